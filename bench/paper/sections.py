"""The sections of `helios bench paper`, and the report of those that were measured."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from bench.paper import (
    baselines,
    control,
    curve,
    footprint,
    insights,
    reloads,
    saturation,
    served_routing,
    shape,
)
from bench.paper.claims import claims
from bench.paper.policy import section as policy
from bench.paper.policy import targets as policy_targets
from bench.results import Report, Target
from bench.systems.subject import Subject


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the bench that can be run alone. `targets` reads what `measure` found."""

    measure: Callable[[Subject], dict[str, Any]]
    targets: Callable[[dict[str, Any]], list[Target]]


SECTIONS = {
    "curve": Section(curve.measure, curve.targets),
    "baselines": Section(baselines.measure, baselines.targets),
    "memory": Section(footprint.measure, footprint.targets),
    "shape": Section(shape.measure, shape.targets),
    "insights": Section(insights.measure, insights.targets),
    "saturation": Section(saturation.measure, saturation.targets),
    "policy": Section(policy.measure, policy_targets.targets),
    "control": Section(control.measure, control.targets),
    "served": Section(served_routing.measure, served_routing.targets),
    "reloads": Section(reloads.measure, reloads.targets),
}


def report_of(results: dict[str, Any]) -> Report:
    """The report of the sections that `results` holds, in order."""
    found = {name: results[name] for name in SECTIONS if name in results}
    targets = [target for name, result in found.items() for target in SECTIONS[name].targets(result)]
    against = claims(found)
    rows = [(f"{claim.name}: {claim.paper}", claim.measured) for claim in against]
    rows.append(
        ("seconds", ", ".join(f"{name} {one['cost']['wall_seconds']:.0f}" for name, one in found.items()))
    )
    compared = [asdict(claim) for claim in against]
    return Report({"settings": results["settings"], **found, "claims": compared}, targets, rows)
