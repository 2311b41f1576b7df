"""Caches the chat templates of served models, each with the process that renders it."""

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from helios.chat_template import ChatRenderer, ChatTemplate
from helios.v1 import worker_pb2
from services.gateway.worker_pool import Worker

# Each template in the cache has a process of about 20 MB.
_MOST_TEMPLATES = 8


class ServedTemplate:
    """A model's chat template. It has its own thread and process, so a slow one delays no other."""

    def __init__(self, model: str, template: ChatTemplate) -> None:
        self._renderer = ChatRenderer(model, template)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="chat-template")

    async def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt for the assistant's next message. Raises as ChatRenderer does."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._renderer.render, messages)

    def close(self) -> None:
        """Ends the renderer."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._renderer.close()


class ChatTemplates:
    """Templates by model and id. Each is fetched once from a worker."""

    def __init__(self, fetch_seconds: float) -> None:
        self._fetch_seconds = fetch_seconds
        # The least recently used first.
        self._templates: OrderedDict[tuple[str, str], ServedTemplate] = OrderedDict()
        self._fetching = asyncio.Lock()

    async def of(self, worker: Worker, model: str) -> ServedTemplate:
        """The template of a model of a worker that has one.

        Raises grpc.aio.AioRpcError when it cannot be fetched.
        """
        async with self._fetching:
            key = (model, worker.chat_template_ids[model])
            if key not in self._templates:
                return await self._fetch(worker, model)
            self._templates.move_to_end(key)
            return self._templates[key]

    def close(self) -> None:
        """Ends all renderers."""
        for template in self._templates.values():
            template.close()

    async def _fetch(self, worker: Worker, model: str) -> ServedTemplate:
        request = worker_pb2.GetChatTemplateRequest(model=model)
        response = await worker.stub.GetChatTemplate(request, timeout=self._fetch_seconds)
        template = ChatTemplate(response.template, dict(response.special_tokens), response.source)
        fetched = self._templates[model, response.chat_template_id] = ServedTemplate(model, template)
        if len(self._templates) > _MOST_TEMPLATES:
            _, oldest = self._templates.popitem(last=False)
            oldest.close()
        return fetched
