"""The price of quality follows the traffic, so that the bound holds."""

import math
from dataclasses import replace

import numpy as np
import pytest

from helios.routing.knowledge import Knowledge
from helios.routing.terms import Terms, settle
from tests.routing_examples import MODELS, example, examples, knowledge, recent


def _increase(known: Knowledge, terms: Terms, kinds: tuple[str, ...]) -> float:
    """What the examples of these kinds would get, over the model that is best for all of them together."""
    rows = [row for row, one in enumerate(examples()) if one.id.split("-")[0] in kinds]
    nats, expected = known.true_nats[rows], known.expected_by_all[rows]
    best = nats[:, known.deepest].mean(axis=0).min()

    def served(price: float) -> float:
        chosen = (known.costs + price * expected).argmin(axis=1)
        return float(nats[np.arange(len(rows)), chosen].mean())

    mean = terms.low_share * served(terms.low_price) + (1 - terms.low_share) * served(terms.price)
    return math.expm1(mean - best)


@pytest.mark.parametrize("kind", MODELS)
def test_the_bound_holds_for_traffic_of_one_kind(kind: str) -> None:
    known = knowledge()
    terms = settle(known, recent(known, kind, 60), 0.05)
    assert _increase(known, terms, (kind,)) <= 0.05 + 1e-9
    assert terms.increase <= 0.05 + 1e-9
    assert terms.usual_model == kind
    assert not terms.is_best_effort


def test_a_mix_is_served_cheaper_because_no_single_model_is_good_at_it() -> None:
    known = knowledge()
    alone = settle(known, recent(known, "prose", 60), 0.05)
    pairs = zip(recent(known, "prose", 30), recent(known, "tech", 30), strict=True)
    mixed = settle(known, [one for pair in pairs for one in pair], 0.05)
    assert mixed.price < alone.price
    assert _increase(known, mixed, MODELS) <= 0.05


def test_the_difference_between_kinds_is_no_uncertainty() -> None:
    known = knowledge()
    pairs = zip(recent(known, "prose", 30), recent(known, "tech", 30), strict=True)
    mixed = settle(known, [one for pair in pairs for one in pair], 0.05)
    # What the models differ by from kind to kind is no chance, so it costs no caution.
    assert mixed.error < 0.05


def test_a_few_strays_do_not_make_a_mix() -> None:
    known = knowledge()
    pure = settle(known, recent(known, "prose", 60), 0.05)
    stray = settle(known, [*recent(known, "prose", 58), *recent(known, "tech", 2)], 0.05)
    assert stray.price >= pure.price


def test_a_wider_bound_lowers_the_price() -> None:
    known = knowledge()
    prices = [settle(known, recent(known, "prose", 60), bound).price for bound in (0.01, 0.05, 0.5)]
    assert prices == sorted(prices, reverse=True)
    assert prices[0] > prices[-1]


def test_without_recent_requests_no_mix_is_counted_on() -> None:
    known = knowledge()
    terms = settle(known, [], 0.05)
    for kind in MODELS:
        assert _increase(known, terms, (kind,)) <= 0.055


def test_prompts_that_are_served_worse_than_expected_tighten_the_terms() -> None:
    known = knowledge()
    fine = settle(known, recent(known, "prose", 60), 0.1)
    worse = settle(known, recent(known, "prose", 60, surprise=0.15), 0.1)
    assert worse.increase < fine.increase
    assert (worse.price, -worse.low_share) > (fine.price, -fine.low_share)


def test_no_share_of_the_requests_is_served_much_worse() -> None:
    known = knowledge()
    terms = settle(known, recent(known, "prose", 60), 0.05)
    low = terms.model_copy(update={"low_share": 1.0})
    assert _increase(known, low, ("prose",)) <= 0.3


def test_a_bound_that_nothing_holds_is_told() -> None:
    # The examples' own noise is larger than this bound.
    known = knowledge()
    terms = settle(known, recent(known, "prose", 60, surprise=0.5), 0.0)
    assert terms.is_best_effort


def test_unlike_prompts_show_together_which_model_reads_them_best() -> None:
    known = knowledge()
    prose = recent(known, "prose", 60)
    unlike = [replace(one, is_unlike=True) for one in recent(known, "tech", 3)]
    assert settle(known, prose, 0.05).unlike_model is None
    assert settle(known, [*prose, *unlike], 0.05).unlike_model == "tech"
    # They change nothing else.
    terms = settle(known, [*prose, *unlike], 0.05).model_copy(update={"unlike_model": None})
    assert terms == settle(known, prose, 0.05)


def test_terms_do_not_depend_on_anything_but_their_input() -> None:
    known = knowledge()
    assert settle(known, recent(known, "tech", 40), 0.05) == settle(known, recent(known, "tech", 40), 0.05)


def test_readings_of_one_model_are_enough_for_terms() -> None:
    known = knowledge()
    terms = settle(known, recent(known, "tech", 60, first="prose"), 0.05)
    assert terms.usual_model == "tech"
    assert example("tech", 1).id == "tech-1"
