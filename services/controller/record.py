"""The decision record: an append-only, capped stream in Redis (helios.redis_schema).

An entry has the fields `kind` ("decision" or "outcome"), `number` and `json`. A decision's JSON holds its
situation and settings, so `decide` can be run on it again. The outcome follows later as a separate entry with
the number of its decision.
"""

from collections.abc import AsyncIterator
from typing import Literal, TypeAlias, cast

from pydantic import Field
from redis.asyncio import Redis

from helios.errors import HeliosError
from helios.ignored_entries import IgnoredEntries, fault
from helios.redis_schema import CONTROLLER_STATE, DECISIONS
from services.controller.decision import Decision
from services.controller.leader import Leadership
from services.controller.policy.decide import decide
from services.controller.policy.settings import PolicySettings
from services.controller.situation import Record, Situation

# KEYS 3, 4: record, state. ARGV 3..6: kind, number (0: the next one), JSON, entries kept.
_APPEND = """
local number = tonumber(ARGV[4])
if number == 0 then number = redis.call('HINCRBY', KEYS[4], 'decisions', 1) end
redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[6], '*', 'kind', ARGV[3], 'number', number, 'json', ARGV[5])
return number
"""
_PAGE = 100
# Entries in Redis's form: position and fields.
_Entries: TypeAlias = list[tuple[bytes, dict[bytes, bytes]]]


class DecisionEntry(Record):
    """A decision with its complete input. `time` is in seconds since the Unix epoch."""

    kind: Literal["decision"] = "decision"
    time: float
    mode: str
    situation: Situation
    settings: PolicySettings
    decision: Decision

    def replay(self) -> Decision:
        """The result of today's policy for the same input."""
        return decide(self.situation, self.settings)


class OutcomeEntry(Record):
    """Measurements after a decision. The fields are those of controller.proto."""

    kind: Literal["outcome"] = "outcome"
    time: float
    seconds: float = Field(ge=0)
    requests: int
    tokens_per_second: float
    high_exit_share: float
    reload_seconds: float = 0.0
    stall_seconds: float = 0.0
    sequences_moved: int = 0
    halted: str = ""


_KINDS: dict[bytes, type[DecisionEntry | OutcomeEntry]] = {
    b"decision": DecisionEntry,
    b"outcome": OutcomeEntry,
}
# A stored SLO that is out of range raises a HeliosError.
_UNREADABLE = (KeyError, ValueError, HeliosError)


class NumberedDecision(Record):
    """A decision read from the record, with its outcome once there is one."""

    number: int
    entry: DecisionEntry
    outcome: OutcomeEntry | None = None


async def append(
    leadership: Leadership, entry: DecisionEntry | OutcomeEntry, *, number: int = 0, keep: int
) -> int:
    """Appends an entry and returns its number. `number`: that of an outcome's decision; 0: the next one.

    About the last `keep` entries are kept. Raises StaleLeaderError, redis.RedisError.
    """
    values = (entry.kind, number, entry.model_dump_json(), keep)
    written = await leadership.write(_APPEND, (DECISIONS, CONTROLLER_STATE), values)
    return int(str(written))


async def read_last(redis: Redis, count: int) -> tuple[list[NumberedDecision], str, dict[str, str]]:
    """The last decisions, oldest first; the position at which `follow` continues; and the ignored entries.

    Ignored entries are given with the reason.
    """
    position, before = "0-0", "+"
    outcomes: dict[int, OutcomeEntry] = {}
    found: list[NumberedDecision] = []
    ignored: dict[str, str] = {}
    while True:
        page = cast(_Entries, await redis.xrevrange(DECISIONS, max=before, count=_PAGE))
        for entry_id, fields in page:
            position = max(position, entry_id.decode(), key=_order)
            try:
                number, entry = _parse(fields)
            except _UNREADABLE as error:
                ignored[_name(entry_id)] = _why(error)
                continue
            if isinstance(entry, OutcomeEntry):
                outcomes.setdefault(number, entry)
            elif len(found) < count:
                found.append(NumberedDecision(number=number, entry=entry, outcome=outcomes.get(number)))
        if len(page) < _PAGE or len(found) >= count:
            return found[::-1], position, ignored
        before = f"({page[-1][0].decode()}"


async def follow(
    redis: Redis, position: str, block_seconds: float, ignored: IgnoredEntries
) -> AsyncIterator[NumberedDecision]:
    """Yields each decision when it is made and again when its outcome comes, until the caller ends it.

    Entries that cannot be read go to `ignored`.
    """
    decisions: dict[int, DecisionEntry] = {}
    while True:
        answer = await redis.xread({DECISIONS: position}, block=int(block_seconds * 1000))
        for _, entries in cast("list[tuple[bytes, _Entries]]", answer or []):
            for entry_id, fields in entries:
                position = entry_id.decode()
                try:
                    number, entry = _parse(fields)
                except _UNREADABLE as error:
                    ignored.note(_name(entry_id), _why(error))
                    continue
                if isinstance(entry, DecisionEntry):
                    # Only the last two decisions are kept: older ones already have their outcome.
                    decisions = {key: value for key, value in decisions.items() if key >= number - 1}
                    decisions[number] = entry
                    yield NumberedDecision(number=number, entry=entry)
                    continue
                if number not in decisions:
                    decisions |= {one.number: one.entry for one in (await read_last(redis, _PAGE))[0]}
                if number in decisions:
                    yield NumberedDecision(number=number, entry=decisions[number], outcome=entry)


def _parse(fields: dict[bytes, bytes]) -> tuple[int, DecisionEntry | OutcomeEntry]:
    """Raises one of _UNREADABLE. ValueError includes pydantic.ValidationError."""
    name = fields[b"kind"]
    if name not in _KINDS:
        raise ValueError(f"this version knows no entries of the kind {name.decode(errors='replace')!r}")
    return int(fields[b"number"]), _KINDS[name].model_validate_json(fields[b"json"])


def _name(entry_id: bytes) -> str:
    return f"{DECISIONS} {entry_id.decode()}"


def _why(error: Exception) -> str:
    return f"not an entry of the decision record: {fault(error)}"


def _order(position: str) -> tuple[int, int]:
    milliseconds, _, sequence = position.partition("-")
    return int(milliseconds), int(sequence)
