"""The choice of a request's plan."""

import json

import pytest

from helios.errors import InvalidRequestError
from helios.routing.probe import ExitReading, Probe
from helios.routing.ranked_plan import RankedPlan
from helios.routing.router import Router
from helios.routing.terms import settle
from helios.routing.unlike_prompts import UnlikePrompts
from helios.served import ServedPlan
from helios.slo import Objective
from tests.routing_examples import MODELS, examples, knowledge, probe, recent


def _router(kind: str = "prose") -> Router:
    known = knowledge()
    return Router(number=1, knowledge=known, terms=settle(known, recent(known, kind, 60), 0.05))


def _best(ranked: list[RankedPlan] | None) -> ServedPlan:
    assert ranked
    return ranked[0].plan


@pytest.mark.parametrize("kind", MODELS)
def test_a_request_gets_a_shallow_plan_of_the_model_that_reads_it_best(kind: str) -> None:
    plan = _best(_router(kind).rank(probe(kind), lot=0.9, is_complete=True))
    assert plan.model == kind
    assert plan.depth == 6


def test_a_clear_case_needs_one_reading() -> None:
    ranked = _router().rank(probe("prose", models=("prose",)), lot=0.9, is_complete=False)
    assert _best(ranked).model == "prose"
    assert "by prose alone" in ranked[0].reason if ranked else False


def test_an_unlike_prompt_asks_for_all_readings_then_gets_the_safe_plan() -> None:
    router = _router()
    assert router.rank(probe("other", models=("prose",)), lot=0.9, is_complete=False) is None
    ranked = router.rank(probe("other"), lot=0.9, is_complete=True)
    assert _best(ranked).depth == 12
    assert ranked is not None
    assert len(ranked) == 1
    assert "unlike" in ranked[0].reason


def test_unlike_prompts_in_a_row_show_together_which_model_is_the_safe_one() -> None:
    router, unlike = _router(), UnlikePrompts()
    one = probe("other")

    def best(before: UnlikePrompts) -> str:
        readings = {"prose": ExitReading(2, 12, 9.4, 1.0), "tech": ExitReading(2, 12, 9.6, 1.0)}
        misleading = Probe(one.prompt_tokens, readings, one.first_ids)
        return _best(router.rank(misleading, lot=0.9, is_complete=True, unlike=before)).model

    assert best(unlike) == "prose"
    for _ in range(3):
        unlike.add({"prose": 9.9, "tech": 9.1})
    assert best(unlike) == "tech"
    # Later prompts that are like the examples show that it was no new kind of traffic.
    for _ in range(6):
        unlike.add(None)
    assert best(unlike) == "prose"


def test_while_prompts_are_unlike_less_is_enough_to_suspect_the_next_one() -> None:
    known = knowledge()
    suspected = 0
    for kind in (*MODELS, "other"):
        for number in range(1000, 1020):
            its = probe(kind, number)
            features = known.features_of(
                its.first_ids, {model: one.nats for model, one in its.readings.items()}
            )
            alone, suspect = (known.is_unlike(features, None, is_suspect=one) for one in (False, True))
            assert suspect >= alone
            suspected += suspect > alone
    assert suspected > 0


def test_each_prompt_is_probed_first_by_the_model_that_its_tokens_speak_for() -> None:
    for usual in MODELS:
        router = _router(usual)
        assert [router.first_model(probe(kind).first_ids) for kind in MODELS] == list(MODELS)


def test_another_model_is_never_chosen_unread() -> None:
    router = _router("prose")
    assert router.rank(probe("tech", models=("prose",)), lot=0.9, is_complete=False) is None


def test_a_short_prompt_gets_the_safe_plan() -> None:
    ranked = _router("tech").rank(Probe(5, {}, (11, 12)), lot=0.9, is_complete=True)
    assert _best(ranked) == ServedPlan(model="tech", depth=12)
    assert ranked is not None
    assert "short" in ranked[0].reason


def test_only_an_unlike_prompt_asks_for_more_than_all_readings() -> None:
    router = _router()
    assert router.rank(probe("other"), lot=0.9, is_complete=False) is None
    for kind in MODELS:
        assert router.rank(probe(kind), lot=0.9, is_complete=False)
    for kind in (*MODELS, "other"):
        assert router.rank(probe(kind), lot=0.9, is_complete=True)
        assert router.rank(probe(kind, models=("tech",)), lot=0.9, is_complete=True)


def test_busy_plans_spill_over_to_plans_that_are_no_worse() -> None:
    router = _router()
    ranked = router.rank(probe("prose"), lot=0.9, is_complete=True)
    assert ranked is not None
    increases = [one.expected_perplexity_increase for one in ranked]
    assert all(one <= increases[0] for one in increases)
    extra = [one.extra_seconds_per_token for one in ranked]
    assert extra == sorted(extra)
    assert extra[0] == 0


@pytest.mark.parametrize(("bound", "depth"), [(0.001, 12), (0.2, 6), (2.0, 2)])
def test_a_request_may_have_its_own_bound(bound: float, depth: int) -> None:
    ranked = _router().rank(probe("prose"), lot=0.9, is_complete=True, max_perplexity_increase=bound)
    assert _best(ranked) == ServedPlan(model="prose", depth=depth)


def test_a_bound_of_its_own_needs_all_readings() -> None:
    one = probe("prose", models=("prose",))
    assert _router().rank(one, lot=0.9, is_complete=False, max_perplexity_increase=0.2) is None


def test_latency_takes_the_quickest_plan_within_the_bound() -> None:
    ranked = _router().rank(probe("tech"), lot=0.9, is_complete=True, objective=Objective.LATENCY)
    assert _best(ranked) == ServedPlan(model="tech", depth=6)


def test_a_named_model_gets_one_of_its_own_plans() -> None:
    among = {ServedPlan(model="tech", depth=depth) for depth in (2, 12)}
    ranked = _router().rank(probe("prose"), lot=0.9, is_complete=True, among=among)
    assert {one.plan for one in ranked or ()} <= among


def test_unknown_plans_are_ignored_and_the_list_is_never_empty() -> None:
    router = _router()
    for among in ({ServedPlan(model="nobody", depth=1)}, set()):
        assert router.rank(probe("prose"), lot=0.9, is_complete=True, among=among)


def test_a_router_survives_json() -> None:
    router = _router()
    again = Router.from_json(router.to_json())
    for kind in (*MODELS, "other"):
        before = router.rank(probe(kind), lot=0.1, is_complete=True)
        after = again.rank(probe(kind), lot=0.1, is_complete=True)
        assert [one.plan for one in before or ()] == [one.plan for one in after or ()]


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff"])
def test_a_broken_router_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="not a router"):
        Router.from_json(data)


def test_a_router_of_another_version_is_refused() -> None:
    spoilt = json.loads(_router().model_dump_json()) | {"version": 2}
    with pytest.raises(InvalidRequestError):
        Router.from_json(json.dumps(spoilt))


def test_a_single_model_is_routed_by_depth() -> None:
    known = knowledge(examples(tech=0))
    assert known.models == MODELS
