"""Caches the tokenizers of served models. Each is fetched once from a worker."""

import asyncio
from dataclasses import dataclass

from tokenizers import Tokenizer

from helios.v1 import worker_pb2
from services.gateway.worker_pool import Worker

# Longer texts are tokenized in a thread. A text of this length takes about a millisecond.
_INLINE_CHARACTERS = 2048


@dataclass(frozen=True, slots=True)
class PromptTokenizer:
    """A tokenizer, its id, and the length of its longest token in UTF-8 bytes."""

    tokenizer_id: str
    tokenizer: Tokenizer
    longest_token_bytes: int

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The text's ids, by default with the start token that the model expects (OPT: `</s>`)."""
        if len(text) <= _INLINE_CHARACTERS:
            return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        encoding = await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)
        return list(encoding.ids)


class TokenizerCache:
    """Tokenizers by id (the SHA-256 of their JSON)."""

    def __init__(self, fetch_seconds: float) -> None:
        self._fetch_seconds = fetch_seconds
        self._tokenizers: dict[str, PromptTokenizer] = {}
        self._fetching = asyncio.Lock()

    async def of(self, worker: Worker) -> PromptTokenizer:
        """The tokenizer of the worker's model. Raises grpc.aio.AioRpcError when it cannot be fetched."""
        tokenizer_id = worker.model.tokenizer_id
        if tokenizer_id in self._tokenizers:
            return self._tokenizers[tokenizer_id]
        async with self._fetching:
            if tokenizer_id in self._tokenizers:
                return self._tokenizers[tokenizer_id]
            request = worker_pb2.GetTokenizerRequest()
            response = await worker.stub.GetTokenizer(request, timeout=self._fetch_seconds)
            tokenizer = await asyncio.to_thread(Tokenizer.from_str, response.tokenizer_json.decode())
            # A prompt must never be silently truncated or padded, whatever the checkpoint's file says.
            tokenizer.no_truncation()
            tokenizer.no_padding()
            longest = max(len(token.encode()) for token in tokenizer.get_vocab())
            fetched = PromptTokenizer(response.tokenizer_id, tokenizer, longest)
            self._tokenizers[fetched.tokenizer_id] = fetched
            return fetched
