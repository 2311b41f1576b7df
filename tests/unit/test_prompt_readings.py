"""Sampled nats of a prompt's own tokens equal those of the model's logits, for every way of computing it."""

from pathlib import Path

import pytest
import torch
from transformers import OPTForCausalLM

from helios.engine import Engine, EngineSettings, ExitMode, SamplingParams
from helios.engine.interface import Counters
from tests.opt_variants import save_variant

READINGS = 3
PROMPT = [2, *range(5, 52)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "random"
    save_variant(path, "pre-norm", 21, exits=(1, 2, 4, 6))
    return path


def serve(
    model: Path, *prompts: list[int], sampling: SamplingParams | None = None, **settings: object
) -> Counters:
    """The counters of an engine that has served the prompts one after the other."""
    options = {"prompt_readings": READINGS, "memory_bytes": 64 << 20, "block_tokens": 4} | settings
    engine = Engine.load(model, 6, EngineSettings(**options))
    for prompt in prompts:
        list(engine.generate(prompt, sampling or SamplingParams(max_tokens=3)))
    return engine.telemetry().counters


def expected(model: Path, prompt: list[int]) -> float:
    """Nats of the tokens after the sampled positions, computed by transformers with the same weights."""
    reference = OPTForCausalLM.from_pretrained(model, dtype=torch.float32)
    logprobs = reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
    predicted = len(prompt) - 1
    at = [(2 * index + 1) * predicted // (2 * READINGS) for index in range(READINGS)]
    return -sum(float(logprobs[position, prompt[position + 1]]) for position in at)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"step_token_budget": 7, "max_running": 4},
        {"exit_mode": ExitMode.DYNAMIC, "threshold": 0.0},
        {"sampling": SamplingParams(max_tokens=3, temperature=0.7, seed=3, repetition_penalty=1.2)},
    ],
    ids=["whole", "in chunks", "dynamic", "beside drawn tokens"],
)
@torch.inference_mode()
def test_readings_are_the_models_own_probabilities(model: Path, settings: dict[str, object]) -> None:
    counters = serve(model, PROMPT, **settings)
    assert (counters.prompts_read, counters.prompt_tokens_read) == (1, READINGS)
    assert counters.prompt_nats == pytest.approx(expected(model, PROMPT), abs=1e-3)


def test_what_is_not_computed_is_not_read(model: Path) -> None:
    once, twice = serve(model, PROMPT), serve(model, PROMPT, PROMPT)
    assert twice.prompts_read == once.prompts_read
    assert twice.prompt_nats == once.prompt_nats


def test_short_prompts_give_few_tokens_and_the_shortest_none(model: Path) -> None:
    counters = serve(model, PROMPT[:33])
    assert counters.prompt_tokens_read == 2
    counters = serve(model, PROMPT[:15])
    assert (counters.prompts_read, counters.prompt_tokens_read) == (0, 0)


def test_readings_do_not_change_tokens(model: Path) -> None:
    def ids(readings: int) -> list[int]:
        engine = Engine.load(model, 6, EngineSettings(prompt_readings=readings, memory_bytes=64 << 20))
        sampling = SamplingParams(max_tokens=8, temperature=0.9, seed=11, repetition_penalty=1.3)
        return [token.token_id for token in engine.generate(PROMPT, sampling)]

    assert ids(READINGS) == ids(0)


def test_a_prompt_that_is_computed_anew_is_read_once(model: Path) -> None:
    settings = EngineSettings(prompt_readings=READINGS, memory_bytes=64 << 20, block_tokens=4)
    engine = Engine.load(model, 4, settings)
    tokens = engine.generate(PROMPT, SamplingParams(max_tokens=6))
    next(tokens)
    engine.reload(model, 6)
    list(tokens)
    assert engine.telemetry().counters.prompts_read == 1
