"""The part of the report that is about the section `policy`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bench.page import Page

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def add(result: Mapping[str, Any], page: Page) -> None:
    """Adds the results of `section.measure`."""
    page.say(
        "## The loop over drifting traffic",
        "The controller's own agenda and policy, simulated on recorded requests of "
        f"{result['request_tokens']} tokens. Assumed: {result['assumed']}.",
        "Time, moves included, is over the fastest plan of each phase that is within the bound on it, in "
        "hindsight; *priced*: with the CPU of evaluations. Perplexity is over the best model of each phase, "
        f"whole; *within*: traces that rise by at most {result['bound']:.0%}, and by twice that in no phase. "
        "All else is a mean over the traces.",
    )

    def figures(rows: Sequence[tuple[object, Mapping[str, Any]]]) -> None:
        page.table(
            (
                "",
                "traces",
                "time",
                "priced",
                "tokens/s",
                "within",
                "perplexity: mean, worst trace, worst phase",
                "moves",
                "alarms",
                "evaluations",
            ),
            [
                (
                    name,
                    row["traces"],
                    f"{row['time_to_best']:.3f}",
                    f"{row['priced_time_to_best']:.3f}",
                    f"{row['tokens_per_second']:,.0f}",
                    f"{row['within_bound']} of {row['traces']}",
                    f"{row['perplexity_increase']:+.1%}, {row['largest_perplexity_increase']:+.1%}, "
                    f"{row['worst_phase_increase']:+.1%}",
                    f"{row['moves']:.1f}",
                    f"{row['alarms']:.1f}",
                    f"{row['evaluations']:.1f}",
                )
                for name, row in rows
            ],
        )

    page.say(
        f"Drifting traffic: phases of {result['phase_requests']} requests, of "
        f"{result['long_phase_requests']:,} where it says *long*. *sudden* is the standard trace: "
        f"{', '.join(result['phases'])}."
    )
    figures(list(result["drifting"].items()))
    page.say(
        f"Without a drift, {result['long_phase_requests']:,} requests each. Needless moves, on the mean: "
        + ", ".join(f"{row['needless_moves']:.2f} on {name}" for name, row in result["steady"].items())
        + "."
    )
    figures(list(result["steady"].items()))
    profiling = result["profiling"]
    page.say(
        f"An evaluation of all candidates takes {profiling['seconds_per_assessment']:.2f} s "
        f"({profiling['cpu_seconds_per_assessment']:.2f} s of CPU), speeds known and models loaded; timing "
        f"steps took {profiling['cpu_seconds_once']:.1f} s of CPU, once. On the first standard trace "
        f"evaluations would take {profiling['share']:.0%} of a thread that serves all the time.",
        "Drifts of the first standard trace:",
    )
    page.table(
        (
            "at request",
            "to",
            "plan before",
            "its perplexity there",
            "requests until noticed",
            "until within the bound",
        ),
        [
            (
                drift["request"],
                drift["phase"],
                drift["plan_before"],
                f"{drift['perplexity_increase_if_kept']:+.1%}",
                _requests(drift["requests_until_alarm"]),
                _requests(drift["requests_until_within_bound"]),
            )
            for drift in result["default"]["drifts"]
        ],
    )
    page.say("Plans, each held over the whole of that trace:")
    page.table(
        ("plan", "time", "tokens/s", "perplexity: trace, worst phase"),
        [
            (
                f"{row['model']} at {row['depth']}",
                f"{row['time_to_best']:.3f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['perplexity_increase']:+.1%}, {row['worst_phase_increase']:+.1%}",
            )
            for row in result["fixed_plans"]
        ],
    )
    _compare(result["comparison"], page)
    page.say("Ablation, on the standard trace:")
    figures(list(result["ablation"].items()))
    for kind, name_of in (("sweeps", "Sweep of {}"), ("paper_sweeps", "Sweep of {} by the paper's rule")):
        for name, rows in result[kind].items():
            page.say(f"{name_of.format(name)}, on the standard trace:")
            figures([(row["value"], row) for row in rows])
    paper = result["paper_setting"]
    page.say(
        f"The paper's own setting, concurrency 1: {paper['ratio']:.2f}x of dynamic {paper['dynamic_model']} "
        "(TH 0.8; each token pays a measured step that leaves at its exit)."
    )
    figures([("HELIOS, TH 0.8, batch 1", paper["helios"])])
    served = result["served"]
    reloads = [event["reload"] for event in served["events"] if "reload" in event]
    moved = sum(one["sequences_moved"] for one in reloads)
    page.say(
        f"On an engine: {served['requests']} requests, {served['tokens']} of {served['tokens_expected']} "
        f"tokens, {len(reloads)} reloads with {moved} sequences in flight, "
        f"{served['tokens_per_second']:,.0f} tokens/s with profiling and reloads inside."
    )

    def draw(axes: "Axes") -> None:
        stretches = result["timeline"]
        ends = [*(one["first_request"] for one in stretches[1:]), result["requests"]]
        colours = {name: f"C{index}" for index, name in enumerate(result["candidates"])}
        for one, end in zip(stretches, ends, strict=True):
            span = (one["first_request"], end)
            axes.plot(span, (one["depth"],) * 2, color=colours[one["model"]], linewidth=4)
        for name, colour in colours.items():
            axes.plot([], [], color=colour, linewidth=4, label=name)
        for drift in result["default"]["drifts"]:
            axes.axvline(drift["request"], color="grey", linestyle="--")
        axes.set_xlabel("request")
        axes.set_ylabel("depth")
        axes.legend(fontsize="small")

    page.plot("policy", "Plan over drifting traffic (dashed: drifts)", draw)


def _compare(result: Mapping[str, Any], page: Page) -> None:
    prices = result["prices"]
    page.say(
        "### The router and other methods",
        "The same requests for all. Quality is measured on each request's tokens from "
        f"{result['judged_from']} on. Those before are its beginning, which a probe reads. The learnt router "
        f"has {result['examples']} examples from one half of the texts. All methods serve the other half. "
        f"The router's time has its probes (a reading: {prices['reading_seconds'] * 1e6:.0f} us) and the "
        f"loading of the models that are not served from the start ({prices['loading_seconds']:.2f} s); "
        f"*priced*: also evaluations, {prices['evaluation_seconds'] * 1e3:.1f} ms of CPU for each request "
        "and model.",
        "*held*: traces within the bound over the whole, in each phase, and traces whose phases are all "
        f"within {result['phase_bound']:+.0%}.",
    )

    def methods(rows: Mapping[str, Mapping[str, Any]]) -> None:
        page.table(
            (
                "",
                "traces",
                "time",
                "priced",
                "tokens/s",
                "held",
                "perplexity: mean, worst trace, worst phase",
            ),
            [
                (
                    name,
                    row["traces"],
                    f"{row['time_to_best']:.3f}",
                    f"{row['priced_time_to_best']:.3f}",
                    f"{row['tokens_per_second']:,.0f}",
                    f"{row['held']}, {row['held_in_each_phase']}, {row['within_phase_bound']}",
                    f"{row['perplexity_increase']:+.1%}, {row['largest_perplexity_increase']:+.1%}, "
                    f"{row['worst_phase_increase']:+.1%}",
                )
                for name, row in rows.items()
            ],
        )

    learning = {
        f"router that learns, {int(requests):,} requests": row for requests, row in result["learning"].items()
    }
    shapes = {f"router, {name}": row for name, row in result["shapes"].items()}
    steady = {f"router, {name} only": row for name, row in result["steady"].items()}
    rows = {**result["methods"], **learning, **shapes, **steady}
    methods(rows)
    page.say("What routers did; shares are of requests, except for those of time:")
    page.table(
        (
            "",
            "time: loading, probes",
            "all models read",
            "safe plan",
            "evaluated",
            "came when an example",
            "us a choice",
            "ms a settlement",
        ),
        [
            (
                name,
                f"{row['loading_share']:.1%}, {row['probing_share']:.1%}",
                f"{row['read_by_all_share']:.1%}",
                f"{row['safe_share']:.1%}",
                f"{row['evaluated']:.0f}",
                f"{row['known_share']:.1%}",
                f"{row['ranking_seconds'] * 1e6:.0f}",
                f"{row['settling_seconds'] * 1e3:.1f}",
            )
            for name, row in rows.items()
            if "probing_share" in row
        ],
    )
    page.say(
        "Domains that neither a model nor the learnt router has seen, after prose. Perplexity is over the "
        f"best candidate with all layers; *so far*: the largest over the first n requests, n from "
        f"{result['first_judged']} on:"
    )
    page.table(
        ("", "requests", "all layers", "best model", "time to all layers", "perplexity: mean, so far"),
        [
            (
                name,
                row["requests"],
                f"{row['safe_share']:.0%}",
                f"{row['best_model_share']:.0%}",
                f"{row['time_to_safe']:.2f}",
                f"{row['perplexity_increase']:+.1%}, {row['largest_increase_so_far']:+.1%}",
            )
            for name, row in result["unseen"].items()
        ],
    )


def _requests(count: int | None) -> str:
    return "never" if count is None else str(count)
