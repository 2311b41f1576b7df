"""Computes the figures of `helios bench engine` from its runs: the summary and the targets."""

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.engine import roofline
from bench.engine.roofline import Limits
from bench.peers.contenders import CONTENDERS, Contender
from bench.results import Target
from bench.systems.shapes import FIRST_TOKEN
from helios.architectures.registry import CONFIG_FILE, config_of
from helios.architectures.spec import ModelConfig


@dataclass(frozen=True, slots=True)
class Cell:
    """A load on a model: `batch` prompts that run at once."""

    shape: str
    prompt_tokens: int
    output_tokens: int
    batch: int

    def prompts(self, number: int, vocab_size: int, repeat: int = 0) -> list[list[int]]:
        """Random prompts, the same for every contender. They depend on `number` and `repeat`, so an engine
        that caches the KV of earlier prompts gains nothing."""
        draw = random.Random(f"{self} {number} {repeat}")
        tokens = range(FIRST_TOKEN, vocab_size)
        return [draw.choices(tokens, k=self.prompt_tokens) for _ in range(self.batch)]


def cell_of(run: Mapping[str, Any]) -> Cell:
    """The cell to which a run, or a row of the results, belongs."""
    return Cell(run["shape"], run["prompt_tokens"], run["output_tokens"], run["batch"])


def agreement(token_ids: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> float:
    """Share of the tokens before the first one that differs from the reference, over all sequences."""
    same = 0
    for ids, wanted in zip(token_ids, reference, strict=True):
        pairs = enumerate(zip(ids, wanted, strict=True))
        same += next((index for index, (one, other) in pairs if one != other), len(ids))
    return same / sum(map(len, reference))


def summarise(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each contender in each cell: figures over the rounds; for Helios also ratios to others.

    The best peer has the highest median of those with at least 8 bits a weight. A ratio is the median over
    the rounds that both have run.
    """
    seconds: dict[Cell, dict[str, dict[int, float]]] = {}
    runs: dict[tuple[Cell, str], list[Mapping[str, Any]]] = {}
    for run in results["runs"]:
        cell = cell_of(run)
        seconds.setdefault(cell, {}).setdefault(run["contender"], {})[run["round"]] = run["seconds"]
        runs.setdefault((cell, run["contender"]), []).append(run)
    limits = Limits(**results["limits"])
    rows = []
    for cell, by_name in seconds.items():
        facts = results["shapes"][cell.shape]
        config = config_of(facts["config"], Path(cell.shape) / CONFIG_FILE)
        present = [one for one in CONTENDERS if one.name in by_name]
        least = {one.name: _least_seconds(one, cell, config, limits) for one in present}
        rows += [
            {
                **asdict(cell),
                "contender": one.name,
                "rounds": len(by_name[one.name]),
                **_figures(one, cell, runs[cell, one.name], config, limits, least[one.name]),
                "ratio_to": {} if one.is_peer else _ratios(one, present, by_name, least),
            }
            for one in present
        ]
    return rows


def _least_seconds(one: Contender, cell: Cell, config: ModelConfig, limits: Limits) -> float:
    depth, load = one.depth(config.num_layers), (cell.batch, cell.prompt_tokens, cell.output_tokens)
    return roofline.least_seconds(config, depth, one.products, one.weight_bytes, *load, limits)


def _figures(
    one: Contender,
    cell: Cell,
    runs: Sequence[Mapping[str, Any]],
    config: ModelConfig,
    limits: Limits,
    least: float,
) -> dict[str, Any]:
    depth = one.depth(config.num_layers)
    tokens = cell.batch * cell.output_tokens
    rates = [tokens / run["seconds"] for run in runs]
    step = statistics.median(
        (run["seconds"] - run["first_token_seconds"]) / (cell.output_tokens - 1) for run in runs
    )
    context = cell.prompt_tokens + cell.output_tokens // 2
    read = roofline.bytes_per_step(config, depth, one.weight_bytes, cell.batch, context)
    agreements = [run["agreement"] for run in runs if run["agreement"] is not None]
    overheads = [run["overhead"] for run in runs if run.get("overhead") is not None]
    return {
        "tokens_per_second": {"min": min(rates), "median": statistics.median(rates), "max": max(rates)},
        "ttft_ms": statistics.median(run["first_token_seconds"] for run in runs) * 1000,
        "tpot_ms": step * 1000,
        "share_of_roofline": least / statistics.median(run["seconds"] for run in runs),
        "share_of_bandwidth": read / step / limits.bytes_per_second,
        "overhead": statistics.median(overheads) if overheads else None,
        "agreement_with_reference": statistics.fmean(agreements) if agreements else None,
    }


def _ratios(
    one: Contender,
    present: Sequence[Contender],
    seconds: Mapping[str, Mapping[int, float]],
    least: Mapping[str, float],
) -> dict[str, Any]:
    """Ratios of its speed to the best contender of each kind, over the rounds that both ran.

    Next to the ratio to its own full depth is the best ratio that the machine's limits allow.
    """
    own = seconds[one.name]
    kinds = {
        "best_peer": [other for other in present if other.is_rival],
        "best_peer_of_precision": [
            other for other in present if other.is_rival and other.products == one.products
        ],
        "full_depth": [other for other in present if one.is_part_of(other)],
    }
    found = {}
    for kind, others in kinds.items():
        beside = [other for other in others if own.keys() & seconds[other.name].keys()]
        if beside:
            best = min(beside, key=lambda other: statistics.median(seconds[other.name].values()))
            theirs = seconds[best.name]
            ratio = statistics.median(theirs[number] / own[number] for number in own.keys() & theirs.keys())
            found[kind] = {"contender": best.name, "ratio": ratio}
            if kind == "full_depth":
                found[kind]["of_rooflines"] = least[best.name] / least[one.name]
    return found


def title(row: Mapping[str, Any]) -> str:
    """The name of a row, for people."""
    return f"{row['shape']}, {row['prompt_tokens']} in, batch {row['batch']}: {row['contender']}"


def in_words(row: Mapping[str, Any]) -> str:
    """The figures of a row, for people."""
    rate = row["tokens_per_second"]
    words = (
        f"{rate['median']:,.0f} tokens/s ({rate['min']:,.0f} to {rate['max']:,.0f}), "
        f"TTFT {row['ttft_ms']:,.0f} ms, TPOT {row['tpot_ms']:.1f} ms, "
        f"{row['share_of_roofline']:.0%} of the roofline"
    )
    if row["overhead"] is not None:
        words += f", {row['overhead']:.0%} outside of compiled code"
    for kind, other in row["ratio_to"].items():
        if kind != "best_peer_of_precision":
            words += f"; {_in_proportion(other)}"
    return words


def _in_proportion(other: Mapping[str, Any]) -> str:
    words = f"{other['ratio']:.2f}x {other['contender']}"
    if "of_rooflines" in other:
        words += f", by bytes and operations {other['of_rooflines']:.2f}x"
    return words


@dataclass(frozen=True, slots=True)
class _Goal:
    """By batch, the ratio to `against` that the best of the contenders must reach."""

    shape: str
    contenders: tuple[str, ...]
    against: str
    factors: Mapping[int, float]


_IN_WORDS = {
    "best_peer": "the best peer",
    "best_peer_of_precision": "the best peer of its precision",
    "full_depth": "its own full depth",
}
GOALS = (
    _Goal("opt-125m", ("helios-int8",), "best_peer", {1: 2.5, 8: 2.5, 32: 2.0}),
    _Goal("opt-125m", ("helios-bfloat16",), "best_peer_of_precision", {1: 1.2, 8: 1.1, 32: 1.1}),
    _Goal("opt-1.3b", ("helios-int8",), "best_peer", {1: 2.0, 8: 2.0, 32: 1.5}),
    _Goal("smollm2", ("helios-int8",), "best_peer", {1: 2.0, 8: 2.0, 32: 1.5}),
    _Goal("tinyllama-1.1b", ("helios-int8",), "best_peer", {1: 2.0, 8: 2.0, 32: 1.5}),
    _Goal("bundled", ("helios-int8", "helios-float32"), "best_peer", {1: 3.0, 8: 2.5, 32: 2.0}),
    _Goal("opt-125m", ("helios-int8-half",), "full_depth", {1: 1.7, 8: 1.7, 32: 1.7}),
    _Goal("opt-1.3b", ("helios-int8-half",), "full_depth", {1: 1.9, 8: 1.9, 32: 1.9}),
)
_BANDWIDTH_SHAPE, _BANDWIDTH_CONTENDER, _BANDWIDTH_SHARE = "opt-1.3b", "helios-int8", 0.7
_OVERHEAD_SHAPE, _OVERHEAD_BATCH, _OVERHEAD = "bundled", 8, 0.1


def targets(rows: Sequence[Mapping[str, Any]]) -> list[Target]:
    """The targets for which there are measured cells."""
    found = []
    for goal in GOALS:
        mine = [
            row
            for row in rows
            if row["shape"] == goal.shape
            and row["contender"] in goal.contenders
            and goal.against in row["ratio_to"]
        ]
        for cell in dict.fromkeys(cell_of(row) for row in mine):
            if cell.batch not in goal.factors:
                continue
            best = max(
                (row for row in mine if cell_of(row) == cell),
                key=lambda row: row["ratio_to"][goal.against]["ratio"],
            )
            other, factor = best["ratio_to"][goal.against], goal.factors[cell.batch]
            found.append(
                Target(
                    f"{title(best)} against {_IN_WORDS[goal.against]}",
                    f">= {factor:g}x",
                    _in_proportion(other),
                    other["ratio"] >= factor,
                )
            )
    found += [
        Target(
            f"{title(row)}: share of the read bandwidth while decoding",
            f">= {_BANDWIDTH_SHARE:.0%}",
            f"{row['share_of_bandwidth']:.0%}",
            row["share_of_bandwidth"] >= _BANDWIDTH_SHARE,
        )
        for row in rows
        if (row["shape"], row["contender"], row["batch"]) == (_BANDWIDTH_SHAPE, _BANDWIDTH_CONTENDER, 1)
    ]
    found += [
        Target(
            f"{title(row)}: share of decoding outside of compiled code",
            f"< {_OVERHEAD:.0%}",
            f"{row['overhead']:.1%}",
            row["overhead"] < _OVERHEAD,
        )
        for row in rows
        if (row["shape"], row["batch"]) == (_OVERHEAD_SHAPE, _OVERHEAD_BATCH) and row["overhead"] is not None
    ]
    return found
