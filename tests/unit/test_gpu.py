"""The engine on a CUDA device. Skipped where there is none."""

from functools import partial
from pathlib import Path

import pytest
import torch

from helios.engine import Engine, EngineSettings, ExitMode, Output, SamplingParams
from tests.variants import TYPICAL, VARIANTS, save_variant

EXITS = (1, 2, 4, 6)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("mode", ExitMode)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gpu_gives_the_tokens_of_the_cpu(tmp_path: Path, variant: str, mode: ExitMode) -> None:
    save_variant(tmp_path, variant, 31, exits=EXITS)
    depth = 4 if mode is ExitMode.GREEDY else 6
    tokens = {}
    for device in ("cpu", "cuda"):
        settings = EngineSettings(device=device, exit_mode=mode, threshold=0.1, memory_bytes=256 << 20)
        engine = Engine.load(tmp_path, depth, settings)
        tokens[device] = [
            (token.token_id, token.exit_layer)
            for sampling in (
                SamplingParams(max_tokens=30, ignore_eos=True),
                SamplingParams(max_tokens=30, ignore_eos=True, temperature=0.8, top_p=0.9, top_k=50, seed=1),
            )
            for token in engine.generate([2, 40, 50], sampling)
        ]
    assert tokens["cuda"] == tokens["cpu"]


@pytest.mark.parametrize("variant", TYPICAL)
def test_a_captured_step_gives_the_tokens_of_one_that_is_not(tmp_path: Path, variant: str) -> None:
    save_variant(tmp_path, variant, 32, exits=EXITS)
    prompts = [[2, 40 + n, *range(50, 50 + 3 * n)] for n in range(5)]
    tokens = []
    for captured in (True, False):
        settings = EngineSettings(device="cuda", memory_bytes=256 << 20, cuda_graphs=captured)
        engine = Engine.load(tmp_path, 4, settings)
        found: list[list[int]] = [[] for _ in prompts]

        def sink(mine: list[int], output: Output) -> None:
            mine.extend(one.token_id for one in output.tokens)

        for index, prompt in enumerate(prompts):
            sampling = SamplingParams(max_tokens=20 + index, ignore_eos=True)
            engine.submit(str(index), prompt, sampling, partial(sink, found[index]))
            engine.step()
        while engine.step():
            if len(found[0]) == 10:
                # The reload keeps the KV cache. Graphs of the deeper plan must not run any more.
                engine.reload(tmp_path, 2)
        tokens.append(found)
    assert tokens[0] == tokens[1]
