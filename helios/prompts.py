"""Recent prompts as token ids, in a capped Redis stream. Gateways write it, the profiler reads it.

A prompt is kept until its lifetime ends or enough newer prompts have come. The whole stream expires one
lifetime after its last prompt. An entry has the fields `tokenizer_id` and `ids` (a JSON list).
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeAlias, cast

from pydantic import Field, TypeAdapter
from redis.asyncio import Redis

from helios.ignored_entries import fault
from helios.redis_schema import PROMPTS

_PAGE = 64

_IDS: TypeAdapter[tuple[int, ...]] = TypeAdapter(Annotated[tuple[int, ...], Field(min_length=1)])
_Entries: TypeAlias = list[tuple[bytes, dict[bytes, bytes]]]


# KEYS: prompts. ARGV: entries kept, their lifetime in milliseconds, then tokenizer id and ids of each new
# one.
_WRITE = """
for first = 3, #ARGV, 2 do
    redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[1], '*', 'tokenizer_id', ARGV[first], 'ids', ARGV[first + 1])
end
-- Redis's clock, which also numbers the entries.
local now = redis.call('TIME')
local oldest = now[1] * 1000 + math.floor(now[2] / 1000) - ARGV[2]
redis.call('XTRIM', KEYS[1], 'MINID', string.format('%.0f', math.max(oldest, 0)))
if #ARGV > 2 then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
"""


@dataclass(frozen=True, slots=True)
class RecentPrompt:
    """A prompt's token ids, and the SHA-256 of their tokenizer."""

    tokenizer_id: str
    ids: tuple[int, ...]


async def write(redis: Redis, prompts: Sequence[RecentPrompt], kept: int, lifetime_seconds: float) -> None:
    """Appends prompts. Drops all but the last `kept` prompts, and those older than the lifetime.

    Raises redis.RedisError when Redis cannot be reached.
    """
    entries = [part for prompt in prompts for part in (prompt.tokenizer_id, json.dumps(prompt.ids))]
    await redis.eval(_WRITE, 1, PROMPTS, kept, int(lifetime_seconds * 1000), *entries)


async def recent(
    redis: Redis, tokenizer_ids: Collection[str], count: int, newest_seconds: float | None = None
) -> tuple[list[RecentPrompt], dict[str, str]]:
    """The newest prompts of these tokenizers, newest first. Fewer than `count` if there are no more.

    newest_seconds: greatest age of a prompt; None: any age. Also returns the ignored entries, by key and
    position, with the reason.

    Raises redis.RedisError when Redis cannot be reached.
    """
    found: list[RecentPrompt] = []
    ignored: dict[str, str] = {}
    before, oldest = "+", "-"
    if newest_seconds is not None:
        # Redis's own clock, which also numbers the entries.
        seconds, microseconds = await redis.time()
        oldest = str(max(0, int(seconds) * 1000 + int(microseconds) // 1000 - int(newest_seconds * 1000)))
    while len(found) < count:
        # Helios connects without decode_responses, so all values are bytes.
        entries = cast("_Entries", await redis.xrevrange(PROMPTS, max=before, min=oldest, count=_PAGE))
        for position, fields in entries:
            try:
                prompt = _parsed(fields)
            except (KeyError, ValueError) as error:
                ignored[f"{PROMPTS} {position.decode()}"] = f"not a prompt: {fault(error)}"
                continue
            if prompt.tokenizer_id in tokenizer_ids:
                found.append(prompt)
        if len(entries) < _PAGE:
            break
        before = f"({entries[-1][0].decode()}"
    return found[:count], ignored


def _parsed(fields: dict[bytes, bytes]) -> RecentPrompt:
    """Raises KeyError, ValueError."""
    return RecentPrompt(fields[b"tokenizer_id"].decode(), _IDS.validate_json(fields[b"ids"], strict=True))
