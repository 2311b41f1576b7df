"""`helios bench engine`: how its figures are computed, and the processes that it starts."""

import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, OPTForCausalLM

from bench.engine import comparison, figures, loading, roofline
from bench.engine.figures import Cell
from bench.engine.roofline import Limits
from bench.peers import contenders
from bench.peers.contenders import CONTENDERS, HELIOS, Contender, Runner, Runners, needed_bytes
from bench.peers.environment import make_environment, variables
from bench.peers.runner import Continuation, Job
from bench.systems.gguf_model import gguf_model, write_gguf
from bench.systems.random_model import random_model, write_random_model
from bench.systems.shapes import OPT_1_3B, SHAPES
from helios import catalog
from helios.architectures.registry import architecture_of
from helios.architectures.spec import LearnedPositions, ModelConfig
from helios.errors import CheckpointError, OutOfMemoryError, UnavailableError
from tests import llama_variants
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


def small_shape(config: ModelConfig, **changes: Any) -> ModelConfig:
    """A shape like `config`, with few and small layers."""
    sizes = {
        "vocab_size": 300,
        "hidden_size": 16,
        "embed_size": 16,
        "num_layers": 4,
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 8,
        "ffn_dim": 32,
        "context_tokens": 32,
    }
    positions = config.positions
    if isinstance(positions, LearnedPositions):
        positions = replace(positions, rows=positions.offset + sizes["context_tokens"])
    return replace(config, positions=positions, **sizes | changes)


@pytest.mark.parametrize(
    ("shape", "changes"),
    [("opt-1.3b", {}), ("smollm2", {"num_kv_heads": 1}), ("tinyllama-1.1b", {"num_kv_heads": 1})],
)
def test_random_models_are_those_that_transformers_and_helios_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str, changes: dict[str, Any]
) -> None:
    small = small_shape(SHAPES[shape], **changes)
    monkeypatch.setitem(SHAPES, "small", small)
    path = random_model("small", tmp_path)
    entry = catalog.read_model(path)
    assert entry.exit_layers == (1, 2, 3, 4)
    assert entry.config.parameters() == small.parameters()
    assert entry.config == replace(small, dtype="bfloat16")
    _, loading = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(loading.values())
    tokenizer = AutoTokenizer.from_pretrained(path)
    # Every id has a different text, as in a real vocabulary.
    assert len({tokenizer.decode([token]) for token in range(260, 300)}) == 40
    write_random_model(small, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()


def test_the_shapes_are_those_of_the_published_models() -> None:
    assert SHAPES["opt-125m"].parameters() == 125_239_296
    assert SHAPES["opt-1.3b"].parameters() == 1_315_758_080
    assert SHAPES["smollm2"].parameters() == 134_515_008
    assert SHAPES["tinyllama-1.1b"].parameters() == 1_100_048_384


@pytest.mark.parametrize("variant", ["llama", "tied", "wide-heads", "one-kv-head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_transformers_reads_the_weights_of_a_checkpoint_from_its_gguf_file(
    tmp_path: Path, variant: str, dtype: torch.dtype
) -> None:
    path = tmp_path / variant
    model = llama_variants.save_variant(path, variant, seed=3, dtype=dtype)
    write_gguf(path, GGMLQuantizationType.F32, tmp_path / "model.gguf")
    read = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    expected, found = model.state_dict(), read.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for field in ("rms_norm_eps", "num_key_value_heads", "head_dim", "max_position_embeddings"):
        assert getattr(read.config, field) == pytest.approx(getattr(model.config, field))
    assert read.config.rope_parameters["rope_theta"] == model.config.rope_parameters["rope_theta"]


@pytest.mark.parametrize(("quantization", "steps"), [("Q8_0", 254), ("Q4_1", 15)])
def test_quantised_gguf_files_hold_the_weights_as_far_as_their_bits_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str, steps: int
) -> None:
    small = small_shape(SHAPES["smollm2"], hidden_size=64, embed_size=64, head_dim=32, ffn_dim=96)
    monkeypatch.setitem(SHAPES, "small", small)
    checkpoint = random_model("small", tmp_path)
    file = gguf_model(checkpoint, quantization, tmp_path)
    assert gguf_model(checkpoint, quantization, tmp_path) == file
    write_gguf(checkpoint, GGMLQuantizationType.F32, tmp_path / "exact.gguf")
    exact = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "exact.gguf").tensors}
    kinds = {}
    for tensor in gguf.GGUFReader(file).tensors:
        kinds[tensor.name] = tensor.tensor_type.name
        wanted = exact[tensor.name].data
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        # Q8_0 has steps from -max to max of a block, Q4_1 from its lowest to its highest value.
        wide = 2 * np.abs(wanted).max() / steps
        assert np.abs(found - wanted).max() <= 0.51 * wide + 1e-3 * np.abs(wanted).max()
    assert kinds.keys() == exact.keys()
    assert kinds["blk.3.attn_k.weight"] == kinds["blk.0.ffn_gate.weight"] == quantization
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["output_norm.weight"] == kinds["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.parametrize("variant", ["biased", "linear", "llama3", "qwen3"])
def test_no_gguf_file_is_written_of_what_is_no_plain_llama(tmp_path: Path, variant: str) -> None:
    llama_variants.save_variant(tmp_path / "model", variant, seed=1)
    with pytest.raises(CheckpointError, match="not a Llama without biases"):
        gguf_model(tmp_path / "model", "Q8_0", tmp_path / "converted")
    assert not list(tmp_path.glob("converted/*"))


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
        assert all(line.count("==") == 1 for line in lines)
        # torch is installed first, from where its CPU build is.
        assert not any(line.startswith("torch==") for line in lines[1:])


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


def test_few_kv_heads_a_gate_and_an_untied_head_are_counted_as_they_are() -> None:
    shape = SHAPES["tinyllama-1.1b"]
    layer = 2 * 2048 * 2048 + 2 * 256 * 2048 + 3 * 2048 * 5632
    one = roofline.bytes_per_step(shape, 22, 1, batch=1, context=0)
    # The embeddings, which an untied head leaves beside it, are not read by a step.
    assert 22 * layer + 32000 * 2048 < one < 1.001 * (22 * layer + 32000 * 2048)
    many = roofline.bytes_per_step(shape, 22, 1, batch=8, context=100)
    assert many - one == 8 * 100 * 22 * 2 * 256 * 2


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
    configs = SHAPES | {"bundled": SHAPES["opt-125m"]}
    shapes = {
        shape: {"name": shape, "parameters": 1, "config": architecture_of(config).write(config)}
        for shape, config in configs.items()
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


def test_weights_of_four_bits_are_reported_and_not_compared_with() -> None:
    cell = Cell("smollm2", 4, 3, 1)
    rows = figures.summarise(
        results_of(
            run_of("llamacpp-q4_1", 0, 1.5, cell),
            run_of("llamacpp-q8_0", 0, 3.0, cell),
            run_of("vllm-bfloat16", 0, 4.0, cell),
            run_of("helios-int8", 0, 1.0, cell),
        )
    )
    assert {row["contender"] for row in rows} >= {"llamacpp-q4_1", "llamacpp-q8_0"}
    (row,) = (row for row in rows if row["contender"] == "helios-int8")
    assert row["ratio_to"]["best_peer"] == {"contender": "llamacpp-q8_0", "ratio": 3.0}
    assert row["ratio_to"]["best_peer_of_precision"]["contender"] == "llamacpp-q8_0"
    (target,) = figures.targets(rows)
    assert target.met
    assert target.measured == "3.00x llamacpp-q8_0"


@pytest.mark.parametrize(("batch", "seconds", "met"), [(8, 1.9, False), (8, 2.0, True), (32, 1.5, True)])
@pytest.mark.parametrize("shape", ["smollm2", "tinyllama-1.1b"])
def test_llama_shapes_have_targets_against_the_best_peer(
    shape: str, batch: int, seconds: float, met: bool
) -> None:
    cell = Cell(shape, 4, 3, batch)
    rows = figures.summarise(
        results_of(run_of("ctranslate2-int8", 0, seconds, cell), run_of("helios-int8", 0, 1.0, cell))
    )
    (target,) = figures.targets(rows)
    assert target.met is met


def test_a_peer_without_the_architecture_is_named_and_left_out(tmp_path: Path, model: Path) -> None:
    own = [one for one in CONTENDERS if one.engine == "llamacpp"]
    results = comparison._empty(threads=1)
    run = comparison._Comparison(results, own, 1, tmp_path, None, lambda _: None)
    run.run({"small": catalog.read_model(model)}, [Cell("small", 4, 3, 1)], rounds=1, fresh=False)
    assert results["runs"] == []
    assert [one["contender"] for one in results["failed"]] == [one.name for one in own]
    assert all("does not have the architecture of small" in one["reason"] for one in results["failed"])
    # Nothing was installed for it.
    assert not (tmp_path / "peers").exists()


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
