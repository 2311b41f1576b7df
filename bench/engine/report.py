"""The report of `helios bench engine`: Markdown, and its plots as PNG files beside it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.engine import loading
from bench.page import Page
from bench.peers.contenders import CONTENDERS
from bench.results import Report, machine

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Rows = Sequence[Mapping[str, Any]]


def write(report: Report, path: Path) -> None:
    """Writes the report of the cells that `report` has."""
    page = Page(path)
    results = report.results
    limits = results["limits"]
    rates = ", ".join(
        f"{rate / 1e9:,.0f} G operations/s in {name}"
        for name, rate in limits["operations_per_second"].items()
    )
    page.say(
        "# The engine against other engines",
        f"`helios bench engine`, {results['settings']['threads']} threads for each, greedy, end of text "
        f"ignored, the same weights and prompts, taking turns. Machine: `{json.dumps(machine())}`; it reads "
        f"{limits['bytes_per_second'] / 1e9:.1f} GB/s and multiplies {rates}.",
    )
    page.targets(report.targets)
    if results["failed"]:
        page.say("## What did not run")
        page.table(
            ("engine", "load", "reason"),
            [(one["contender"], _load(one["cell"]), one["reason"]) for one in results["failed"]],
        )
    page.say("## Loading", f"In {loading.PRECISION}, from disk unless it says otherwise.")
    page.table(
        ("model", "seconds"), [(name, loading.in_words(one)) for name, one in results["loading"].items()]
    )
    for shape, facts in results["shapes"].items():
        for prompt_tokens in sorted(
            {row["prompt_tokens"] for row in results["cells"] if row["shape"] == shape}
        ):
            rows = [
                row
                for row in results["cells"]
                if (row["shape"], row["prompt_tokens"]) == (shape, prompt_tokens)
            ]
            _load_of_a_shape(page, shape, facts, prompt_tokens, rows)
    page.write()


def _load_of_a_shape(
    page: Page, shape: str, facts: Mapping[str, Any], prompt_tokens: int, rows: _Rows
) -> None:
    page.say(
        f"## {shape} ({facts['name']}, {facts['parameters'] / 1e6:,.0f} M parameters), "
        f"{prompt_tokens} tokens in, {rows[0]['output_tokens']} out",
        "Tokens a second over the whole run, prefill included: median of the rounds, lowest and highest. "
        "Agreement: tokens before the first that differs from the reference's.",
    )
    page.table(
        (
            *("batch", "engine", "tokens/s", "TTFT ms", "TPOT ms", "to the best peer"),
            *("of the roofline", "of the bandwidth, decoding", "agreement"),
        ),
        [
            (
                row["batch"],
                row["contender"],
                "{median:,.0f} ({min:,.0f} to {max:,.0f})".format(**row["tokens_per_second"]),
                f"{row['ttft_ms']:,.0f}",
                f"{row['tpot_ms']:.1f}",
                _ratio(row),
                f"{row['share_of_roofline']:.0%}",
                f"{row['share_of_bandwidth']:.0%}",
                _share(row["agreement_with_reference"]),
            )
            for row in sorted(rows, key=lambda row: row["batch"])
        ],
    )

    def draw(axes: "Axes") -> None:
        for index, one in enumerate(CONTENDERS):
            own = sorted((row for row in rows if row["contender"] == one.name), key=lambda row: row["batch"])
            if own:
                axes.plot(
                    [row["batch"] for row in own],
                    [row["tokens_per_second"]["median"] for row in own],
                    marker="o",
                    linestyle="--" if one.is_peer else "-",
                    color=f"C{index}",
                    label=one.name,
                )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("batch")
        axes.set_ylabel("tokens/s")
        axes.legend(fontsize="small")

    page.plot(f"{shape}-{prompt_tokens}", f"{shape}, {prompt_tokens} tokens in (dashed: peers)", draw)


def _load(cell: Mapping[str, Any] | None) -> str:
    return "all" if cell is None else "{shape}, {prompt_tokens} in, batch {batch}".format(**cell)


def _ratio(row: Mapping[str, Any]) -> str:
    best = row["ratio_to"].get("best_peer")
    return "" if best is None else f"{best['ratio']:.2f}x {best['contender']}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
