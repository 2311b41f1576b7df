"""The operator's settings for routing."""

import enum

from pydantic import Field

from services.controller.situation import Record


class Routing(enum.StrEnum):
    """What gets a plan: each request, or all of them together."""

    REQUEST = "request"
    SINGLE = "single"


class RoutingSettings(Record):
    """The operator's settings for routing."""

    routing: Routing = Field(
        Routing.REQUEST,
        description="request (a router that is learnt while serving chooses a plan for each request) or "
        "single (one plan for all, the paper's method)",
    )
    routing_examples: int = Field(
        200, ge=8, description="evaluated requests from which the router is learnt, the newest ones"
    )
    routing_least_examples: int = Field(
        24, ge=8, description="fewest evaluated requests for a router; with fewer, one plan serves all"
    )
    routing_growth: int = Field(
        48,
        ge=0,
        description="evaluated requests that are wanted of each kind of traffic that is served now; until "
        "then more are evaluated, whatever profiling_share says",
    )
    routing_push_seconds: float = Field(
        1.0, gt=0, description="least time between two routers that workers are given"
    )
    bound_share: float = Field(
        0.9,
        gt=0,
        le=1,
        description="share of the bound on perplexity at which the router aims, because it may err",
    )
