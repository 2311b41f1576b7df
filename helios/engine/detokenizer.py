"""Text from token ids, as they come: never half a character, never part of a stop string."""

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Incremental text of one sequence.

    What has been emitted after n tokens depends on these n ids alone, so a sequence resumed elsewhere
    from its ids goes on with the same text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
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
        new = self._stream.step(self._tokenizer, token_id)
        if new is None:
            return ""
        if not self._stop:
            # Nothing is ever held back. Once a token: a call more would be felt.
            self._decoded += new
            self._emitted = len(self._decoded)
            return new
        return self._emit(new, last=False)

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
