"""What routers learn: fits, scores of tokens, and prompts that are unlike all examples."""

import json

import numpy as np
import pytest

from helios.errors import InvalidRequestError
from helios.routing.example import Example, ModelExample, joined
from helios.routing.knowledge import Knowledge
from helios.routing.probe import read_positions
from tests.routing_examples import DEPTHS, FIRST_TOKENS, MODELS, example, examples, knowledge


def _by_model(one: Example) -> dict[str, ModelExample]:
    return {
        model: ModelExample(
            id=one.id,
            ids=one.ids,
            first_tokens=one.first_tokens,
            first_nats=one.first_nats[model],
            rest_nats=one.rest_nats[model],
            token_nats=one.token_nats[model],
        )
        for model in MODELS
    }


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("first", [None, 0, 1])
def test_a_new_prompt_is_expected_to_be_read_as_well_as_others_of_its_kind(
    kind: str, first: int | None
) -> None:
    known, one = knowledge(), example(kind, 1000)
    features = known.features_of(one.ids[:FIRST_TOKENS], one.first_nats)
    expected = known.expected_nats(features, first)
    true = np.array([one.rest_nats[plan.model][DEPTHS.index(plan.depth)] for plan in known.plans])
    assert np.abs(expected - true).max() < 0.5
    assert known.models[int(expected[known.deepest].argmin())] == kind


def test_an_example_is_predicted_without_itself() -> None:
    found = examples()
    known = knowledge(found)
    for at in (0, 40):
        without = knowledge([*found[:at], *found[at + 1 :]])
        features = without.features_of(found[at].ids[:FIRST_TOKENS], found[at].first_nats)
        # Leaving one row out of the fit is exact. The table and the scales still know the others' tokens.
        assert np.allclose(known.expected_by_all[at], without.expected_nats(features, None), atol=0.05)


def test_tokens_that_one_model_reads_worse_raise_its_score() -> None:
    known = knowledge()
    scores = {kind: known.token_table.scores(np.array(example(kind, 1000).ids))[0][0] for kind in MODELS}
    # The score of the second model relative to the first one.
    assert scores["prose"] > 0.5
    assert scores["tech"] < -0.5


@pytest.mark.parametrize("kind", MODELS)
def test_the_model_that_its_tokens_speak_for_is_probed_first(kind: str) -> None:
    assert MODELS[knowledge().first_for(example(kind, 1000).ids)] == kind


def test_tokens_that_no_example_has_count_as_the_mean_wherever_their_ids_lie() -> None:
    table = knowledge().token_table
    # Between the known ids, just beyond the last one, and far beyond.
    within, next_one, far = (table.scores(np.array([5, one])) for one in (5, 100, 10**6))
    assert within[1] == next_one[1] == far[1] == 0.0
    assert within[0] == next_one[0] == far[0] == pytest.approx(table.scores(np.array([], dtype=int))[0])


def test_unknown_tokens_are_counted_and_score_the_mean() -> None:
    table = knowledge().token_table
    scores, known = table.scores(np.array([5_000, 6_000]))
    assert known == 0
    assert abs(scores[0]) < 0.2


def test_a_prompt_of_an_unknown_kind_is_unlike_all_examples() -> None:
    known = knowledge()
    for kind, is_unlike in (("prose", False), ("tech", False), ("other", True)):
        one = example(kind, 1000)
        features = known.features_of(one.ids[:FIRST_TOKENS], one.first_nats)
        for first in (None, 0, 1):
            assert known.is_unlike(features, first) is is_unlike, (kind, first)


def test_a_kind_of_which_nothing_was_learnt_is_unlike_the_other() -> None:
    known, one = knowledge(examples(tech=0)), example("tech", 1000)
    assert known.is_unlike(known.features_of(one.ids[:FIRST_TOKENS], one.first_nats), None)


def test_what_is_learnt_survives_json() -> None:
    known, one = knowledge(), example("tech", 1000)
    again = Knowledge.from_json(known.model_dump_json())
    features = known.features_of(one.ids[:FIRST_TOKENS], one.first_nats)
    same = again.features_of(one.ids[:FIRST_TOKENS], one.first_nats)
    assert np.allclose(features, same, atol=0.01)
    assert np.allclose(known.expected_nats(features, None), again.expected_nats(same, None), atol=0.01)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", 2),
        ("plans", []),
        ("features", [[1.0]]),
        ("nats", [[1.0]] * 60),
        ("scale", [1.0, 1.0, 0.0, 1.0]),
        ("centre", [1.0]),
        ("first_fits", []),
        ("models", ["prose", "tech", "third"]),
        ("expected", None),
    ],
)
def test_what_does_not_fit_together_is_refused(field: str, value: object) -> None:
    spoilt = json.loads(knowledge().model_dump_json()) | {field: value}
    with pytest.raises(InvalidRequestError, match="version 1"):
        Knowledge.from_json(json.dumps(spoilt))


def test_numbers_that_are_not_finite_are_refused() -> None:
    spoilt = json.loads(knowledge().model_dump_json())
    spoilt["nats"][0][0] = float("nan")
    with pytest.raises(InvalidRequestError):
        Knowledge.from_json(json.dumps(spoilt))


def test_only_prompts_that_all_models_have_read_alike_are_joined() -> None:
    both = [_by_model(example("prose", number)) for number in range(3)]
    by_model = {model: [one[model] for one in both] for model in MODELS}
    by_model["tech"][1] = by_model["tech"][1].model_copy(update={"first_tokens": 3})
    del by_model["tech"][2]
    assert [one.id for one in joined(by_model)] == ["prose-0"]
    assert joined(by_model)[0] == example("prose", 0)
    assert joined({}) == []


def test_read_positions_are_spread_and_leave_out_the_beginning() -> None:
    assert read_positions(32, 12) == sorted(set(read_positions(32, 12)))
    assert len(read_positions(32, 12)) == 12
    assert min(read_positions(32, 12)) >= 6
    assert max(read_positions(32, 12)) < 32
    assert len(read_positions(8, 12)) == 7
    assert read_positions(1, 4) == [0]


def test_examples_of_other_exits_are_left_out() -> None:
    found = examples()
    old = found[0].model_copy(
        update={"rest_nats": {**found[0].rest_nats, "tech": (1.0, 2.0)}, "id": "of replaced files"}
    )
    assert len(knowledge([old, *found[1:]]).features) == len(found) - 1
    with pytest.raises(InvalidRequestError, match="too few"):
        knowledge([old] * 60)
