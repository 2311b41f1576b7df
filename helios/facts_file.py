"""Writes helios.json, the early-exit facts beside a checkpoint. `helios.catalog` reads it."""

import json
from dataclasses import asdict
from pathlib import Path

from helios.catalog import FACTS_FILE, FORMAT_VERSION, EarlyExitFacts


def write_facts(directory: Path, facts: EarlyExitFacts) -> None:
    """Writes `facts` to `directory`, completely or not at all."""
    contents = {
        "format_version": FORMAT_VERSION,
        "exit_layers": list(facts.exit_layers),
        "exit_head": facts.exit_head,
        "thresholds": {str(layer): value for layer, value in facts.thresholds.items()},
        "tokenizer_id": facts.tokenizer_id,
        "default_depth": facts.default_depth,
        "precisions": {
            precision: {str(layer): asdict(found) for layer, found in by_layer.items()}
            for precision, by_layer in facts.precisions.items()
        },
        "training": dict(facts.training),
    }
    if facts.weights_digest is not None:
        contents["weights_digest"] = facts.weights_digest
    partial = directory / (FACTS_FILE + ".partial")
    partial.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(directory / FACTS_FILE)
