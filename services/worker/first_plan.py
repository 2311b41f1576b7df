"""Finds the plans that a worker starts with: those in force, the last ones served, or that of its flags."""

import asyncio
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from redis.exceptions import RedisError

from helios import history, orders, redis_client
from helios.engine.interface import PlanToLoad
from helios.served import ServedPlan

log = logging.getLogger(__name__)

# Time limit for Redis: a worker that cannot reach it starts this much later.
_REDIS_SECONDS = 2.0


class LoadedPlan(BaseModel):
    """A plan, and what it was loaded with: its confidence threshold and its share (`PlanToLoad`)."""

    model_config = ConfigDict(frozen=True)

    plan: ServedPlan
    threshold: float | None
    share: float = 1.0

    def to_load(self, path: Path) -> PlanToLoad:
        """What the engine is given, with the checkpoint in `path`."""
        return PlanToLoad(path, self.plan.depth, self.threshold, self.share)


@dataclass(frozen=True, slots=True)
class FirstPlan:
    """A plan that replaces the flags' plan, the confidence threshold to load it with, and the reason.

    `also` are the plans to serve beside it.
    """

    plan: ServedPlan
    threshold: float | None
    why: str
    also: tuple[LoadedPlan, ...] = ()


class _Kept(BaseModel):
    """The contents of a plan file: the plans served last, and the plan of the flags of that worker."""

    model_config = ConfigDict(frozen=True)

    plan: ServedPlan
    threshold: float | None
    flags: ServedPlan
    also: tuple[LoadedPlan, ...] = ()


class PlanFile:
    """The file in which a worker stores its plans for the process that replaces it. No path: no file."""

    def __init__(self, path: Path | None, flags: ServedPlan) -> None:
        """flags: the plan of this process's flags. Plans stored under other flags are ignored."""
        self._path = path
        self._flags = flags

    def read(self) -> FirstPlan | None:
        """The plans that were stored under the same flags, or None."""
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
        return FirstPlan(kept.plan, kept.threshold, "was served before the restart", kept.also)

    def write(self, plan: ServedPlan, threshold: float | None, also: tuple[LoadedPlan, ...] = ()) -> None:
        """Stores the plans in force. If the file cannot be written, that is logged and serving continues."""
        if self._path is None:
            return
        kept = _Kept(plan=plan, threshold=threshold, flags=self._flags, also=also)
        draft = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            draft.write_text(kept.model_dump_json())
            draft.replace(self._path)
        except OSError as error:
            log.warning("the plan cannot be kept in %s: %s", self._path, error)


async def find(redis_url: str | None, worker_id: str, plan_file: PlanFile) -> FirstPlan | None:
    """The plans that this worker must serve first. None: the plan of its flags.

    Never raises, and takes at most a few seconds. Faults of Redis or of the file are logged.
    """
    kept = plan_file.read()
    ordered = None if redis_url is None else await _ordered(redis_url, worker_id)
    return ordered or kept


async def _ordered(redis_url: str, worker_id: str) -> FirstPlan | None:
    try:
        async with asyncio.timeout(_REDIS_SECONDS), redis_client.connect(redis_url) as redis:
            in_force = await orders.read(redis)
            plans = in_force.wanted_plans(worker_id)
            if not plans:
                return None
            # The controller sends the same thresholds with a reload.
            profiles = {name: await history.find(redis, name) for name in {plan.model for plan in plans}}
            first, *also = [
                LoadedPlan(
                    plan=plan,
                    threshold=one.threshold
                    if (profile := profiles[plan.model]) and (one := profile.find_exit(plan.depth))
                    else None,
                )
                for plan in plans
            ]
            return FirstPlan(first.plan, first.threshold, "is in force", tuple(also))
    except (RedisError, OSError, ValidationError) as error:  # TimeoutError is an OSError.
        reason = str(error) or f"no answer in {_REDIS_SECONDS:g} s"
        log.warning("the plan in force cannot be read from Redis: %s", reason)
        return None
