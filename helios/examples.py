"""What routers learn from, in Redis: a capped list of `ModelExample` per model, each as JSON, newest last.

The profiler writes it, the controller reads it.
"""

import logging
from collections.abc import Iterable, Sequence

from pydantic import ValidationError
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from helios.ignored_entries import IgnoredEntries, fault
from helios.redis_schema import EXAMPLES_PREFIX
from helios.routing.example import ModelExample

log = logging.getLogger(__name__)

_ignored = IgnoredEntries(log)


async def append(redis: Redis, model: str, examples: Sequence[ModelExample], keep: int) -> None:
    """Appends a model's examples, and drops all but the last `keep`. Atomic: several may write at once.

    An equal example that is there already moves to the end, so that a prompt that is evaluated again and
    again does not push out others. Raises redis.RedisError when Redis cannot be reached.
    """
    if not examples:
        return
    key, documents = EXAMPLES_PREFIX + model, [example.model_dump_json() for example in examples]
    async with redis.pipeline(transaction=True) as transaction:
        for document in documents:
            transaction.lrem(key, 0, document)
        transaction.rpush(key, *documents)
        transaction.ltrim(key, -keep, -1)
        await transaction.execute()


async def read(redis: Redis, models: Iterable[str]) -> dict[str, list[ModelExample]]:
    """The examples of each of these models, newest last, and one for each prompt: the newest.

    What is not an example of this version is ignored and logged. Raises redis.RedisError when Redis cannot be
    reached.
    """
    return {model: await _read(redis, EXAMPLES_PREFIX + model) for model in models}


async def _read(redis: Redis, key: str) -> list[ModelExample]:
    try:
        documents = await redis.lrange(key, 0, -1)
    except ResponseError as error:
        # It is not a list, or this user may not read it. Other models' examples may still be readable.
        _ignored.note(key, f"it cannot be read: {error}")
        return []
    found: dict[str, ModelExample] = {}
    for document in documents:
        try:
            example = ModelExample.model_validate_json(document)
        except ValidationError as error:
            reason = f"not an example of this version of Helios: {fault(error)}"
            _ignored.note(f"an entry of {key}", reason)
            continue
        # The newest has its own place, not that of the one before it.
        found.pop(example.id, None)
        found[example.id] = example
    return list(found.values())
