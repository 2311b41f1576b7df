"""What `helios generate` tells at the end of a stream."""

import json

import pytest

from helios.cli.generate import _show_json, _summary
from helios.v1 import generation_pb2

FINISH = generation_pb2.Finish(
    reason=generation_pb2.FINISH_REASON_LENGTH, text="xyz", completion_tokens=3, model="prose", depth=6
)


def test_summary_says_which_plan_served_and_why() -> None:
    assert _summary(FINISH, [0.1, 0.2, 0.3]).splitlines() == [
        "3 tokens (length) · 10 tokens/s · first after 100 ms · prose, 6 layers"
    ]
    chosen = generation_pb2.Finish(expected_perplexity_increase=0.012, plan_reason="it reads as prose")
    chosen.MergeFrom(FINISH)
    assert _summary(chosen, [0.1]).splitlines()[1:] == [
        "prose at depth 6, perplexity +1.2% expected: it reads as prose"
    ]
    without_router = generation_pb2.Finish(plan_reason="no router")
    without_router.MergeFrom(FINISH)
    assert _summary(without_router, [0.1]).splitlines()[1:] == ["prose at depth 6: no router"]


def test_json_of_the_end_has_every_field_whether_its_plan_was_chosen_or_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = generation_pb2.Finish(expected_perplexity_increase=0.5, plan_reason="it reads as prose")
    chosen.MergeFrom(FINISH)
    for event, increase, why in ((FINISH, None, ""), (chosen, 0.5, "it reads as prose")):
        _show_json(event)
        told = json.loads(capsys.readouterr().out)
        assert (told["event"], told["model"], told["depth"]) == ("finish", "prose", 6)
        assert told["expected_perplexity_increase"] == increase
        assert told["plan_reason"] == why
