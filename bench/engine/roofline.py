"""The limits of the machine: read bandwidth, matrix rates, and the least time that a load can take.

Williams, Waterman, Patterson, "Roofline: An Insightful Visual Performance Model", CACM 2009. The limits are
those of the faster of torch's kernels and Helios's. They are measured in their own process:
`python -m bench.engine.roofline THREADS`.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from helios.architectures.spec import ModelConfig
from helios.errors import HeliosError
from helios.footprint import kv_bytes_per_token
from helios.tether import tethered

# Far more than the caches hold.
_READ_BYTES = 512 << 20
_MATRIX = 2048
# Time for each kernel. It is long enough to include a moment without other work on the machine.
_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes read per second, and operations per second by precision. A multiply-add is two operations."""

    bytes_per_second: float
    operations_per_second: Mapping[str, float]


def measure(threads: int) -> Limits:
    """The machine's limits with `threads` threads. Raises HeliosError when they cannot be measured."""
    done = subprocess.run(
        tethered([sys.executable, "-P", "-m", "bench.engine.roofline", str(threads)]),
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise HeliosError(f"the machine's limits were not measured: {done.stderr.strip()}")
    return Limits(**json.loads(done.stdout))


def highest(first: Limits, second: Limits) -> Limits:
    """The higher of both measurements: a rate that the machine once reached is possible."""
    rates = {
        name: max(rate, second.operations_per_second[name])
        for name, rate in first.operations_per_second.items()
    }
    return Limits(max(first.bytes_per_second, second.bytes_per_second), rates)


def bytes_per_step(config: ModelConfig, depth: int, weight_bytes: float, batch: int, context: int) -> float:
    """Bytes that a decode step must read: the weights once, and the KV of all tokens in bfloat16.

    context: tokens of each sequence. The embeddings of the step's tokens are not counted.
    """
    kv = kv_bytes_per_token(config, depth, "bfloat16") * batch * context
    return config.step_parameters(depth) * weight_bytes + kv


def least_seconds(
    config: ModelConfig,
    depth: int,
    products: str,
    weight_bytes: float,
    batch: int,
    prompt_tokens: int,
    output_tokens: int,
    limits: Limits,
) -> float:
    """The least time for prefill and decoding of a batch. Each step takes the time of its tighter limit.

    products: the precision of the products. weight_bytes: bytes of a weight.
    """
    rate = limits.operations_per_second[products]

    def seconds(operations: float, read: float) -> float:
        return max(operations / rate, read / limits.bytes_per_second)

    head = config.vocab_size * config.embed_size
    layers = config.step_parameters(depth) - head
    # A token attends to all tokens before it: one product with keys, one with values.
    attended = 2 * 2 * depth * config.query_size
    prefill = batch * (
        2 * layers * prompt_tokens + attended * prompt_tokens * (prompt_tokens + 1) / 2 + 2 * head
    )
    least = seconds(prefill, config.step_parameters(depth) * weight_bytes)
    for context in range(prompt_tokens + 1, prompt_tokens + output_tokens):
        operations = batch * (2 * (layers + head) + attended * context)
        least += seconds(operations, bytes_per_step(config, depth, weight_bytes, batch, context))
    return least


def main() -> None:
    """Writes the Limits as JSON to stdout."""
    import torch  # noqa: PLC0415

    from helios.engine.kernels.team import TEAM  # noqa: PLC0415
    from helios.engine.weights.linear import pack  # noqa: PLC0415
    from helios.engine.weights.parts import LinearWeights  # noqa: PLC0415
    from helios.engine.weights.quantize import quantize  # noqa: PLC0415

    torch.set_num_threads(int(sys.argv[1]))
    source = torch.ones(_READ_BYTES // 4)
    bandwidth = _READ_BYTES / _best(source.sum)
    operations = 2 * _MATRIX**3
    rows = torch.randn(_MATRIX, _MATRIX)
    whole, scales = quantize(rows)
    seconds, packed = {}, {"int8": pack(LinearWeights(whole, None, scales))}
    for name in ("float32", "bfloat16"):
        matrix = rows.to(getattr(torch, name))
        packed[name] = pack(LinearWeights(matrix, None))
        seconds[name] = _best(partial(torch.matmul, matrix, matrix))
    # Weights are stored as [out, in] and used transposed.
    seconds["int8"] = _best(partial(torch._int_mm, whole, whole.T))
    # Torch's threads spin for a while after their work, so only one is kept.
    torch.set_num_threads(1)
    TEAM.threads = int(sys.argv[1])
    rates = {name: operations / min(seconds[name], _best(partial(packed[name], rows))) for name in seconds}
    sys.stdout.write(json.dumps(asdict(Limits(bandwidth, rates))))


def _best(act: Callable[[], Any]) -> float:
    """Seconds of the fastest of many runs, which nothing disturbed."""
    act()
    seconds: list[float] = []
    while sum(seconds) < _SECONDS:
        started = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


if __name__ == "__main__":
    main()
