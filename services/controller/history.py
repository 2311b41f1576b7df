"""The performance history as far as decisions can rest on it."""

from dataclasses import dataclass, field

from redis.asyncio import Redis

from helios import history
from helios.history import ModelProfile
from helios.ignored_entries import IgnoredEntries


@dataclass(frozen=True, slots=True)
class History:
    """Profiles by model, and what was found but cannot be used, in words."""

    profiles: dict[str, ModelProfile] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def times(self) -> dict[str, float]:
        """When each model was profiled, seconds since the Unix epoch."""
        return {model: profile.time for model, profile in self.profiles.items()}


async def read_history(redis: Redis, loadable: frozenset[str], ignored: IgnoredEntries) -> History:
    """The profiles of models that workers can load. Raises redis.RedisError."""
    profiles, left_out = await history.read(redis)
    ignored.update(left_out)
    problems = ignored.problems()
    problems += [
        f"the profile of {model} is ignored: no worker can load it"
        for model in profiles
        if loadable and model not in loadable
    ]
    usable = {model: profile for model, profile in profiles.items() if model in loadable}
    return History(usable, tuple(problems))
