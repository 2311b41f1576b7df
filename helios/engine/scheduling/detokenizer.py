"""Turns token ids into text as they come. It never emits half a character or a part of a stop string.

All deltas together equal the text of all ids decoded at once, for any ids. So text that a later token may
change is held back: half a character, and the bytes of a byte-fallback vocabulary (`<0x41>`). The tokenizer
decodes a run of such bytes as a whole, and one broken byte turns the whole run into replacement characters.
"""

import re
from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer, decoders

# Stands for half a character, and for each byte that is not part of a character.
_REPLACEMENT = "\ufffd"
# The form that `decoders.ByteFallback` recognises.
_FALLBACK_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
# Half a character has at most three bytes, so it spans at most three byte-level tokens.
_HALF_TOKENS = 3


def token_texts(tokenizer: Tokenizer) -> dict[int, str]:
    """Texts of the tokens whose text never depends on other tokens. Empty if the tokenizer has none.

    Byte-level tokens (Radford et al. 2019) are the same bytes after any token. Tokens that are not whole
    characters, and tokens without text, are left out.
    """
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        return {}
    ids = sorted(tokenizer.get_vocab().values())
    texts = tokenizer.decode_batch([[token_id] for token_id in ids], skip_special_tokens=True)
    found = zip(ids, texts, strict=True)
    return {token_id: text for token_id, text in found if text and _REPLACEMENT not in text}


class Detokenizer:
    """Incremental text of one sequence.

    The text emitted after n tokens depends only on these n ids, so a sequence that is resumed elsewhere from
    its ids continues with the same text.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: tuple[str, ...], texts: Mapping[int, str] | None = None
    ) -> None:
        """texts: `token_texts` of this tokenizer. They avoid most of the decoding."""
        self._tokenizer = tokenizer
        self._texts = texts or {}
        # Tokens whose text is not final. If a token's text depends on its place, one more token precedes
        # them.
        self._window: list[int] = []
        # Number of final characters in the window's text.
        self._final = 0
        self._stop = stop
        self._decoded = ""
        self._emitted = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """All text emitted so far."""
        return self._decoded[: self._emitted]

    def push(self, token_id: int) -> str:
        """Takes the next id and returns the text that it completes. Sets `stopped` at a stop string."""
        new = None if self._window else self._texts.get(token_id)
        if new is None:
            new = self._decode(token_id)
        return self._emit(new, last=False) if new else ""

    def push_all(self, ids: Sequence[int]) -> list[str]:
        """Calls `push` for each id in order, up to the one that completes a stop string."""
        if not self._stop and not self._window:
            known = self._texts.get
            texts = [text for token_id in ids if (text := known(token_id)) is not None]
            if len(texts) == len(ids):
                # Nothing is held back, so all texts are appended at once: checking each token as `push` does
                # takes noticeable time.
                self._decoded += "".join(texts)
                self._emitted = len(self._decoded)
                return texts
        found = []
        for token_id in ids:
            found.append(self.push(token_id))
            if self.stopped:
                break
        return found

    def _decode(self, token_id: int) -> str:
        """The text that an id makes final, decoded by the tokenizer."""
        window, decode = self._window, self._tokenizer.decode
        alone = decode([token_id])
        # Decoding skips special tokens and ids outside the vocabulary, so the tokens around them join.
        if self._texts:
            if not alone:
                return ""
        elif (token := self._tokenizer.id_to_token(token_id)) is None:
            return ""
        elif _FALLBACK_BYTE.fullmatch(token):
            window.append(token_id)
            return ""
        elif not alone and decode([token_id], skip_special_tokens=False):
            return ""
        window.append(token_id)
        text = decode(window) if len(window) > 1 else alone
        # Among broken bytes, only those at the end may still become a character.
        end = len(text) - text.endswith(_REPLACEMENT)
        new, self._final = text[self._final : end], end
        if self._texts:
            if end == len(text):
                # All characters are complete, so the next token needs nothing before it.
                self._window, self._final = [], 0
            elif len(window) > _HALF_TOKENS:
                self._window = window[-_HALF_TOKENS:]
                self._final = len(decode(self._window)) - 1
        elif alone and end == len(text):
            # After a token with its own text, later texts depend on nothing before that token.
            self._window, self._final = [token_id], len(alone)
        return new

    def flush(self) -> str:
        """The text still held back, once there are no more tokens."""
        if self.stopped:
            return ""
        text = self._tokenizer.decode(self._window)
        new, self._final = text[self._final :], len(text)
        return self._emit(new, last=True)

    def _emit(self, new: str, *, last: bool) -> str:
        start = self._emitted
        self._decoded += new
        end = len(self._decoded)
        if self._stop:
            # A stop string can only begin in text that was held back, so the search starts there.
            hits = [at for at in (self._decoded.find(stop, start) for stop in self._stop) if at >= 0]
            if hits:
                self.stopped = True
                end = min(hits)
            elif not last:
                end -= self._held_back(start)
        self._emitted = end
        return self._decoded[start:end]

    def _held_back(self, start: int) -> int:
        """Length of the longest suffix of the text that could grow into a stop string."""
        longest = max(len(stop) for stop in self._stop) - 1
        pending = self._decoded[max(start, len(self._decoded) - longest) :]
        for at in range(len(pending)):
            if any(stop.startswith(pending[at:]) for stop in self._stop):
                return len(pending) - at
        return 0
