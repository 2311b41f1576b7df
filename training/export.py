"""From a training state to a Hugging Face OPT checkpoint in bf16."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from helios.architectures.registry import CONFIG_FILE
from helios.catalog import EarlyExitFacts
from helios.errors import HeliosError
from helios.facts_file import write_facts
from helios.staging import check_free, staged
from training.checkpoint import load_state
from training.corpora import DEFAULT_DIRECTORY
from training.model import EarlyExitOPT, ModelShape
from training.tokenizer import tokenizer_id


def hf_tensors(model: EarlyExitOPT) -> dict[str, Tensor]:
    """A copy of the model's weights in bf16 under `OPTForCausalLM`'s names."""
    return {name: tensor.to(torch.bfloat16).contiguous().clone() for name, tensor in model.hf_views().items()}


def export_model(state_path: Path, target: Path, tokenizer: Path, *, force: bool = False) -> None:
    """Write a checkpoint directory atomically from a state of training.train.

    Its helios.json is not calibrated yet: see training/evaluate.py. Raises CheckpointError when the state
    cannot be read, or when `target` exists and `force` is false.
    """
    check_free(target, replace=force)
    state = load_state(state_path)
    shape = ModelShape(**state["shape"])
    model = EarlyExitOPT(shape)
    model.load_state_dict(state["model"])
    config = state["config"]
    training = {
        "domains": config["domains"],
        "own_domains": list(config["own_domains"]),
        "steps": state["step"],
        "tokens_per_step": config["tokens_per_step"],
        "tokens": state["step"] * config["tokens_per_step"],
        "hours": round(state["seconds"] / 3600, 2),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seed": config["seed"],
    }
    with staged(target, replace=force) as staging:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tokenizer / name, staging / name)
        (staging / CONFIG_FILE).write_text(json.dumps(shape.hf_config(), indent=2, sort_keys=True) + "\n")
        weights = staging / "model.safetensors"
        save_file(hf_tensors(model), str(weights), metadata={"format": "pt"})
        shutil.copymode(staging / CONFIG_FILE, weights)  # safetensors makes it private
        facts = EarlyExitFacts(
            exit_layers=shape.exit_layers,
            exit_head="shared",
            default_depth=shape.num_layers,
            thresholds=dict.fromkeys(shape.exit_layers[:-1], 1.0) | {shape.num_layers: 0.0},
            tokenizer_id=tokenizer_id(staging / "tokenizer.json"),
            training=training,
        )
        write_facts(staging, facts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.export", description=__doc__)
    parser.add_argument("state", type=Path, help="a state.pt of training.train")
    parser.add_argument("target", type=Path, help="directory to write")
    parser.add_argument("--tokenizer", type=Path, default=DEFAULT_DIRECTORY / "tokenizer")
    parser.add_argument("--force", action="store_true", help="replace the target")
    arguments = parser.parse_args()
    export_model(arguments.state, arguments.target, arguments.tokenizer, force=arguments.force)


if __name__ == "__main__":
    try:
        main()
    except HeliosError as error:
        sys.exit(f"error: {error}")
