"""int8: exact sums, rows that do not disturb each other, streams that resume to the bit, and its quality."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numba import njit
from torch.nn import functional as F

from helios.engine import simd
from helios.engine.batch import build_batch
from helios.engine.checkpoint import LinearWeights
from helios.engine.detokenizer import Detokenizer
from helios.engine.engine import Engine
from helios.engine.kv_cache import KVCache
from helios.engine.linear import Int8Linear, quantize
from helios.engine.paged_attention import attend
from helios.engine.precision import Precision
from helios.engine.sampler import Row, sample
from helios.engine.sequence import GeneratedToken, Output, Sequence
from helios.engine.settings import EngineSettings
from helios.engine.team import TEAM
from helios.engine.threads import get_threads, lend, set_threads
from helios.errors import SettingsError
from helios.sampling import SamplingParams
from tests.opt_variants import VARIANTS, save_variant

MEMORY = 64 << 20


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = TEAM.threads
    TEAM.threads = request.param
    yield request.param
    TEAM.threads = before


def int8_linear(in_size: int, out_size: int, seed: int = 0) -> tuple[Int8Linear, torch.Tensor, torch.Tensor]:
    """A linear, its weights as they are after quantising [out, in], and its biases."""
    torch.manual_seed(seed)
    weight, scales = quantize(torch.randn(out_size, in_size))
    bias = torch.randn(out_size)
    return Int8Linear(LinearWeights(weight, bias, scales)), weight * scales[:, None], bias


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize(("in_size", "out_size"), [(192, 576), (33, 70), (4, 1), (768, 96)])
@pytest.mark.parametrize("rows", [1, 2, 4, 7, 33])
def test_a_product_is_that_of_the_quantised_numbers(
    threads: int, in_size: int, out_size: int, rows: int
) -> None:
    linear, weight, bias = int8_linear(in_size, out_size)
    x = torch.randn(rows, in_size)
    scales = x.abs().amax(dim=1, keepdim=True) / 127
    expected = F.linear((x / scales).round() * scales, weight, bias)
    torch.testing.assert_close(linear(x), expected, rtol=1e-4, atol=1e-4)


def test_a_loud_row_does_not_disturb_its_neighbours() -> None:
    linear, _, _ = int8_linear(64, 96)
    quiet, loud = torch.randn(6, 64), 1e6 * torch.randn(1, 64)
    together = linear(torch.cat([quiet, loud]))
    assert torch.equal(together[:6], linear(quiet))
    for row in range(6):
        assert torch.equal(together[row : row + 1], linear(quiet[row : row + 1]))


def test_a_row_of_zeros_gives_the_biases() -> None:
    linear, _, bias = int8_linear(64, 96)
    assert torch.equal(linear(torch.zeros(2, 64)), bias.expand(2, -1))


def test_without_the_byte_instruction_the_sums_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simd, "has_byte_dot_product", lambda: False)
    dot, load, store = simd.byte_dot_product, simd.load_words, simd.store_singles
    to_singles, none = simd.to_singles, simd.no_words

    @njit
    def compute(left: int, right: int, out: int) -> None:
        store(out, 0, to_singles(dot(none(), load(left, 0), load(right, 0))))

    generator = np.random.default_rng(0)
    unsigned = generator.integers(0, 256, 64, dtype=np.uint8)
    signed = generator.integers(-128, 128, 64, dtype=np.int8)
    out = np.zeros(16, np.float32)
    compute(unsigned.ctypes.data, signed.ctypes.data, out.ctypes.data)
    expected = (unsigned.astype(np.int32) * signed.astype(np.int32)).reshape(16, 4).sum(1)
    assert out.tolist() == expected.tolist()


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("block_tokens", [16, 32])
def test_paged_attention_sees_each_rows_own_context(threads: int, block_tokens: int) -> None:
    """Decodes of several lengths beside a first and a later chunk of prefills."""
    torch.manual_seed(0)
    heads, head_dim = 3, 8
    computed, count = (0, 40, 16, 1, 35), (20, 1, 17, 1, 1)
    cache = KVCache(1, 20, block_tokens, heads, head_dim, torch.float32, torch.device("cpu"))
    numbers = iter(torch.randperm(20).tolist())
    scheduled, states = [], {}
    for before, added in zip(computed, count, strict=True):
        sequence = Sequence(
            "", [5] * (before + added), 1, SamplingParams(), Detokenizer.__new__(Detokenizer), lambda _: None
        )
        sequence.computed = before
        sequence.blocks = [next(numbers) for _ in range(-(-(before + added) // block_tokens))]
        states[sequence.arrival] = torch.randn(before + added, 3, heads, head_dim)
        past = states[sequence.arrival][:before]
        slots = [sequence.blocks[p // block_tokens] * block_tokens + p % block_tokens for p in range(before)]
        cache.write(0, torch.tensor(slots, dtype=torch.int64), past[:, 1], past[:, 2])
        scheduled.append((sequence, added))
    batch, _ = build_batch(scheduled, block_tokens, torch.device("cpu"))
    order = sorted(scheduled, key=lambda pair: pair[1] != pair[0].pending or pair[1] != 1)
    new = torch.cat([states[seq.arrival][seq.computed :] for seq, _ in order])
    attended = attend(new.flatten(1), batch, cache, 0)
    row = 0
    for seq, added in order:
        query, key, value = states[seq.arrival].transpose(0, 2).transpose(0, 1).unbind(0)
        causal = torch.ones(len(query[0]), len(query[0]), dtype=torch.bool).tril()
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=causal)[:, seq.computed :]
        torch.testing.assert_close(
            attended[row : row + added], expected.transpose(0, 1).flatten(1), rtol=1e-5, atol=1e-5
        )
        row += added


def generate(
    engine: Engine, prompts: list[list[int]], emitted: list[list[int]], tokens: int
) -> list[list[GeneratedToken]]:
    """The new tokens of all prompts, served together."""
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


@pytest.mark.parametrize("name", ["pre-norm", "post-norm", "no-bias", "no-affine"])
def test_a_resumed_stream_goes_on_to_the_bit_whatever_it_is_batched_with(tmp_path: Path, name: str) -> None:
    save_variant(tmp_path, name, seed=1, exits=[2, 4, 6])
    settings = EngineSettings(precision="int8", memory_bytes=MEMORY, step_token_budget=64, max_running=8)
    engine = Engine.load(tmp_path, 4, settings)
    prompts = [[2, *range(10 + 7 * index, 40 + 11 * index)] for index in range(5)]
    undisturbed = generate(engine, prompts, [[] for _ in prompts], 40)
    other = Engine.load(tmp_path, 4, settings)
    for index, (prompt, tokens) in enumerate(zip(prompts, undisturbed, strict=True)):
        cut = 5 + 6 * index
        before = [token.token_id for token in tokens[:cut]]
        filler = [[2] * (3 + index)] * index
        # At the same place among its neighbours, so with the same sampling.
        alone = generate(other, [*filler, prompt], [*([] for _ in filler), before], 40)
        assert [(t.token_id, t.logprob, t.confidence) for t in alone[-1]] == [
            (t.token_id, t.logprob, t.confidence) for t in tokens[cut:]
        ]


@pytest.mark.parametrize("name", list(VARIANTS))
def test_int8_computes_nearly_what_float32_does(tmp_path: Path, name: str) -> None:
    """Random weights are the hardest case: they have no redundancy."""
    save_variant(tmp_path, name, seed=3, exits=[2, 4, 6])
    logits = {}
    for precision in ("float32", "int8"):
        engine = Engine.load(tmp_path, 6, EngineSettings(precision=precision, memory_bytes=MEMORY))
        model = engine.plan.model
        sequence = Sequence(
            "",
            [2, *range(20, 80)],
            1,
            SamplingParams(),
            Detokenizer(engine.plan.tokenizer, ()),
            lambda _: None,
        )
        sequence.blocks = [0, 1, 2, 3]
        batch, _ = build_batch([(sequence, 61)], 16, model.device)
        cache = KVCache(6, 4, 16, model.config.num_heads, model.config.head_dim, model.dtype, model.device)
        with torch.inference_mode():
            logits[precision] = model.read_out(model.forward(batch, cache), 6)
    error = (logits["int8"] - logits["float32"]).norm() / logits["float32"].norm()
    assert 0 < error < 0.05


def test_one_call_computes_what_the_layers_one_by_one_do(tmp_path: Path) -> None:
    """Blocks of 8 tokens are not what the compiled layers read: there the model applies its int8 linears."""
    save_variant(tmp_path, "pre-norm", seed=3)
    prompts = [[2, *range(20, 80)], [2, *range(30, 50)]]
    told = []
    for block_tokens in (8, 16):
        settings = EngineSettings(precision="int8", memory_bytes=MEMORY, block_tokens=block_tokens)
        engine = Engine.load(tmp_path, settings=settings)
        told.append(generate(engine, prompts, [[], []], 1))
    for one, other in zip(*told, strict=True):
        assert one[0].token_id == other[0].token_id
        assert one[0].logprob == pytest.approx(other[0].logprob, abs=0.02)


COMPILED = """
import sys
from numba.core.dispatcher import Dispatcher
from helios.engine import Engine, EngineSettings, SamplingParams, kernels

def compiled():
    found = {name: len(one.signatures) for name, one in vars(kernels).items() if isinstance(one, Dispatcher)}
    assert found
    return found

engine = Engine.load(sys.argv[1], settings=EngineSettings(precision=sys.argv[2], memory_bytes=64 << 20))
before = compiled()
assert sum(before.values())
list(engine.generate([2] * 40, SamplingParams(max_tokens=3, ignore_eos=True)))
assert compiled() == before, (before, compiled())
"""


@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_no_request_waits_for_a_kernel_to_be_compiled(tmp_path: Path, precision: str) -> None:
    save_variant(tmp_path, "pre-norm", seed=3)
    command = [sys.executable, "-c", COMPILED, str(tmp_path), precision]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_int8_weights_take_a_quarter_of_the_memory(tmp_path: Path) -> None:
    save_variant(tmp_path, "pre-norm", seed=3, hidden_size=128, ffn_dim=512)
    sizes = {
        precision: Engine.load(
            tmp_path, settings=EngineSettings(precision=precision, memory_bytes=MEMORY)
        ).plan.memory.weight_bytes
        for precision in ("float32", "int8")
    }
    assert sizes["int8"] < 0.3 * sizes["float32"]


def test_auto_is_int8_where_bytes_are_multiplied_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr("helios.engine.precision.has_byte_dot_product", lambda: True)
    assert Precision.AUTO.on(cpu) is Precision.INT8
    monkeypatch.setattr("helios.engine.precision.has_byte_dot_product", lambda: False)
    assert Precision.AUTO.on(cpu) is Precision.FLOAT32
    assert Precision.AUTO.on(torch.device("cuda")) is Precision.BFLOAT16
    assert Precision.BFLOAT16.on(cpu) is Precision.BFLOAT16
    with pytest.raises(SettingsError, match="use bfloat16"):
        Precision.INT8.on(torch.device("cuda"))
    with pytest.raises(SettingsError, match="one of auto, float32"):
        EngineSettings(precision="int4")


def test_threads_belong_to_torch_or_to_the_team() -> None:
    before = get_threads()
    try:
        set_threads(2)
        lend(compiled=True)
        assert (torch.get_num_threads(), TEAM.threads, get_threads()) == (1, 2, 2)
        lend(compiled=False)
        assert (torch.get_num_threads(), TEAM.threads, get_threads()) == (2, 1, 2)
    finally:
        set_threads(before)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("width", [3, 16, 264, 4097])
def test_sampling_finds_the_first_of_the_largest_and_the_mass_of_all(threads: int, width: int) -> None:
    torch.manual_seed(width)
    logits = (torch.randn(5, width) * 4).round()  # rounded, so that there are ties
    sampled = sample(logits, [Row(SamplingParams(), 1, [])] * 5)
    assert sampled.token_ids.tolist() == [row.index(max(row)) for row in logits.tolist()]
    expected = logits.log_softmax(dim=-1).amax(dim=-1)
    torch.testing.assert_close(sampled.logprobs, expected)
    torch.testing.assert_close(sampled.confidences, expected.exp())
