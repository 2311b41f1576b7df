"""What a candidate teaches a router is what its exits say of each prompt, as traces have it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from helios import catalog
from helios.catalog import read_model
from helios.engine.evaluation.candidate import Candidate, load_candidate
from helios.engine.evaluation.pace import Pace
from helios.engine.evaluation.router_examples import LEAST_TOKENS, evaluate_for_router
from helios.engine.evaluation.settings import EvaluationSettings
from helios.engine.evaluation.trace import ExitTrace, trace_exits
from helios.engine.plan import load_plan
from helios.engine.settings import EngineSettings
from helios.errors import CancelledError, CheckpointError, InvalidRequestError, SettingsError
from helios.modes import ExitMode
from helios.routing.example import ModelExample
from helios.routing.probe import read_positions
from tests.opt_variants import Head
from tests.variants import save_variant

EXITS = (1, 3, 6)
SETTINGS = EvaluationSettings(generated_tokens=1)
# Long enough for a beginning of 32 tokens, for one of half the prompt, and just long enough.
PROMPTS = [[2, *range(10, 100)], [2, *range(200, 160, -1)], [2, *range(50, 49 + LEAST_TOKENS)]]
FIRST_TOKENS = [32, 20, 12]
NAMES = ["a", "b", "c"]


def traces_of(path: Path, precision: str, prompts: list[list[int]]) -> list[ExitTrace]:
    settings = EngineSettings(exit_mode=ExitMode.DYNAMIC, precision=precision)
    return trace_exits(load_plan(path, None, settings), prompts)


def assert_says_what_the_trace_does(
    example: ModelExample, trace: ExitTrace, settings: EvaluationSettings
) -> None:
    first = example.first_tokens
    probed = read_positions(first, settings.probe_readings)
    assert example.first_nats == pytest.approx(trace.nats[0, probed].mean(dtype=np.float64), rel=1e-4)
    rest = trace.nats[:, first :: settings.router_stride].mean(axis=1, dtype=np.float64)
    assert example.rest_nats == pytest.approx(rest, rel=1e-4)
    assert example.token_nats == pytest.approx(trace.nats[-1], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("variant", "head"),
    [
        ("pre-norm", "linear"),
        ("post-norm", "norm"),
        ("projected", "linear"),
        ("llama3", "linear"),
        ("qwen3", "norm"),
    ],
)
@pytest.mark.parametrize("stride", [1, 3])
def test_nats_are_those_of_traces(tmp_path: Path, variant: str, head: Head, stride: int) -> None:
    save_variant(tmp_path, variant, 5, exits=EXITS, head=head)
    settings = replace(SETTINGS, router_stride=stride)
    found = evaluate_for_router(load_candidate(read_model(tmp_path), settings), PROMPTS, NAMES, settings)
    assert [one.id for one in found] == NAMES
    assert [list(one.ids) for one in found] == PROMPTS
    assert [one.first_tokens for one in found] == FIRST_TOKENS
    for example, trace in zip(found, traces_of(tmp_path, "float32", PROMPTS), strict=True):
        assert_says_what_the_trace_does(example, trace, settings)


@pytest.mark.parametrize("name", ["helios-prose", "helios-tech"])
def test_nats_of_the_bundled_models_in_int8_are_those_of_traces(name: str) -> None:
    entry = catalog.find_model(catalog.find_models_dir(None), name)
    settings = replace(SETTINGS, precision="int8")
    prompts = [[2, *range(1000, 1130)], [2, *range(300, 363)]]
    found = evaluate_for_router(load_candidate(entry, settings), prompts, NAMES[:2], settings)
    for example, trace in zip(found, traces_of(entry.path, "int8", prompts), strict=True):
        assert len(example.rest_nats) == len(entry.exit_layers)
        assert_says_what_the_trace_does(example, trace, settings)


def test_the_only_exit_of_a_model_without_early_ones_is_its_first_and_its_last(tmp_path: Path) -> None:
    save_variant(tmp_path, "pre-norm", 9)
    (example,) = evaluate_for_router(
        load_candidate(read_model(tmp_path), SETTINGS), PROMPTS[:1], NAMES[:1], SETTINGS
    )
    token_nats = np.array(example.token_nats)
    probed = read_positions(example.first_tokens, SETTINGS.probe_readings)
    assert example.first_nats == pytest.approx(token_nats[probed].mean(), abs=1e-4)
    assert example.rest_nats == pytest.approx([token_nats[32::2].mean()], abs=1e-4)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_variant(path, "pre-norm", 7, exits=EXITS, head="linear")
    return path


@pytest.fixture(scope="module")
def candidate(model_path: Path) -> Candidate:
    return load_candidate(read_model(model_path), SETTINGS)


def test_a_prompt_teaches_the_same_whatever_other_prompts_come_before_it(candidate: Candidate) -> None:
    together = evaluate_for_router(candidate, PROMPTS, NAMES, SETTINGS)
    alone = [
        evaluate_for_router(candidate, [prompt], [name], SETTINGS)[0]
        for prompt, name in zip(PROMPTS, NAMES, strict=True)
    ]
    assert together == alone


def test_prompts_that_are_too_short_are_left_out(candidate: Candidate) -> None:
    short = [2, *range(10, 9 + LEAST_TOKENS - 1)]
    found = evaluate_for_router(candidate, [short, PROMPTS[2], [5]], NAMES, SETTINGS)
    assert [one.id for one in found] == ["b"]
    assert evaluate_for_router(candidate, [short], ["a"], SETTINGS) == []


def test_a_long_prompt_is_cut_to_its_first_tokens(candidate: Candidate) -> None:
    settings = replace(SETTINGS, max_prompt_tokens=40, probe_tokens=8, probe_readings=3)
    (example,) = evaluate_for_router(candidate, PROMPTS[:1], NAMES[:1], settings)
    assert list(example.ids) == PROMPTS[0][:40]
    assert example.first_tokens == 8


def test_progress_counts_the_prompts_and_a_stopped_evaluation_ends_between_them(
    candidate: Candidate,
) -> None:
    pace = Pace()
    done = []

    def progress(count: int, total: int) -> None:
        done.append((count, total))
        if len(done) == 6:
            pace.stop()

    evaluate_for_router(candidate, PROMPTS, NAMES, SETTINGS, progress, pace)
    with pytest.raises(CancelledError):
        evaluate_for_router(candidate, PROMPTS, NAMES, SETTINGS, progress, pace)
    assert done == [(0, 3), (1, 3), (2, 3), (3, 3), (0, 3), (1, 3)]


def test_what_cannot_be_evaluated_is_refused_with_the_reason(candidate: Candidate) -> None:
    for prompt, said in (([2, 5000], "5000"), ([], "no token")):
        with pytest.raises(InvalidRequestError, match=said):
            evaluate_for_router(candidate, [prompt], ["a"], SETTINGS)
    for name in ("probe_tokens", "probe_readings", "router_stride"):
        with pytest.raises(SettingsError, match=name):
            replace(SETTINGS, **{name: 0})


def test_weights_without_finite_probabilities_are_refused_naming_the_model(model_path: Path) -> None:
    broken = load_candidate(read_model(model_path), SETTINGS)
    head = broken.model.weights.exits[EXITS[0]].norm
    assert head is not None
    assert head.weight is not None
    head.weight[0] = torch.inf
    with pytest.raises(CheckpointError, match=f"{model_path} computes no finite probabilities"):
        evaluate_for_router(broken, PROMPTS, NAMES, SETTINGS)
