"""Turns a request into the token ids that workers compute, and the models that can continue them."""

import dataclasses
from dataclasses import dataclass

import grpc

from helios.errors import UnavailableError
from helios.sampling import SamplingParams
from helios.v1 import inference_pb2
from services.gateway.router import Needs
from services.gateway.settings import GatewaySettings
from services.gateway.tokenizer_cache import PromptTokenizer, TokenizerCache
from services.gateway.validation import check_prompt_bytes, check_prompt_ids, prompt_limit
from services.gateway.worker_pool import Worker, WorkerPool


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, the models that may continue them (empty: any), and the context into which they must fit."""

    ids: list[int]
    models: frozenset[str]
    tokenizer_id: str
    context_tokens: int

    def fitted(self, sampling: SamplingParams) -> SamplingParams:
        """The parameters with max_tokens cut to the remaining context."""
        room = self.context_tokens - len(self.ids)
        return dataclasses.replace(sampling, max_tokens=min(sampling.max_tokens, room))

    def needs(self, sampling: SamplingParams) -> Needs:
        """The requirements for a worker that takes this prompt with these (fitted) parameters."""
        return Needs(self.models, self.tokenizer_id, len(self.ids) + sampling.max_tokens)


async def read_prompt(
    request: inference_pb2.GenerateRequest,
    pool: WorkerPool,
    tokenizers: TokenizerCache,
    settings: GatewaySettings,
) -> Prompt:
    """The request's prompt as ids that fit a served model.

    Waits for a worker if there is none. Raises InvalidRequestError when the prompt is too long or not in the
    model's vocabulary, and the errors of WorkerPool.wait_for.
    """
    models = frozenset({request.model}) if request.model else frozenset[str]()
    worker, tokenizer = await _worker_and_tokenizer(Needs(models), request, pool, tokenizers, settings)
    tokenizer_id = tokenizer.tokenizer_id if tokenizer is not None else worker.model.tokenizer_id
    context_tokens = pool.context_tokens(Needs(models, tokenizer_id)) or worker.model.context_tokens
    if tokenizer is not None:
        size = len(request.text.encode())
        check_prompt_bytes(size, tokenizer.longest_token_bytes, prompt_limit(context_tokens, settings))
        ids = await tokenizer.encode(request.text)
    else:
        ids = list(request.token_ids.ids)
    check_prompt_ids(ids, worker.model.vocab_size, context_tokens, settings)
    return Prompt(ids, models, tokenizer_id, context_tokens)


async def _worker_and_tokenizer(
    needs: Needs,
    request: inference_pb2.GenerateRequest,
    pool: WorkerPool,
    tokenizers: TokenizerCache,
    settings: GatewaySettings,
) -> tuple[Worker, PromptTokenizer | None]:
    """A worker for the prompt and, for a text, its tokenizer. Skips workers that cannot return theirs."""
    reason = ""
    for _ in range(settings.max_resumes + 1):
        worker = await pool.wait_for(needs)
        if request.WhichOneof("prompt") != "text":
            return worker, None
        try:
            return worker, await tokenizers.of(worker)
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}, {error.details()}"
            pool.suspect(worker, f"it did not give its tokenizer: {reason}")
    raise UnavailableError(f"no worker gave its tokenizer, the last said: {reason}")
