"""The engine on a CUDA device. Skipped where there is none."""

from pathlib import Path

import pytest
import torch

from helios.engine import Engine, EngineSettings, ExitMode, SamplingParams
from tests.opt_variants import VARIANTS, save_variant

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
