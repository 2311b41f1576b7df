"""The report of `helios bench paper`: Markdown, and its plots as PNG files beside it."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.page import Page
from bench.paper.policy import report as policy_report
from bench.results import Report, machine

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GIB = 1 << 30
_Part = Callable[[Mapping[str, Any], Page], None]


def write(report: Report, path: Path) -> None:
    """Writes the report of the sections that `report` has."""
    page = Page(path)
    settings = report.results["settings"]
    page.say("# HELIOS against the paper's claims")
    if settings["quick"]:
        page.say("**Quick sizes: this shows that the bench works. The figures measure nothing.**")
    page.say(
        f"`helios bench paper`, engine with {settings['threads']} thread(s), {settings['precision']}, "
        f"{settings['memory_mib']} MiB each. Machine: `{json.dumps(machine())}`."
    )
    page.targets(report.targets)
    page.say(
        "## The paper's results",
        "Theirs on 4 x A100-40GB with OPT-1.3B and 6.7B, ours on the machine above with the models here.",
    )
    page.table(
        ("result", "paper", "here"),
        [(row["name"], row["paper"], row["measured"]) for row in report.results["claims"]],
    )
    for name, part in _PARTS.items():
        if name in report.results:
            part(report.results[name], page)
            cost = report.results[name]["cost"]
            page.say(
                f"<sub>{name}: measured {cost['at']} in {cost['wall_seconds']:.0f} s "
                f"(load average before: {cost['load_average_before']:.1f})</sub>"
            )
    page.write()


def _curve(result: Mapping[str, Any], page: Page) -> None:
    best = ", ".join(f"{judge['model']} on {name}" for name, judge in result["best_candidates"].items())
    page.say(
        "## Every exit: speed, memory, quality",
        f"Prompts of {result['prompt_tokens']} tokens, outputs of {result['output_tokens']}; medians of "
        f"{result['rounds']} rounds that alternate with the model's last layer. Perplexity is of held-out "
        f"text, its increase over the best candidate at full depth ({best}); *generated* is that candidate's "
        "perplexity on what the plan generates (low for repetitive text).",
    )
    batches = result["batches"]
    domains = list(result["best_candidates"])
    page.table(
        (
            "model",
            "depth",
            *(f"tokens/s at {batch} (to full)" for batch in batches),
            "TPOT ms",
            "weights MB",
            "KV B/token",
            *(f"{domain}: perplexity (increase), agreement, generated" for domain in domains),
        ),
        [
            (
                row["model"],
                f"{row['depth']} of {row['num_layers']}",
                *(
                    f"{one['decode_tokens_per_second']:,.0f} ({one['ratio_to_full']:.2f}x)"
                    for one in row["speed"]
                ),
                f"{row['tpot_ms_batch_1']:.2f}",
                f"{row['weight_bytes'] / 1e6:.1f}",
                f"{row['kv_bytes_per_token']:,}",
                *(_quality(row["quality"][domain]) for domain in domains),
            )
            for row in result["exits"]
        ],
    )

    def draw(axes: "Axes") -> None:
        for model in dict.fromkeys(row["model"] for row in result["exits"]):
            rows = [row for row in result["exits"] if row["model"] == model]
            for domain in domains:
                increases = [row["quality"][domain]["perplexity_increase"] * 100 for row in rows]
                rates = [row["speed"][-1]["decode_tokens_per_second"] for row in rows]
                axes.plot(increases, rates, marker="o", label=f"{model}, {domain}")
        axes.axvline(5, color="grey", linestyle="--")
        axes.set_xscale("symlog")
        axes.set_xlabel("perplexity over the best candidate, %")
        axes.set_ylabel(f"decode tokens/s at batch {batches[-1]}")
        axes.legend(fontsize="small")

    page.plot("curve", "Speed and quality of every exit", draw)


def _quality(quality: Mapping[str, Any]) -> str:
    return (
        f"{quality['perplexity']:.2f} ({quality['perplexity_increase']:+.1%}), {quality['agreement']:.0%}, "
        f"{_number(quality['generated_perplexity'])}"
    )


def _number(value: float | None, form: str = ".2f") -> str:
    return "unknown" if value is None else format(value, form)


def _baselines(result: Mapping[str, Any], page: Page) -> None:
    page.say(
        "## Baselines",
        f"Same engine, same run, {result['rounds']} alternating rounds. *saturated*: {result['concurrency']} "
        "open at a time; a way with batch 1 serves them one after another. `dynamic`: every token leaves at "
        "its own exit, with the calibrated thresholds or the paper's 0.8. Quality is teacher-forced on the "
        "same held-out text; for `dynamic` with its KV propagation.",
    )
    for domain, found in result["domains"].items():
        page.say(f"### {domain}")
        page.table(
            (
                "way",
                "plan",
                "perplexity",
                "agreement",
                "tokens/s at 1",
                "saturated",
                "to full",
                "to dynamic batch 1",
                "TPOT P50, P99, P99.9 ms",
                "TTFT P50, P99, P99.9 ms",
                "mean exit",
                "J/token",
            ),
            [
                (
                    name,
                    f"{way['model']} at {way['depth']}",
                    f"{way['quality']['perplexity']:.2f}",
                    f"{way['quality']['agreement']:.1%}",
                    f"{way['single']['tokens_per_second']:,.0f}",
                    f"{way['saturated']['tokens_per_second']:,.0f}",
                    f"{way['saturated']['ratio_to']['full']:.2f}x",
                    f"{way['single']['ratio_to']['dynamic_1']:.2f}x at 1, "
                    f"{way['saturated']['ratio_to']['dynamic_1']:.2f}x saturated",
                    _percentiles(way["saturated"]["tpot_ms"]),
                    _percentiles(way["saturated"]["ttft_ms"]),
                    f"{way['saturated']['mean_exit_layer']:.1f}",
                    _number(way["saturated"]["joules_per_token"], ".4f"),
                )
                for name, way in found["ways"].items()
            ],
        )

        def draw(axes: "Axes", ways: Mapping[str, Any] = found["ways"]) -> None:
            axes.barh(list(ways), [way["saturated"]["tokens_per_second"] for way in ways.values()])
            axes.invert_yaxis()
            axes.set_xlabel("tokens/s, saturated")

        page.plot(f"baselines-{domain}", f"Throughput on {domain}", draw)


def _percentiles(latency: Mapping[str, float]) -> str:
    return ", ".join(f"{latency[name]:.1f}" for name in ("p50", "p99", "p999"))


def _memory(result: Mapping[str, Any], page: Page) -> None:
    page.say("## Memory", result["shape"] + ".")
    page.table(
        ("assumption", "value"),
        [(name.replace("_", " "), value) for name, value in result["assumptions"].items()],
    )
    page.table(
        ("budget", f"greedy, depth {result['depth']}", "dynamic, all layers", "ratio"),
        [
            (
                f"{row['budget_bytes'] / _GIB:.2f} GiB",
                row["greedy_batch"],
                row["dynamic_batch"],
                f"{_number(row['ratio'])}x",
            )
            for row in result["largest_batch"]
        ],
    )
    page.table(
        ("batch", "greedy GiB", "dynamic GiB", "saved"),
        [
            (
                row["batch"],
                f"{row['greedy']['total_bytes'] / _GIB:.2f}",
                f"{row['dynamic']['total_bytes'] / _GIB:.2f}",
                f"{row['saved']:.1%}",
            )
            for row in result["same_batch"]
        ],
    )


def _shape(result: Mapping[str, Any], page: Page) -> None:
    page.say(
        f"## Speed of {result['shape']}'s shape",
        f"Weights are {result['weights']}. {result['precision']}, prompts of {result['prompt_tokens']} "
        f"tokens, outputs of {result['output_tokens']}, alternating with all layers.",
    )
    page.table(
        (
            "depth",
            "weights GB",
            "KV kB/token",
            *(f"TPOT ms, tokens/s at {batch} (to full)" for batch in result["batches"]),
        ),
        [
            (
                f"{row['depth']} of {result['num_layers']}",
                f"{row['weight_bytes'] / 1e9:.2f}",
                f"{row['kv_bytes_per_token'] / 1e3:.0f}",
                *(
                    f"{one['tpot_ms']:.1f} ({one['tpot_to_full'] - 1:+.0%}), "
                    f"{one['decode_tokens_per_second']:,.1f} ({one['ratio_to_full']:.2f}x)"
                    for one in row["speed"]
                ),
            )
            for row in result["exits"]
        ],
    )


def _insights(result: Mapping[str, Any], page: Page) -> None:
    page.say("## The three insights", "### 0. Where tokens would leave one model alone")
    page.table(
        ("model", "domain", "at the earliest exit", "need all layers", "the same at TH 0.8"),
        [
            (
                row["model"],
                row["domain"],
                f"{row['th_calibrated']['at_earliest_exit']:.1%}",
                f"{row['th_calibrated']['needs_all_layers']:.1%}",
                f"{row['th_0.8']['at_earliest_exit']:.1%}, {row['th_0.8']['needs_all_layers']:.1%}",
            )
            for row in result["exits"]
        ],
    )
    page.say("### 1. Exits complement each other", "Earliest exits, calibrated thresholds, all text.")
    first = {row["first"]: row["first_depth"] for row in reversed(result["complementary"])}
    page.table(
        ("first", "second", "first alone", "of the rest, second", "together", "second alone"),
        [
            (
                f"{row['first']} at {row['first_depth']}",
                f"{row['second']} at {row['second_depth']}",
                f"{row['first_alone']:.1%}",
                "-" if row["second_of_the_rest"] is None else f"{row['second_of_the_rest']:.1%}",
                f"{row['together']:.1%}",
                f"{row['second_alone']:.1%}",
            )
            for row in result["complementary"]
            if (row["domain"], row["threshold"]) == ("all", "calibrated")
            and row["first_depth"] == first[row["first"]]
        ],
    )
    page.say("### 2. Low confidence rarely means wrong", "All text, calibrated thresholds.")
    page.table(
        ("model", "depth", "unsure tokens", "of them equal to the last layer's", "all tokens equal"),
        [
            (
                row["model"],
                row["depth"],
                f"{row['unsure_share']:.1%}",
                "-" if row["unsure_agreement"] is None else f"{row['unsure_agreement']:.1%}",
                f"{row['agreement']:.1%}",
            )
            for row in result["low_confidence"]
            if (row["domain"], row["threshold"]) == ("all", "calibrated")
        ],
    )
    page.say(
        "### 3. Temporal locality",
        "Total variation between the first exit's confidence histograms of consecutive stretches.",
    )
    page.table(
        ("model", "requests a stretch", "within a domain", "across the drift"),
        [
            (
                model["model"],
                row["requests"],
                _number(row["within_domain"], ".3f"),
                _number(row["across_drift"], ".3f"),
            )
            for model in result["locality"]
            for row in model["intervals"]
        ],
    )


def _saturation(result: Mapping[str, Any], page: Page) -> None:
    page.say(
        "## Saturation: batch x model x depth",
        f"Saturated: the smallest batch with {result['saturated_share']:.0%} of the plan's best rate.",
    )
    page.table(
        ("model", "depth", "best tokens/s", "saturating batch", "batch in memory", "limited by"),
        [
            (
                plan["model"],
                plan["depth"],
                f"{plan['best_tokens_per_second']:,.0f}",
                plan["saturating_batch"],
                plan["batch_in_memory"],
                plan["limited_by"],
            )
            for plan in result["plans"]
        ],
    )

    def draw(axes: "Axes") -> None:
        for plan in result["plans"]:
            own = [
                point
                for point in result["points"]
                if (point["model"], point["depth"]) == (plan["model"], plan["depth"])
            ]
            axes.plot(
                [point["batch"] for point in own],
                [point["decode_tokens_per_second"] for point in own],
                marker=".",
                label=f"{plan['model']} at {plan['depth']}",
            )
        axes.set_xscale("log", base=2)
        axes.set_xlabel("batch")
        axes.set_ylabel("decode tokens/s")
        axes.legend(fontsize="x-small")

    page.plot("saturation", "Throughput over batch, model and depth", draw)


def _control(result: Mapping[str, Any], page: Page) -> None:
    rates, shares = result["tokens_per_second"], result["cpu_share"]
    page.say(
        "## What profiling and control cost",
        f"Gateway and workers as processes, {result['concurrency']} streams at once, rounds of "
        f"{result['seconds_per_round']:g} s that alternate between a stack with profiler and controller "
        f"(advisory) and one without: {rates['with']:,.0f} against {rates['without']:,.0f} tokens/s, a cost "
        f"of {result['throughput_cost']:.1%}. Of the machine's CPU the profiler took "
        f"{shares['profiler']:.2%}, the controller {shares['controller']:.2%}; "
        f"{result['reassessments']} reassessments, of which "
        f"{result['put_off']} were put off to keep profiling within {result['profiling_share']:.1%} of the "
        "workers' CPU.",
    )


def _served(result: Mapping[str, Any], page: Page) -> None:
    page.say(
        "## A plan for each request, served",
        f"Gateway, {result['workers']} workers, profiler and controller as processes, {result['streams']} "
        f"streams at once, prompts of {result['prompt_tokens']} tokens, outputs of "
        f"{result['output_tokens']}. Nothing is measured before the router is learnt, from other documents. "
        "Perplexity is of the prompts' rest under the plans that served them, over the "
        "best candidate at full depth. TTFT is of one stream at a time, under the plan that the router takes "
        "most often.",
    )
    page.table(
        ("traffic", "", "tokens/s", "ratio", "perplexity", "learnt from", "plans (share of the tokens)"),
        [
            (
                traffic,
                name,
                f"{found[name]['tokens_per_second']:,.0f}",
                f"{found['ratio']:.2f}x" if name == "router" else "",
                f"{found[name]['rise']['increase']:+.1%} (error {found[name]['rise']['error']:.1%})",
                f"{found['learnt_requests']} requests" if name == "router" else "",
                _shares(found[name]["plans"]),
            )
            for traffic, found in {"mix": result["mix"], **result["domains"]}.items()
            for name in ("router", "single", "fixed")
            if name in found
        ],
    )
    page.table(
        ("traffic", "prompt tokens", "plan", "TTFT with the router ms", "pinned ms", "ratio of medians"),
        [
            (
                domain,
                found["ttft"]["prompt_tokens"],
                f"{found['ttft']['plan']['model']} at {found['ttft']['plan']['depth']}",
                _percentiles(found["ttft"]["router_ms"]),
                _percentiles(found["ttft"]["fixed_ms"]),
                f"{found['ttft']['ratio']:.2f}",
            )
            for domain, found in result["domains"].items()
        ],
    )


def _shares(plans: Sequence[Mapping[str, Any]]) -> str:
    total = sum(plan["tokens"] for plan in plans)
    return ", ".join(f"{plan['model']} at {plan['depth']} {plan['tokens'] / total:.0%}" for plan in plans)


def _reloads(result: Mapping[str, Any], page: Page) -> None:
    page.say(
        "## Reloads under load",
        f"{len(result['reloads'])} reloads, {result['streams_at_once']} streams at once: {result['lost']} "
        f"tokens lost, {result['repeated']} repeated. All streams' prefill anew takes "
        f"{result['prefill_of_all_streams_ms']:.0f} ms.",
    )
    rows = [
        (f"{name}, {what.replace('_', ' ')}", _percentiles(result[what][name]))
        for name in ("tpot_ms", "ttft_ms")
        for what in ("without_reloads", "with_reloads")
    ]
    rows += [
        (f"stall at a reload, {kind}", _percentiles(found)) for kind, found in result["stall_ms"].items()
    ]
    page.table(("", "P50, P99, P99.9 ms"), rows)


_PARTS: dict[str, _Part] = {
    "curve": _curve,
    "baselines": _baselines,
    "memory": _memory,
    "shape": _shape,
    "insights": _insights,
    "saturation": _saturation,
    "policy": policy_report.add,
    "control": _control,
    "served": _served,
    "reloads": _reloads,
}
