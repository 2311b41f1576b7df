"""The engine gives the same results as transformers, for every variant, depth, batch and chunking."""

import errno
import math
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OPTForCausalLM

from helios.engine import Engine, EngineSettings, ExitMode, Output, SamplingParams
from helios.engine.backends.readout import Readout
from helios.engine.interface import GeneratedToken
from helios.errors import HeliosError, OutOfMemoryError
from tests.opt_variants import VARIANTS, save_variant, truncated
from tests.runners import hooked_engine

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


def greedy(model: OPTForCausalLM, prompt: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    """transformers' greedy continuation, and its logits [count, vocabulary]."""
    result = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return result.sequences[0, len(prompt) :].tolist(), torch.cat(result.logits)


GREEDY = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)


@pytest.mark.parametrize("head", ["shared", "norm", "linear"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_depth_equals_a_truncated_opt(tmp_path: Path, variant: str, head: str) -> None:
    path = tmp_path / variant
    full = save_variant(path, variant, 5, exits=EXITS, head=head)
    for depth in EXITS:
        engine = Engine.load(path, depth, EngineSettings(memory_bytes=64 << 20))
        reference = truncated(full, depth, path)
        for prompt, tokens in zip(PROMPTS, run(engine, PROMPTS, GREEDY), strict=True):
            expected, logits = greedy(reference, prompt, NEW_TOKENS)
            assert [token.token_id for token in tokens] == expected
            assert {token.exit_layer for token in tokens} == {depth}
            probabilities = logits.log_softmax(-1)
            torch.testing.assert_close(
                torch.tensor([token.logprob for token in tokens]),
                probabilities.amax(-1),
                atol=1e-4,
                rtol=1e-4,
            )
            torch.testing.assert_close(
                torch.tensor([token.confidence for token in tokens]),
                probabilities.amax(-1).exp(),
                atol=1e-4,
                rtol=1e-4,
            )


@pytest.mark.parametrize("prefix", ["model.decoder.", "decoder."])
@pytest.mark.parametrize("tied_as", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "untied"])
def test_tied_weights_under_either_name_are_what_transformers_loads(
    tmp_path: Path, variant: str, tied_as: str, prefix: str
) -> None:
    path = tmp_path / variant
    save_variant(path, variant, 5, prefix=prefix, tied_as=tied_as)
    reference = OPTForCausalLM.from_pretrained(path).eval()
    engine = Engine.load(path, settings=EngineSettings(memory_bytes=64 << 20))
    for prompt, tokens in zip(PROMPTS[:2], run(engine, PROMPTS[:2], GREEDY), strict=True):
        expected, logits = greedy(reference, prompt, NEW_TOKENS)
        assert [token.token_id for token in tokens] == expected
        logprobs = torch.tensor([token.logprob for token in tokens])
        torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1), atol=1e-4, rtol=1e-4)


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
@pytest.mark.parametrize("variant", ["pre-norm", "post-norm"])
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
        assert [token.token_id for token in got] == greedy(reference, prompt, 24)[0]
        assert [token.index for token in got] == list(range(24))


def test_dynamic_at_threshold_one_equals_the_full_model(tmp_path: Path) -> None:
    reference = save_variant(tmp_path, "pre-norm", 8, exits=EXITS)
    settings = EngineSettings(exit_mode=ExitMode.DYNAMIC, threshold=1.0, memory_bytes=64 << 20)
    for prompt, tokens in zip(
        PROMPTS, run(Engine.load(tmp_path, settings=settings), PROMPTS, GREEDY), strict=True
    ):
        assert [token.token_id for token in tokens] == greedy(reference, prompt, NEW_TOKENS)[0]


def propagated(
    model: OPTForCausalLM, prompt: list[int], count: int, threshold: float
) -> list[tuple[int, int]]:
    """A simple implementation of EE-LLM decoding: (token, exit layer) of one sequence. It keeps all states.

    For the layers above, a token that leaves after layer e is represented by its state at e.
    """
    decoder = model.model.decoder
    layers = decoder.layers
    heads = model.config.num_attention_heads
    states: list[list[torch.Tensor]] = [[] for _ in layers]  # inputs of each layer, one row per position
    result: list[tuple[int, int]] = []

    def attend(index: int, row: torch.Tensor) -> torch.Tensor:
        layer = layers[index]
        context = layer.self_attn_layer_norm(torch.stack(states[index]))
        attention = layer.self_attn
        query = attention.q_proj(layer.self_attn_layer_norm(row)).view(heads, 1, -1)
        key = attention.k_proj(context).view(len(context), heads, -1).transpose(0, 1)
        value = attention.v_proj(context).view(len(context), heads, -1).transpose(0, 1)
        weights = (query @ key.transpose(1, 2) * query.shape[-1] ** -0.5).softmax(-1)
        row = row + attention.out_proj((weights @ value).transpose(0, 1).reshape(-1))
        return row + layer.fc2(torch.relu(layer.fc1(layer.final_layer_norm(row))))

    ids = list(prompt)
    for position in range(len(prompt) + count - 1):
        token = torch.tensor([ids[position]])
        row = (decoder.embed_tokens(token) + decoder.embed_positions.weight[position + 2])[0]
        decoding = position >= len(prompt)
        left = 0
        logits = torch.empty(0)
        for index in range(len(layers)):
            states[index].append(row)
            if left:
                continue
            row = attend(index, row)
            if index + 1 in EXITS:
                logits = model.lm_head(decoder.final_layer_norm(row))
                if decoding and index + 1 < len(layers) and float(logits.softmax(-1).max()) >= threshold:
                    left = index + 1
        if position >= len(prompt) - 1:
            ids.append(int(logits.argmax()))
            result.append((ids[-1], left or len(layers)))
    return result


def test_dynamic_exits_and_propagates_state_as_ee_llm_says(tmp_path: Path) -> None:
    reference = save_variant(tmp_path, "pre-norm", 9, exits=EXITS)
    threshold = 0.12
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
    assert [t.token_id for t in run(engine, [[2, 5]], GREEDY)[0]] == greedy(reference, [2, 5], NEW_TOKENS)[0]


def test_sequences_in_flight_go_on_under_a_reloaded_plan(tmp_path: Path) -> None:
    full = save_variant(tmp_path, "pre-norm", 12, exits=EXITS)
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
    assert before == greedy(truncated(full, 2), [2, 9], len(before))[0]
    assert after == greedy(full, [2, 9, *before], len(after))[0]


@pytest.mark.parametrize(("name", "first", "second"), [("a", 2, 6), ("b", 2, 6), ("b", 6, 2), ("b", 4, 4)])
def test_streams_move_to_another_plan_one_after_the_other(
    tmp_path: Path, name: str, first: int, second: int
) -> None:
    models = {
        each: save_variant(tmp_path / each, "pre-norm", seed, exits=EXITS)
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
        assert before == greedy(truncated(models["a"], first), prompt, len(before))[0]
        assert after == greedy(truncated(models[name], second), [*prompt, *before], len(after))[0]


def test_going_shallower_keeps_the_lower_layers_kv(tmp_path: Path) -> None:
    full = save_variant(tmp_path, "pre-norm", 13, exits=EXITS)
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
    assert before == greedy(full, [2, 9, 30], len(before))[0]
    # The same layers computed the same KV, so these are the tokens of depth 2 after the text so far.
    assert after == greedy(truncated(full, 2), [2, 9, 30, *before], len(after))[0]


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
    assert tokens == greedy(truncated(full, depth), [2, 9, 30], NEW_TOKENS)[0]


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
    assert [t.token_id for t in tokens if t.exit_layer == 2] == greedy(
        truncated(changed, 2), [2, 9, 30, *before], len(tokens) - len(before)
    )[0]


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
    assert after == greedy(changed, [2, 9, 30, *before], len(after))[0]
    assert engine.telemetry().blocks_free == engine.telemetry().blocks_total
