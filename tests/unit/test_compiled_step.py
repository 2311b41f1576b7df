"""The compiled step: its sums, rows that do not affect each other, resuming to the bit, and quality."""

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from helios.engine.backends.burst import ONE_STEP
from helios.engine.backends.eager import EagerModel
from helios.engine.backends.kv_cache import KVCache
from helios.engine.backends.paged_attention import attend
from helios.engine.backends.readout import read
from helios.engine.engine import Engine
from helios.engine.interface import GeneratedToken, Output
from helios.engine.kernels import inner_product as inner_product_module
from helios.engine.kernels.attention_int8 import first_half
from helios.engine.kernels.inner_product import GROUP, TILE, inner_product
from helios.engine.kernels.layer import OWN_ROWS
from helios.engine.kernels.layout import BFLOAT16, INT8
from helios.engine.kernels.processor import PROCESSOR
from helios.engine.kernels.simd import keep, store_long
from helios.engine.kernels.team import TEAM
from helios.engine.plan import load_plan
from helios.engine.scheduling.batch import Batch, build_batch
from helios.engine.scheduling.detokenizer import Detokenizer
from helios.engine.scheduling.sequence import Sequence
from helios.engine.settings import EngineSettings
from helios.engine.threads import get_threads, set_threads
from helios.engine.weights import part_reader
from helios.engine.weights.linear import PackedLinear, pack
from helios.engine.weights.parts import LinearWeights
from helios.engine.weights.precision import precision_on
from helios.engine.weights.quantize import quantize
from helios.errors import SettingsError
from helios.modes import ExitMode, Precision
from helios.sampling import SamplingParams
from helios.served import ServedPlan
from tests.opt_variants import Head
from tests.variants import VARIANTS, save_variant

MEMORY = 64 << 20
PLAN = ServedPlan(model="random", depth=1)
PRECISIONS = ("float32", "bfloat16", "int8")
# Kinds of products: in int8 each row and channel has one scale, or each group of inputs.
PRODUCTS = (*PRECISIONS, "int8 in groups")


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before, worthwhile = TEAM.threads, TEAM.worthwhile
    # worthwhile 0: threads share the work even if there is little.
    TEAM.threads, TEAM.worthwhile = request.param, 0
    yield request.param
    TEAM.threads, TEAM.worthwhile = before, worthwhile


@dataclass(frozen=True)
class Case:
    """A packed linear layer, and the weights and settings that it was made from."""

    linear: PackedLinear
    weight: torch.Tensor  # [out, in], rounded to the precision
    bias: torch.Tensor
    precision: str

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The product in float64 of numbers that are rounded to the precision."""
        if self.precision.startswith("int8"):
            group = GROUP if self.precision == "int8 in groups" else x.shape[1]
            parts = F.pad(x, (0, -x.shape[1] % group)).unflatten(1, (-1, group))
            spans = parts.clamp(min=0).amax(dim=2, keepdim=True) - parts.clamp(max=0).amin(
                dim=2, keepdim=True
            )
            scales = spans / 254
            parts = torch.where(scales > 0, (parts / scales).round() * scales, 0)
            x = parts.flatten(1)[:, : x.shape[1]]
        if self.precision == "bfloat16":
            x = x.bfloat16()
        return F.linear(x.double(), self.weight.double(), self.bias.double()).float()


def packed(precision: str, in_size: int, out_size: int) -> Case:
    torch.manual_seed(0)
    weight, bias = torch.randn(out_size, in_size), torch.randn(out_size)
    if precision == "int8":
        whole, scales = quantize(weight)
        return Case(pack(LinearWeights(whole, bias, scales)), whole * scales[:, None], bias, precision)
    if precision == "int8 in groups":
        whole, scales = quantize(weight, in_groups=True)
        by_input = scales.repeat_interleave(GROUP, dim=1)[:, :in_size]
        return Case(pack(LinearWeights(whole, bias, scales)), whole * by_input, bias, precision)
    weight = weight.to(getattr(torch, precision))
    return Case(pack(LinearWeights(weight, bias)), weight, bias, precision)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("precision", PRODUCTS)
@pytest.mark.parametrize(("in_size", "out_size"), [(192, 576), (33, 70), (4, 1), (768, 96)])
@pytest.mark.parametrize("rows", [1, 2, 4, 7, 33])
def test_a_product_is_that_of_the_numbers_in_its_precision(
    threads: int, precision: str, in_size: int, out_size: int, rows: int
) -> None:
    case = packed(precision, in_size, out_size)
    x = torch.randn(rows, in_size)
    torch.testing.assert_close(case.linear(x), case.product(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", PRODUCTS)
@pytest.mark.parametrize("first", [0, 32, 40, 95])
def test_a_part_of_the_channels_is_the_same_as_in_the_whole(precision: str, first: int) -> None:
    case, x = packed(precision, 64, 96), torch.randn(3, 64)
    assert torch.equal(case.linear.from_channel(x, first), case.linear(x)[:, first:])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_weights_of_a_channel_are_found_where_they_are_packed(precision: str) -> None:
    case, channels = packed(precision, 33, 70), torch.tensor([69, 0, 31, 32, 31])
    assert torch.equal(case.linear.weights_of(channels), case.weight[channels])


@pytest.mark.parametrize("precision", PRODUCTS)
def test_a_row_is_the_same_to_the_bit_whatever_rows_are_beside_it(precision: str) -> None:
    linear = packed(precision, 192, 96).linear
    x = torch.randn(27, 192)
    x[5] *= 1e6
    together = linear(x)
    for count in (1, 2, 3, 5, 8, 13):
        for start in range(0, 27 - count, count):
            assert torch.equal(together[start : start + count], linear(x[start : start + count]))


def test_int8_steps_span_what_a_row_has_and_no_more() -> None:
    """Rows without negative numbers, such as a ReLU's output, lose half as much as rows with both signs."""
    eye = torch.eye(64)
    whole, scales = quantize(eye)
    same = pack(LinearWeights(whole, torch.zeros(64), scales))
    for low, high in ((0.0, 1.0), (-1.0, 0.0), (-1.0, 1.0), (-0.2, 0.8), (3.0, 5.0)):
        x = torch.linspace(low, high, 64)[None]
        step = (max(high, 0) - min(low, 0)) / 254
        assert ((same(x) - x).abs() <= 0.501 * step + 1e-6).all()
        assert torch.allclose(same(torch.zeros(1, 64)), torch.zeros(1, 64)), "zero is always exact"


@pytest.mark.parametrize("precision", PRODUCTS)
def test_a_row_of_zeros_gives_the_biases(precision: str) -> None:
    case = packed(precision, 64, 96)
    assert torch.equal(case.linear(torch.zeros(2, 64)), case.bias.expand(2, -1))


@pytest.mark.parametrize("precision", [BFLOAT16, INT8])
def test_without_the_instruction_the_sums_are_the_same(
    monkeypatch: pytest.MonkeyPatch, precision: int
) -> None:
    generator = np.random.default_rng(0)
    steps = 5
    if precision == INT8:
        x = generator.integers(0, 256, (2, 4 * steps), dtype=np.uint8)
        weights = generator.integers(-128, 128, (steps, TILE, 4), dtype=np.int8)
        by_step, products = x.astype(np.int32).reshape(2, steps, 4), weights.astype(np.int32)
    else:
        # Sums of small whole numbers are exact in any order.
        by_step = generator.integers(-9, 9, (2, steps, 2)).astype(np.float32)
        products = generator.integers(-9, 9, (steps, TILE, 2)).astype(np.float32)
        x, weights = ((part.view(np.uint32) >> 16).astype(np.uint16) for part in (by_step, products))
    expected = np.einsum("rsk,sck->rc", by_step, products)

    def sums() -> Any:
        @njit
        def compute(x: int, weights: int, out: int) -> None:
            inner_product(precision, 2, x, steps, weights, steps, out, weights, 0)

        out = np.zeros((2, TILE), expected.dtype)
        compute(x.ctypes.data, weights.ctypes.data, out.ctypes.data)
        return out.tolist()

    assert sums() == expected.tolist()
    plain = replace(PROCESSOR, byte_dot_product=None, bfloat16_dot_product=None)
    monkeypatch.setattr(inner_product_module, "PROCESSOR", plain)
    assert sums() == expected.tolist()


def test_a_few_large_numbers_leave_those_of_other_groups_their_bits() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(32, 4 * GROUP), torch.randn(3, 4 * GROUP)
    # A large weight meets zeros, and so does a large input.
    weight[:, 5], x[:, :GROUP] = 1e3, 0
    x[:, GROUP + 5], weight[:, GROUP : 2 * GROUP] = 1e3, 0
    whole, scales = quantize(weight, in_groups=True)
    found = pack(LinearWeights(whole, None, scales))(x)
    torch.testing.assert_close(found, F.linear(x, weight), rtol=0, atol=0.5)


def halves_of(keys: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The parts of the last dimension that each have a scale."""
    size = keys.shape[-1]
    first = first_half(size)
    return keys.split([part for part in (first, size - first) if part], dim=-1)


def in_bytes(numbers: torch.Tensor) -> torch.Tensor:
    """Rounds each vector of the last dimension to steps of a 127th of its largest number."""
    steps = numbers.abs().amax(dim=-1, keepdim=True) / 127
    return (numbers / steps).round() * steps


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("block_tokens", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(3, 3, 8), (3, 3, 20), (3, 3, 64), (3, 3, 80), (9, 3, 64), (7, 1, 12)]
)
def test_paged_attention_sees_each_rows_own_context(
    threads: int, block_tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    """The batch has decodes of several lengths, a first chunk of a prefill and a later one."""
    torch.manual_seed(0)
    parts = [heads, kv_heads, kv_heads]
    # In int8 the attention weights have 16 bits.
    tolerance = 1e-4 if dtype == torch.int8 else 1e-5
    computed, count = (0, 40, 16, 1, 35), (20, 1, 17, 1, 1)
    cache = KVCache(1, 20, block_tokens, kv_heads, head_dim, dtype, torch.device("cpu"))
    numbers = iter(torch.randperm(20).tolist())
    scheduled, states = [], {}
    for before, added in zip(computed, count, strict=True):
        detokenizer = Detokenizer.__new__(Detokenizer)
        ids = [5] * (before + added)
        sequence = Sequence("", ids, 1, SamplingParams(), detokenizer, lambda _: None, PLAN)
        sequence.computed = before
        sequence.blocks = [next(numbers) for _ in range(-(-(before + added) // block_tokens))]
        states[sequence.arrival] = torch.randn(before + added, sum(parts), head_dim)
        _, *past = states[sequence.arrival][:before].split(parts, dim=1)
        slots = [sequence.blocks[p // block_tokens] * block_tokens + p % block_tokens for p in range(before)]
        cache.write(0, torch.tensor(slots, dtype=torch.int64), *past)
        scheduled.append((sequence, added))
    batch, _ = build_batch(scheduled, block_tokens, torch.device("cpu"))
    order = sorted(scheduled, key=lambda pair: pair[1] != pair[0].pending or pair[1] != 1)
    new = torch.cat([states[seq.arrival][seq.computed :] for seq, _ in order])
    attended = attend(new.flatten(1), batch, cache, 0)
    row = 0
    for seq, added in order:
        # [heads, tokens, head_dim]
        query, key, value = states[seq.arrival].transpose(0, 1).split(parts)
        if dtype == torch.int8:
            query, key = (torch.cat(list(map(in_bytes, halves_of(part))), dim=2) for part in (query, key))
            value = in_bytes(value)
        else:
            key, value = key.to(dtype).float(), value.to(dtype).float()
        causal = torch.ones(len(query[0]), len(query[0]), dtype=torch.bool).tril()
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=causal, enable_gqa=True)
        torch.testing.assert_close(
            attended[row : row + added],
            expected[:, seq.computed :].transpose(0, 1).flatten(1),
            rtol=1e-5,
            atol=tolerance,
        )
        for position in range(seq.computed, len(seq.token_ids)):
            alone = replace(seq, token_ids=[5] * (position + 1), computed=position)
            single, _ = build_batch([(alone, 1)], block_tokens, torch.device("cpu"))
            state = states[seq.arrival][position].flatten()[None]
            assert torch.equal(attend(state, single, cache, 0)[0], attended[row]), "a row alone is the same"
            row += 1


def test_keys_and_values_beyond_float16_are_kept_at_its_end() -> None:
    cache = KVCache(1, 1, 16, 1, 4, torch.float16, torch.device("cpu"))
    zero = torch.zeros(1, dtype=torch.int64)
    batch = Batch.of(zero, zero, zero, zero[None], zero, 1, 16, (), zero)
    query = torch.ones(4)
    attended = attend(torch.cat([query, 1e9 * query, -1e9 * query])[None], batch, cache, 0)
    assert torch.equal(attended[0], torch.full((4,), -65504.0))
    assert torch.isfinite(cache.keys[0]).all()


def generate(
    engine: Engine, prompts: list[list[int]], emitted: list[list[int]], tokens: int
) -> list[list[GeneratedToken]]:
    """The new tokens of all prompts, which are served together."""
    found: list[list[GeneratedToken]] = [[] for _ in prompts]

    def sink(index: int) -> object:
        def take(output: Output) -> None:
            assert output.error is None
            found[index].extend(output.tokens)

        return take

    for index, (prompt, before) in enumerate(zip(prompts, emitted, strict=True)):
        sampling = SamplingParams(
            max_tokens=tokens, ignore_eos=True, temperature=0.9 if index % 2 else 0.0, seed=index
        )
        engine.submit(f"{index}-{len(before)}", prompt, sampling, sink(index), emitted_ids=before)  # type: ignore[arg-type]
    while engine.step():
        pass
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "name", ["pre-norm", "post-norm", "no-bias", "no-affine", "llama", "odd-widths", "qwen3"]
)
def test_a_resumed_stream_goes_on_to_the_bit_whatever_it_is_batched_with(
    tmp_path: Path, name: str, precision: str
) -> None:
    save_variant(tmp_path, name, seed=1, exits=[2, 4, 6])
    settings = EngineSettings(precision=precision, memory_bytes=MEMORY, step_token_budget=64, max_running=8)
    engine = Engine.load(tmp_path, 4, settings)
    prompts = [[2, *range(10 + 7 * index, 40 + 11 * index)] for index in range(5)]
    undisturbed = generate(engine, prompts, [[] for _ in prompts], 40)
    other = Engine.load(tmp_path, 4, settings)
    for index, (prompt, tokens) in enumerate(zip(prompts, undisturbed, strict=True)):
        cut = 5 + 6 * index
        before = [token.token_id for token in tokens[:cut]]
        filler = [[2] * (3 + index)] * index
        # The prompt keeps its place among its neighbours, so it has the same sampling parameters.
        alone = generate(other, [*filler, prompt], [*([] for _ in filler), before], 40)
        assert [(t.token_id, t.logprob, t.confidence) for t in alone[-1]] == [
            (t.token_id, t.logprob, t.confidence) for t in tokens[cut:]
        ]


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["pre-norm", "post-norm", "biased", "qwen3"])
def test_many_rows_at_once_are_the_same_to_the_bit_as_a_few_at_a_time(
    tmp_path: Path, name: str, precision: str, threads: int
) -> None:
    """With many rows each thread owns some of them. With few rows all threads share the channels."""
    save_variant(tmp_path, name, seed=2, exits=[2, 4, 6])
    prompts = [[2, *range(10 + 5 * index, 90 + 5 * index)] for index in range(3)]
    told = []
    for budget in (16, 3 * OWN_ROWS + 5):
        settings = EngineSettings(
            precision=precision, memory_bytes=MEMORY, step_token_budget=budget, max_running=3
        )
        engine = Engine.load(tmp_path, 4, settings)
        tokens = generate(engine, prompts, [[], [], []], 4)
        told.append([[(one.token_id, one.logprob, one.confidence) for one in stream] for stream in tokens])
    assert told[0] == told[1]


def logits_of(path: Path, precision: str) -> torch.Tensor:
    """Logits of the full model after a prompt of 61 tokens: [1, vocabulary]."""
    settings = EngineSettings(precision=precision, memory_bytes=MEMORY, packed_cache_bytes=0)
    engine = Engine.load(path, 6, settings)
    model, detokenizer = engine.plan.model, Detokenizer(engine.plan.tokenizer, ())
    ids = [2, *range(20, 80)]
    sequence = Sequence("", ids, 1, SamplingParams(), detokenizer, lambda _: None, engine.plan.served)
    sequence.blocks = [0, 1, 2, 3]
    batch, _ = build_batch([(sequence, 61)], 16, model.device)
    cache = KVCache.of(model.config, 6, 4, 16, model.dtype, model.device)
    # KV is as exact as the activations, so that only the precision of products matters.
    eager = EagerModel(model.config, model.weights, 16)
    with torch.inference_mode():
        return eager.step(batch, cache, 6).logits.clone()


def error_of(path: Path, precision: str) -> float:
    """The relative error against float32."""
    expected = logits_of(path, "float32")
    return float((logits_of(path, precision) - expected).norm() / expected.norm())


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", list(VARIANTS))
def test_fewer_bits_compute_nearly_what_float32_does(tmp_path: Path, name: str, precision: str) -> None:
    """Random weights are the hardest case, because they have no redundancy."""
    save_variant(tmp_path, name, seed=3, exits=[2, 4, 6])
    assert 0 < error_of(tmp_path, precision) < 0.05


def test_a_large_channel_of_a_norm_leaves_the_others_their_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same function with one channel of each norm 64 times larger, and its weights 64 times smaller."""
    save_variant(tmp_path, "pre-norm", seed=3, exits=[2, 4, 6])
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(6):
        name = f"model.decoder.layers.{layer}."
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            for kind in ("weight", "bias"):
                tensors[f"{name}{norm}.{kind}"][5] *= 64
        for product in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "fc1"):
            tensors[f"{name}{product}.weight"][:, 5] /= 64
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    evened = error_of(tmp_path, "int8")
    monkeypatch.setattr(part_reader, "migrate_gammas", lambda norm: (norm, None))
    assert evened < 0.5 * error_of(tmp_path, "int8")


def test_a_norm_that_is_zero_everywhere_stays_as_it_is(tmp_path: Path) -> None:
    save_variant(tmp_path, "pre-norm", seed=3, exits=[2, 4, 6])
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.decoder.layers.1.final_layer_norm.weight"].zero_()
    tensors["model.decoder.layers.2.self_attn_layer_norm.weight"][3] = 0
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert 0 < error_of(tmp_path, "int8") < 0.05


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("name", "head"),
    [
        *((name, "shared") for name in VARIANTS),
        ("pre-norm", "norm"),
        ("projected", "linear"),
        ("qwen2", "linear"),
    ],
)
def test_one_call_computes_what_the_layers_one_by_one_do(
    tmp_path: Path, name: str, head: Head, precision: str, threads: int
) -> None:
    """The compiled step does not support blocks of 8 tokens. There the model applies layer after layer."""
    save_variant(tmp_path, name, seed=3, exits=[2, 4, 6], head=head)
    prompts = [[2, *range(20, 80)], [2, *range(30, 50)]]
    told = []
    for block_tokens in (8, 16):
        settings = EngineSettings(precision=precision, memory_bytes=MEMORY, block_tokens=block_tokens)
        engine = Engine.load(tmp_path, 4, settings)
        told.append([one[0] for one in generate(engine, prompts, [[], []], 1)])
    # Sums in another order are rounded differently, and in int8 the other way does not round queries. Random
    # weights magnify this.
    tolerance = {"float32": 1e-4, "bfloat16": 0.02, "int8": 0.1}[precision]
    (likely, drawn), (other_likely, other_drawn) = told
    assert likely.logprob == pytest.approx(other_likely.logprob, abs=tolerance)
    if precision == "float32":
        # With fewer bits, near ties may fall either way.
        assert [likely.token_id, drawn.token_id] == [other_likely.token_id, other_drawn.token_id]
    if drawn.token_id == other_drawn.token_id:
        assert drawn.logprob == pytest.approx(other_drawn.logprob, abs=tolerance)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize(
    ("name", "head"),
    [("pre-norm", "shared"), ("post-norm", "norm"), ("projected", "linear"), ("llama3", "norm")],
)
def test_tokens_leave_the_one_call_where_they_leave_the_layers_one_by_one(
    tmp_path: Path, name: str, head: Head, threads: int
) -> None:
    """Rows that have not left yet are moved together, beside prompts in chunks."""
    save_variant(tmp_path, name, seed=3, exits=[1, 2, 4, 6], head=head)
    prompts = [[2, *range(10 + 7 * index, 30 + 23 * index)] for index in range(8)]
    told = []
    for block_tokens in (8, 16):
        settings = EngineSettings(
            exit_mode=ExitMode.DYNAMIC,
            threshold=0.05,
            memory_bytes=MEMORY,
            block_tokens=block_tokens,
            step_token_budget=32,
            max_running=8,
        )
        engine = Engine.load(tmp_path, settings=settings)
        told.append(generate(engine, prompts, [[] for _ in prompts], 30))
    for one, other in zip(*told, strict=True):
        assert [(t.token_id, t.exit_layer) for t in one] == [(t.token_id, t.exit_layer) for t in other]
        assert [t.logprob for t in one] == pytest.approx([t.logprob for t in other], abs=1e-4)
    assert len({token.exit_layer for tokens in told[0] for token in tokens}) > 2


COMPILED = """
import sys
from helios.engine import Engine, EngineSettings, SamplingParams
from helios.engine.kernels import jit

def compiled():
    return {name: len(types) for name, types in jit.signatures().items()}

engine = Engine.load(sys.argv[1], settings=EngineSettings(precision=sys.argv[2], memory_bytes=64 << 20))
before = compiled()
assert sum(before.values())
warm = {"temperature": 1.0, "top_p": 0.5, "top_k": 9}
for sampling in ({}, warm, {**warm, "repetition_penalty": 2.0}):
    list(engine.generate([2] * 40, SamplingParams(max_tokens=3, ignore_eos=True, **sampling)))
assert compiled() == before, (before, compiled())
"""


@pytest.mark.parametrize("precision", ["int8", "float32"])
@pytest.mark.parametrize("name", ["pre-norm", "llama"])
def test_no_request_waits_for_a_kernel_to_be_compiled(tmp_path: Path, name: str, precision: str) -> None:
    save_variant(tmp_path, name, seed=3)
    command = [sys.executable, "-c", COMPILED, str(tmp_path), precision]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["pre-norm", "post-norm", "llama", "qwen3-biased"])
def test_skipped_layers_remember_what_they_would_have_of_the_same_input(
    tmp_path: Path, threads: int, precision: str, name: str
) -> None:
    """Equal to the bit, even if one tile holds the last queries and the first keys."""
    save_variant(tmp_path, name, seed=5, hidden_size=48)
    model = load_plan(tmp_path, None, EngineSettings(precision=precision, memory_bytes=MEMORY)).model
    positions, blocks = torch.tensor([0, 1, 9]), torch.arange(3)
    slots = 16 * blocks + positions
    ids = torch.tensor([5, 70, 200])
    batch = Batch.of(ids, positions, slots, blocks[:, None], blocks, 3, 16, (), blocks)
    skipped, walked = (
        KVCache.of(model.config, model.depth, 3, 16, model.kv_dtype, ids.device) for _ in range(2)
    )
    with torch.inference_mode():
        _, left = model.backend.step_dynamic(batch, skipped, {2: 0.0}, ONE_STEP)
        hidden = model.layers(0, 2, model.embed(ids, positions), batch, walked)
        for index in range(2, model.depth):
            model.layers(index, index + 1, hidden, batch, walked)
    assert left == [2, 2, 2]
    for kept, expected in ((skipped.keys, walked.keys), (skipped.values, walked.values)):
        assert all(layer.any() for layer in kept)
        assert all(torch.equal(one, other) for one, other in zip(kept, expected, strict=True))


def test_fewer_bits_take_less_memory(tmp_path: Path) -> None:
    save_variant(tmp_path, "pre-norm", seed=3, hidden_size=128, ffn_dim=512)
    sizes = {
        precision: Engine.load(
            tmp_path, settings=EngineSettings(precision=precision, memory_bytes=MEMORY)
        ).plan.memory.weight_bytes
        for precision in PRECISIONS
    }
    assert sizes["bfloat16"] < 0.51 * sizes["float32"]
    assert sizes["int8"] < 0.3 * sizes["float32"]


def test_a_tied_head_and_the_embeddings_are_one_tensor(tmp_path: Path) -> None:
    sizes = {}
    for name in ("pre-norm", "untied"):
        save_variant(tmp_path / name, name, seed=3)
        engine = Engine.load(tmp_path / name, settings=EngineSettings(memory_bytes=MEMORY))
        sizes[name] = engine.plan.memory.weight_bytes
    assert sizes["untied"] - sizes["pre-norm"] == 264 * 32 * 4


def test_auto_is_int8_where_bytes_are_multiplied_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr("helios.engine.weights.precision.has_byte_dot_product", lambda: True)
    assert precision_on(Precision.AUTO, cpu) is Precision.INT8
    monkeypatch.setattr("helios.engine.weights.precision.has_byte_dot_product", lambda: False)
    assert precision_on(Precision.AUTO, cpu) is Precision.FLOAT32
    assert precision_on(Precision.AUTO, torch.device("cuda")) is Precision.BFLOAT16
    assert precision_on(Precision.BFLOAT16, cpu) is Precision.BFLOAT16
    with pytest.raises(SettingsError, match="use bfloat16"):
        precision_on(Precision.INT8, torch.device("cuda"))
    with pytest.raises(SettingsError, match="one of auto, float32"):
        EngineSettings(precision="int4")


def test_threads_belong_to_torch_or_to_the_team() -> None:
    before = get_threads()
    try:
        set_threads(2)
        assert (torch.get_num_threads(), TEAM.threads, get_threads()) == (1, 2, 2)
        set_threads(2, "float16")
        assert (torch.get_num_threads(), TEAM.threads, get_threads()) == (2, 1, 2)
    finally:
        set_threads(before)


@njit
def take_twice(count: int) -> tuple[int, int]:
    """The addresses of two arrays. Only the addresses are used afterwards."""
    first = np.empty(64, np.int64)
    one = first.ctypes.data
    for index in range(count):
        store_long(one, index, index)
    second = np.empty(64, np.int64)
    other = second.ctypes.data
    for index in range(count):
        store_long(other, index, index)
    keep(first)
    keep(second)
    return one, other


def test_kept_memory_is_not_given_to_others() -> None:
    one, other = take_twice(3)
    assert one != other


@pytest.mark.parametrize("name", ["attention_float", "attention_int8", "product", "summary"])
def test_memory_whose_address_a_kernel_takes_is_kept_to_its_end(name: str) -> None:
    """Otherwise another thread sometimes gets the memory while the kernel still works in it."""
    taken = 0
    module = importlib.import_module(f"helios.engine.kernels.{name}")
    for kernel in ast.walk(ast.parse(inspect.getsource(module))):
        if not isinstance(kernel, ast.FunctionDef):
            continue
        nodes = [ast.unparse(node) for node in ast.walk(kernel) if isinstance(node, ast.Attribute)]
        arrays = {node.removesuffix(".ctypes.data") for node in nodes if node.endswith(".ctypes.data")}
        last = [ast.unparse(statement) for statement in kernel.body[len(kernel.body) - len(arrays) :]]
        assert set(last) == {f"keep({array})" for array in arrays}, kernel.name
        taken += len(arrays)
    assert taken


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("width", [3, 16, 264, 4097])
def test_sampling_finds_the_first_of_the_largest_and_the_mass_of_all(threads: int, width: int) -> None:
    torch.manual_seed(width)
    logits = (torch.randn(5, width) * 4).round()  # rounded, so that there are ties
    found = read(logits)
    assert found.best.tolist() == [row.index(max(row)) for row in logits.tolist()]
    expected = logits.log_softmax(dim=-1).amax(dim=-1)
    torch.testing.assert_close(found.logprobs, expected)
    torch.testing.assert_close(found.confidences, expected.exp())
