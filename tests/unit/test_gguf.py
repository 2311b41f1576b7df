"""Pulling a GGUF file. What transformers reads of it is what is written; a file that lies is refused."""

import json
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Stored
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from helios.architectures.registry import read_config
from helios.architectures.spec import LinearScaling, Llama3Scaling, RotaryPositions
from helios.errors import CheckpointError, InvalidRequestError
from helios.sources import gguf
from helios.sources.gguf import name_of
from helios.sources.gguf_header import GgufHeader
from helios.sources.pull import pull
from helios.sources.safetensors_file import write_float32
from tests.gguf_files import LAYERS, TEMPLATE, Kind, write_gguf


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.mark.parametrize(
    ("kind", "tied", "linear", "embeddings"),
    [
        ("llama", True, Stored.Q4_1, Stored.Q8_0),
        ("llama", False, Stored.Q8_0, Stored.F16),
        ("llama", True, Stored.BF16, Stored.F32),
        ("qwen2", True, Stored.Q5_0, Stored.Q8_0),
        ("qwen3", False, Stored.Q4_0, Stored.Q5_1),
    ],
)
def test_the_weights_are_those_that_transformers_reads(
    tmp_path: Path, models: Path, kind: Kind, tied: bool, linear: Stored, embeddings: Stored
) -> None:
    file = tmp_path / "Tiny-Model.Q4_1.gguf"
    write_gguf(file, kind, tied=tied, linear=linear, embeddings=embeddings)
    pulled = pull(str(file), models)
    entry = pulled.entry
    assert (entry.name, entry.num_layers, pulled.licence) == ("tiny-model", LAYERS, "apache-2.0")
    written = load_file(entry.path / "model.safetensors")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name).state_dict()
    if tied:
        del expected["lm_head.weight"]
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name]), name


def test_what_was_permuted_for_ggufs_is_put_back(tmp_path: Path, models: Path) -> None:
    model = write_gguf(tmp_path / "tiny.gguf", linear=Stored.F32, embeddings=Stored.F32)
    written = load_file(pull(str(tmp_path / "tiny.gguf"), models).entry.path / "model.safetensors")
    original = model.state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in written.items())


def test_large_tensors_are_converted_in_pieces(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    whole = (pull(str(tmp_path / "tiny.gguf"), models).entry.path / "model.safetensors").read_bytes()
    monkeypatch.setattr(gguf, "_PIECE_ELEMENTS", 500)
    largest = 0

    def watched(file: Path, shapes: object, pieces: Iterator[np.ndarray]) -> None:
        nonlocal largest
        kept = list(pieces)
        largest = max(piece.size for piece in kept)
        write_float32(file, shapes, kept)

    monkeypatch.setattr(gguf, "write_float32", watched)
    again = pull(str(tmp_path / "tiny.gguf"), models, name="again").entry.path / "model.safetensors"
    assert again.read_bytes() == whole
    # Only queries and keys are read at once, because their rows are permuted.
    assert largest == 64 * 64


def test_the_checkpoint_computes_what_transformers_computes(tmp_path: Path, models: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    entry = pull(str(tmp_path / "tiny.gguf"), models).entry
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        from_gguf = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf")(ids).logits
        from_folder = AutoModelForCausalLM.from_pretrained(entry.path)(ids).logits
    assert torch.equal(from_gguf, from_folder)


TEXTS = ("hello world", "  two  spaces\n\tand é ü 日本", "<|im_start|>hello<|im_end|>", "x=  12,\n    7")


@pytest.mark.parametrize("sentencepiece", [False, True])
def test_the_tokenizer_reads_text_as_transformers_does(
    tmp_path: Path, models: Path, sentencepiece: bool
) -> None:
    write_gguf(
        tmp_path / "tiny.gguf", sentencepiece=sentencepiece, metadata={"tokenizer.ggml.pre": "default"}
    )
    entry = pull(str(tmp_path / "tiny.gguf"), models).entry
    ours = Tokenizer.from_file(str(entry.path / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    assert [ours.encode(text).ids for text in TEXTS] == [theirs(text)["input_ids"] for text in TEXTS]
    # A sentencepiece vocabulary that says nothing begins with BOS; this byte-level one says that it does not.
    assert (ours.encode("hello").ids[0] == 1) is sentencepiece
    assert (entry.path / "chat_template.jinja").read_text() == TEMPLATE


def test_digits_are_single_tokens_where_the_file_says_smollm(tmp_path: Path, models: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", metadata={"tokenizer.ggml.pre": "smollm"})
    entry = pull(str(tmp_path / "tiny.gguf"), models).entry
    tokenizer = Tokenizer.from_file(str(entry.path / "tokenizer.json"))
    # White space before a digit stays whole, as in the text that the merges were learnt from.
    assert tokenizer.encode("=  12").tokens == ["=", "ĠĠ", "1", "2"]


def test_every_token_that_ends_a_text_is_kept(tmp_path: Path, models: Path) -> None:
    ends = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 9}
    write_gguf(tmp_path / "tiny.gguf", metadata=ends)
    assert read_config(pull(str(tmp_path / "tiny.gguf"), models).entry.path).eos_token_ids == (2, 5, 9)


def rope_factors(factor: float) -> np.ndarray:
    """By what llama.cpp divides the frequencies of Llama 3.1, with theta 50,000 and heads of 16."""
    found = []
    for index in range(8):
        wavelength = 2 * np.pi * 50000.0 ** (index / 8)
        if wavelength < 8192 / 4:
            found.append(1.0)
        elif wavelength > 8192 / 1:
            found.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, dtype=np.float32)


def test_scaled_positions_are_kept(tmp_path: Path, models: Path) -> None:
    file = tmp_path / "tiny.gguf"

    def scaling(**wanted: Any) -> object:
        write_gguf(file, **wanted)
        positions = pull(str(file), models, force=True).entry.config.positions
        assert isinstance(positions, RotaryPositions) and positions.theta == 50000.0
        return positions.scaling

    assert scaling() is None
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert scaling(metadata=linear) == LinearScaling(4.0)
    assert scaling(tensors={"rope_freqs.weight": rope_factors(8.0)}) == Llama3Scaling(8.0, 1.0, 4.0, 8192)


def heads(count: int, kv_count: int) -> dict[str, Any]:
    """Metadata with another number of heads."""
    return {
        "llama.attention.head_count": count,
        "llama.attention.head_count_kv": kv_count,
        "llama.rope.dimension_count": None,
    }


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": (
        {"metadata": {"general.architecture": "gpt2"}},
        "general.architecture is 'gpt2', which is not supported",
    ),
    "no layers": ({"metadata": {"llama.block_count": None}}, "llama.block_count is missing"),
    "huge layers": (
        {"metadata": {"llama.block_count": 1 << 30}},
        "llama.block_count is 1073741824, and there",
    ),
    "layers in words": (
        {"metadata": {"llama.block_count": "three"}},
        "llama.block_count must be a whole number",
    ),
    "heads per layer": (
        {"metadata": {"llama.attention.head_count": [4, 4, 4]}},
        "llama.attention.head_count must be a whole number",
    ),
    "heads that do not fit": (
        {"metadata": heads(32, 32)},
        "blk.0.attn_k.weight has the shape",
    ),
    "heads of another width": (
        {"metadata": heads(8, 2)},
        r"layers\.0\.self_attn\.k_proj\.weight has shape",
    ),
    "heads that are rotated in part": (
        {"metadata": {"llama.rope.dimension_count": 8}},
        "llama.rope.dimension_count is 8 of 16 dimensions of a head",
    ),
    "heads that do not divide": (
        {"metadata": heads(5, 5)},
        "cannot be read by transformers .*hidden size",
    ),
    "part of a model": ({"metadata": {"split.count": 3}}, "split.count says that the model lies in several"),
    "another scaling": (
        {"metadata": {"llama.rope.scaling.type": "yarn"}},
        "llama.rope.scaling.type is 'yarn', which is not supported",
    ),
    "factors of another model": (
        {"tensors": {"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)}},
        "rope_freqs.weight scales rotary positions as no Llama 3",
    ),
    "an unknown split": (
        {"metadata": {"tokenizer.ggml.pre": "deepseek-llm"}},
        "tokenizer.ggml.pre is 'deepseek-llm'",
    ),
    "an end beyond the vocabulary": (
        {"metadata": {"tokenizer.ggml.eot_token_id": 1 << 20}},
        "tokenizer.ggml.eot_token_id must be a token below",
    ),
    "more tokens than the model has": (
        {"metadata": {"llama.vocab_size": 250}},
        "tokenizer.ggml.tokens has 266 tokens, and the model has 250",
    ),
    "no tokenizer": ({"metadata": {"tokenizer.ggml.model": None}}, "cannot be read by transformers"),
    "a stray tensor": (
        {"tensors": {"blk.0.attn_q.bias": np.zeros(64, dtype=np.float32)}},
        "blk.0.attn_q.bias has no place in a model of type llama",
    ),
    "a missing tensor": (
        {"tensors": {"blk.1.ffn_up.weight": None}},
        r"no tensor layers\.1\.mlp\.up_proj\.weight",
    ),
    "another shape": (
        {"tensors": {"blk.1.ffn_up.weight": np.zeros((64, 96), dtype=np.float32)}},
        r"layers\.1\.mlp\.up_proj\.weight has shape \[64, 96\]",
    ),
    "NaN": (
        {"tensors": {"blk.2.ffn_norm.weight": np.full(64, np.nan, dtype=np.float32)}},
        r"layers\.2\.post_attention_layernorm\.weight holds NaN",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_helios_cannot_serve_is_refused_by_name_and_leaves_nothing(
    tmp_path: Path, models: Path, lie: str
) -> None:
    wanted, reason = LIES[lie]
    file = tmp_path / "tiny.gguf"
    write_gguf(file, **wanted)
    with pytest.raises(CheckpointError, match=reason) as raised:
        pull(str(file), models)
    assert str(file) in raised.value.message and "\n" not in raised.value.message
    assert not models.exists() or not list(models.iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a good file."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file)
    return file.read_bytes()


def after(whole: bytes, key: str) -> int:
    """The place of the value of a metadata entry, behind its type."""
    return whole.index(struct.pack("<Q", len(key)) + key.encode()) + 8 + len(key) + 4


def patched(whole: bytes, place: int, form: str, value: int) -> bytes:
    return whole[:place] + struct.pack(form, value) + whole[place + struct.calcsize(form) :]


def lying_headers(whole: bytes) -> Iterator[tuple[bytes, str]]:
    huge = (1 << 62) + 1
    tensor = whole.index(b"blk.0.attn_norm.weight")
    behind = tensor + len(b"blk.0.attn_norm.weight")
    tokens = after(whole, "tokenizer.ggml.tokens")
    yield b"", "is not a GGUF file"
    yield b"GGJT" + whole[4:], "is not a GGUF file"
    yield patched(whole, 4, "<I", 1), "version 1 of GGUF is not supported"
    yield patched(whole, 4, ">I", 3), "version 50331648 of GGUF is not supported"
    yield patched(whole, 8, "<Q", huge), f"the number of tensors is {huge}"
    yield patched(whole, 16, "<Q", huge), f"the number of metadata entries is {huge}"
    yield patched(whole, 24, "<Q", huge), f"the length of a metadata key is {huge}"
    yield patched(whole, tokens + 4, "<Q", huge), f"the length of tokenizer.ggml.tokens is {huge}"
    yield patched(whole, tokens, "<I", 9), "tokenizer.ggml.tokens is an array of type 9"
    yield patched(whole, tokens - 4, "<I", 77), "tokenizer.ggml.tokens has the unknown type 77"
    yield (
        patched(whole, tokens + 12, "<Q", 1 << 20),
        "an item of tokenizer.ggml.tokens reaches beyond the end",
    )
    yield patched(whole, after(whole, "general.license") + 8, "<H", 0xFFFF), "general.license is not text"
    yield patched(whole, tensor - 8, "<Q", huge), f"the length of a tensor's name is {huge}"
    yield patched(whole, behind, "<I", 9), "the number of dimensions of blk.0.attn_norm.weight is 9"
    yield patched(whole, behind + 4, "<Q", huge), f"a dimension of blk.0.attn_norm.weight is {huge}"
    yield patched(whole, behind + 4, "<Q", 0), r"blk.0.attn_norm.weight has the shape \[0\]"
    yield patched(whole, behind + 12, "<I", 99), "blk.0.attn_norm.weight has the unknown type 99"
    yield (
        patched(whole, behind + 12, "<I", int(Stored.Q4_K)),
        "has rows of 64, and its type has blocks of 256",
    )
    yield patched(whole, behind + 16, "<Q", 1 << 62), "is truncated: .* blk.0.attn_norm.weight ends at"
    yield patched(whole, behind + 16, "<Q", 1), "has the offset 1, which is no multiple of 32"
    yield patched(whole, behind + 16, "<Q", 0), "lies on"
    yield whole[:-64], "is truncated"
    yield whole[: header_size(whole)], "is truncated"
    yield whole[: tensor + 4], "a tensor's name reaches beyond the end of the file"


def test_a_truncated_or_lying_header_is_refused_by_the_name_of_the_field(
    tmp_path: Path, models: Path, whole: bytes
) -> None:
    file = tmp_path / "tiny.gguf"
    for content, reason in lying_headers(whole):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=reason) as raised:
            pull(str(file), models)
        assert str(file) in raised.value.message
        assert not models.exists()


def mutations(whole: bytes, header_bytes: int) -> st.SearchStrategy[bytes]:
    """A file with some bytes of its header replaced, and perhaps cut off."""
    numbers = st.sampled_from([0, 1, 2, 9, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, 1 << 63, (1 << 64) - 1])
    edit = st.tuples(
        st.integers(0, header_bytes - 8),
        st.one_of(st.binary(min_size=1, max_size=8), numbers.map(lambda number: struct.pack("<Q", number))),
    )

    def apply(edits: list[tuple[int, bytes]], cut: int | None) -> bytes:
        content = bytearray(whole)
        for place, new in edits:
            content[place : place + len(new)] = new
        return bytes(content[:cut])

    cuts = st.one_of(st.none(), st.integers(0, len(whole)))
    return st.builds(apply, st.lists(edit, min_size=1, max_size=3), cuts)


def header_size(whole: bytes) -> int:
    """Up to where the header of the good file reaches, about."""
    return whole.rindex(b"output_norm.weight") + 64


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_header_is_read_or_refused(whole: bytes, data: st.DataObject) -> None:
    content = data.draw(mutations(whole, header_size(whole)))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tiny.gguf"
        file.write_bytes(content)
        try:
            header = GgufHeader.read(file)
        except CheckpointError as error:
            assert str(file) in error.message
        else:
            assert all(tensor.start + tensor.size <= len(content) for tensor in header.tensors)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_file_is_pulled_or_refused_and_a_refusal_leaves_nothing(
    whole: bytes, data: st.DataObject
) -> None:
    content = data.draw(mutations(whole, header_size(whole)))
    with tempfile.TemporaryDirectory() as folder:
        file, models = Path(folder) / "tiny.gguf", Path(folder) / "models"
        file.write_bytes(content)
        try:
            pull(str(file), models)
        except CheckpointError as error:
            assert str(file) in error.message
            assert not models.exists() or not list(models.iterdir())


KEYS = (
    *(f"llama.{key}" for key in ("block_count", "context_length", "embedding_length", "feed_forward_length")),
    *(f"llama.attention.{key}" for key in ("head_count", "head_count_kv", "layer_norm_rms_epsilon")),
    *(f"llama.{key}" for key in ("rope.freq_base", "rope.dimension_count", "vocab_size")),
    *(f"tokenizer.ggml.{key}" for key in ("model", "pre", "tokens", "merges", "token_type", "add_bos_token")),
    *(f"tokenizer.ggml.{key}_token_id" for key in ("bos", "eos", "unknown", "padding", "eot")),
    "tokenizer.chat_template",
    "general.architecture",
    "general.license",
    "general.name",
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, 2, 3, 5, 7, 260, 1 << 20, (1 << 31) - 1, (1 << 32) - 1]),
    st.sampled_from([0.0, -1.0, 1e-30, 1e30, float("inf"), float("nan")]),
    st.sampled_from(["", "llama", "mistral", "gpt2", "t5", "default", "{{ 1 / 0 }}", "{% if", "é" * 99]),
    st.lists(st.sampled_from(["a", "", "a b", "he ll", "<unk>", "▁"]), min_size=1, max_size=300),
    st.lists(st.integers(-5, 5), min_size=1, max_size=300),
)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(metadata=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=2))
def test_any_metadata_are_pulled_or_refused_and_a_refusal_leaves_nothing(metadata: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file, models = Path(folder) / "tiny.gguf", Path(folder) / "models"
        write_gguf(file, metadata=metadata)
        try:
            pull(str(file), models)
        except CheckpointError as error:
            assert str(file) in error.message
            assert not models.exists() or not list(models.iterdir())


def test_a_file_that_is_missing_is_said_so(tmp_path: Path, models: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.gguf is missing"):
        pull(str(tmp_path / "gone.gguf"), models)
    with pytest.raises(InvalidRequestError, match="is a file and has no revisions"):
        pull(str(tmp_path / "gone.gguf"), models, revision="main")


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 900, 100))
    with pytest.raises(CheckpointError, match=r"as float32, and .* GB free; make room"):
        pull(str(tmp_path / "tiny.gguf"), models)
    assert not list(models.iterdir())


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct"),
        ("Llama-3.2-1B-Instruct-Q4_K_M.gguf", "llama-3.2-1b-instruct"),
        ("Qwen3 0.6B_bf16.gguf", "qwen3-0.6b"),
        ("tinyllama.IQ4_XS.gguf", "tinyllama"),
    ],
)
def test_a_gguf_names_its_model_without_the_quantisation(file: str, name: str) -> None:
    assert name_of(Path(file)) == name


def test_a_pulled_config_names_what_transformers_needs(tmp_path: Path, models: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", "qwen3")
    fields = json.loads((pull(str(tmp_path / "tiny.gguf"), models).entry.path / "config.json").read_text())
    assert fields["architectures"] == ["Qwen3ForCausalLM"]
    assert (fields["head_dim"], fields["dtype"]) == (128, "float32")
