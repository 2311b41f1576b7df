"""Finds the plan that a worker starts with: the one in force, the last one served, or that of its flags."""

import asyncio
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from redis.exceptions import RedisError

from helios import history, orders, redis_client
from helios.served import ServedPlan

log = logging.getLogger(__name__)

# Time limit for Redis: a worker that cannot reach it starts this much later.
_REDIS_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class FirstPlan:
    """A plan that replaces the flags' plan, the confidence threshold to load it with, and the reason."""

    plan: ServedPlan
    threshold: float | None
    why: str


class _Kept(BaseModel):
    """The contents of a plan file: the plan served last, and the plan of the flags of that worker."""

    model_config = ConfigDict(frozen=True)

    plan: ServedPlan
    threshold: float | None
    flags: ServedPlan


class PlanFile:
    """The file in which a worker stores its plan for the process that replaces it. No path: no file."""

    def __init__(self, path: Path | None, flags: ServedPlan) -> None:
        """flags: the plan of this process's flags. A plan stored under other flags is ignored."""
        self._path = path
        self._flags = flags

    def read(self) -> FirstPlan | None:
        """The plan that was stored under the same flags, or None."""
        if self._path is None:
            return None
        try:
            kept = _Kept.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            log.warning("the plan in %s cannot be read, it is not gone on with: %s", self._path, error)
            return None
        if kept.flags != self._flags:
            return None
        return FirstPlan(kept.plan, kept.threshold, "was served before the restart")

    def write(self, plan: ServedPlan, threshold: float | None) -> None:
        """Stores a plan. If the file cannot be written, that is logged and serving continues."""
        if self._path is None:
            return
        kept = _Kept(plan=plan, threshold=threshold, flags=self._flags)
        draft = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            draft.write_text(kept.model_dump_json())
            draft.replace(self._path)
        except OSError as error:
            log.warning("the plan cannot be kept in %s: %s", self._path, error)


async def find(redis_url: str | None, worker_id: str, plan_file: PlanFile) -> FirstPlan | None:
    """The plan that this worker must serve first. None: the plan of its flags.

    Never raises, and takes at most a few seconds. Faults of Redis or of the file are logged.
    """
    ordered = None if redis_url is None else await _ordered(redis_url, worker_id)
    return ordered or plan_file.read()


async def _ordered(redis_url: str, worker_id: str) -> FirstPlan | None:
    try:
        async with asyncio.timeout(_REDIS_SECONDS), redis_client.connect(redis_url) as redis:
            plan = (await orders.read(redis)).wanted(worker_id)
            if plan is None:
                return None
            # The controller sends the same threshold with a reload.
            profile = await history.find(redis, plan.model)
            found = None if profile is None else profile.find_exit(plan.depth)
            return FirstPlan(plan, None if found is None else found.threshold, "is in force")
    except (RedisError, OSError, ValidationError) as error:  # TimeoutError is an OSError.
        reason = str(error) or f"no answer in {_REDIS_SECONDS:g} s"
        log.warning("the plan in force cannot be read from Redis: %s", reason)
        return None
