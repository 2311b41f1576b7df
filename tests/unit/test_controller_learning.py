"""When requests are evaluated for the router, and what routed prompts say. All pure."""

import pytest

from helios.routing.terms import Terms, settle
from helios.served import ServedPlan
from helios.v1 import worker_pb2
from services.controller.agenda import Evaluate
from services.controller.allowance import Allowance
from services.controller.routing.learning import Learning
from services.controller.routing.recent_prompts import RecentPrompts, Seen, recent
from services.controller.routing.request_routing import has_changed
from tests.routing_examples import FIRST_TOKENS, MODELS, example, examples, knowledge

GROWTH = 48


class Owner:
    """Does at once what is due. Evaluations cost more CPU than the share gives, unless it is 1."""

    def __init__(self, share: float = 1e-9, examples: int = 0) -> None:
        self.now = 0.0
        self.learning = Learning(GROWTH, Allowance(share, lambda: self.now))
        self.finished = 0
        self.examples = examples
        self.of_kind: dict[str, int] = {}

    def due(self) -> Evaluate | None:
        return self.learning.due(self.finished, self.now, self.examples, self.of_kind)

    def serve(self, requests: int, *, failing: bool = False) -> list[tuple[int, int | None, bool]]:
        """The evaluations while so many requests finish: when, of how many requests, and whether fresh."""
        found = []
        for _ in range(requests):
            self.finished += 1
            self.now += 1.0
            if (due := self.due()) is not None:
                assert due.for_router
                found.append((self.finished, due.requests, due.fresh))
                self.learning.began(self.finished, self.now)
                self.learning.ended(1.0, 1, failed=failing)
                self.examples += 0 if failing else due.requests or 0
        return found


def seen(kind: str, count: int, *, unlike: bool = False) -> list[Seen]:
    return [Seen(unlike, kind)] * count


def test_the_first_evaluations_double_as_requests_come() -> None:
    assert Owner().serve(80) == [(8, 8, False), (24, 16, False), (56, 32, False)]


def test_a_controller_that_takes_over_goes_on_where_the_last_one_was() -> None:
    assert Owner(examples=24).serve(40) == [(32, 32, False)]
    assert Owner(examples=200).serve(40) == [(8, 8, False)], "one that profiling_share permits"


def test_after_that_evaluations_keep_within_the_share_of_cpu() -> None:
    owner = Owner(share=0.01)
    owner.serve(56)
    # Each takes a second of CPU, so the three are paid off 300 s after the first.
    assert owner.serve(400) == [(308, 8, False), (408, 8, False)]


def test_a_kind_of_traffic_that_lacks_examples_gets_more_whatever_the_share_says() -> None:
    owner = Owner()
    owner.serve(56)
    owner.of_kind = {"prose": 100, "tech": GROWTH - 1}
    owner.learning.saw(seen("prose", 11) + seen("tech", 5))
    assert not owner.serve(60), "a small part of the traffic does not matter"
    owner.learning.saw(seen("tech", 1))
    assert owner.serve(60) == [(117, 8, False), (141, 8, False), (165, 8, False)]
    owner.of_kind["tech"] = GROWTH
    assert not owner.serve(60)


def test_traffic_unlike_all_examples_is_evaluated_at_once_and_once() -> None:
    owner = Owner()
    owner.serve(56)
    owner.of_kind = {"tech": GROWTH}
    owner.learning.saw(seen("tech", 3, unlike=True) + seen("tech", 3))
    assert not owner.serve(1), "3 of the last 6"
    owner.learning.saw(seen("tech", 4, unlike=True))
    assert owner.serve(30) == [(58, 8, True)]


def test_a_drift_that_a_single_plan_notices_is_learnt_too() -> None:
    owner = Owner()
    owner.serve(56)
    owner.learning.traffic_changed()
    assert owner.serve(30) == [(57, 8, True)]


def test_a_failed_evaluation_is_tried_again_after_a_while() -> None:
    owner = Owner()
    assert [number for number, *_ in owner.serve(31, failing=True)] == [8, 18, 28]
    assert owner.serve(20) == [(38, 8, False)]


# -- routed prompts ---------------------------------------------------------------------------------------


def prompt(
    kind: str, number: int, *, surprise: float = 0.0, models: tuple[str, ...] = MODELS, tokens: int = 16
) -> worker_pb2.ServedPrompt:
    """A prompt that was served with all layers of `prose`."""
    one, known = example(kind, number), knowledge()
    readings = {name: one.first_nats[name] for name in models}
    ids = one.ids[:FIRST_TOKENS]
    features = known.features_of(ids, readings)
    first = None if len(models) == len(MODELS) else known.models.index(models[0])
    at = [one.plan for one in known.plans].index(ServedPlan(model="prose", depth=12))
    expected = float(known.expected_nats(features, first)[at])
    return worker_pb2.ServedPrompt(
        plan=worker_pb2.Plan(model="prose", depth=12),
        prompt_tokens=len(one.ids),
        readings=[worker_pb2.ExitReading(model=name, depth=2, nats=nats) for name, nats in readings.items()],
        tokens=tokens,
        nats=tokens * (expected + surprise),
        first_ids=ids,
    )


def test_the_surprise_is_what_served_prompts_have_above_the_expectation() -> None:
    prompts = RecentPrompts()
    assert prompts.surprise() is None
    prompts.add([prompt("prose", 900 + n, surprise=0.1 + 0.01 * (-1) ** n) for n in range(10)], knowledge())
    found = prompts.surprise()
    assert found is not None
    assert found.nats == pytest.approx(0.1)
    assert found.error == pytest.approx(0.01 / 3, rel=0.01)


def test_prompts_say_their_kind_and_whether_they_are_unlike_all_examples() -> None:
    prompts, known = RecentPrompts(), knowledge()
    found = prompts.add([prompt("prose", 900), prompt("tech", 901), prompt("other", 902)], known)
    assert [one.kind for one in found[:2]] == ["prose", "tech"]
    assert [one.is_unlike for one in found] == [False, False, True]


def test_prompts_that_are_unlike_all_examples_reach_the_terms() -> None:
    prompts, known = RecentPrompts(), knowledge()
    prompts.add([prompt("other", number) for number in range(902, 906)], known)
    assert settle(known, prompts.recent(known), 0.05).unlike_model is not None
    assert settle(known, recent(prompts.prompts, known), 0.05).unlike_model is not None


def test_a_prompt_that_only_one_model_has_read_is_judged_by_that_one() -> None:
    known = knowledge()
    (one,) = recent([prompt("tech", 900, models=("tech",), surprise=0.5)], known)
    assert one.first == known.models.index("tech")
    assert one.surprise == pytest.approx(0.5)
    assert one.tokens == 16


def test_a_prompt_that_was_not_probed_counts_for_the_shares_alone() -> None:
    prompts, known = RecentPrompts(), knowledge()
    short = worker_pb2.ServedPrompt(plan=worker_pb2.Plan(model="tech", depth=12), prompt_tokens=3)
    spoilt = prompt("tech", 900)
    for reading in spoilt.readings:
        reading.nats = float("nan")
    assert not prompts.add([short, spoilt], known)
    assert not recent(prompts.prompts, known)
    shares = {str(plan): share for plan, share in prompts.shares().items()}
    assert shares == {"tech at depth 12": 0.5, "prose at depth 12": 0.5}


def test_only_the_last_hundred_count_and_new_knowledge_judges_them_anew() -> None:
    prompts, known = RecentPrompts(), knowledge()
    prompts.add([prompt("prose", 900, surprise=9.0), *(prompt("prose", 901) for _ in range(100))], known)
    assert len(prompts.prompts) == 100
    found = prompts.surprise()
    assert found is not None
    assert found.nats == pytest.approx(0.0, abs=1e-6)
    assert not prompts.add([], knowledge(examples(prose=20, tech=30)))
    other = prompts.surprise()
    assert other is not None
    assert other.nats != pytest.approx(0.0, abs=1e-6)


def test_terms_are_told_to_workers_once_they_have_changed_enough() -> None:
    terms = Terms(
        usual_model="prose", price=1.0, low_price=0.5, low_share=0.2, bound=0.05, increase=0.0, error=0.0
    )
    for update, changed in (
        ({"price": 1.04, "low_share": 0.24, "increase": 0.5}, False),
        ({"price": 1.06}, True),
        ({"low_price": 0.4}, True),
        ({"low_share": 0.26}, True),
        ({"usual_model": "tech"}, True),
        ({"unlike_model": "tech"}, True),
        ({"bound": 0.04}, True),
        ({"is_best_effort": True}, True),
    ):
        assert has_changed(terms, terms.model_copy(update=update)) == changed, update
