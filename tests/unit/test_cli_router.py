"""What `helios status` and `top` say of the router."""

import json

from helios.cli.router import as_dict, in_words
from helios.v1 import controller_pb2

ROUTER = controller_pb2.RouterState(
    number=7,
    examples=120,
    price=3e-4,
    low_price=1e-4,
    low_share=0.25,
    bound=0.045,
    expected_increase=0.031,
    error=0.012,
    shares=[
        controller_pb2.PlanShare(model="prose", depth=depth, share=share)
        for depth, share in ((2, 0.4), (4, 0.3), (6, 0.15), (8, 0.1), (12, 0.05))
    ],
)


def test_a_router_is_told_in_two_lines() -> None:
    first, second = in_words(ROUTER)
    assert first == (
        "router 7: 120 examples, 300 us a nat (100 for 25% of the requests); perplexity +3.1% +- 1.2% "
        "expected, aims at +4.5%"
    )
    assert second == "last requests: prose 2 40%, prose 4 30%, prose 6 15%, prose 8 10%, others 5%"


def test_what_was_served_is_told_once_it_is_known() -> None:
    served = controller_pb2.RouterState()
    served.CopyFrom(ROUTER)
    served.served_surprise, served.served_surprise_error = -0.02, 0.01
    assert in_words(served)[0].endswith("; served -0.020 +- 0.010 nats above expectation")
    assert as_dict(ROUTER)["served_surprise"] is None
    assert json.loads(json.dumps(as_dict(served)))["served_surprise"] == -0.02


def test_why_nothing_is_routed_is_told() -> None:
    few = controller_pb2.RouterState(examples=8, problem="8 requests have been evaluated, 24 are needed")
    assert in_words(few) == ["router: one plan for all; 8 requests have been evaluated, 24 are needed"]
    assert in_words(controller_pb2.RouterState(examples=60)) == [
        "router: one plan for all; a set of plans would not pay"
    ]
