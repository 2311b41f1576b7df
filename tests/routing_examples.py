"""Examples of two kinds of traffic, each read best by its own model, for tests of the router."""

import random

from helios.routing.example import Example
from helios.routing.knowledge import Knowledge, PlanCost, ProbeCost
from helios.routing.probe import ExitReading, Probe
from helios.routing.terms import Recent

MODELS = ("prose", "tech")
DEPTHS = (2, 6, 12)
FIRST_TOKENS = 16
# Excess nats at each depth over the last one.
_EXCESS = (0.2, 0.03, 0.0)
# Tokens of each kind have ids in their own range, with some in common.
_WORDS = {"prose": range(10, 60), "tech": range(50, 100), "other": range(200, 250)}


def example(kind: str, number: int, tokens: int = 48) -> Example:
    """A prompt of a kind. The model of that name reads it best; nobody reads `other` well."""
    draw = random.Random(f"{kind} {number}")
    ids = tuple(draw.choice(_WORDS[kind]) for _ in range(tokens))
    base = {model: (2.8 if model == kind else 4.6) + draw.gauss(0, 0.1) for model in MODELS}
    if kind == "other":
        base = dict.fromkeys(MODELS, 9.0)
    return Example(
        id=f"{kind}-{number}",
        ids=ids,
        first_tokens=FIRST_TOKENS,
        first_nats={model: base[model] + 0.5 + draw.gauss(0, 0.1) for model in MODELS},
        rest_nats={
            model: tuple(base[model] + more + draw.gauss(0, 0.01) for more in _EXCESS) for model in MODELS
        },
        token_nats={model: (base[model],) * (tokens - 1) for model in MODELS},
    )


def examples(prose: int = 30, tech: int = 30) -> list[Example]:
    """Examples of both kinds."""
    return [example("prose", n) for n in range(prose)] + [example("tech", n) for n in range(tech)]


def plans() -> list[PlanCost]:
    """Every depth of both models. Deeper is dearer."""
    return [
        PlanCost(model=model, depth=depth, seconds=depth * 1e-5, latency_seconds=depth * 1e-4)
        for model in MODELS
        for depth in DEPTHS
    ]


def knowledge(found: list[Example] | None = None) -> Knowledge:
    """What is learnt from examples of both kinds, or from those that are given."""
    return Knowledge.learn(
        examples() if found is None else found,
        plans(),
        dict.fromkeys(MODELS, DEPTHS),
        ProbeCost(first_seconds=1e-5, further_seconds=1e-4),
        tokens=64,
    )


def probe(kind: str, number: int = 1000, models: tuple[str, ...] = MODELS) -> Probe:
    """A probe of a prompt of a kind, with readings of these models."""
    one = example(kind, number)
    readings = {model: ExitReading(2, 12, one.first_nats[model], 1.0) for model in models}
    return Probe(len(one.ids), readings, one.ids[:FIRST_TOKENS])


def recent(
    known: Knowledge, kind: str, count: int, *, surprise: float = 0.0, first: str | None = None
) -> list[Recent]:
    """Routed requests of a kind. first: the model whose reading alone is known."""
    found = []
    for number in range(2000, 2000 + count):
        one = example(kind, number)
        nats = one.first_nats if first is None else {first: one.first_nats[first]}
        features = known.features_of(one.ids[:FIRST_TOKENS], nats)
        index = None if first is None else known.models.index(first)
        found.append(Recent(features, index, surprise, 16))
    return found
