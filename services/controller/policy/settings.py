"""The operator's settings for decisions."""

import enum

from pydantic import Field

from helios.rates import WINDOW_TOKENS
from services.controller.situation import Record


class Moves(enum.StrEnum):
    """Which moves are allowed: both by default, fewer for the paper's ablation."""

    BOTH = "both"
    SWITCH = "switch"
    DEEPEN = "deepen"


class PolicySettings(Record):
    """The operator's settings for decisions. Shares are in [0, 1]."""

    window_tokens: int = Field(
        WINDOW_TOKENS, ge=1, description="tokens in the window of the breach counter (CBC)"
    )
    breach_limit: int = Field(
        50, ge=1, description="unsure (high-exit) tokens in the window that are a breach (CBCmax)"
    )
    breach_sigmas: float = Field(
        3.0,
        ge=0,
        description="the limit is at least this many standard deviations above the unsure tokens that the "
        "profile itself expects of the plan",
    )
    reassess_requests: int = Field(150, ge=1, description="requests between two reassessments (RI)")
    moves: Moves = Field(Moves.BOTH, description="allowed moves: both, switch (to another model), deepen")
    min_gain: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="share by which a plan must beat the one in force, the cost of the move included",
    )
    routing_premium: float = Field(
        0.03,
        ge=0,
        lt=1,
        description="share by which a router may be slower than the best single plan and still be taken: it "
        "answers a change of the traffic with the first request",
    )
    min_dwell_requests: int = Field(
        25, ge=0, description="requests for which a new plan stays unless it violates the quality bound"
    )
    leave_sigmas: float = Field(
        0.2,
        ge=0,
        description="the plan in force must go once its perplexity is this many standard errors beyond the "
        "bound; with a larger value workers move less often, and are out of the bound more often",
    )
    stay_sigmas: float = Field(
        0.5,
        ge=0,
        description="the same where it is compared with another model: a few requests say less about two "
        "models than about two depths of one",
    )
    enter_sigmas: float = Field(
        0.75,
        ge=0,
        description="a new plan's perplexity must be this many standard errors within the bound, if any "
        "plan's is",
    )
    switch_sigmas: float = Field(
        1.0,
        ge=0,
        description="the same against other models, while the plan in force may stay: a few requests of "
        "mixed traffic say little about which model is better",
    )
    decide_sigmas: float = Field(
        2.0,
        ge=0,
        description="more requests are evaluated while a plan that matters is within this many standard "
        "errors of the bound on perplexity",
    )
    bound_margin: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of each other bound that a new plan must leave unused, if any plan does; also of "
        "the bound on perplexity while its standard error is unknown",
    )
    min_exit_share: float | None = Field(
        None,
        ge=0,
        le=1,
        description="smallest share of tokens that must be sure at the depth; none: no bound",
    )
