"""`helios slo`: the objective that the controller optimises, and its bounds."""

import json
from typing import Any

import click

from helios.cli.target import target_option
from helios.controller_client import connect
from helios.slo import Objective, Slo


class _Bound(click.ParamType[float | None]):
    name = "number"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | None:
        if str(value).lower() == "none":
            return None
        try:
            return float(str(value).removesuffix("%")) / (100 if str(value).endswith("%") else 1)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor none", param, ctx)


@click.group()
def slo() -> None:
    """Show or set the service level objective."""


@slo.command("set")
@click.argument("objective", type=click.Choice([str(one) for one in Objective]))
@click.option(
    "--max-perplexity-increase",
    type=_Bound(),
    default=str(Slo().max_perplexity_increase),
    show_default=True,
    help="Over the best candidate at full depth: 0.05 or 5% or none.",
)
@click.option("--min-agreement", type=_Bound(), help="Share of tokens that agree with the full model.")
@click.option("--max-ttft", type=_Bound(), metavar="SECONDS", help="Longest time to the first token.")
@click.option("--max-tpot", type=_Bound(), metavar="SECONDS", help="Longest time per further token.")
@target_option("controller")
def set_slo(
    *,
    objective: str,
    max_perplexity_increase: float | None,
    min_agreement: float | None,
    max_ttft: float | None,
    max_tpot: float | None,
    target: str | None,
) -> None:
    """Optimise OBJECTIVE within these bounds; a bound that is not given does not bind."""
    wanted = Slo(Objective(objective), max_perplexity_increase, min_agreement, max_ttft, max_tpot)
    with connect(target) as controller:
        answer = controller.set_slo(wanted.to_proto())
    click.echo(in_words(Slo.from_proto(answer)))


@slo.command()
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
@target_option("controller")
def show(*, as_json: bool, target: str | None) -> None:
    """Show the objective, its bounds and the mode of the controller."""
    from rich.console import Console

    from helios.cli import rows

    with connect(target) as controller:
        answer = controller.get_plan()
    current = Slo.from_proto(answer.slo)
    if as_json:
        click.echo(json.dumps({"mode": answer.mode, **as_dict(current)}, indent=2))
        return
    problems = [rows.Line(f"problem: {problem}", "red") for problem in answer.problems]
    rows.show(Console(), rows.Line(f"{in_words(current)} (controller: {answer.mode})"), *problems)


def as_dict(current: Slo) -> dict[str, Any]:
    """An objective with its bounds, in the form of the JSON output."""
    return {
        "objective": str(current.objective),
        "max_perplexity_increase": current.max_perplexity_increase,
        "min_agreement": current.min_agreement,
        "max_ttft_seconds": current.max_ttft_seconds,
        "max_tpot_seconds": current.max_tpot_seconds,
    }


def in_words(current: Slo) -> str:
    """The objective and the bounds that are set, in words."""
    objective, *bounds = as_dict(current).items()
    set_ones = [f"{name} {value:g}" for name, value in bounds if value is not None]
    return f"{objective[1]}, {', '.join(set_ones) or 'no bounds'}"
