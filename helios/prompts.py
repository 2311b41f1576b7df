"""Recent prompts, as token ids: a capped stream in Redis, written by gateways, read by the profiler.

A prompt is kept for a lifetime and as one of the last so many; the whole stream expires a lifetime after
its last prompt. An entry has the fields `tokenizer_id` and `ids` (a JSON list).
"""

import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

from redis.asyncio import Redis

from helios.redis_schema import PROMPTS

log = logging.getLogger(__name__)

_PAGE = 64

_Entries: TypeAlias = list[tuple[bytes, dict[bytes, bytes]]]


# KEYS: prompts. ARGV: entries kept, their life in milliseconds, then tokenizer id and ids of each new one.
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
    """Token ids, and the SHA-256 of the tokenizer that they are of."""

    tokenizer_id: str
    ids: tuple[int, ...]


async def write(redis: Redis, prompts: Sequence[RecentPrompt], kept: int, lifetime_seconds: float) -> None:
    """Appends prompts and drops those beyond the `kept` last or the lifetime.

    Raises redis.RedisError when Redis cannot be reached.
    """
    entries = [part for prompt in prompts for part in (prompt.tokenizer_id, json.dumps(prompt.ids))]
    await redis.eval(_WRITE, 1, PROMPTS, kept, int(lifetime_seconds * 1000), *entries)


async def recent(redis: Redis, tokenizer_ids: Collection[str], count: int) -> list[RecentPrompt]:
    """The newest prompts of these tokenizers, newest first; fewer than `count` when there are no more.

    Raises redis.RedisError when Redis cannot be reached.
    """
    found: list[RecentPrompt] = []
    before = "+"
    while len(found) < count:
        # Without decode_responses, which is how Helios connects, everything is bytes.
        entries = cast("_Entries", await redis.xrevrange(PROMPTS, max=before, count=_PAGE))
        for _, fields in entries:
            prompt = _parsed(fields)
            if prompt is not None and prompt.tokenizer_id in tokenizer_ids:
                found.append(prompt)
        if len(entries) < _PAGE:
            break
        before = f"({entries[-1][0].decode()}"
    return found[:count]


def _parsed(fields: dict[bytes, bytes]) -> RecentPrompt | None:
    try:
        ids = json.loads(fields[b"ids"])
        if not ids or not all(isinstance(one, int) for one in ids):
            raise ValueError("ids must be a list of whole numbers")
        return RecentPrompt(fields[b"tokenizer_id"].decode(), tuple(ids))
    except (KeyError, TypeError, ValueError) as error:
        log.warning("an entry of %s is no prompt and is ignored: %s", PROMPTS, error)
        return None
