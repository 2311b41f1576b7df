"""Greedy continuations by `transformers`, the reference for parity: `python -m bench.peers.reference`.

It runs in its own process, because a bench must not share its interpreter with torch. It reads a Job as JSON
from stdin and writes {"streams": [{"token_ids", "margins"}], "seconds"} to stdout.
"""

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from helios.errors import HeliosError
from helios.tether import tethered


@dataclass(frozen=True, slots=True)
class Job:
    """Prompts to continue with the first `depth` layers of a checkpoint."""

    checkpoint: str
    depth: int
    max_tokens: int
    prompts: Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class ReferenceStream:
    """A greedy continuation. margins: at each step, the highest logit minus the second."""

    token_ids: list[int]
    margins: list[float]


async def generate(job: Job) -> list[ReferenceStream]:
    """Runs the reference in its own process. Raises HeliosError with its last line when it fails."""
    process = await asyncio.create_subprocess_exec(
        *tethered([sys.executable, "-P", "-m", "bench.peers.reference"]),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate(json.dumps(asdict(job)).encode())
    if process.returncode:
        last_line = err.decode(errors="replace").strip().rpartition("\n")[2]
        raise HeliosError(f"transformers could not continue the prompts: {last_line}")
    return [ReferenceStream(**stream) for stream in json.loads(out)["streams"]]


def main() -> None:
    """Serves one job from stdin."""
    job = Job(**json.load(sys.stdin))
    started = time.monotonic()
    streams = _continue(job)
    answer = {"streams": [asdict(stream) for stream in streams], "seconds": time.monotonic() - started}
    sys.stdout.write(json.dumps(answer))


def _continue(job: Job) -> list[ReferenceStream]:
    import torch  # noqa: PLC0415
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    # One row at a time is too little work for a second thread.
    torch.set_num_threads(1)
    config = AutoConfig.from_pretrained(job.checkpoint)
    # With fewer layers in its config, transformers does not read the weights of the others.
    full_depth, config.num_hidden_layers = config.num_hidden_layers, job.depth
    model: Any = AutoModelForCausalLM.from_pretrained(job.checkpoint, config=config, dtype=torch.float32)
    if job.depth < full_depth:
        _use_exit_head(model, Path(job.checkpoint), job.depth)
    model.generation_config.eos_token_id = None
    streams = []
    for prompt in job.prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=job.max_tokens,
            output_logits=True,
            return_dict_in_generate=True,
        )
        # [steps, 2]
        top = torch.cat(output.logits).topk(2).values
        streams.append(
            ReferenceStream(output.sequences[0, len(prompt) :].tolist(), (top[:, 0] - top[:, 1]).tolist())
        )
    return streams


def _use_exit_head(model: Any, checkpoint: Path, depth: int) -> None:
    """Replaces the final norm by the checkpoint's exit head of `depth`, if it has one."""
    from safetensors.torch import load_file  # noqa: PLC0415
    from torch import nn  # noqa: PLC0415

    facts = json.loads((checkpoint / "helios.json").read_text())
    if facts["exit_head"] == "shared":
        return
    tensors = load_file(checkpoint / "exits.safetensors")
    # OPT's decoder and its norm have other names than those of all other architectures.
    decoder = getattr(model.model, "decoder", model.model)
    name = "final_layer_norm" if hasattr(decoder, "final_layer_norm") else "norm"
    norm = getattr(decoder, name)
    norm.weight.data = tensors[f"exits.{depth}.norm.weight"].float()
    if hasattr(norm, "bias"):
        norm.bias.data = tensors[f"exits.{depth}.norm.bias"].float()
    if facts["exit_head"] == "linear":
        linear = nn.Linear(norm.weight.numel(), norm.weight.numel(), bias=False)
        linear.weight.data = tensors[f"exits.{depth}.linear.weight"].float()
        setattr(decoder, name, nn.Sequential(norm, linear))


if __name__ == "__main__":
    main()
