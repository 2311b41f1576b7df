"""Cards, README.md, of bundled models and of added exits, from the figures in their helios.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helios.calibration import TARGET_AGREEMENT
from helios.catalog import EarlyExitFacts, Fidelity


def write_card(directory: Path, exits: EarlyExitFacts, licences: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write `directory`/README.md. All its figures come from the evaluation."""
    facts = exits.training
    config = json.loads((directory / "config.json").read_text())
    own = facts["own_domains"]
    size = (directory / "model.safetensors").stat().st_size / 1e6
    sections = [
        f"# {directory.name}",
        f"An early-exit OPT, bundled with Helios so that it runs without a download. It is for "
        f"{_titles(own, licences)}. On other text it is weak on purpose, because the other bundled model is "
        "for that.",
        f"- {config['num_hidden_layers']} layers x {config['hidden_size']}, "
        f"{config['num_attention_heads']} heads, {facts['parameters'] / 1e6:.1f} M parameters, "
        f"context {config['max_position_embeddings']} tokens, "
        f"vocabulary {config['vocab_size']}, bf16, {size:.1f} MB.\n"
        f"- Exits after layers {', '.join(map(str, exits.exit_layers))}, read through the shared final norm "
        f"and the tied LM head. Default depth: {exits.default_depth} (the smallest within 5 % of the last "
        "layer's perplexity on its own text).\n"
        "- It is an ordinary `transformers` checkpoint: `OPTForCausalLM.from_pretrained` loads all layers of "
        "it.\n"
        "- It is a language model of the texts below and nothing more. It follows no instructions, and what "
        "it says need not be true.",
        "## Training",
        f"{facts['steps']:,} steps of {facts['tokens_per_step']:,} tokens ({facts['tokens'] / 1e6:.1f} M in "
        f"all) in {facts['hours']:.1f} hours, from scratch, on one or two CPU cores that also did other "
        "work, by `python -m training.train` (training/README.md has the recipe). A step reads out the last "
        "layer and some of the exits. The loss is cross-entropy, and distillation of the last layer into the "
        "exits.",
        _mix_table(facts["domains"], licences),
        "## Figures",
        "Measured by `python -m training.evaluate` on held-out documents, in windows of the whole context "
        "without overlap. The threshold of an exit is the lowest confidence from which "
        f"{100 * TARGET_AGREEMENT:.0f} % of tokens agree with the last layer. It is calibrated on windows "
        "that the tables leave out.",
        _threshold_table(exits),
        *(_precision_table(precision, found) for precision, found in exits.precisions.items()),
        *([_figure_table("Its own texts together", facts["own_evaluation"])] if len(own) > 1 else []),
        *(
            _figure_table(f"{licences[name]['name']}{' (its own)' if name in own else ''}", found)
            for name, found in facts["evaluation"].items()
        ),
        "## Samples",
        *(_sample(sample) for sample in facts["samples"]),
    ]
    path = directory / "README.md"
    path.write_text("\n\n".join(sections) + "\n")
    return path


def write_exit_card(directory: Path, exits: EarlyExitFacts, model: str) -> Path:
    """Write `directory`/README.md about the exits that were added to `model`."""
    facts = exits.training
    own = facts["own_evaluation"]
    tuned = (
        f"The heads (`{exits.exit_head}`) were tuned on the frozen model by `helios models add-exits`, in "
        f"{facts['steps']:,} steps of {facts['tokens_per_step']:,} tokens over {facts['text_tokens']:,} "
        f"tokens of these texts: {', '.join(facts['texts'])}. The loss is "
        f"{facts['exit_weight']:g} x cross-entropy + {facts['distill_weight']:g} x KL(last layer || exit)."
        if exits.exit_head != "shared"
        else "All exits are read through the model's own final norm and LM head. Nothing was tuned."
    )
    sections = [
        f"# Exits of {model}",
        f"- Exits after layers {', '.join(map(str, exits.exit_layers))}. Default depth: "
        f"{exits.default_depth}.\n- {_worth(own, exits.default_depth)}",
        "## How they were made",
        tuned,
        "## Figures",
        "Measured on the held-out ends of the texts, and of conversations only on the answers. The threshold "
        f"of an exit is the lowest confidence from which {100 * TARGET_AGREEMENT:.0f} % of tokens agree with "
        "the last layer. It is calibrated on passages that the tables leave out.",
        _threshold_table(exits),
        *([_figure_table("All texts together", own)] if len(facts["evaluation"]) > 1 else []),
        *(_figure_table(name, found) for name, found in facts["evaluation"].items()),
    ]
    path = directory / "README.md"
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def _worth(figures: Mapping[str, Mapping[str, float | None]], default_depth: int) -> str:
    """What the best exit brings, in a sentence."""
    *early, last = figures
    full = figures[last]["perplexity"] or 1.0
    increase = {layer: (figures[layer]["perplexity"] or 0.0) / full - 1 for layer in early}
    if default_depth < int(last):
        return (
            f"Depth {default_depth} of {last} is the shallowest whose perplexity is within 5 % of the last "
            f"layer's ({increase[str(default_depth)]:+.1%})."
        )
    layer, least = min(increase.items(), key=lambda item: item[1])
    return (
        f"No exit is within 5 % of the last layer's perplexity. The nearest is the one after layer {layer} "
        f"of {last}: {least:+.1%}."
    )


def _titles(names: list[str], licences: Mapping[str, Mapping[str, Any]]) -> str:
    titles = [f"the {str(licences[name]['name']).removeprefix('The ')}" for name in names]
    return titles[0] if len(titles) == 1 else ", ".join(titles[:-1]) + " and " + titles[-1]


def _mix_table(domains: Mapping[str, float], licences: Mapping[str, Mapping[str, Any]]) -> str:
    rows = ["| text | share of windows | Debian package | licence |", "| --- | --- | --- | --- |"]
    for name, share in sorted(domains.items(), key=lambda item: -item[1]):
        record = licences[name]
        packages = ", ".join(record["packages"])
        rows.append(f"| {record['name']} | {share:.0%} | {packages} | {record['licence']} |")
    return "\n".join(rows)


def _threshold_table(exits: EarlyExitFacts) -> str:
    return "\n".join(
        [
            f"| exit | {' | '.join(map(str, exits.exit_layers))} |",
            f"| --- {'| --- ' * len(exits.exit_layers)}|",
            f"| threshold | {' | '.join(f'{exits.thresholds[layer]:.2f}' for layer in exits.exit_layers)} |",
        ]
    )


def _precision_table(precision: str, found: Mapping[int, Fidelity]) -> str:
    return "\n".join(
        [
            f"{precision} compared with float32, on its kind of text in `bench/texts` "
            "(`helios models measure`):",
            "",
            f"| exit | {' | '.join(map(str, found))} |",
            f"| --- {'| --- ' * len(found)}|",
            f"| perplexity | {' | '.join(f'{one.perplexity_increase:+.2%}' for one in found.values())} |",
            f"| same most likely token | {' | '.join(f'{one.agreement:.1%}' for one in found.values())} |",
        ]
    )


def _figure_table(title: str, exits: Mapping[str, Mapping[str, float | None]]) -> str:
    rows = [
        f"### {title}",
        "",
        "| exit | perplexity per token | bits per byte | agrees with last layer | confidence >= 0.8 "
        "| above threshold (agree) | agree of confidence < 0.5 | agree of those below threshold |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    last = list(exits)[-1]
    for layer, found in exits.items():
        above = f"{_percent(found['above_threshold'])} ({_percent(found['agreement_above_threshold'])})"
        columns = [
            layer,
            f"{found['perplexity']:.2f}",
            f"{found['bits_per_byte']:.3f}",
            "-" if layer == last else _percent(found["agreement"]),
            _percent(found["confident"]),
            "-" if layer == last else above,
            "-" if layer == last else _percent(found["agreement_unsure"]),
            "-" if layer == last else _percent(found["agreement_below_threshold"]),
        ]
        rows.append(f"| {' | '.join(columns)} |")
    return "\n".join(rows)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _sample(sample: Mapping[str, Any]) -> str:
    how = "greedy" if sample["temperature"] == 0 else f"temperature {sample['temperature']}, top-p 0.95"
    text = str(sample["text"]).replace("```", "'''")
    return f"Prompt {json.dumps(sample['prompt'])}, {how}, all layers:\n\n```text\n{text}\n```"
