"""The paper's results (arXiv 2504.10724) next to the figures that were measured here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.paper.policy import traffic

Results = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Claim:
    """A result of the paper (on 4 x A100-40GB, unless it says otherwise), and our result in words."""

    name: str
    paper: str
    measured: str


def claims(results: Results) -> list[Claim]:
    """The claims for whose sections there are `results`."""
    return [
        Claim(name, paper, measured(results))
        for name, paper, sections, measured in _ROWS
        if all(section in results for section in sections)
    ]


def _each_domain(results: Results, said: Callable[[Mapping[str, Any]], str]) -> str:
    domains = results["baselines"]["domains"].items()
    return "; ".join(f"{said(found['ways'])} on {domain}" for domain, found in domains)


def _throughput(results: Results) -> str:
    measured = _each_domain(
        results, lambda ways: f"{ways['within_5']['single']['ratio_to']['dynamic_1_th_0.8']:.2f}x"
    )
    return f"{measured} (greedy within +5 % against dynamic with TH 0.8)"


def _exits(results: Results) -> str:
    found = results["insights"]
    earliest: dict[str, int] = {}
    for row in found["complementary"]:
        for role in ("first", "second"):
            depth = row[f"{role}_depth"]
            earliest[row[role]] = min(depth, earliest.get(row[role], depth))
    pairs = [
        f"{row['first']} with {row['second']} {row['together']:.0%} (alone {row['first_alone']:.0%})"
        for row in found["complementary"]
        if (row["domain"], row["threshold"]) == ("all", "calibrated")
        and all(row[f"{role}_depth"] == earliest[row[role]] for role in ("first", "second"))
    ]
    needing = [
        f"{row['model']} {row['th_calibrated']['needs_all_layers']:.1%}"
        for row in found["exits"]
        if row["domain"] == "all"
    ]
    return f"{'; '.join(pairs) or 'no two models share a tokenizer'}; need all layers: {', '.join(needing)}"


def _batch(results: Results) -> str:
    rows = [row for row in results["memory"]["largest_batch"] if row["ratio"]]
    return f"{min(row['ratio'] for row in rows):.1f}x to {max(row['ratio'] for row in rows):.1f}x by budget"


def _footprint(results: Results) -> str:
    saved = [row["saved"] for row in results["memory"]["same_batch"]]
    return f"{-min(saved):.1%} to {-max(saved):.1%} by batch"


def _latency(results: Results) -> str:
    def said(ways: Mapping[str, Any]) -> str:
        greedy, base = ways["within_5"]["single"], ways["dynamic_1_th_0.8"]["single"]
        tpot = greedy["tpot_ms"]["p50"] / base["tpot_ms"]["p50"] - 1
        # Requests run one after another, so the response time is the inverse of the throughput.
        response = greedy["tokens_per_second"] / base["tokens_per_second"]
        return f"TPOT {tpot:+.0%}, {response:.2f}x lower"

    return f"{_each_domain(results, said)} (greedy within +5 % against dynamic with TH 0.8)"


def _energy(results: Results) -> str:
    def said(ways: Mapping[str, Any]) -> str:
        greedy = ways["within_5"]["saturated"]["joules_per_token"]
        base = ways["dynamic_batched"]["saturated"]["joules_per_token"]
        return "unknown, no meter is readable," if greedy is None else f"{base / greedy:.2f}x"

    return _each_domain(results, said)


def _plain(results: Results) -> str:
    def said(ways: Mapping[str, Any]) -> str:
        greedy, alone = (ways[name]["single"]["ratio_to"]["full"] - 1 for name in ("within_5", "dynamic_1"))
        return f"{greedy:+.0%} (single EE-LLM: {alone:+.0%})"

    return f"{_each_domain(results, said)} (batch 1; greedy within +5 %, dynamic with calibrated thresholds)"


def _perplexity(results: Results) -> str:
    def said(ways: Mapping[str, Any]) -> str:
        base = ways["full"]["quality"]["perplexity"]
        costs = (f"{ways[name]['quality']['perplexity'] - base:+.2f}" for name in ("within_5", "within_1"))
        return f"{' and '.join(costs)} of {base:.2f}"

    return f"{_each_domain(results, said)} (bounds +5 % and +1 %)"


def _adaptation(results: Results) -> str:
    found = results["policy"]
    standard = found["drifting"][traffic.STANDARD]
    return (
        f"{standard['moves']:.1f} in {found['requests']} requests of drifting traffic, mean of "
        f"{standard['traces']} traces; "
        f"{found['profiling']['seconds_per_assessment'] * 1000:.0f} ms per profiling of all "
        f"{len(found['candidates'])} candidates"
    )


def _ablation(results: Results) -> str:
    return "; ".join(
        f"{name}: {row['tokens_per_second']:,.0f} tokens/s, perplexity {row['perplexity_increase']:+.1%}"
        for name, row in results["policy"]["ablation"].items()
    )


def _sweeps(results: Results) -> str:
    sweeps = results["policy"]["paper_sweeps"]
    fastest = max(sweeps["reassess_requests"], key=lambda row: float(row["tokens_per_second"]))
    best = min(sweeps["reassess_requests"], key=lambda row: float(row["perplexity_increase"]))
    low, high = sweeps["threshold"][0], sweeps["threshold"][-1]

    def change(name: str) -> str:
        return f"{high[name] / low[name] - 1:+.0%}"

    return (
        f"RI {fastest['value']} is fastest, RI {best['value']} keeps the best perplexity; TH {high['value']} "
        f"instead of {low['value']}: dynamic {change('dynamic_tokens_per_second')}, "
        f"HELIOS {change('tokens_per_second')}"
    )


_ROWS: tuple[tuple[str, str, tuple[str, ...], Callable[[Results], str]], ...] = (
    (
        "throughput vs single-model EE-LLM, batch 1",
        "1.48x (OPT-1.3B), 2.13x (OPT-6.7B)",
        ("baselines",),
        _throughput,
    ),
    (
        "tokens handled at the earliest exit; tokens needing all layers",
        "91 % (73 % alone); 7.39 %",
        ("insights",),
        _exits,
    ),
    ("largest batch in the same memory, OPT-1.3B shape", "up to 15.14x (v1: 3.7x)", ("memory",), _batch),
    ("memory footprint, OPT-1.3B shape", "down to -67.4 %", ("memory",), _footprint),
    ("TPOT; response time", "down to -46.6 %; 1.39x lower", ("baselines",), _latency),
    ("energy", "1.10x better (0.45 Wh per prompt against 1.01)", ("baselines",), _energy),
    (
        "serving CodeLlama-34B + Llama2-70B vs plain decoding",
        "+45 % (single EE-LLM: +16 %)",
        ("baselines",),
        _plain,
    ),
    ("perplexity cost", "+0.01", ("baselines",), _perplexity),
    (
        "adaptation cost",
        "6 switches or extensions in 1,087 requests; 220 ms per profiling",
        ("policy",),
        _adaptation,
    ),
    (
        "ablation",
        "switching only: fastest, worst perplexity; extending only: accurate, slow",
        ("policy",),
        _ablation,
    ),
    (
        "sweeps",
        "RI 50 fastest, 150 default, > 250 loses; higher TH hurts single EE-LLM, not HELIOS",
        ("policy",),
        _sweeps,
    ),
)
