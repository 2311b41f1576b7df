"""The router of a stack in words and as JSON, for `helios status` and `top`."""

from typing import Any

from helios.v1 import controller_pb2

_OPTIONAL = ("served_surprise", "served_surprise_error")
_NAMED = 4


def as_dict(router: controller_pb2.RouterState) -> dict[str, Any]:
    """A router in the form of the JSON output."""
    fields = {field.name: getattr(router, field.name) for field in router.DESCRIPTOR.fields}
    unset = {name: None for name in _OPTIONAL if not router.HasField(name)}  # type: ignore[arg-type]
    shares = [{"model": one.model, "depth": one.depth, "share": one.share} for one in router.shares]
    return {**fields, **unset, "shares": shares}


def in_words(router: controller_pb2.RouterState) -> list[str]:
    """One or two lines."""
    if not router.number:
        return [f"router: one plan for all; {router.problem or 'a set of plans would not pay'}"]
    prices = f"{1e6 * router.price:.3g} us a nat"
    if router.low_share:
        prices += f" ({1e6 * router.low_price:.3g} for {router.low_share:.0%} of the requests)"
    lines = [
        f"router {router.number}: {router.examples} examples, {prices}; perplexity "
        f"{router.expected_increase:+.1%} +- {router.error:.1%} expected, aims at {router.bound:+.1%}"
    ]
    if router.HasField("served_surprise"):
        surprise = f"{router.served_surprise:+.3f} +- {router.served_surprise_error:.3f}"
        lines[0] += f"; served {surprise} nats above expectation"
    if router.shares:
        named = [f"{one.model} {one.depth} {one.share:.0%}" for one in router.shares[:_NAMED]]
        rest = sum(one.share for one in router.shares[_NAMED:])
        named += [f"others {rest:.0%}"] if rest else []
        lines.append(f"last requests: {', '.join(named)}")
    if router.problem:
        lines.append(f"router: {router.problem}")
    return lines
