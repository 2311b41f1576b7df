"""`helios bench engine`: how its figures are computed, and the processes that it starts."""

import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, OPTForCausalLM

from bench.engine import comparison, figures, loading, roofline
from bench.engine.figures import Cell
from bench.engine.roofline import Limits
from bench.peers import contenders
from bench.peers.contenders import CONTENDERS, HELIOS, Contender, Runner, Runners, needed_bytes
from bench.peers.environment import make_environment, variables
from bench.peers.runner import Continuation, Job
from bench.systems.random_model import random_model, write_random_model
from bench.systems.shapes import OPT_1_3B, SHAPES
from helios import catalog
from helios.architectures.opt import OPT
from helios.errors import OutOfMemoryError, UnavailableError
from tests.opt_variants import save_variant

LIMITS = Limits(bytes_per_second=1e9, operations_per_second={"float32": 1e12, "bfloat16": 1e12, "int8": 1e12})
CELL = Cell("opt-125m", prompt_tokens=4, output_tokens=3, batch=1)
PROMPTS = [[2, 10, 11, 12], [2, 20, 21, 22]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "small"
    save_variant(path, "pre-norm", seed=5, exits=[3, 6])
    return path


def job(model: Path, cache: Path, **changes: Any) -> Job:
    facts: dict[str, Any] = {
        "model": str(model),
        "precision": "float32",
        "threads": 1,
        "batch": 2,
        "sequence_tokens": 16,
        "memory_bytes": 256 << 20,
        "kv_bytes": 1 << 20,
        "cache": str(cache),
        "depth": 6,
    }
    return Job(**facts | changes)


def test_random_models_are_those_that_transformers_and_helios_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(
        OPT_1_3B,
        vocab_size=300,
        hidden_size=16,
        embed_size=16,
        num_layers=4,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        ffn_dim=32,
        context_tokens=32,
    )
    monkeypatch.setitem(SHAPES, "small", small)
    path = random_model("small", tmp_path)
    entry = catalog.read_model(path)
    assert entry.exit_layers == (1, 2, 3, 4)
    assert entry.config.parameters() == small.parameters()
    _, loading = OPTForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(loading.values())
    tokenizer = AutoTokenizer.from_pretrained(path)
    # Every id has a different text, as in a real vocabulary.
    assert len({tokenizer.decode([token]) for token in range(260, 300)}) == 40
    write_random_model(small, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()


def test_the_shapes_are_those_of_the_published_models() -> None:
    assert SHAPES["opt-125m"].parameters() == 125_239_296
    assert SHAPES["opt-1.3b"].parameters() == 1_315_758_080


@pytest.mark.parametrize(
    "contender",
    [Contender("transformers", "float32"), Contender(HELIOS, "float32")],
    ids=lambda one: one.name,
)
def test_a_runner_generates_what_transformers_does(model: Path, tmp_path: Path, contender: Contender) -> None:
    runner = Runner(contender, job(model, tmp_path), Path(sys.executable), tmp_path / "log")
    try:
        run = runner.generate(PROMPTS, 5)
    finally:
        runner.close()
    reference = OPTForCausalLM.from_pretrained(model, dtype=torch.float32)
    reference.generation_config.eos_token_id = None
    ids = torch.tensor(PROMPTS)
    expected = reference.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5)
    assert run.token_ids == expected[:, 4:].tolist()
    assert run.first_token_seconds > 0
    assert run.seconds > 0
    assert run.overhead is None if contender.is_peer else 0 < run.overhead < 1


def test_helios_at_half_depth_loads_half_of_the_layers(model: Path, tmp_path: Path) -> None:
    half = Contender(HELIOS, "float32", 0.5)
    full = Contender(HELIOS, "float32")
    assert half.depth(6) == 3
    assert half.is_part_of(full)
    assert not full.is_part_of(half)
    runner = Runner(half, job(model, tmp_path, depth=half.depth(6)), Path(sys.executable), tmp_path / "log")
    try:
        assert [len(ids) for ids in runner.generate(PROMPTS, 5).token_ids] == [5, 5]
    finally:
        runner.close()


def test_a_runner_computes_only_while_it_is_asked(model: Path, tmp_path: Path) -> None:
    contender = Contender("transformers", "float32")
    runner = Runner(contender, job(model, tmp_path), Path(sys.executable), tmp_path / "log")
    try:
        assert process_state(runner.process_id) == "T"
        first = runner.generate(PROMPTS, 2)
        assert process_state(runner.process_id) == "T"
        assert runner.generate(PROMPTS, 2).token_ids == first.token_ids
    finally:
        runner.close()


def process_state(process_id: int) -> str:
    """The state letter of a process (proc(5)). Waits for it, because a process stops with a delay."""
    deadline = time.monotonic() + 60
    while True:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "T" or time.monotonic() > deadline:
            return state
        time.sleep(0.01)


@pytest.mark.parametrize("paused", [False, True])
def test_what_a_contender_has_started_ends_with_the_bench(paused: bool) -> None:
    # A bench that starts a command on a leash, may pause it, prints its processes, and waits to be killed.
    bench = """
import os, signal, subprocess, sys
from bench.peers.leash import leashed
command = leashed(["/bin/sh", "-c", "sleep 1000 & echo $$ $!; wait"])
group = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0)
line = group.stdout.readline()
if sys.argv[1] == "True":
    os.killpg(group.pid, signal.SIGSTOP)
print(group.pid, line, flush=True)
signal.pause()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", bench, str(paused)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert process.stdout is not None
    with process:
        started = [int(part) for part in process.stdout.readline().split()]
        assert len(started) == 3
        assert not paused or all(process_state(process_id) == "T" for process_id in started)
        process.kill()
        for process_id in started:
            wait_until_ended(process_id)


def wait_until_ended(process_id: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        # Its new parent has not reaped it yet.
        if state == "Z":
            return
        time.sleep(0.01)
    pytest.fail(f"process {process_id} goes on without the bench")


def test_a_runner_that_cannot_load_says_why(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="absent"):
        Runner(
            Contender(HELIOS, "float32"),
            job(tmp_path / "absent", tmp_path),
            Path(sys.executable),
            tmp_path / "log",
        )


def test_runners_stay_loaded_until_memory_is_short(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 64 << 30
    monkeypatch.setattr(contenders, "available_memory", lambda: free)
    runners = Runners(contenders.pythons({"transformers": Path(sys.executable)}), tmp_path)
    first, second = Contender(HELIOS, "float32"), Contender("transformers", "float32")
    own = job(model, tmp_path)
    try:
        loaded = runners.get(first, own)
        assert runners.get(first, own) is loaded
        free = own.memory_bytes - 1
        with pytest.raises(OutOfMemoryError, match="smaller batch"):
            runners.get(second, own)
        # It was closed to free memory.
        free = 64 << 30
        assert runners.get(first, own) is not loaded
    finally:
        runners.close()


def test_what_a_contender_needs_grows_with_precision_depth_and_load() -> None:
    def needed(engine: str, precision: str, share: float = 1.0, kv_bytes: int = 1 << 30) -> int:
        return needed_bytes(Contender(engine, precision, share), OPT_1_3B, kv_bytes)

    assert needed("vllm", "bfloat16", kv_bytes=2 << 30) - needed("vllm", "bfloat16") == 1 << 30
    # KV is in float32 too.
    assert needed("helios", "float32", kv_bytes=2 << 30) - needed("helios", "float32") == 2 << 30
    assert needed("helios", "int8") < needed("helios", "bfloat16") < needed("helios", "float32")
    assert needed("helios", "int8", 0.5) < needed("helios", "int8")


def test_vllm_sets_the_threads_of_its_processes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    for_vllm = variables("vllm", threads=1, kv_bytes=(1 << 30) + 1)
    assert "OMP_NUM_THREADS" not in for_vllm
    assert for_vllm["VLLM_CPU_OMP_THREADS_BIND"] == str(min(os.sched_getaffinity(0)))
    assert for_vllm["VLLM_CPU_KVCACHE_SPACE"] == "2"
    for_others = variables("ctranslate2", threads=3, kv_bytes=0)
    assert for_others["OMP_NUM_THREADS"] == "3"
    assert "PYTHONPATH" not in for_others


def test_a_peer_that_cannot_be_installed_is_said_and_tried_again(tmp_path: Path) -> None:
    pins = tmp_path / "pins.txt"
    pins.write_text(f"{tmp_path}/missing-1.0-py3-none-any.whl\n")
    for _ in range(2):
        with pytest.raises(UnavailableError, match="cannot be installed"):
            make_environment("ghost", tmp_path / "peers", pins)
    pins.write_text("# Nothing.\n")
    python = make_environment("ghost", tmp_path / "peers", pins)
    assert python.exists()
    assert make_environment("ghost", tmp_path / "peers", pins, lambda _: pytest.fail("made anew")) == python


def test_every_peer_pins_each_of_its_packages() -> None:
    for peer in contenders.PEERS:
        file = Path(contenders.__file__).with_name(f"{peer}.txt")
        lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
        assert lines[0].startswith("torch==")
        assert all(line.count("==") == 1 for line in lines)


def test_prompts_are_equal_for_all_and_other_ones_each_round() -> None:
    cell = Cell("bundled", prompt_tokens=5, output_tokens=2, batch=3)
    first = cell.prompts(0, 100)
    assert first == cell.prompts(0, 100)
    assert first != cell.prompts(1, 100)
    assert [len(prompt) for prompt in first] == [5, 5, 5]
    assert all(4 <= token < 100 for prompt in first for token in prompt)


def test_agreement_ends_at_the_first_difference() -> None:
    assert figures.agreement([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 9, 4], [5, 6, 7, 8]]) == 6 / 8


def test_a_step_reads_weights_once_and_the_keys_and_values_of_all() -> None:
    layer = 4 * 2048 * 2048 + 2 * 2048 * 8192
    one = roofline.bytes_per_step(OPT_1_3B, 24, 1, batch=1, context=0)
    # Biases and norms come on top of the products' weights.
    assert 24 * layer + 50272 * 2048 < one < 1.001 * (24 * layer + 50272 * 2048)
    assert roofline.bytes_per_step(OPT_1_3B, 24, 2, batch=1, context=0) == 2 * one
    many = roofline.bytes_per_step(OPT_1_3B, 24, 1, batch=8, context=100)
    assert many - one == 8 * 100 * 24 * 2 * 2048 * 2


def test_decoding_is_limited_by_reading_and_long_prompts_by_operations() -> None:
    def least(prompt_tokens: int, limits: Limits) -> float:
        return roofline.least_seconds(OPT_1_3B, 24, "int8", 1, 1, prompt_tokens, 2, limits)

    faster_products = Limits(1e9, {"int8": 2e12})
    faster_reading = Limits(2e9, {"int8": 1e12})
    assert least(1, faster_products) == least(1, LIMITS)
    assert least(1, faster_reading) == pytest.approx(least(1, LIMITS) / 2)
    assert least(2000, faster_products) < 0.75 * least(2000, LIMITS)


def test_loading_tells_what_each_load_reads(tiny_models: Path) -> None:
    found = loading.measure(tiny_models / "tiny", threads=1)
    assert 0 < found.deeper_bytes < found.checkpoint_bytes
    assert found.shallower_bytes == 0
    assert f"({found.deeper_bytes:,} bytes)" in loading.in_words(asdict(found))


def run_of(contender: str, number: int, seconds: float, cell: Cell = CELL) -> dict[str, Any]:
    return {
        **asdict(cell),
        "contender": contender,
        "round": number,
        "runs": 1,
        "seconds": seconds,
        "first_token_seconds": seconds / 3,
        "overhead": None,
        "agreement": None,
        "at": "",
        "load_average_before": 0.0,
    }


def results_of(*runs: dict[str, Any]) -> dict[str, Any]:
    config = OPT.write(SHAPES["opt-125m"])
    shapes = {
        shape: {"name": shape, "parameters": 1, "config": config}
        for shape in ("opt-125m", "opt-1.3b", "bundled")
    }
    return {"shapes": shapes, "limits": asdict(LIMITS), "loading": {}, "runs": list(runs), "failed": []}


def test_ratios_are_of_the_same_rounds_and_the_best_peer() -> None:
    rows = figures.summarise(
        results_of(
            # In round 1 both were slow.
            *(run_of("vllm-bfloat16", number, seconds) for number, seconds in enumerate((2.0, 20.0, 2.0))),
            *(run_of("ctranslate2-int8", number, 4.0) for number in range(3)),
            *(run_of("helios-int8", number, seconds) for number, seconds in enumerate((1.0, 10.0))),
            run_of("helios-int8-half", 0, 0.5),
        )
    )
    by_name = {row["contender"]: row for row in rows}
    ratio_to = by_name["helios-int8"]["ratio_to"]
    assert ratio_to["best_peer"] == {"contender": "vllm-bfloat16", "ratio": 2.0}
    assert ratio_to["best_peer_of_precision"] == {"contender": "ctranslate2-int8", "ratio": (4.0 + 0.4) / 2}
    full = by_name["helios-int8-half"]["ratio_to"]["full_depth"]
    assert (full["contender"], full["ratio"]) == ("helios-int8", 2.0)
    assert by_name["vllm-bfloat16"]["ratio_to"] == {}
    assert by_name["vllm-bfloat16"]["tokens_per_second"] == {"min": 0.15, "median": 1.5, "max": 1.5}
    # The first token takes a third of the time, the other two take the rest.
    assert by_name["vllm-bfloat16"]["tpot_ms"] == pytest.approx(2000 / 3)


@pytest.mark.parametrize(("seconds", "met"), [(1.0, True), (1.3, False)])
def test_targets_are_missed_when_the_ratio_is_low(seconds: float, met: bool) -> None:
    rows = figures.summarise(
        results_of(
            run_of("vllm-bfloat16", 0, 2.6), run_of("helios-int8", 0, seconds), run_of("helios-float32", 0, 9)
        )
    )
    (target,) = figures.targets(rows)
    assert target.met is met
    assert "vllm-bfloat16" in str(target.measured)


def test_the_bundled_model_may_meet_its_target_in_either_precision() -> None:
    cell = Cell("bundled", 4, 3, 8)
    rows = figures.summarise(
        results_of(
            run_of("vllm-bfloat16", 0, 3.0, cell),
            run_of("helios-int8", 0, 2.0, cell),
            run_of("helios-float32", 0, 1.0, cell),
        )
    )
    (target,) = figures.targets(rows)
    assert target.met
    assert "helios-float32" in target.name


@pytest.mark.parametrize(("overhead", "met"), [(0.09, True), (0.11, False)])
def test_python_is_to_take_less_than_a_tenth_of_a_step_of_the_bundled_model(
    overhead: float, met: bool
) -> None:
    cell = Cell("bundled", 4, 3, 8)
    rows = figures.summarise(results_of(run_of("helios-int8", 0, 2.0, cell) | {"overhead": overhead}))
    (target,) = figures.targets(rows)
    assert target.met is met


def test_half_of_the_layers_is_shown_beside_what_the_limits_make_of_it() -> None:
    config = SHAPES["opt-125m"]
    head = config.vocab_size * config.hidden_size
    layers = config.parameters() - config.parameters(0)
    rows = figures.summarise(results_of(run_of("helios-int8", 0, 3.0), run_of("helios-int8-half", 0, 2.0)))
    (half,) = (row for row in rows if row["contender"] == "helios-int8-half")
    # A batch of one is limited by reading all weights at every step. The LM head is not halved.
    expected = (layers + head) / (layers / 2 + head)
    assert half["ratio_to"]["full_depth"]["of_rooflines"] == pytest.approx(expected, rel=0.01)
    (target,) = figures.targets(rows)
    assert target.measured == "1.50x helios-int8, by bytes and operations 1.52x"
    assert not target.met


def test_a_turn_takes_a_while_and_no_run_repeats_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def generate(prompts: list[list[int]], max_tokens: int) -> Continuation:
        asked.append(prompts)
        return Continuation([[1] * max_tokens], 0.001, 0.001)

    monkeypatch.setattr(comparison, "_TURN_SECONDS", 0.05)
    turn = comparison._turn(generate, CELL, 0, 300)
    assert len(turn) == len(asked) > 1
    assert len({str(prompts) for prompts in asked}) == len(asked)
    assert asked[0] == CELL.prompts(0, 300)
    monkeypatch.setattr(comparison, "_TURN_SECONDS", 0)
    assert len(comparison._turn(generate, CELL, 0, 300)) == 1


def test_without_peers_there_is_no_target_against_them() -> None:
    assert figures.targets(figures.summarise(results_of(run_of("helios-int8", 0, 1.0)))) == []


def test_every_goal_names_contenders_that_there_are() -> None:
    names = {one.name for one in CONTENDERS}
    assert all(set(goal.contenders) <= names for goal in figures.GOALS)
