"""Turns a request into the token ids that workers compute, and the models that can continue them."""

import dataclasses
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import grpc

from helios.errors import InvalidRequestError, UnavailableError
from helios.sampling import SamplingParams
from helios.v1 import inference_pb2
from services.gateway.chat_templates import ChatTemplates, ServedTemplate
from services.gateway.router import Needs
from services.gateway.settings import GatewaySettings
from services.gateway.tokenizer_cache import PromptTokenizer, TokenizerCache
from services.gateway.validation import check_prompt_bytes, check_prompt_ids, prompt_limit
from services.gateway.worker_pool import Worker, WorkerPool


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, the models that may continue them (empty: any), and the context into which they must fit.

    dropped_messages: the oldest messages that were left out.
    """

    ids: list[int]
    models: frozenset[str]
    tokenizer_id: str
    context_tokens: int
    dropped_messages: int

    def fitted(self, sampling: SamplingParams) -> SamplingParams:
        """The parameters with max_tokens cut to the remaining context."""
        room = self.context_tokens - len(self.ids)
        return dataclasses.replace(sampling, max_tokens=min(sampling.max_tokens, room))

    def needs(self, sampling: SamplingParams) -> Needs:
        """The requirements for a worker that takes this prompt with these (fitted) parameters."""
        return Needs(self.models, self.tokenizer_id, len(self.ids) + sampling.max_tokens)


async def read_prompt(
    request: inference_pb2.GenerateRequest,
    max_tokens: int,
    pool: WorkerPool,
    tokenizers: TokenizerCache,
    templates: ChatTemplates,
    settings: GatewaySettings,
) -> Prompt:
    """The request's prompt as ids that fit a served model. max_tokens: what the request asks for.

    Waits for a worker if there is none. Raises InvalidRequestError when the prompt is too long or not in the
    model's vocabulary, the errors of ChatRenderer for messages, and the errors of WorkerPool.wait_for.
    """
    named = frozenset({request.model}) if request.model else frozenset[str]()

    def longest_context(worker: Worker, models: frozenset[str]) -> int:
        return pool.context_tokens(Needs(models, worker.model.tokenizer_id)) or worker.model.context_tokens

    match request.WhichOneof("prompt"):
        case "messages":
            chat = await _chat(named, pool, tokenizers, templates, settings)
            worker, tokenizer, models = chat.worker, chat.tokenizer, chat.models
            context = longest_context(worker, models)
            # A long answer must not push the whole conversation out.
            goal = min(settings.max_prompt_tokens, context - min(max_tokens, context // 2))
            limit = prompt_limit(context, settings)
            ids, dropped = await _chat_ids(request.messages, chat, limit, min(goal, limit))
        case "text":
            worker, tokenizer = await _fetched(Needs(named), pool, settings, "tokenizer", tokenizers.of)
            models, context = named, longest_context(worker, named)
            size = len(request.text.encode())
            check_prompt_bytes(size, tokenizer.longest_token_bytes, prompt_limit(context, settings))
            ids, dropped = await tokenizer.encode(request.text), 0
        case _:
            worker = await pool.wait_for(Needs(named))
            models, context = named, longest_context(worker, named)
            ids, dropped = list(request.token_ids.ids), 0
    check_prompt_ids(ids, worker.model.vocab_size, context, settings)
    return Prompt(ids, models, worker.model.tokenizer_id, context, dropped)


@dataclass(frozen=True, slots=True)
class _Chat:
    """What turns a conversation into ids, and the models that have this template (empty: all do)."""

    worker: Worker
    tokenizer: PromptTokenizer
    template: ServedTemplate
    models: frozenset[str]


async def _chat(
    named: frozenset[str],
    pool: WorkerPool,
    tokenizers: TokenizerCache,
    templates: ChatTemplates,
    settings: GatewaySettings,
) -> _Chat:
    """The template of the named model, or else of the first served model that has one.

    Only models with this template may then serve the request, because others do not understand the prompt.
    """

    async def fetch(worker: Worker) -> _Chat:
        plans = (plan.model for plan in worker.plans if not named or plan.model in named)
        model = next((model for model in plans if model in worker.chat_template_ids), None)
        if model is None:
            raise InvalidRequestError(
                f"{' or '.join(sorted(named)) or worker.plans[0].model} has no chat template; send text "
                "instead of messages"
            )
        template_id = worker.chat_template_ids[model]
        alike = pool.chat_models(template_id)
        models = named or (frozenset() if alike >= pool.served_models() else alike)
        tokenizer, template = await tokenizers.of(worker), await templates.of(worker, model)
        return _Chat(worker, tokenizer, template, models)

    # Without a worker, the models are not known yet.
    await pool.wait_for(Needs(named))
    needs = Needs(named or pool.chat_models())
    _, chat = await _fetched(needs, pool, settings, "tokenizer and chat template", fetch)
    return chat


async def _chat_ids(
    conversation: inference_pb2.ChatMessages, chat: _Chat, limit: int, goal: int
) -> tuple[list[int], int]:
    """The ids of a conversation, and the number of messages left out so that it fits.

    limit: the most ids that a prompt may have. goal: the most that it should have. If the request allows it,
    the oldest turns are left out to reach the goal, but never the last turn.
    """
    messages = [{"role": one.role, "content": one.content} for one in conversation.messages]
    tokenizer = chat.tokenizer
    head = next((at for at, one in enumerate(messages) if one["role"] != "system"), len(messages))
    # Where the kept messages after the head may begin. The first turn goes up to the second user's message.
    starts = [head, *[at for at, one in enumerate(messages) if one["role"] == "user"][1:]]

    async def text_from(start: int) -> str:
        return await chat.template.render(messages[:head] + messages[start:])

    async def fits(start: int) -> bool:
        text = await text_from(start)
        if len(text.encode()) > goal * tokenizer.longest_token_bytes:
            return False
        return len(await tokenizer.encode(text, add_special_tokens=False)) <= goal

    # Bisects for the first turn from which the conversation fits.
    low, high = 0, len(starts) - 1 if conversation.drop_oldest_turns else 0
    while low < high:
        middle = (low + high) // 2
        if await fits(starts[middle]):
            high = middle
        else:
            low = middle + 1
    text = await text_from(starts[low])
    check_prompt_bytes(len(text.encode()), tokenizer.longest_token_bytes, limit)
    ids = await tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise InvalidRequestError("the model's chat template makes an empty prompt of these messages")
    return ids, starts[low] - head


_Fetched = TypeVar("_Fetched")


async def _fetched(
    needs: Needs,
    pool: WorkerPool,
    settings: GatewaySettings,
    what: str,
    fetch: Callable[[Worker], Awaitable[_Fetched]],
) -> tuple[Worker, _Fetched]:
    """A worker for the prompt, and what is fetched from it. Skips workers that cannot return it."""
    reason = ""
    for _ in range(settings.max_resumes + 1):
        worker = await pool.wait_for(needs)
        try:
            return worker, await fetch(worker)
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}, {error.details()}"
            pool.suspect(worker, f"it did not give its {what}: {reason}")
    raise UnavailableError(f"no worker gave its {what}, the last said: {reason}")
