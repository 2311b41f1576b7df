"""Text from token ids, as they come: never half a character, never part of a stop string."""

from tokenizers import Tokenizer, decoders
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Incremental text of one sequence.

    What has been emitted after n tokens depends on these n ids alone, so a sequence resumed elsewhere
    from its ids goes on with the same text.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: tuple[str, ...], texts: dict[int, str] | None = None
    ) -> None:
        """texts: of the tokens of this tokenizer that were met, kept for all its sequences."""
        self._tokenizer = tokenizer
        # Byte-level tokens (Radford et al. 2019) are bytes whatever is before them: a text may begin at any.
        self._is_byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._texts = {} if texts is None else texts
        # Of the tokens from the last whole character on, or of all.
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
        if not self._stop:
            # Nothing is ever held back. Once a token: a call more would be felt.
            self._decoded += new
            self._emitted = len(self._decoded)
            return new
        return self._emit(new, last=False) if new else ""

    def _decode(self, token_id: int) -> str:
        """Text that an id completes, by the tokenizer itself."""
        is_first = self._stream is None
        if self._stream is None:
            self._stream = DecodeStream(skip_special_tokens=True)
        new = self._stream.step(self._tokenizer, token_id)
        if new is None:
            return ""
        if self._is_byte_level:
            self._stream = None
            if is_first:
                self._texts[token_id] = new
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
