"""The engine gives the same results as transformers, for every variant, depth, batch and chunking."""

import errno
import math
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from helios.engine import Engine, EngineSettings, ExitMode, Output, SamplingParams
from helios.engine.backends.compiled import CompiledModel
from helios.engine.backends.readout import Readout
from helios.engine.interface import GeneratedToken
from helios.errors import HeliosError, OutOfMemoryError
from tests.opt_variants import Form, decoder_of, final_norm_name, truncated
from tests.runners import hooked_engine
from tests.variants import OPT_VARIANTS, TIED, TYPICAL, VARIANTS, save_variant

EXITS = (1, 2, 4, 6)
PROMPTS = [[2, 10, 20, 30], [2], [2, *range(50, 120)], [7, 7, 7, 7, 7, 7, 7, 7, 9, 250], [2, 100]]
NEW_TOKENS = 12


def run(engine: Engine, prompts: list[list[int]], sampling: SamplingParams) -> list[list[GeneratedToken]]:
    """Runs all prompts at once through one engine, to their ends."""
    outputs: list[list[Output]] = [[] for _ in prompts]
    for number, prompt in enumerate(prompts):
        engine.submit(f"request-{number}", prompt, sampling, outputs[number].append)
    while engine.step():
        pass
    assert all(each[-1].finish is not None for each in outputs)
    return [[token for output in each for token in output.tokens] for each in outputs]


def predictions(model: PreTrainedModel, prompt: list[int], ids: list[int]) -> torch.Tensor:
    """transformers' logits for each of the tokens `ids` after a prompt: [len(ids), vocabulary]."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([[*prompt, *ids[:-1]]]), use_cache=False).logits
    return logits[0, len(prompt) - 1 :]


def likeliest(model: PreTrainedModel, prompt: list[int], ids: list[int]) -> list[int]:
    """transformers' likeliest token at each place of `ids`. Equal to `ids` if these are its greedy tokens."""
    return predictions(model, prompt, ids).argmax(-1).tolist()


def assert_greedy(model: PreTrainedModel, prompt: list[int], tokens: list[GeneratedToken]) -> None:
    """The tokens are transformers' greedy ones, with their probabilities."""
    assert len(tokens) == NEW_TOKENS
    ids = [token.token_id for token in tokens]
    expected, which = predictions(model, prompt, ids).log_softmax(-1).max(-1)
    assert ids == which.tolist()
    for found, logs in (
        ([token.logprob for token in tokens], expected),
        ([token.confidence for token in tokens], expected.exp()),
    ):
        torch.testing.assert_close(torch.tensor(found), logs, atol=1e-4, rtol=1e-4)


GREEDY = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)


@pytest.mark.parametrize("head", ["shared", "norm", "linear"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_depth_equals_a_truncated_model(tmp_path: Path, variant: str, head: str) -> None:
    path = tmp_path / variant
    full = save_variant(path, variant, 5, exits=EXITS, head=head)
    for depth in EXITS:
        engine = Engine.load(path, depth, EngineSettings(memory_bytes=64 << 20))
        reference = truncated(full, depth, path)
        for prompt, tokens in zip(PROMPTS, run(engine, PROMPTS, GREEDY), strict=True):
            assert_greedy(reference, prompt, tokens)
            assert {token.exit_layer for token in tokens} == {depth}


@pytest.mark.parametrize("block_tokens", [4, 16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_torch_computes_equals_transformers_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, block_tokens: int
) -> None:
    """Other devices use it. With blocks of 4, torch computes attention as well."""
    monkeypatch.setattr(CompiledModel, "of", lambda _config, _weights: None)
    full = save_variant(tmp_path, variant, 5, exits=EXITS)
    settings = EngineSettings(memory_bytes=64 << 20, block_tokens=block_tokens, step_token_budget=64)
    engine = Engine.load(tmp_path, 4, settings)
    for prompt, tokens in zip(PROMPTS, run(engine, PROMPTS, GREEDY), strict=True):
        assert_greedy(truncated(full, 4), prompt, tokens)


@pytest.mark.parametrize("tied_as", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("variant", TIED)
def test_tied_weights_under_either_name_are_what_transformers_loads(
    tmp_path: Path, variant: str, tied_as: str
) -> None:
    prefixes = ["model.decoder.", "decoder."] if variant in OPT_VARIANTS else ["model.", ""]
    for prefix in prefixes:
        path = tmp_path / f"{variant}-{prefix}"
        save_variant(path, variant, 5, prefix=prefix, tied_as=tied_as)
        reference = AutoModelForCausalLM.from_pretrained(path).eval()
        engine = Engine.load(path, settings=EngineSettings(memory_bytes=64 << 20))
        for prompt, tokens in zip(PROMPTS[:2], run(engine, PROMPTS[:2], GREEDY), strict=True):
            assert_greedy(reference, prompt, tokens)


@pytest.mark.parametrize("form", ["safetensors", "sharded-safetensors"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("variant", TYPICAL)
def test_weights_of_any_type_are_computed_with_in_float32(
    tmp_path: Path, variant: str, dtype: torch.dtype, form: Form
) -> None:
    reference = save_variant(tmp_path, variant, 5, form, dtype=dtype)
    engine = Engine.load(tmp_path, settings=EngineSettings(memory_bytes=64 << 20))
    for prompt, tokens in zip(PROMPTS[:3], run(engine, PROMPTS[:3], GREEDY), strict=True):
        assert_greedy(reference, prompt, tokens)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("budget", [1, 7, 512])
def test_logits_equal_transformers_whatever_the_chunks(tmp_path: Path, variant: str, budget: int) -> None:
    path = tmp_path / variant
    reference = save_variant(path, variant, 6)
    prompt = [2, *range(30, 90)]
    settings = EngineSettings(memory_bytes=64 << 20, step_token_budget=budget, max_running=1, block_tokens=4)
    logits: list[torch.Tensor] = []

    def keep(found: Readout) -> None:
        logits.extend(found.logits.clone())

    engine = hooked_engine(path, None, settings, after=keep)
    engine.submit("one", prompt, SamplingParams(), [].append)
    while not logits:
        engine.step()
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0, -1]
    torch.testing.assert_close(logits[0], expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("variant", ["post-norm", *TYPICAL])
def test_preempted_sequences_continue_as_if_nothing_had_happened(
    tmp_path: Path, variant: str, prefix_cache: bool
) -> None:
    path = tmp_path / variant
    reference = save_variant(path, variant, 7, max_position_embeddings=64)
    # The pool holds little more than one context, so five growing sequences overflow it.
    roomy = Engine.load(path, settings=EngineSettings(memory_bytes=64 << 20, block_tokens=4))
    memory = roomy.plan.memory
    budget = memory.weight_bytes + memory.activation_bytes + 70 * memory.kv_bytes_per_token
    settings = EngineSettings(memory_bytes=budget, block_tokens=4, prefix_cache=prefix_cache)
    engine = Engine.load(path, settings=settings)
    prompts = [[2, 10 + n, 20, 30, 40, 50, 60, 70] for n in range(5)]
    tokens = run(engine, prompts, SamplingParams(max_tokens=24, ignore_eos=True))
    assert engine.telemetry().preemptions > 0
    for prompt, got in zip(prompts, tokens, strict=True):
        ids = [token.token_id for token in got]
        assert ids == likeliest(reference, prompt, ids)
        assert [token.index for token in got] == list(range(24))


@pytest.mark.parametrize("variant", TYPICAL)
def test_sequences_that_begin_alike_share_their_keys_and_values(tmp_path: Path, variant: str) -> None:
    reference = save_variant(tmp_path, variant, 8)
    engine = Engine.load(tmp_path, settings=EngineSettings(memory_bytes=64 << 20, block_tokens=4))
    for last in ([7], [8, 9], [10]):
        prompt = [2, *range(50, 90), *last]
        (tokens,) = run(engine, [prompt], GREEDY)
        assert_greedy(reference, prompt, tokens)
    assert engine.telemetry().cached_tokens == 80


@pytest.mark.parametrize("variant", TYPICAL)
def test_dynamic_at_threshold_one_equals_the_full_model(tmp_path: Path, variant: str) -> None:
    reference = save_variant(tmp_path, variant, 8, exits=EXITS)
    settings = EngineSettings(exit_mode=ExitMode.DYNAMIC, threshold=1.0, memory_bytes=64 << 20)
    for prompt, tokens in zip(
        PROMPTS, run(Engine.load(tmp_path, settings=settings), PROMPTS, GREEDY), strict=True
    ):
        assert_greedy(reference, prompt, tokens)


def propagated(
    model: PreTrainedModel, prompt: list[int], count: int, threshold: float
) -> list[tuple[int, int]]:
    """A simple implementation of EE-LLM decoding: (token, exit layer) of one sequence. It keeps all states.

    For the layers above, a token that leaves after layer e is represented by its state at e.
    """
    decoder = decoder_of(model)
    layers, final_norm = decoder.layers, getattr(decoder, final_norm_name(model))
    is_opt = model.config.model_type == "opt"
    # Inputs of each layer, one row per position.
    states: list[list[torch.Tensor]] = [[] for _ in layers]
    result: list[tuple[int, int]] = []

    def attend(index: int) -> torch.Tensor:
        """A layer's output for the last position."""
        rows = torch.stack(states[index])[None]
        places = torch.arange(rows.shape[1])[None]
        rotations = {} if is_opt else {"position_embeddings": decoder.rotary_emb(rows, places)}
        # The last row attends to all others, so without a mask it is right.
        return layers[index](rows, attention_mask=None, **rotations)[0, -1]

    ids = list(prompt)
    for position in range(len(prompt) + count - 1):
        row = decoder.embed_tokens(torch.tensor(ids[position]))
        if is_opt:
            row = row + decoder.embed_positions.weight[position + 2]
        decoding = position >= len(prompt)
        left = 0
        logits = torch.empty(0)
        for index in range(len(layers)):
            states[index].append(row)
            if left:
                continue
            row = attend(index)
            if index + 1 in EXITS:
                logits = model.lm_head(final_norm(row))
                if decoding and index + 1 < len(layers) and float(logits.softmax(-1).max()) >= threshold:
                    left = index + 1
        if position >= len(prompt) - 1:
            ids.append(int(logits.argmax()))
            result.append((ids[-1], left or len(layers)))
    return result


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize(
    ("variant", "threshold"), [("pre-norm", 0.12), ("llama", 0.06), ("qwen2", 0.06), ("qwen3", 0.06)]
)
def test_dynamic_exits_and_propagates_state_as_ee_llm_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, threshold: float, is_compiled: bool
) -> None:
    if not is_compiled:
        monkeypatch.setattr(CompiledModel, "of", lambda _config, _weights: None)
    reference = save_variant(tmp_path, variant, 9, exits=EXITS)
    settings = EngineSettings(exit_mode=ExitMode.DYNAMIC, threshold=threshold, memory_bytes=64 << 20)
    prompts = [[2, 10, 20, 30], [2, *range(50, 70)], [7, 7, 9, 250]]
    exits_seen = set()
    with torch.inference_mode():
        for prompt, tokens in zip(
            prompts, run(Engine.load(tmp_path, settings=settings), prompts, GREEDY), strict=True
        ):
            got = [(token.token_id, token.exit_layer) for token in tokens]
            assert got == propagated(reference, prompt, NEW_TOKENS, threshold)
            exits_seen |= {layer for _, layer in got}
    assert len(exits_seen) > 2


def test_a_failed_reload_leaves_the_running_plan(tmp_path: Path) -> None:
    reference = save_variant(tmp_path / "a", "pre-norm", 10, exits=EXITS)
    save_variant(tmp_path / "b", "pre-norm", 11, exits=EXITS)
    (tmp_path / "b" / "model.safetensors").write_bytes(b"broken")
    engine = Engine.load(tmp_path / "a", 6, EngineSettings(memory_bytes=64 << 20))
    with pytest.raises(HeliosError, match=r"model\.safetensors"):
        engine.reload(tmp_path / "b", 6)
    assert_greedy(reference, [2, 5], run(engine, [[2, 5]], GREEDY)[0])


@pytest.mark.parametrize("variant", TYPICAL)
def test_sequences_in_flight_go_on_under_a_reloaded_plan(tmp_path: Path, variant: str) -> None:
    full = save_variant(tmp_path, variant, 12, exits=EXITS)
    engine = Engine.load(tmp_path, 2, EngineSettings(memory_bytes=64 << 20))
    outputs: list[Output] = []
    engine.submit("one", [2, 9], GREEDY, outputs.append)
    for _ in range(5):
        engine.step()
    moved = engine.reload(tmp_path, 6)
    while engine.step():
        pass
    tokens = [token for output in outputs for token in output.tokens]
    before = [token.token_id for token in tokens if token.exit_layer == 2]
    after = [token.token_id for token in tokens if token.exit_layer == 6]
    assert moved.sequences_moved == 1
    assert [token.index for token in tokens] == list(range(NEW_TOKENS))
    assert before == likeliest(truncated(full, 2), [2, 9], before)
    assert after == likeliest(full, [2, 9, *before], after)


@pytest.mark.parametrize(("name", "first", "second"), [("a", 2, 6), ("b", 2, 6), ("b", 6, 2), ("b", 4, 4)])
@pytest.mark.parametrize("variant", ["pre-norm", "llama", "qwen3"])
def test_streams_move_to_another_plan_one_after_the_other(
    tmp_path: Path, variant: str, name: str, first: int, second: int
) -> None:
    models = {
        each: save_variant(tmp_path / each, variant, seed, exits=EXITS)
        for each, seed in (("a", 12), ("b", 13))
    }
    # A step has room for few prompt tokens beside decodes, and the pool is smaller than at fewer layers.
    settings = EngineSettings(
        memory_bytes=3 << 20, block_tokens=4, max_running=6, step_token_budget=24, prefill_stretch=math.inf
    )
    engine = Engine.load(tmp_path / "a", first, settings)
    said: list[tuple[int, GeneratedToken]] = []

    def sink(number: int) -> Callable[[Output], None]:
        return lambda output: said.extend((number, token) for token in output.tokens)

    prompts = [[2, 9, 30 + number] for number in range(6)]
    sampling = SamplingParams(max_tokens=30, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        engine.submit(str(number), prompt, sampling, sink(number))
    for _ in range(12):
        engine.step()
    moved = engine.reload(tmp_path / name, second)
    fresh = Engine.load(tmp_path / name, second, settings)
    assert engine.telemetry().blocks_total == fresh.telemetry().blocks_total
    while engine.step():
        pass
    assert engine.telemetry().blocks_free == engine.telemetry().blocks_total
    assert moved.sequences_moved == len(prompts)
    old, new = ("a", first), (name, second)
    plans = [(Path(token.model).name, token.exit_layer) for _, token in said]
    assert plans.index(new) < len(plans) - 1 - plans[::-1].index(old), "some went on under the old plan"
    for number, prompt in enumerate(prompts):
        tokens = [token for which, token in said if which == number]
        assert [token.index for token in tokens] == list(range(30))
        before = [token.token_id for token in tokens if (token.model, token.exit_layer) == old]
        after = [token.token_id for token in tokens[len(before) :]]
        assert before == likeliest(truncated(models["a"], first), prompt, before)
        assert after == likeliest(truncated(models[name], second), [*prompt, *before], after)


@pytest.mark.parametrize("variant", TYPICAL)
def test_going_shallower_keeps_the_lower_layers_kv(tmp_path: Path, variant: str) -> None:
    full = save_variant(tmp_path, variant, 13, exits=EXITS)
    # With this budget, fewer layers have a larger pool.
    engine = Engine.load(tmp_path, 6, EngineSettings(memory_bytes=3 << 20, block_tokens=4))
    blocks = engine.telemetry().blocks_total
    outputs: list[Output] = []
    engine.submit("one", [2, 9, 30], GREEDY, outputs.append)
    for _ in range(5):
        engine.step()
    moved = engine.reload(tmp_path, 2)
    assert engine.telemetry().blocks_total > blocks
    prefilled = engine.telemetry().counters.prefill_tokens
    while engine.step():
        pass
    assert moved.sequences_moved == 1
    assert engine.telemetry().counters.prefill_tokens == prefilled, "nothing was computed again"
    assert engine.telemetry().blocks_free == engine.telemetry().blocks_total
    tokens = [token for output in outputs for token in output.tokens]
    before = [token.token_id for token in tokens if token.exit_layer == 6]
    after = [token.token_id for token in tokens if token.exit_layer == 2]
    assert before == likeliest(full, [2, 9, 30], before)
    # The same layers computed the same KV, so these are the tokens of depth 2 after the text so far.
    assert after == likeliest(truncated(full, 2), [2, 9, 30, *before], after)


# With heads of another size, the KV cannot stay in place.
@pytest.mark.parametrize(("depth", "heads"), [(6, {"num_attention_heads": 2}), (2, {})])
def test_a_reload_without_memory_for_its_pool_leaves_the_running_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: int, heads: dict[str, int]
) -> None:
    full = save_variant(tmp_path / "a", "pre-norm", 13, exits=EXITS)
    save_variant(tmp_path / "b", "pre-norm", 14, exits=EXITS, **heads)
    engine = Engine.load(tmp_path / "a", depth, EngineSettings(memory_bytes=3 << 20, block_tokens=4))
    outputs: list[Output] = []
    engine.submit("one", [2, 9, 30], GREEDY, outputs.append)
    for _ in range(5):
        engine.step()

    map_memory = mmap.mmap

    def exhausted(file: int, size: int, **options: Any) -> mmap.mmap:
        # Small maps still work: a warm-up needs one block.
        if size > 4096:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return map_memory(file, size, **options)

    with monkeypatch.context() as patched:
        patched.setattr("helios.engine.backends.kv_cache.mmap.mmap", exhausted)
        with pytest.raises(OutOfMemoryError, match=r"no memory for \d+ blocks of KV: .*Cannot allocate"):
            engine.reload(tmp_path / "b", 6)
    while engine.step():
        pass
    assert engine.telemetry().blocks_free == engine.telemetry().blocks_total
    tokens = [token.token_id for output in outputs for token in output.tokens]
    assert len(tokens) == NEW_TOKENS
    assert tokens == likeliest(truncated(full, depth), [2, 9, 30], tokens)


def test_a_checkpoint_that_changed_in_its_place_is_another_model(tmp_path: Path) -> None:
    save_variant(tmp_path, "pre-norm", 14, exits=EXITS)
    engine = Engine.load(tmp_path, 6, EngineSettings(memory_bytes=64 << 20))
    outputs: list[Output] = []
    engine.submit("one", [2, 9, 30], GREEDY, outputs.append)
    for _ in range(5):
        engine.step()
    changed = save_variant(tmp_path, "pre-norm", 15, exits=EXITS)
    engine.reload(tmp_path, 2)
    while engine.step():
        pass
    tokens = [token for output in outputs for token in output.tokens]
    before = [token.token_id for token in tokens if token.exit_layer == 6]
    after = [token.token_id for token in tokens if token.exit_layer == 2]
    assert len(before) + len(after) == NEW_TOKENS
    assert after == likeliest(truncated(changed, 2), [2, 9, 30, *before], after)


def test_a_checkpoint_that_changed_in_its_place_can_be_reloaded_at_the_same_depth(tmp_path: Path) -> None:
    save_variant(tmp_path, "pre-norm", 14, exits=EXITS)
    engine = Engine.load(tmp_path, 6, EngineSettings(memory_bytes=64 << 20))
    outputs: list[Output] = []
    engine.submit("one", [2, 9, 30], GREEDY, outputs.append)
    for _ in range(5):
        engine.step()
    before = [token.token_id for output in outputs for token in output.tokens]
    changed = save_variant(tmp_path, "pre-norm", 15, exits=EXITS)
    assert engine.reload(tmp_path, 6).sequences_moved == 1
    while engine.step():
        pass
    tokens = [token.token_id for output in outputs for token in output.tokens]
    assert tokens[: len(before)] == before
    after = tokens[len(before) :]
    assert after == likeliest(changed, [2, 9, 30, *before], after)
    assert engine.telemetry().blocks_free == engine.telemetry().blocks_total
