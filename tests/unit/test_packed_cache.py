"""Promises of packed weights on disk: the same numbers sooner, and never an error from a bad cache."""

import logging
import os
import resource
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helios import catalog
from helios.engine.weights.linear import LAYOUT_VERSION, linear
from helios.engine.weights.loader import load_packed
from helios.engine.weights.packed_cache import default_directory
from helios.engine.weights.packed_weights import PackedWeights, tensors_of
from helios.engine.weights.parts import LinearWeights
from helios.engine.weights.quantize import quantize
from helios.footprint import weight_bytes
from helios.modes import Precision
from tests.opt_variants import VARIANTS, save_variant

EXITS = (2, 4, 6)
PLENTY = 1 << 40
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_models_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helios.engine.weights.loader.MIN_CACHED_BYTES", 0)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_variant(tmp_path / "model", "pre-norm", 1, exits=EXITS, head="linear")
    return tmp_path / "model"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def load(
    path: Path,
    cache: Path | None,
    depth: int = 6,
    precision: Precision = Precision.INT8,
    limit: int = PLENTY,
    **options: object,
) -> PackedWeights:
    """A model with all exits up to a depth. cache None: without a cache."""
    entry = catalog.read_model(path)
    exits = [layer for layer in entry.exit_layers if layer <= depth]
    limit = 0 if cache is None else limit
    return load_packed(entry, depth, exits, precision, CPU, cache_dir=cache, cache_bytes=limit, **options)


def tensors(weights: PackedWeights) -> list[torch.Tensor]:
    """All tensors of a model, in order."""
    parts = [weights.ends, *weights.layers, weights.final, *weights.exits.values()]
    return [tensor for part in parts if part is not None for tensor in tensors_of(part)]


def assert_same(one: PackedWeights, other: PackedWeights) -> None:
    """Checks that both are equal to the bit."""
    for mine, others in zip(tensors(one), tensors(other), strict=True):
        assert (mine.dtype, mine.shape) == (others.dtype, others.shape)
        assert torch.equal(mine, others)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.BFLOAT16, Precision.INT8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_mapped_is_what_was_packed_to_the_bit(
    tmp_path: Path,
    cache: Path,
    variant: str,
    precision: Precision,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    save_variant(tmp_path / "model", variant, 1, exits=EXITS, head="norm")
    packed = load(tmp_path / "model", None, precision=precision)
    stored = load(tmp_path / "model", cache, precision=precision)
    # From now on the checkpoint must not be opened.
    monkeypatch.delattr("helios.engine.weights.loader.Checkpoint")
    mapped = load(tmp_path / "model", cache, precision=precision)
    for one in (stored, mapped):
        assert_same(one, packed)
        # Tied heads stay tied.
        assert one.weight_bytes == packed.weight_bytes
    assert mapped.bytes_read == sum(file.stat().st_size for file in cache.glob("*/*"))
    assert not warnings(caplog)


def test_tensors_begin_at_cache_lines(model: Path, cache: Path) -> None:
    load(model, cache)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors(load(model, cache)))


def test_a_deeper_load_packs_only_what_is_not_there(model: Path, cache: Path) -> None:
    load(model, cache, depth=2)
    before = {file: file.stat().st_mtime_ns for file in cache.glob("*/*")}
    assert_same(load(model, cache, depth=6), load(model, None, depth=6))
    after = {file: file.stat().st_mtime_ns for file in cache.glob("*/*")}
    assert before.items() <= after.items()
    assert {file.stem for file in after.keys() - before.keys()} == {
        *(f"layer-{index}" for index in range(2, 6)),
        "exit-4",
        "final",
    }


@pytest.mark.parametrize(
    "damage", ["byte changed", "truncated", "emptied", "garbage", "another part", "deep JSON"]
)
def test_a_damaged_file_is_logged_and_made_anew(
    model: Path, cache: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    packed = load(model, cache)
    file = next(cache.glob("*/layer-3.safetensors"))
    content = file.read_bytes()
    middle = len(content) * 2 // 3
    changed = {
        "byte changed": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "truncated": content[:middle],
        "emptied": b"",
        "garbage": bytes(range(256)) * 64,
        "another part": (file.parent / "ends.safetensors").read_bytes(),
        "deep JSON": (60_000).to_bytes(8, "little") + b"[" * 60_000,
    }[damage]
    # Written to a new file and renamed, as the cache does, because the first load still maps the old file.
    (file.parent / "new").write_bytes(changed)
    (file.parent / "new").rename(file)
    assert_same(load(model, cache), packed)
    (message,) = warnings(caplog)
    assert "layer-3.safetensors" in message
    assert "made anew" in message
    assert file.read_bytes() == content
    caplog.clear()
    assert_same(load(model, cache), packed)
    assert not warnings(caplog)


def test_where_nothing_can_be_written_loading_goes_on_and_says_so_once(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a directory")
    assert_same(load(model, tmp_path / "file" / "cache"), load(model, None))
    (message,) = warnings(caplog)
    assert "cannot be kept" in message
    assert "packed_cache_dir" in message


def test_a_file_that_cannot_be_finished_leaves_nothing(
    model: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The first write beyond this limit fails, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, hard))
    try:
        weights = load(model, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_same(weights, load(model, None))
    assert len(warnings(caplog)) == 1
    assert not list(cache.glob("*/*.part"))
    assert_same(load(model, cache), weights)


def test_half_of_the_free_space_is_left_to_others(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    needed = weight_bytes(catalog.read_model(model).config, Precision.INT8)
    usage = shutil.disk_usage(model)
    for free, kept in ((2 * needed - 1, False), (2 * needed, True)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: usage._replace(free=free))
        load(model, cache)
        assert bool(list(cache.glob("*/*"))) == kept
    assert len(warnings(caplog)) == 1


def test_the_models_used_longest_ago_go_beyond_the_limit(tmp_path: Path, cache: Path) -> None:
    for index, name in enumerate("abc"):
        save_variant(tmp_path / name, "pre-norm", index, exits=EXITS)

    def kept() -> list[str]:
        return sorted(path.name[0] for path in cache.glob("*.packed"))

    def use(name: str, limit: int) -> PackedWeights:
        weights = load(tmp_path / name, cache, limit=limit)
        # All times are moved back, so that the next use is later.
        for path in cache.iterdir():
            facts = path.stat()
            os.utime(path, (facts.st_atime - 10, facts.st_mtime - 10))
        return weights

    first = use("a", PLENTY)
    size = sum(file.stat().st_size for file in cache.glob("*/*"))
    (cache / "elses").mkdir()
    (cache / "elses" / "file").write_bytes(bytes(3 * size))
    limit = size * 5 // 2
    second = use("b", limit)
    use("a", limit)
    assert kept() == ["a", "b"]
    use("c", limit)
    assert kept() == ["a", "c"]
    assert (cache / "elses" / "file").exists(), "a directory that is not the cache's own"
    # Mapped weights stay valid after their file is deleted.
    assert_same(first, load(tmp_path / "a", None))
    assert_same(second, load(tmp_path / "b", None))


def test_a_model_beyond_the_limit_and_a_small_one_are_not_kept(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = weight_bytes(catalog.read_model(model).config, Precision.INT8)
    load(model, cache, limit=needed - 1)
    assert not cache.exists()
    monkeypatch.setattr("helios.engine.weights.loader.MIN_CACHED_BYTES", needed + 1)
    load(model, cache)
    assert not cache.exists()


def test_a_checkpoint_that_changes_is_packed_anew(model: Path, cache: Path) -> None:
    before = load(model, cache)
    times = (model / "model.safetensors").stat()
    save_variant(model, "pre-norm", 2, exits=EXITS, head="linear")
    # Some copying tools restore the time like this.
    os.utime(model / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    after = load(model, cache)
    assert after.id != before.id
    assert_same(after, load(model, None))
    assert not torch.equal(after.ends.embed_tokens, before.ends.embed_tokens)


def test_a_copy_elsewhere_is_a_checkpoint_of_its_own(model: Path, tmp_path: Path, cache: Path) -> None:
    shutil.copytree(model, tmp_path / "elsewhere" / "model")
    assert load(model, cache).id != load(tmp_path / "elsewhere" / "model", cache).id


def test_nothing_is_kept_of_a_checkpoint_that_changed_while_it_was_read(model: Path, cache: Path) -> None:
    load(model, cache, progress=lambda done, total: os.utime(model / "model.safetensors"))
    assert not list(cache.iterdir())


def test_what_a_crash_left_unfinished_goes(model: Path, cache: Path) -> None:
    load(model, cache, depth=2)
    (directory,) = cache.iterdir()
    old, new = directory / "layer-3-0.part", directory / "layer-3-1.part"
    for file in (old, new):
        file.write_bytes(b"unfinished")
    os.utime(old, (time.time() - 7200,) * 2)
    load(model, cache, depth=6)
    assert not old.exists()
    assert new.exists(), "another process may be writing it"


# Loads a model when it reads a line, and prints a checksum of the weights.
RACER = """
import sys, zlib
from pathlib import Path
import torch
from helios import catalog
from helios.engine.weights import loader
from helios.engine.weights.packed_weights import tensors_of
from helios.modes import Precision

loader.MIN_CACHED_BYTES = 0
entry = catalog.read_model(Path(sys.argv[1]))
print("ready", flush=True)
for _ in sys.stdin:
    weights = loader.load_packed(
        entry, 6, [6], Precision.INT8, torch.device("cpu"), cache_dir=Path(sys.argv[2]), cache_bytes=1 << 40
    )
    check = 0
    for part in (weights.ends, *weights.layers, weights.final):
        for tensor in tensors_of(part):
            check = zlib.crc32(tensor.view(-1).view(torch.uint8).numpy().data, check)
    print(check, flush=True)
"""


@pytest.fixture
def racers(model: Path, cache: Path) -> Iterator[list["subprocess.Popen[str]"]]:
    command = [sys.executable, "-c", RACER, str(model), str(cache)]
    started = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    yield started
    for process in started:
        process.kill()
        process.communicate()


def test_two_processes_that_load_at_once_do_not_disturb_each_other(
    racers: list["subprocess.Popen[str]"], model: Path, cache: Path
) -> None:
    weights = load_packed(catalog.read_model(model), 6, [6], Precision.INT8, CPU)
    expected = 0
    for tensor in tensors(weights):
        expected = zlib.crc32(tensor.view(-1).view(torch.uint8).numpy().data, expected)
    for process in racers:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for _ in range(5):
        shutil.rmtree(cache, ignore_errors=True)
        for process in racers:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        assert [int(process.stdout.readline()) for process in racers if process.stdout] == [expected] * 2
        assert {file.suffix for file in cache.glob("*/*")} == {".safetensors"}
    for process in racers:
        _, errors = process.communicate()
        assert not errors


def test_the_packed_form_is_that_of_its_version() -> None:
    """If this fails, packing has changed. Raise LAYOUT_VERSION, or old files will be read as new ones."""
    numbers = torch.arange(70 * 33, dtype=torch.float32).mul(7).remainder(101).sub(50).view(70, 33)
    weight, scales = quantize(numbers)
    of_groups, group_scales = quantize(numbers, in_groups=True)
    check = 0
    for weights in (
        LinearWeights(numbers, numbers[:, 0]),
        LinearWeights(numbers.bfloat16(), None),
        LinearWeights(weight, numbers[:, 0], scales),
        LinearWeights(of_groups, numbers[:, 0], group_scales),
    ):
        for tensor in linear(weights).tensors:
            check = zlib.crc32(tensor.view(-1).view(torch.uint8).numpy().data, check)
    assert (LAYOUT_VERSION, check) == (7, 3451472094)


def test_the_directory_follows_the_xdg_specification(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_directory() == Path("/home/someone/.cache/helios/packed")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert default_directory() == Path("/elsewhere/helios/packed")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert default_directory() is None
