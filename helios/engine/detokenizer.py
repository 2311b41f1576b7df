"""Text from token ids, as they come: never half a character, never part of a stop string."""

from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer, decoders
from tokenizers.decoders import DecodeStream

_HALF_CHARACTER = "\ufffd"


def token_texts(tokenizer: Tokenizer) -> dict[int, str]:
    """The texts of tokens that have the same one wherever they stand; none where a tokenizer has no such.

    Byte-level tokens (Radford et al. 2019) are bytes whatever is before them. Left out are those that are no
    whole characters, and those without any text.
    """
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        return {}
    ids = sorted(tokenizer.get_vocab().values())
    texts = tokenizer.decode_batch([[token_id] for token_id in ids], skip_special_tokens=True)
    found = zip(ids, texts, strict=True)
    return {token_id: text for token_id, text in found if text and _HALF_CHARACTER not in text}


class Detokenizer:
    """Incremental text of one sequence.

    What has been emitted after n tokens depends on these n ids alone, so a sequence resumed elsewhere
    from its ids goes on with the same text.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: tuple[str, ...], texts: Mapping[int, str] | None = None
    ) -> None:
        """texts: `token_texts` of this tokenizer, which spare most of the decoding."""
        self._tokenizer = tokenizer
        self._texts = texts or {}
        # Of the tokens since the last one that `texts` had; of all where it has none.
        self._stream: DecodeStream | None = None
        self._stop = stop
        self._ids: list[int] = []
        self._decoded = ""
        self._emitted = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """All text emitted so far."""
        return self._decoded[: self._emitted]

    def push(self, token_id: int) -> str:
        """Takes the next id and returns the text it completes. Sets `stopped` at a stop string."""
        self._ids.append(token_id)
        new = self._texts.get(token_id) if self._stream is None else None
        if new is None:
            new = self._decode(token_id)
        return self._emit(new, last=False) if new else ""

    def push_all(self, ids: Sequence[int]) -> list[str]:
        """As `push`, one after the other, up to that which completes a stop string."""
        if not self._stop and self._stream is None:
            known = self._texts.get
            texts = [text for token_id in ids if (text := known(token_id)) is not None]
            if len(texts) == len(ids):
                # Nothing is ever held back. Of all at once: once a token, all that `push` looks at is felt.
                self._ids += ids
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
        """Text that an id completes, by the tokenizer itself."""
        if self._stream is None:
            self._stream = DecodeStream(skip_special_tokens=True)
        new = self._stream.step(self._tokenizer, token_id)
        if new is None:
            return ""
        if self._texts:
            # All characters are whole: the next token may stand at the beginning as well.
            self._stream = None
        return new

    def flush(self) -> str:
        """The text still held back, when no more tokens will come."""
        if self.stopped:
            return ""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return self._emit(whole[len(self._decoded) :], last=True)

    def _emit(self, new: str, *, last: bool) -> str:
        start = self._emitted
        self._decoded += new
        end = len(self._decoded)
        if self._stop:
            # A stop string can begin only in text that was held back, so the search starts there.
            hits = [at for at in (self._decoded.find(stop, start) for stop in self._stop) if at >= 0]
            if hits:
                self.stopped = True
                end = min(hits)
            elif not last:
                end -= self._held_back(start)
        self._emitted = end
        return self._decoded[start:end]

    def _held_back(self, start: int) -> int:
        """Length of the longest end of the text that could grow into a stop string."""
        longest = max(len(stop) for stop in self._stop) - 1
        pending = self._decoded[max(start, len(self._decoded) - longest) :]
        for at in range(len(pending)):
            if any(stop.startswith(pending[at:]) for stop in self._stop):
                return len(pending) - at
        return 0
