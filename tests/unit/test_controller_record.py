"""The decision record, the state and the leader's lock, in a real Redis."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from helios import orders
from helios.errors import SettingsError, UnavailableError
from helios.ignored_entries import IgnoredEntries
from helios.orders import EVERY_WORKER
from helios.redis_schema import CONTROLLER_LEADER, CONTROLLER_STATE, DECISIONS
from helios.served import ServedPlan
from helios.slo import Objective, Slo
from services.controller import record, state
from services.controller.leader import Leadership, StaleLeaderError, find_leader
from services.controller.policy.decide import decide
from services.controller.policy.settings import PolicySettings
from services.controller.record import DecisionEntry, NumberedDecision, OutcomeEntry
from services.controller.situation import Bar, Situation, Trigger, WorkerView
from services.controller.state import ControllerState
from tests.profiles import exit_profile, model_profile

LEASE_SECONDS = 30.0
KEEP = 1000


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as connection:
        yield connection


@pytest.fixture
async def leadership(redis: Redis) -> Leadership:
    held = Leadership(redis, "a", "127.0.0.1:1", LEASE_SECONDS)
    assert await held.campaign()
    return held


def decision_entry(time: float = 1.0) -> DecisionEntry:
    profile = model_profile("small", [exit_profile(2, 0.901), exit_profile(6, 0.9)])
    situation = Situation(
        trigger=Trigger.REASSESSMENT,
        slo=Slo(objective=Objective.LATENCY, max_tpot_seconds=0.1),
        history={"small": profile},
        candidates=("small",),
        workers=(WorkerView(worker_id="w", model="small", depth=6, tokenizer_id="t", max_running=4),),
        prompt_tokens=1 / 3,
        output_tokens=0.1 + 0.2,
    )
    settings = PolicySettings(min_gain=0.1)
    return DecisionEntry(
        time=time,
        mode="active",
        situation=situation,
        settings=settings,
        decision=decide(situation, settings),
    )


log = logging.getLogger(__name__)
OUTCOME = OutcomeEntry(time=9.0, seconds=5.0, requests=7, tokens_per_second=12.5, high_exit_share=0.25)


async def test_a_decision_is_replayed_from_the_record(redis: Redis, leadership: Leadership) -> None:
    entry = decision_entry()
    await record.append(leadership, entry, keep=KEEP)
    (read,), _, ignored = await record.read_last(redis, 10)
    assert ignored == {}
    assert read.entry == entry
    assert read.entry.replay() == entry.decision
    assert entry.decision.moves


async def test_decisions_are_numbered_in_order_and_joined_with_their_outcomes(
    redis: Redis, leadership: Leadership
) -> None:
    for time in (1.0, 2.0, 3.0):
        await record.append(leadership, decision_entry(time), keep=KEEP)
    await record.append(leadership, OUTCOME, number=2, keep=KEEP)
    last, *_ = await record.read_last(redis, 2)
    assert [(one.number, one.entry.time, one.outcome) for one in last] == [(2, 2.0, OUTCOME), (3, 3.0, None)]


async def test_a_follower_sees_new_decisions_and_their_outcomes(redis: Redis, leadership: Leadership) -> None:
    await record.append(leadership, decision_entry(), keep=KEEP)
    _, position, _ = await record.read_last(redis, 0)
    seen: list[NumberedDecision] = []

    async def watch() -> None:
        async for one in record.follow(redis, position, 1.0, IgnoredEntries(log)):
            seen.append(one)
            if len(seen) == 3:
                return

    watching = asyncio.create_task(watch())
    await record.append(leadership, decision_entry(), keep=KEEP)
    await record.append(leadership, OUTCOME, number=2, keep=KEEP)
    await record.append(leadership, OUTCOME, number=1, keep=KEEP)
    await asyncio.wait_for(watching, 10)
    assert [(one.number, one.outcome) for one in seen] == [(2, None), (2, OUTCOME), (1, OUTCOME)]


async def test_the_record_is_capped(redis: Redis, leadership: Leadership) -> None:
    for _ in range(250):
        await record.append(leadership, OUTCOME, number=1, keep=50)
    assert 50 <= await redis.xlen(DECISIONS) <= 200


async def test_state_is_read_back_as_it_was_saved(redis: Redis, leadership: Leadership) -> None:
    assert await state.load(redis) is None
    kept = ControllerState(
        slo=Slo(objective=Objective.ACCURACY, max_perplexity_increase=None),
        pins={"w": ServedPlan(model="a", depth=2), EVERY_WORKER: ServedPlan(model="b", depth=4)},
        plan=ServedPlan(model="c", depth=6),
        bars=(Bar(model="a", depth=1, time=1.5, reason="breach", shallower=True),),
    )
    await state.save(leadership, kept, "active")
    read = await state.load(redis)
    assert read == kept
    assert (read.wanted("w"), read.wanted("new")) == (
        ServedPlan(model="a", depth=2),
        ServedPlan(model="b", depth=4),
    )


async def test_workers_read_pins_always_and_the_plan_while_an_active_controller_leads(
    redis: Redis, leadership: Leadership
) -> None:
    assert (await orders.read(redis)).wanted("w") is None
    pinned, chosen = ServedPlan(model="a", depth=2), ServedPlan(model="c", depth=6)
    kept = ControllerState(pins={"w": pinned}, plan=chosen, slo=Slo(objective=Objective.LATENCY))

    async def wanted() -> tuple[ServedPlan | None, ServedPlan | None]:
        read = await orders.read(redis)
        return read.wanted("w"), read.wanted("new")

    await state.save(leadership, kept, "advisory")
    assert await wanted() == (pinned, None)
    await state.save(leadership, kept, "active")
    assert await wanted() == (pinned, chosen)
    await leadership.resign()
    assert await wanted() == (pinned, None), "the next stack may be told something else"


async def test_workers_without_a_pin_get_their_set_and_others_the_usual_one(
    redis: Redis, leadership: Leadership
) -> None:
    pinned, chosen = ServedPlan(model="a", depth=2), ServedPlan(model="c", depth=6)
    usual, own = (chosen, ServedPlan(model="c", depth=12)), (chosen, ServedPlan(model="b", depth=4))
    kept = ControllerState(
        pins={"pinned": pinned}, plan=chosen, plans={EVERY_WORKER: usual, "own": own, "pinned": own}
    )
    await state.save(leadership, kept, "active")
    read = await orders.read(redis)
    assert read.wanted_plans("own") == own
    assert read.wanted_plans("new") == usual
    assert read.wanted("new") == chosen
    assert read.wanted_plans("pinned") == (pinned,)
    await leadership.resign()
    left = await orders.read(redis)
    assert (left.wanted_plans("own"), left.wanted_plans("pinned")) == ((), (pinned,))


async def test_a_state_without_sets_is_read_as_one_plan_for_all(redis: Redis) -> None:
    old = {"slo": {"objective": "throughput"}, "pins": {}, "plan": {"model": "c", "depth": 6}, "bars": []}
    await redis.hset(CONTROLLER_STATE, "state", json.dumps(old))
    read = await state.load(redis)
    assert read is not None
    assert read.wanted_plans("w") == (ServedPlan(model="c", depth=6),)


async def test_a_decision_of_an_earlier_version_is_read_and_replayed(
    redis: Redis, leadership: Leadership
) -> None:
    entry = decision_entry()
    old = entry.model_dump(mode="json")
    for name in ("plans", "offer", "no_offer"):
        del old["situation"][name]
    for name in ("plans", "plans_before"):
        del old["decision"][name]
    await redis.xadd(DECISIONS, {"kind": "decision", "number": 1, "json": json.dumps(old)})
    (read,), _, ignored = await record.read_last(redis, 10)
    assert ignored == {}
    assert read.entry == entry
    assert read.entry.replay() == entry.decision


async def test_state_of_another_version_is_refused_by_name(redis: Redis, leadership: Leadership) -> None:
    await redis.hset(CONTROLLER_STATE, "state", '{"slo": 5}')
    with pytest.raises(SettingsError, match=CONTROLLER_STATE):
        await state.load(redis)


async def test_what_a_newer_version_saved_is_read_and_kept(redis: Redis, leadership: Leadership) -> None:
    newer = {
        "slo": {"objective": "accuracy", "max_watts": 5},
        "pins": {"w": {"model": "a", "depth": 2, "batch": 8}, "v": {"model": "a", "depth": 4, "batch": 9}},
        "plan": None,
        "bars": [{"model": "a", "depth": 1, "time": 1.5, "reason": "breach", "shift": "night"}],
        "routes": ["x"],
    }
    await redis.hset(CONTROLLER_STATE, "state", json.dumps(newer))
    read = await state.load(redis)
    assert read is not None
    assert (read.slo.objective, read.pins["v"]) == (Objective.ACCURACY, ServedPlan(model="a", depth=4))

    pins = {"w": ServedPlan(model="a", depth=2), "v": ServedPlan(model="a", depth=6)}
    bars = (*read.bars, Bar(model="b", depth=1, time=2.5, reason="breach"))
    plan = ServedPlan(model="c", depth=1)
    await state.save(leadership, read.model_copy(update={"pins": pins, "bars": bars, "plan": plan}), "active")
    kept = json.loads(await redis.hget(CONTROLLER_STATE, "state") or "")
    for unchanged in ("slo", "routes"):
        assert kept[unchanged] == newer[unchanged]
    assert kept["pins"] == {"w": {"model": "a", "depth": 2, "batch": 8}, "v": {"model": "a", "depth": 6}}
    assert kept["plan"] == {"model": "c", "depth": 1}
    assert kept["bars"][0] == newer["bars"][0]
    assert await state.load(redis) == read.model_copy(update={"pins": pins, "bars": bars, "plan": plan})


@pytest.mark.parametrize("spoilt", ["not json", '{"slo": {"objective": "accuracy", "min_agreement": 5}}'])
async def test_a_state_that_cannot_be_read_is_not_replaced(
    redis: Redis, leadership: Leadership, spoilt: str
) -> None:
    await redis.hset(CONTROLLER_STATE, "state", spoilt)
    with pytest.raises(SettingsError, match=CONTROLLER_STATE):
        await state.load(redis)
    with pytest.raises(SettingsError, match=CONTROLLER_STATE):
        await state.save(leadership, ControllerState(), "active")
    assert await redis.hget(CONTROLLER_STATE, "state") == spoilt.encode()


async def test_a_spoilt_entry_of_the_record_hides_no_other(
    redis: Redis, leadership: Leadership, caplog: pytest.LogCaptureFixture
) -> None:
    entry = decision_entry()
    newer = entry.model_dump(mode="json") | {"weather": "fine"}
    newer["decision"]["reason_code"] = 7
    newer["situation"]["slo"]["max_watts"] = 5
    impossible = entry.model_dump(mode="json")
    impossible["situation"]["slo"]["min_agreement"] = 5
    _, start, _ = await record.read_last(redis, 0)
    written = [
        {"kind": "decision", "number": 1, "json": json.dumps(newer)},
        {"kind": "decision", "number": 2, "json": "not json"},
        {"kind": "decision", "number": 3, "json": json.dumps(impossible)},
        {"kind": "decision", "number": "three", "json": entry.model_dump_json()},
        {"kind": "remark", "number": 4, "json": "{}"},
        {"kind": "decision"},
        {"kind": "outcome", "number": 1, "json": '{"time": "yesterday"}'},
        {"kind": "outcome", "number": 1, "json": OUTCOME.model_dump_json()},
    ]
    for fields in written:
        await redis.xadd(DECISIONS, fields)
    (read,), _, ignored = await record.read_last(redis, 10)
    assert (read.number, read.entry, read.outcome) == (1, entry, OUTCOME)
    assert len(ignored) == 6

    followed = record.follow(redis, start, 1.0, IgnoredEntries(log))
    seen = [await anext(followed) for _ in range(2)]
    assert [(one.number, one.outcome) for one in seen] == [(1, None), (1, OUTCOME)]
    assert caplog.text.count("is ignored") == 6


async def test_the_lock_of_a_newer_leader_is_read(redis: Redis, leadership: Leadership) -> None:
    held = json.loads(await redis.get(CONTROLLER_LEADER) or "")
    await redis.set(CONTROLLER_LEADER, json.dumps(held | {"version": "99"}), px=30_000)
    leader = await find_leader(redis)
    assert leader is not None
    assert leader.controller_id == "a"
    assert await leadership.campaign()
    await state.save(leadership, ControllerState(), "active")


@pytest.mark.parametrize("spoilt", ["not json", "7", '{"controller_id": "a"}'])
async def test_a_lock_that_cannot_be_read_is_named_and_not_taken(
    redis: Redis, leadership: Leadership, spoilt: str
) -> None:
    await redis.set(CONTROLLER_LEADER, spoilt)
    assert not await leadership.campaign()
    with pytest.raises(StaleLeaderError):
        await state.save(leadership, ControllerState(), "active")
    with pytest.raises(UnavailableError, match=f"{CONTROLLER_LEADER}.*delete it"):
        await find_leader(redis)


async def test_one_replica_leads_at_a_time(redis: Redis, leadership: Leadership) -> None:
    second = Leadership(redis, "b", "127.0.0.1:2", LEASE_SECONDS)
    assert not await second.campaign()
    assert not second.is_held
    assert await leadership.campaign()
    await leadership.resign()
    assert not leadership.is_held
    assert await second.campaign()
    leader = await find_leader(redis)
    assert leader is not None
    assert (leader.controller_id, leader.address, leader.fence) == ("b", "127.0.0.1:2", 2)


async def test_a_leader_that_slept_cannot_write(redis: Redis, leadership: Leadership) -> None:
    await redis.delete(CONTROLLER_LEADER)  # The same happens when its lease ends.
    await state.save(leadership, ControllerState(plan=ServedPlan(model="old", depth=1)), "active")
    second = Leadership(redis, "b", "127.0.0.1:2", LEASE_SECONDS)
    assert await second.campaign()
    await state.save(second, ControllerState(plan=ServedPlan(model="new", depth=2)), "active")
    with pytest.raises(StaleLeaderError):
        await state.save(leadership, ControllerState(plan=ServedPlan(model="old", depth=1)), "active")
    with pytest.raises(StaleLeaderError):
        await record.append(leadership, OUTCOME, number=1, keep=KEEP)
    read = await state.load(redis)
    assert read is not None
    assert read.plan == ServedPlan(model="new", depth=2)
    assert await redis.xlen(DECISIONS) == 0
    assert not await leadership.campaign()


async def test_a_leader_cannot_write_after_redis_lost_everything(
    redis: Redis, leadership: Leadership
) -> None:
    await redis.flushall()
    with pytest.raises(StaleLeaderError):
        await state.save(leadership, ControllerState(), "active")
    assert leadership.terms == 1
    assert await leadership.campaign()
    assert leadership.terms == 2
    await state.save(leadership, ControllerState(), "active")


async def test_leadership_ends_by_itself_when_it_is_not_renewed(redis: Redis) -> None:
    brief = Leadership(redis, "c", "127.0.0.1:3", 0.05)
    assert await brief.campaign()
    await asyncio.sleep(0.06)
    assert not brief.is_held
