"""Requests are judged by the plans that served them, on the rest of their own prompts."""

import math
from pathlib import Path

import pytest

from bench.load.clients import Request, Stream
from bench.quality.judge import FIRST_REQUESTS, Judge, stride
from bench.quality.served import Quality, Served, best_of, rise, rise_over, tokens_within, windows
from helios import catalog
from helios.modes import Precision
from helios.served import ServedPlan

GOOD, BAD = ServedPlan(model="good", depth=2), ServedPlan(model="bad", depth=1)


def served(opened: float, excess: float, tokens: int = 10, plan: ServedPlan = GOOD) -> Served:
    """A request whose plan has `excess` nats a token more than the first of two candidates."""
    return Served(opened, {plan: tokens}, Quality(2.0 + excess, 0.5, (2.0, 3.0)))


def test_rise_is_the_mean_over_tokens_of_nats_above_the_reference() -> None:
    found = rise([served(0, 0.3, tokens=10), served(1, 0.0, tokens=20)], 0)
    assert found.increase == pytest.approx(math.expm1(0.1))
    assert found.judged == 2
    assert rise([served(0, 0.3)], 1).increase == pytest.approx(math.expm1(-0.7))


def test_error_of_a_rise_shrinks_with_more_requests() -> None:
    few = [served(0, excess) for excess in (0.0, 0.2)]
    assert rise(few, 0).error == pytest.approx(math.exp(0.1) * 0.1 / math.sqrt(2))
    assert rise(few * 100, 0).error == pytest.approx(rise(few, 0).error / 10)


def test_requests_of_several_phases_are_compared_with_the_best_of_their_own() -> None:
    found = rise_over([(served(0, 0.1), 0), (served(1, 1.1), 1)])
    assert found.increase == pytest.approx(math.expm1(0.1))


def test_reference_is_the_candidate_that_is_best_over_all_judged_requests() -> None:
    other = Served(0.0, {GOOD: 10}, Quality(1.0, 0.5, (9.0, 3.0)))
    unjudged = Served(0.0, {GOOD: 10})
    assert best_of([served(0, 0.0), served(1, 0.0), unjudged]) == 0
    assert best_of([served(0, 0.0), other, unjudged]) == 1


def test_windows_last_a_second_and_have_enough_judged_requests() -> None:
    # 20 requests a second, of which every second one is judged.
    requests = [served(at / 20, 0.0) if at % 2 else Served(at / 20, {GOOD: 10, BAD: 10}) for at in range(100)]
    found = windows("prose", requests, 0)
    # 16 judged requests take 1.6 s.
    assert [window.began for window in found] == [0.0, 1.6, 3.2]
    assert sum(window.tokens for window in found) == 50 * 10 + 50 * 20
    assert [window.rise.judged for window in found] == [16, 16, 18]
    assert {(one.model, one.depth): one.share for one in found[0].shares} == pytest.approx(
        {("good", 2): 2 / 3, ("bad", 1): 1 / 3}
    )


def test_tokens_of_a_window_beyond_the_bound_do_not_count() -> None:
    requests = [served(at / 20, 0.0 if at < 40 else 0.5) for at in range(80)]
    found = windows("prose", requests, 0)
    assert len(found) == 4
    assert tokens_within(found, 0.05) == 400


def test_a_phase_with_fewer_requests_is_one_window() -> None:
    assert len(windows("prose", [served(0.1, 0.0), served(0.0, 0.0)], 0)) == 1
    assert windows("prose", [], 0) == []


@pytest.fixture(scope="module")
def judge(tiny_models: Path) -> Judge:
    tokenizer_id = catalog.list_models(tiny_models)[0].tokenizer_id
    assert tokenizer_id is not None
    return Judge(tiny_models, tokenizer_id, Precision.FLOAT32, lambda _: None)


def stream(opened: float, prompt: tuple[int, ...], *exits: tuple[str, int, int]) -> Stream:
    found = Stream(Request(prompt, 4), opened)
    for model, depth, tokens in exits:
        found.exits[model, depth] += tokens
        found.token_ids += [0] * tokens
    return found


def test_a_stream_that_moved_has_the_mean_of_its_plans_by_their_tokens(judge: Judge) -> None:
    prompt = tuple(range(3, 43))
    one, other, both = judge.of(
        [
            stream(0.0, prompt, ("tiny", 1, 4)),
            stream(1.0, prompt, ("other", 4, 4)),
            stream(2.0, prompt, ("tiny", 1, 3), ("other", 4, 1)),
        ],
        every=1,
    )
    assert one.quality is not None
    assert other.quality is not None
    assert both.quality is not None
    assert one.quality.nats != other.quality.nats
    assert both.quality.nats == pytest.approx(0.75 * one.quality.nats + 0.25 * other.quality.nats)
    names = [model.name for model in judge.candidates]
    assert other.quality.nats == pytest.approx(other.quality.full_nats[names.index("other")])
    assert other.quality.agreement == 1


def test_the_first_requests_are_all_judged_and_of_the_others_every_nth(judge: Judge) -> None:
    prompt = tuple(range(3, 43))
    streams = [stream(float(at), prompt, ("tiny", 4, 4)) for at in reversed(range(FIRST_REQUESTS + 20))]
    found = judge.of([*streams, stream(0.5, prompt)], every=8)
    assert [one.opened for one in found] == sorted(one.opened for one in found)
    judged = [at for at, one in enumerate(found) if one.quality is not None]
    # The second one was served nothing.
    assert judged == [0, *range(2, FIRST_REQUESTS), 32, 40, 48]


def test_kinds_of_prompts_that_come_in_turn_are_judged_alike_often() -> None:
    assert stride(300, most=400, kinds=2) == 1
    every = stride(2400, most=400, kinds=2)
    assert 2400 / every <= 400
    judged = [index % 2 for index in range(0, 2400, every)]
    assert abs(judged.count(0) - judged.count(1)) <= 1


def test_the_fastest_plan_within_a_bound_is_the_smallest_one(judge: Judge) -> None:
    prompts = [tuple(range(at, at + 40)) for at in (3, 9)]
    assert judge.fastest_within(prompts, 100.0).depth == 1
    best = judge.best(prompts)
    assert judge.fastest_within(prompts, 0.0).depth <= best.num_layers
