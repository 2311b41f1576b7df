"""Samples prompts for the profiler, outside the data path. A stream never waits for it or for Redis."""

import asyncio
import contextlib
import logging
import math
import random
import time
from collections import deque
from collections.abc import Sequence

from helios import prompts, redis_client
from helios.prompts import RecentPrompt
from helios.redis_outage import RedisOutage, probe
from services.gateway.settings import GatewaySettings

log = logging.getLogger(__name__)

# Seconds between two writes. If more prompts than `prompts_per_second` come, they push older ones out of the
# queue.
_WRITE_SECONDS = 0.1
# Seconds between two writes while no prompt comes.
_IDLE_SECONDS = 1.0


class PromptSampler:
    """A bounded queue and a task that writes it to Redis. Prompts are lost while Redis is down."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._queue: deque[RecentPrompt] = deque(
            maxlen=math.ceil(settings.prompts_per_second * _WRITE_SECONDS)
        )
        self._task: asyncio.Task[None] | None = None
        self._outage = RedisOutage(
            log, "prompts cannot be sampled for the profiler", "prompts are sampled again"
        )

    def start(self) -> None:
        """Starts to write, if there is a Redis and prompts are to be sampled."""
        if self._settings.redis_url and self._settings.prompt_share > 0:
            self._task = asyncio.create_task(self._write(self._settings.redis_url))

    async def close(self) -> None:
        """Stops writing. Prompts that have not been written are lost."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def problems(self) -> list[str]:
        """Messages about what Redis refuses. The worker pool reports when Redis cannot be reached."""
        return [self._outage.refusal] if self._outage.refusal else []

    def offer(self, tokenizer_id: str, ids: Sequence[int]) -> None:
        """Samples the prompt with probability `prompt_share`. Returns at once."""
        if self._task is not None and random.random() < self._settings.prompt_share:
            self._queue.append(RecentPrompt(tokenizer_id, tuple(ids)))

    async def _write(self, redis_url: str) -> None:
        settings = self._settings
        async with redis_client.connect(redis_url, settings.worker_timeout_seconds) as redis:
            idle_until = 0.0
            while True:
                await asyncio.sleep(_WRITE_SECONDS)
                taken = list(self._queue)
                self._queue.clear()
                # Also writes from time to time without new prompts, to delete expired ones.
                if not taken and time.monotonic() < idle_until:
                    continue
                idle_until = time.monotonic() + _IDLE_SECONDS
                with self._outage.bridged():
                    if self._outage.ongoing:
                        # A full Redis still deletes, so only a probe shows whether it accepts writes again.
                        await probe(redis)
                    await prompts.write(redis, taken, settings.prompts_kept, settings.prompt_lifetime_seconds)
