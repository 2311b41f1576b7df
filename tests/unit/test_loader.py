"""Promises of loading beside a running model: common parts are shared, and serving has priority."""

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helios import catalog
from helios.engine.engine import Engine
from helios.engine.interface import GeneratedToken
from helios.engine.settings import EngineSettings
from helios.engine.threads import loading_threads
from helios.engine.weights.loader import load_packed
from helios.engine.weights.packed_weights import PackedWeights
from helios.errors import CheckpointError, OutOfMemoryError
from helios.modes import Precision
from helios.sampling import SamplingParams
from tests.opt_variants import FORMS, Form, Head, save_variant

EXITS = (2, 4, 6)
MEMORY = 64 << 20
CPU = torch.device("cpu")


def load(path: Path, depth: int, exits: Sequence[int] | None = None, **options: object) -> PackedWeights:
    """Loads in float32, so that bytes are easy to count."""
    entry = catalog.read_model(path)
    return load_packed(entry, depth, exits or [depth], Precision.FLOAT32, CPU, **options)


def generated(engine: Engine) -> list[GeneratedToken]:
    return list(engine.generate([2, 9, 30], SamplingParams(max_tokens=12, ignore_eos=True)))


def overwrite(path: Path, name: str, value: float) -> None:
    """Overwrites the last number of a tensor of a checkpoint."""
    file = path / ("exits.safetensors" if name.startswith("exits") else "model.safetensors")
    tensors = load_file(file)
    (stored,) = (key for key in tensors if key.endswith(name))
    tensors[stored].view(-1)[-1] = value
    save_file(tensors, file)


@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.BFLOAT16, Precision.INT8])
@pytest.mark.parametrize(
    "name",
    [
        "decoder.embed_tokens.weight",
        "decoder.embed_positions.weight",
        "decoder.project_in.weight",
        "decoder.project_out.weight",
        "layers.3.self_attn.k_proj.weight",
        "layers.3.fc1.weight",
        "layers.3.fc2.bias",
        "layers.3.self_attn_layer_norm.weight",
        "layers.3.final_layer_norm.bias",
        "decoder.final_layer_norm.weight",
        "exits.4.norm.weight",
        "exits.4.linear.weight",
        "lm_head.weight",
    ],
)
def test_a_number_that_is_not_finite_is_refused_naming_model_and_tensor(
    tmp_path: Path, name: str, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helios.engine.weights.loader.MIN_CACHED_BYTES", 0)
    model, cache = tmp_path / "model", tmp_path / "cache"
    save_variant(model, "untied", 1, exits=EXITS, head="linear", word_embed_proj_dim=16)
    for value in (float("nan"), float("inf"), float("-inf")):
        overwrite(model, name, value)
        # The second time, the good parts of the model come from the cache.
        for _ in range(2):
            with pytest.raises(CheckpointError, match=rf"model/.*{name} holds NaN or infinite numbers"):
                load_packed(
                    catalog.read_model(model), 6, EXITS, precision, CPU, cache_dir=cache, cache_bytes=1 << 40
                )


def test_only_what_is_loaded_must_be_finite(tmp_path: Path) -> None:
    save_variant(tmp_path, "pre-norm", 1, exits=EXITS)
    overwrite(tmp_path, "layers.4.fc1.bias", float("nan"))
    part = load(tmp_path, 4)
    with pytest.raises(CheckpointError, match=r"layers\.4\.fc1\.bias"):
        load(tmp_path, 6, running=part)


@pytest.mark.parametrize(("precision", "fits"), [("float32", True), ("float16", False), ("int8", False)])
def test_a_number_beyond_the_precision_is_refused_saying_so(
    tmp_path: Path, precision: str, fits: bool
) -> None:
    save_variant(tmp_path, "untied", 1)
    # With int8, embeddings are kept in float16.
    overwrite(tmp_path, "embed_tokens.weight", -1e5)
    settings = EngineSettings(precision=precision, memory_bytes=MEMORY)
    if fits:
        Engine.load(tmp_path, settings=settings)
    else:
        with pytest.raises(CheckpointError, match=r"embed_tokens.* from -100000 to .*another precision"):
            Engine.load(tmp_path, settings=settings)


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("head", ["shared", "linear"])
def test_a_reloaded_model_computes_what_one_loaded_afresh_does(
    tmp_path: Path, head: Head, precision: str
) -> None:
    for index, name in enumerate("ab"):
        save_variant(tmp_path / name, "pre-norm", index, exits=EXITS, head=head)
    settings = EngineSettings(precision=precision, memory_bytes=MEMORY)
    engine = Engine.load(tmp_path / "a", 4, settings)
    for name, depth in (("a", 6), ("a", 2), ("b", 4), ("b", 6), ("a", 4)):
        engine.reload(tmp_path / name, depth)
        fresh = Engine.load(tmp_path / name, depth, settings)
        assert engine.plan.memory == fresh.plan.memory
        assert generated(engine) == generated(fresh)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "legacy-bin"])
def test_going_deeper_reads_the_missing_layers_alone(tmp_path: Path, form: Form) -> None:
    save_variant(tmp_path, "untied", 1, form, exits=EXITS)
    part, whole = load(tmp_path, 2), load(tmp_path, 6)
    deeper = load(tmp_path, 6, running=part)
    assert deeper.bytes_read == whole.bytes_read - part.bytes_read > 0
    assert deeper.ends is part.ends
    assert list(deeper.layers[:2]) == list(part.layers)
    assert deeper.weight_bytes == whole.weight_bytes
    assert len(part.layers) == 2


def test_going_shallower_opens_no_file_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_variant(tmp_path, "pre-norm", 1, exits=EXITS)
    part, whole = load(tmp_path, 2), load(tmp_path, 6)
    monkeypatch.delattr("helios.engine.weights.loader.Checkpoint")
    shallower = load(tmp_path, 2, running=whole)
    assert shallower.bytes_read == 0
    assert list(shallower.layers) == list(whole.layers[:2])
    assert shallower.weight_bytes == part.weight_bytes


def test_only_an_exits_own_head_is_read_when_its_layers_are_there(tmp_path: Path) -> None:
    save_variant(tmp_path, "pre-norm", 1, exits=EXITS, head="linear")
    whole = load(tmp_path, 6)
    shallower = load(tmp_path, 4, running=whole)
    hidden = 32
    assert shallower.bytes_read == 4 * (hidden * hidden + 2 * hidden)
    assert shallower.final is None
    # The baseline reads every exit, so it already has all heads.
    every = load(tmp_path, 6, exits=EXITS)
    assert load(tmp_path, 4, exits=(2, 4), running=every).bytes_read == 0


def test_nothing_is_shared_with_another_model(tmp_path: Path) -> None:
    for index, name in enumerate("ab"):
        save_variant(tmp_path / name, "pre-norm", index, exits=EXITS)
    running = load(tmp_path / "a", 6)
    other = load(tmp_path / "b", 6, running=running)
    assert other.bytes_read == load(tmp_path / "b", 6).bytes_read
    assert other.ends is not running.ends
    assert not {id(layer) for layer in other.layers} & {id(layer) for layer in running.layers}


def test_a_load_that_fails_half_way_leaves_the_running_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_variant(tmp_path, "pre-norm", 1, exits=EXITS)
    engine = Engine.load(tmp_path, 2, EngineSettings(memory_bytes=MEMORY))
    before, plan = generated(engine), engine.plan

    def exhausted(layer: object) -> None:
        raise OutOfMemoryError("no memory for a layer")

    monkeypatch.setattr("helios.engine.weights.loader.pack_layer", exhausted)
    with pytest.raises(OutOfMemoryError, match="for a layer"):
        engine.reload(tmp_path, 6)
    assert engine.plan is plan
    assert generated(engine) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loading")]
    monkeypatch.undo()
    assert engine.reload(tmp_path, 6).bytes_read > 0


def test_progress_counts_the_layers_in_order(tmp_path: Path) -> None:
    save_variant(tmp_path, "pre-norm", 1, exits=EXITS)
    told: list[tuple[int, int]] = []
    load(tmp_path, 6, running=load(tmp_path, 4), progress=lambda done, total: told.append((done, total)))
    assert told == [(index, 6) for index in range(1, 7)]


def test_loading_threads_compute_alone_and_leave_the_others_their_number() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with loading_threads(beside_serving=False) as threads:
            assert threads.submit(torch.get_num_threads).result() == 1
            assert torch.get_num_threads() == 2
            new: list[int] = []
            later = threading.Thread(target=lambda: new.append(torch.get_num_threads()))
            later.start()
            later.join()
            assert new == [2]
    finally:
        torch.set_num_threads(before)


def test_what_loads_beside_serving_is_one_thread_that_stands_back() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = niceness()
    with loading_threads(beside_serving=True) as threads:
        assert {threads.submit(niceness).result() for _ in range(8)} == {min(19, before + 10)}
        assert {threads.submit(threading.get_ident).result() for _ in range(8)} != {threading.get_ident()}
        assert len({threads.submit(threading.get_ident).result() for _ in range(8)}) == 1
    assert niceness() == before


# Loads a large model in int8 after a small one, which does torch's one-time set-up. Prints the bytes of the
# weights, by how much resident memory grew at most, and by how much anonymous memory has grown.
MEASURE = """
import os, re, sys
from pathlib import Path
import torch
from helios import catalog
from helios.engine.weights import loader
from helios.modes import Precision

def memory(name):
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{name}:\\s+(\\d+) kB", text, re.MULTILINE)[1]) * 1024

def load(path, cache):
    entry, limit = catalog.read_model(Path(path)), 1 << 40 if cache else 0
    return loader.load_packed(
        entry, entry.num_layers, [entry.num_layers], Precision.INT8, torch.device("cpu"),
        cache_dir=cache, cache_bytes=limit,
    )

# One core, so one thread: each has buffers of its own.
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
loader.MIN_CACHED_BYTES = 0
small, large, cache = sys.argv[1], sys.argv[2], sys.argv[3]
load(small, Path(cache))
# Forgets the peak so far (proc(5)).
Path("/proc/self/clear_refs").write_text("5")
resident, anonymous = memory("VmRSS"), memory("RssAnon")
weights = load(large, Path(cache) if sys.argv[4] == "cached" else None)
print(weights.weight_bytes, memory("VmHWM") - resident, memory("RssAnon") - anonymous)
"""


@pytest.fixture(scope="module")
def sized_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small` and `large`. `large` has 150 MB in float32 (12.6 MB per layer) and 42 MB in int8."""
    path = tmp_path_factory.mktemp("sized")
    save_variant(path / "small", "pre-norm", 1)
    sizes = {"vocab_size": 4096, "hidden_size": 512, "ffn_dim": 2048, "num_hidden_layers": 11}
    save_variant(path / "large", "pre-norm", 1, **sizes)
    return path


def measure(models: Path, cache: Path, mode: str) -> tuple[int, int, int]:
    command = [sys.executable, "-c", MEASURE, str(models / "small"), str(models / "large"), str(cache), mode]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    size, peak, anonymous = map(int, done.stdout.split())
    print(f"{mode}: {size:,} bytes of weights, peak {peak:,}, anonymous {anonymous:,}")  # noqa: T201
    return size, peak, anonymous


def test_quantising_takes_little_more_memory_than_the_quantised_weights(
    sized_models: Path, tmp_path: Path
) -> None:
    # The buffer for reading, and one layer before it is packed.
    slack = 24 << 20
    for mode in ("packed", "cached"):
        size, peak, _ = measure(sized_models, tmp_path, mode)
        assert peak < size + slack


def test_mapped_weights_are_not_the_processs_own_memory(sized_models: Path, tmp_path: Path) -> None:
    measure(sized_models, tmp_path, "cached")
    size, peak, anonymous = measure(sized_models, tmp_path, "cached")
    assert anonymous < size // 10
    assert peak > size // 2, "resident all the same"
