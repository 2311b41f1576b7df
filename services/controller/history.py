"""The performance history, limited to the profiles that decisions can use."""

import logging
from collections.abc import Iterable, Mapping

from redis.asyncio import Redis

from helios import history
from helios.history import ModelProfile
from helios.ignored_entries import IgnoredEntries
from helios.served import ServedPlan
from services.controller.fleet import Fleet
from services.controller.situation import Bar

log = logging.getLogger(__name__)


class History:
    """The profiles of all models that workers can load, as of the last read."""

    def __init__(self, redis: Redis, fleet: Fleet) -> None:
        self._redis = redis
        self._fleet = fleet
        self._ignored = IgnoredEntries(log)
        self.profiles: Mapping[str, ModelProfile] = {}
        # Messages about profiles that cannot be used, and about faults of those that are used.
        self.problems: list[str] = []

    @property
    def times(self) -> dict[str, float]:
        """When each model was profiled, in seconds since the Unix epoch."""
        return {model: profile.time for model, profile in self.profiles.items()}

    async def read(self) -> None:
        """Reads all profiles again. Raises redis.RedisError when Redis cannot be reached."""
        profiles, left_out = await history.read(self._redis)
        self._ignored.update(left_out)
        loadable = self._fleet.loadable
        self.profiles = {model: profile for model, profile in profiles.items() if model in loadable}
        self.problems = [
            *self._ignored.problems(),
            *(
                f"the profile of {model} is ignored: no worker can load it"
                for model in profiles
                if loadable and model not in loadable
            ),
            *self._mistimed(),
        ]

    def thresholds(self, plans: Iterable[ServedPlan]) -> dict[ServedPlan, float]:
        """The confidence to which each plan's exit was calibrated on recent requests, if it was profiled."""
        return {
            plan: found.threshold
            for plan in plans
            if (profile := self.profiles.get(plan.model)) and (found := profile.find_exit(plan.depth))
        }

    def upholds(self, bar: Bar) -> bool:
        """Whether the bar still holds: its model has not been profiled since."""
        profile = self.profiles.get(bar.model)
        return profile is None or profile.time <= bar.time

    def _mistimed(self) -> list[str]:
        """Messages about speeds that were measured with another number of threads than a worker has."""
        facts = [profile.provenance for profile in self.profiles.values()]
        timed = {one["threads"] for one in facts if "threads" in one}
        for worker in self._fleet.serving:
            others = sorted(threads for threads in timed if threads != str(worker.threads))
            if others:
                return [
                    f"speeds were measured with {', '.join(others)} CPU thread(s), {worker.worker_id} has "
                    f"{worker.threads}; start the profiler with --timing-threads {worker.threads}"
                ]
        return []
