"""Promises of an engine to its caller."""

import copy
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models

from helios.engine import Engine, EngineSettings, ExitMode, Finish, FinishReason, Output, SamplingParams
from helios.engine.backends.burst import Burst
from helios.engine.interface import GeneratedToken
from helios.engine.scheduling.sequence import Sequence
from helios.errors import (
    CancelledError,
    CheckpointError,
    DeadlineExceededError,
    HeliosError,
    InvalidRequestError,
    OutOfMemoryError,
    OverloadedError,
    SettingsError,
    UnavailableError,
    UnknownDepthError,
)
from tests.opt_variants import SPECIAL_TOKENS, save_variant
from tests.runners import hooked_engine

EXITS = (1, 2, 4, 6)
MEMORY = 64 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "random"
    save_variant(path, "pre-norm", 21, exits=EXITS)
    return path


@pytest.fixture
def engine(model: Path) -> Engine:
    return Engine.load(model, 4, EngineSettings(memory_bytes=MEMORY, block_tokens=4))


class Stream:
    """Collects the outputs of one sequence."""

    def __init__(self) -> None:
        self.tokens: list[GeneratedToken] = []
        self.finish: Finish | None = None
        self.error: HeliosError | None = None

    def __call__(self, output: Output) -> None:
        assert self.finish is None
        assert self.error is None
        self.tokens += output.tokens
        self.finish, self.error = output.finish, output.error

    @property
    def ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)


def drive(engine: Engine, until: Callable[[], bool] = lambda: False) -> None:
    while not until() and engine.step():
        pass


def finished(
    engine: Engine, prompt: list[int], sampling: SamplingParams, emitted: list[int] | None = None
) -> Stream:
    stream = Stream()
    engine.submit(f"{time.monotonic_ns()}", prompt, sampling, stream, emitted_ids=emitted)
    drive(engine)
    assert stream.finish is not None
    return stream


def test_the_library_streams_text_in_five_lines(model: Path) -> None:
    engine = Engine.load(model, depth=2)
    tokens = list(engine.generate("hello", SamplingParams(max_tokens=9, ignore_eos=True)))
    assert [token.index for token in tokens] == list(range(9))
    assert "".join(token.text for token in tokens) == engine.plan.tokenizer.decode(
        [t.token_id for t in tokens]
    )


def test_all_outputs_of_a_step_but_the_last_announce_another(engine: Engine) -> None:
    said: list[Output] = []
    for index, max_tokens in enumerate((3, 5, 4)):
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        engine.submit(f"{index}", [2, 40 + index], sampling, said.append)
    while engine.step():
        assert [output.more for output in said] == [True] * (len(said) - 1) + [False]
        said.clear()


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_tokens=20, ignore_eos=True),
        SamplingParams(max_tokens=20, ignore_eos=True, temperature=1.0, seed=5),
        SamplingParams(max_tokens=20, ignore_eos=True, temperature=1.2, top_p=0.9, top_k=40, seed=2**63),
        SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.7, repetition_penalty=1.5, seed=6),
    ],
    ids=str,
)
def test_a_resumed_sequence_goes_on_as_it_would_have(
    engine: Engine, model: Path, sampling: SamplingParams
) -> None:
    prompt = [2, 40, 50, 60]
    whole = finished(engine, prompt, sampling)
    elsewhere = Engine.load(model, 4, EngineSettings(memory_bytes=MEMORY))
    for cut in (1, 7, 19, 20):
        resumed = finished(elsewhere, prompt, sampling, emitted=whole.ids[:cut])
        assert resumed.ids == whole.ids[cut:]
        assert resumed.finish == whole.finish
        assert [token.index for token in resumed.tokens] == list(range(cut, 20))
        assert resumed.text == "".join(token.text for token in whole.tokens[cut:])


GREEDY = SamplingParams(max_tokens=10, ignore_eos=True)
LONG = [2, *range(30, 71)]


def cached(engine: Engine) -> int:
    return engine.telemetry().cached_tokens


@pytest.mark.parametrize("tokens", [40, 42], ids=["whole blocks", "and a part"])
def test_a_beginning_that_was_computed_is_not_computed_again(engine: Engine, tokens: int) -> None:
    prompt = LONG[:tokens]
    first = finished(engine, prompt, GREEDY)
    before = engine.telemetry().counters.prefill_tokens
    again = finished(engine, prompt, GREEDY)
    assert again.ids == first.ids
    assert cached(engine) == tokens - (1 if tokens == 40 else 2)
    assert engine.telemetry().counters.prefill_tokens - before == (1 if tokens == 40 else 2)
    other = finished(engine, [*prompt[:21], 9, 9, 9], GREEDY)
    assert other.ids == finished(Engine.load(engine.plan.entry.path, 4), [*prompt[:21], 9, 9, 9], GREEDY).ids


def test_sequences_that_share_a_beginning_do_not_disturb_each_other(engine: Engine, model: Path) -> None:
    prompts = [LONG[:40], LONG[:40], [*LONG[:38], 7], [*LONG[:12], 8, 8], LONG]
    alone = Engine.load(model, 4, EngineSettings(memory_bytes=MEMORY, prefix_cache=False))
    expected = [finished(alone, prompt, GREEDY).ids for prompt in prompts]
    assert alone.telemetry().cached_tokens == 0
    for _ in range(2):
        streams = [Stream() for _ in prompts]
        for number, stream in enumerate(streams):
            engine.submit(str(number), prompts[number], GREEDY, stream)
            # The first sequence is running when the others begin.
            engine.step()
        drive(engine)
        assert [stream.ids for stream in streams] == expected
    assert cached(engine) > len(LONG) * 4
    assert engine.telemetry().blocks_free == engine.telemetry().blocks_total


def test_what_was_cached_stays_for_fewer_layers_and_goes_with_more(engine: Engine, model: Path) -> None:
    finished(engine, LONG, GREEDY)
    for depth, found in ((2, 40), (6, 0)):
        before = cached(engine)
        engine.reload(model, depth)
        fresh = Engine.load(model, depth, EngineSettings(memory_bytes=MEMORY, prefix_cache=False))
        assert finished(engine, LONG, GREEDY).ids == finished(fresh, LONG, GREEDY).ids
        assert cached(engine) - before == found


def test_estimated_keys_and_values_are_not_shared(model: Path) -> None:
    settings = EngineSettings(exit_mode=ExitMode.DYNAMIC, threshold=0.0, memory_bytes=MEMORY, block_tokens=4)
    engine = Engine.load(model, settings=settings)
    first = finished(engine, LONG, GREEDY)
    assert {token.exit_layer for token in first.tokens[1:]} == {EXITS[0]}
    assert finished(engine, [*LONG, *first.ids], GREEDY).ids
    assert cached(engine) == 0


def test_tokens_do_not_depend_on_the_neighbours(engine: Engine) -> None:
    sampling = [SamplingParams(max_tokens=15, ignore_eos=True, temperature=t, seed=3) for t in (0, 0.8, 1.5)]
    prompts = [[2, 33], [2, *range(60, 99)], [9]]
    alone = [finished(engine, prompt, params).ids for prompt, params in zip(prompts, sampling, strict=True)]
    streams = [Stream() for _ in prompts]
    for number, stream in enumerate(streams):
        engine.submit(str(number), prompts[number], sampling[number], stream)
    drive(engine)
    assert [stream.ids for stream in streams] == alone


def overflowing(path: Path, bias: float) -> None:
    """A model whose first layer overflows after a token whose first channel is above -bias."""
    save_variant(path, "untied", 21, exits=EXITS)
    tensors = load_file(path / "model.safetensors")
    layer = "model.decoder.layers.0"
    tensors["model.decoder.embed_tokens.weight"][100, 0] = 6e4
    tensors[f"{layer}.final_layer_norm.weight"].fill_(1)
    tensors[f"{layer}.final_layer_norm.bias"].zero_()
    tensors[f"{layer}.fc1.weight"].zero_()[:, 0] = 1e19
    tensors[f"{layer}.fc1.bias"].fill_(bias * 1e19)
    tensors[f"{layer}.fc2.weight"].fill_(1e25)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("exit_mode", [ExitMode.GREEDY, ExitMode.DYNAMIC])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_a_sequence_whose_numbers_overflow_ends_alone_naming_model_and_exit(
    tmp_path: Path, precision: str, exit_mode: ExitMode, temperature: float
) -> None:
    overflowing(tmp_path / "steep", -4.5)
    settings = EngineSettings(memory_bytes=MEMORY, precision=precision, exit_mode=exit_mode, threshold=1.0)
    engine = Engine.load(tmp_path / "steep", 4, settings)
    sampling = SamplingParams(max_tokens=20, ignore_eos=True, temperature=temperature, seed=5)
    alone = finished(engine, [2, 9, 30], sampling)
    # One overflows at the end of its prompt, one after some tokens.
    prompts = {"sound": [2, 9, 30], "prompt": [2, 30, 100], "later": [2, 9, 31]}
    streams = {name: Stream() for name in prompts}
    for name, prompt in prompts.items():
        engine.submit(
            name, prompt, sampling, streams[name], emitted_ids=[9, 100] if name == "later" else None
        )
    drive(engine)
    assert streams["sound"].tokens == alone.tokens
    for name in ("prompt", "later"):
        assert not streams[name].tokens
        assert isinstance(streams[name].error, CheckpointError)
        assert "steep computes NaN" in streams[name].error.message
        assert f"after layer 4: numbers become too large in {precision}" in streams[name].error.message
    telemetry = engine.telemetry()
    assert (telemetry.running, telemetry.waiting) == (0, 0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_a_model_that_overflows_with_every_token_does_not_start(tmp_path: Path, precision: str) -> None:
    overflowing(tmp_path / "steep", 4.5)
    with pytest.raises(CheckpointError, match=r"steep computes NaN .* after layer 4"):
        Engine.load(tmp_path / "steep", 4, EngineSettings(memory_bytes=MEMORY, precision=precision))


def test_generation_ends_at_end_of_text_unless_told_otherwise(engine: Engine) -> None:
    def sampling(seed: int, ignore_eos: bool) -> SamplingParams:
        return SamplingParams(max_tokens=60, ignore_eos=ignore_eos, temperature=100.0, seed=seed)

    streams = ((seed, finished(engine, [2, 8], sampling(seed, True))) for seed in range(100))
    seed, whole = next((seed, stream) for seed, stream in streams if 2 in stream.ids[:-1])
    ended = finished(engine, [2, 8], sampling(seed, False))
    assert ended.finish is not None
    assert ended.finish.reason is FinishReason.EOS
    assert ended.ids == whole.ids[: whole.ids.index(2) + 1]


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_every_end_of_text_ends_a_text_and_is_no_part_of_it(tmp_path: Path, where: str) -> None:
    def load(**ends: object) -> Engine:
        save_variant(tmp_path, "pre-norm", 21, eos_token_id=ends.get("config.json", 2))
        file = tmp_path / "generation_config.json"
        file.write_text(json.dumps({"eos_token_id": ends.get("generation_config.json")}))
        return Engine.load(tmp_path, settings=EngineSettings(memory_bytes=MEMORY))

    endless = SamplingParams(max_tokens=60, ignore_eos=True, temperature=1.0, seed=4)
    sampling = replace(endless, ignore_eos=False)
    whole = finished(load(), [2, 8], endless)
    # Ends of text are letters, which are not special tokens. The second of the two ends comes first.
    letters = [i for i, token in enumerate(whole.tokens) if i > 10 and token.text.isascii() and token.text]
    at = next(i for i in letters if whole.ids.index(whole.ids[i]) == i)
    other = next(token_id for token_id in range(40, 90) if token_id not in whole.ids[:at])
    engine = load(**{where: [other, whole.ids[at]]})
    ended = finished(engine, [2, 8], sampling)
    assert ended.finish is not None
    assert ended.finish.reason is FinishReason.EOS
    assert ended.ids == whole.ids[: at + 1]
    assert ended.text == ended.finish.text == engine.plan.tokenizer.decode(whole.ids[:at])
    # A request that ignores ends of text gets them as normal tokens.
    assert finished(engine, [2, 8], endless).text == whole.text
    for cut in (at, at + 1):
        assert finished(engine, [2, 8], sampling, emitted=ended.ids[:cut]).finish == ended.finish


def test_generation_ends_before_a_stop_string(engine: Engine) -> None:
    whole = finished(engine, [2, 8], SamplingParams(max_tokens=60, ignore_eos=True, temperature=1.0, seed=4))
    stop = whole.text[20:22]
    sampling = SamplingParams(max_tokens=60, ignore_eos=True, temperature=1.0, seed=4, stop=(stop,))
    stream = finished(engine, [2, 8], sampling)
    assert stream.finish is not None
    assert stream.finish.reason is FinishReason.STOP
    assert stream.text == stream.finish.text == whole.text[: whole.text.index(stop)]


def test_max_tokens_is_cut_to_what_the_context_leaves(engine: Engine) -> None:
    stream = finished(engine, [2] * 250, SamplingParams(max_tokens=100, ignore_eos=True))
    assert stream.finish == Finish(FinishReason.LENGTH, stream.text, 250, 6)


@pytest.mark.parametrize("error", [CancelledError("enough"), None])
def test_cancelling_frees_the_blocks_within_one_step(engine: Engine, error: HeliosError | None) -> None:
    running, waiting, neighbour = Stream(), Stream(), Stream()
    engine.submit("running", [2] * 40, SamplingParams(max_tokens=50, ignore_eos=True), running)
    drive(engine, lambda: len(running.tokens) > 3)
    engine.submit("waiting", [2] * 40, SamplingParams(max_tokens=50, ignore_eos=True), waiting)
    engine.submit("neighbour", [2, 5], SamplingParams(max_tokens=50, ignore_eos=True), neighbour)
    engine.cancel("running", error)
    engine.cancel("waiting", error)
    engine.cancel("never heard of", error)
    engine.step()
    telemetry = engine.telemetry()
    assert telemetry.blocks_total - telemetry.blocks_free == 1, "only the neighbour's"
    assert isinstance(running.error, CancelledError)
    assert isinstance(waiting.error, CancelledError)
    drive(engine)
    assert neighbour.finish is not None


def test_a_deadline_ends_a_sequence_and_frees_its_blocks(engine: Engine) -> None:
    stream, waiting = Stream(), Stream()
    now = time.monotonic()
    sampling = SamplingParams(max_tokens=200, ignore_eos=True)
    engine.submit("past", [2, 3], sampling, waiting, deadline=now - 1)
    running = engine.submit("later", [2, 3], sampling, stream, deadline=now + 600)
    drive(engine, lambda: len(stream.tokens) > 3)
    running.deadline = now
    engine.step()
    assert isinstance(stream.error, DeadlineExceededError)
    assert isinstance(waiting.error, DeadlineExceededError)
    assert waiting.tokens == []
    telemetry = engine.telemetry()
    assert telemetry.blocks_free == telemetry.blocks_total


def test_a_full_queue_refuses_with_a_retry_hint(model: Path) -> None:
    engine = Engine.load(model, 4, EngineSettings(memory_bytes=MEMORY, max_running=1, max_waiting=2))
    streams = [Stream() for _ in range(3)]
    for number, stream in enumerate(streams[:2]):
        engine.submit(str(number), [2], SamplingParams(max_tokens=3), stream)
    with pytest.raises(OverloadedError) as refused:
        engine.submit("2", [2], SamplingParams(max_tokens=3), streams[2])
    assert refused.value.retry_after_seconds > 0
    drive(engine)
    assert all(stream.finish for stream in streams[:2])
    assert streams[2].finish is None


@pytest.mark.parametrize(
    ("prompt", "emitted", "said"),
    [
        ([], [], "prompt is empty"),
        ([2, 264], [], "264 is outside the vocabulary of 264"),
        ([2, 3.0], [], "must be whole numbers"),
        ([2] * 256, [], "a context of 256"),
        ([2], [3] * 9, "9 tokens are emitted"),
        ([2], [999], "999 is outside"),
    ],
)
def test_bad_requests_are_refused_with_the_reason(
    engine: Engine, prompt: list[int], emitted: list[int], said: str
) -> None:
    neighbour = Stream()
    engine.submit("neighbour", [2, 3], SamplingParams(max_tokens=5, ignore_eos=True), neighbour)
    with pytest.raises(InvalidRequestError, match=said):
        engine.submit("bad", prompt, SamplingParams(max_tokens=8), Stream(), emitted_ids=emitted)
    drive(engine)
    assert neighbour.finish is not None


@pytest.mark.parametrize("wrong", [{"top_k": 1 << 32}, {"top_k": 2.5}, {"max_tokens": 7.5}, {"seed": 0.5}])
def test_sampling_that_no_step_can_do_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=f"sampling.{next(iter(wrong))} must be"):
        SamplingParams(**wrong)


def test_a_request_id_is_in_use_only_once(engine: Engine) -> None:
    engine.submit("same", [2], SamplingParams(max_tokens=2), Stream())
    with pytest.raises(InvalidRequestError, match="already running"):
        engine.submit("same", [2], SamplingParams(max_tokens=2), Stream())
    drive(engine)
    assert finished(engine, [2], SamplingParams(max_tokens=2)).finish is not None


def test_unusable_settings_are_refused(model: Path) -> None:
    with pytest.raises(UnknownDepthError, match="1, 2, 4, 6"):
        Engine.load(model, 3)
    with pytest.raises(SettingsError, match="exit mode full"):
        Engine.load(model, 2, EngineSettings(exit_mode=ExitMode.FULL))
    with pytest.raises(OutOfMemoryError, match=r"give at least .* no smaller depth fits"):
        Engine.load(model, 2, EngineSettings(memory_bytes=1000))
    with pytest.raises(SettingsError, match="step_token_budget"):
        EngineSettings(step_token_budget=3)
    for stretch in (1.0, float("nan")):
        with pytest.raises(SettingsError, match="prefill_stretch"):
            EngineSettings(prefill_stretch=stretch)


def test_a_reload_beyond_memory_names_what_fits_and_leaves_the_old_plan(model: Path) -> None:
    one_context = Engine.load(model, 4, EngineSettings(memory_bytes=MEMORY, max_running=1)).plan.memory
    room = one_context.num_blocks * 16 * one_context.kv_bytes_per_token
    enough = one_context.weight_bytes + one_context.activation_bytes + room
    engine = Engine.load(model, 2, EngineSettings(memory_bytes=enough, max_running=1))
    before = engine.plan
    with pytest.raises(OutOfMemoryError, match=r"6 layers .*; depths that fit: 1, 2, 4$"):
        engine.reload(model, 6)
    assert engine.plan is before
    tokens = list(engine.generate("In the beginning", SamplingParams(max_tokens=3, ignore_eos=True)))
    assert [token.exit_layer for token in tokens] == [2, 2, 2]


@pytest.mark.parametrize("exit_mode", [ExitMode.GREEDY, ExitMode.DYNAMIC])
def test_unsure_tokens_are_those_of_the_plan_in_force(model: Path, exit_mode: ExitMode) -> None:
    # Every exit is unsure, except the last layer, which has no threshold.
    settings = EngineSettings(
        memory_bytes=MEMORY, threshold=1.0, exit_mode=exit_mode, max_running=8, step_token_budget=20
    )
    engine = Engine.load(model, 2, settings)
    streams = [Stream() for _ in range(8)]
    for number, stream in enumerate(streams):
        engine.submit(str(number), [2, number], SamplingParams(max_tokens=40, ignore_eos=True), stream)
    drive(engine, lambda: len(streams[-1].tokens) > 8)
    before = engine.telemetry().counters.high_exit_tokens
    assert before == sum(len(stream.tokens) for stream in streams)
    engine.reload(model, 6)
    drive(engine)
    assert [len(stream.tokens) for stream in streams] == [40] * 8
    outdated = sum(token.exit_layer == 2 for stream in streams for token in stream.tokens) - before
    assert outdated > 8
    assert engine.telemetry().counters.high_exit_tokens == before


def test_a_reload_ends_when_the_engine_stops_before_all_have_moved(model: Path) -> None:
    # Beside eight sequences that decode there is almost no room for prompts, so moving takes many steps.
    settings = EngineSettings(memory_bytes=MEMORY, max_running=8, step_token_budget=8)
    streams, moving, refused = [Stream() for _ in range(8)], threading.Event(), list[HeliosError]()

    def slowly(burst: Burst) -> None:
        time.sleep(0.01)
        # The new plan is in force, and some sequences still decode under the old one.
        if engine.served.plan.depth == 6:
            moving.set()

    engine = hooked_engine(model, 2, settings, before=slowly)

    def reload() -> None:
        with pytest.raises(UnavailableError) as stopped:
            engine.reload(model, 6)
        refused.append(stopped.value)

    engine.start()
    for number, stream in enumerate(streams):
        engine.submit(str(number), [2] * 20, SamplingParams(max_tokens=200, ignore_eos=True), stream)
    while not streams[-1].tokens:
        time.sleep(0.01)
    reloading = threading.Thread(target=reload)
    reloading.start()
    assert moving.wait(60)
    engine.stop()
    reloading.join(60)
    assert "before all were under the new plan" in refused[0].message
    assert all(isinstance(stream.error, UnavailableError) for stream in streams)


def test_fewer_layers_leave_room_for_more_sequences(model: Path) -> None:
    settings = EngineSettings(
        memory_bytes=MEMORY // 16, max_running=4096, step_token_budget=4096, block_tokens=16
    )
    with pytest.raises(OutOfMemoryError):
        Engine.load(model, 6, settings)
    settings = EngineSettings(memory_bytes=8 << 20)
    plans = {depth: Engine.load(model, depth, settings).plan.memory for depth in EXITS}
    for plan in plans.values():
        pool = plan.num_blocks * 16 * plan.kv_bytes_per_token
        assert plan.weight_bytes + plan.activation_bytes + pool <= 8 << 20
    assert plans[1].num_blocks > plans[2].num_blocks > plans[4].num_blocks > plans[6].num_blocks


def test_the_loop_in_a_thread_serves_and_stops(model: Path) -> None:
    engine = Engine.load(model, 2, EngineSettings(memory_bytes=MEMORY, max_running=1))
    engine.start()
    done, ended = Stream(), threading.Event()

    def take(output: Output) -> None:
        done(output)
        if output.finish is not None:
            ended.set()

    engine.submit("done", [2], SamplingParams(max_tokens=5, ignore_eos=True), take)
    assert ended.wait(60)
    # More streams than it can serve before it stops.
    cut = [Stream() for _ in range(100)]
    for number, stream in enumerate(cut):
        engine.submit(f"cut {number}", [2], SamplingParams(max_tokens=250, ignore_eos=True), stream)
    engine.stop()
    assert len(done.tokens) == 5
    assert isinstance(cut[-1].error, UnavailableError)
    assert not engine.running
    with pytest.raises(UnavailableError):
        engine.submit("late", [2], SamplingParams(), Stream())


def save_byte_fallback_tokenizer(path: Path) -> None:
    """Replaces the tokenizer by one of Llama's kind: special tokens, bytes and words."""
    words = ["▁", "▁a", "▁b", "c"]
    tokens = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(path / "tokenizer.json"))


def test_broken_bytes_of_a_byte_fallback_tokenizer_end_nothing(tmp_path: Path) -> None:
    save_variant(tmp_path, "pre-norm", 21)
    save_byte_fallback_tokenizer(tmp_path)
    engine = Engine.load(tmp_path, settings=EngineSettings(memory_bytes=MEMORY))
    samplings = [
        SamplingParams(max_tokens=60, ignore_eos=True, temperature=100.0, seed=seed) for seed in range(8)
    ]
    streams = [Stream() for _ in samplings]
    for number, stream in enumerate(streams):
        engine.submit(str(number), [2, 8], samplings[number], stream)
    drive(engine)
    for sampling, stream in zip(samplings, streams, strict=True):
        assert stream.finish is not None
        assert stream.text == stream.finish.text == engine.plan.tokenizer.decode(stream.ids)
        assert "\ufffd" in stream.text
        resumed = finished(engine, [2, 8], sampling, emitted=stream.ids[:30])
        assert resumed.finish == stream.finish
        assert resumed.text == "".join(token.text for token in stream.tokens[30:])


class Failing(Stream):
    """Raises at its `number`th output, and at all later ones if `always`."""

    def __init__(self, number: int, *, always: bool) -> None:
        super().__init__()
        self._left, self._always = number, always

    def __call__(self, output: Output) -> None:
        self._left -= 1
        if self._left == 0 or (self._left < 0 and self._always):
            raise RuntimeError("nobody is there")
        super().__call__(output)


def fail_text(engine: Engine, sequence: Sequence) -> None:
    def explode(ids: object) -> list[str]:
        raise RuntimeError("no text")

    sequence.detokenizer.push_all = explode  # type: ignore[method-assign]


def pass_deadline(engine: Engine, sequence: Sequence) -> None:
    sequence.deadline = 0.0


def cancel(engine: Engine, sequence: Sequence) -> None:
    engine.cancel(sequence.request_id)


@pytest.mark.parametrize("burst_seconds", [0.0, 0.05])
@pytest.mark.parametrize(
    ("sink", "happens", "error"),
    [
        (Stream(), fail_text, "RuntimeError: no text"),
        (Failing(3, always=False), None, "RuntimeError: nobody is there"),
        (Failing(3, always=True), None, None),
        (Failing(3, always=True), fail_text, None),
        (Failing(3, always=True), pass_deadline, None),
        (Failing(3, always=True), cancel, None),
    ],
)
def test_what_fails_for_one_sequence_ends_it_alone(
    model: Path,
    sink: Stream,
    happens: Callable[[Engine, Sequence], None] | None,
    error: str | None,
    burst_seconds: float,
) -> None:
    settings = EngineSettings(memory_bytes=MEMORY, block_tokens=4, burst_seconds=burst_seconds)
    engine = Engine.load(model, 4, settings)
    sampling = SamplingParams(max_tokens=40, ignore_eos=True)
    alone = finished(engine, [2, 40], sampling)
    before = engine.telemetry().counters.finished_sequences
    sink = copy.deepcopy(sink)
    streams = [Stream(), sink, Stream()]
    sequences = [engine.submit(str(i), [2, 40], sampling, stream) for i, stream in enumerate(streams)]
    for _ in range(2):
        engine.step()
    if happens is not None:
        happens(engine, sequences[1])
    drive(engine)
    for stream in streams[::2]:
        assert stream.finish == alone.finish
        assert stream.ids == alone.ids
    assert sink.finish is None
    assert error is None or (sink.error is not None and error in sink.error.message)
    telemetry = engine.telemetry()
    assert telemetry.blocks_free == telemetry.blocks_total
    assert telemetry.counters.finished_sequences == before + 3
    assert finished(engine, [2, 40], sampling).finish == alone.finish
    engine.submit("1", [2], SamplingParams(max_tokens=1), Stream())  # the name can be used again


def test_a_sink_that_cannot_take_the_finish_is_told_so(engine: Engine) -> None:
    sampling, neighbour = SamplingParams(max_tokens=1), Stream()
    sink = Failing(1, always=False)
    engine.submit("failing", [2, 3], sampling, sink)
    engine.submit("neighbour", [2, 3], sampling, neighbour)
    drive(engine)
    assert sink.error is not None
    assert "nobody is there" in sink.error.message
    assert neighbour.finish is not None
    assert engine.telemetry().counters.generated_tokens == 2


def test_emitted_ids_without_a_text_are_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(self: object, ids: object) -> list[str]:
        raise RuntimeError("no text")

    monkeypatch.setattr("helios.engine.scheduling.detokenizer.Detokenizer.push_all", explode)
    with pytest.raises(HeliosError, match="the sequence failed: RuntimeError: no text"):
        engine.submit("resumed", [2], GREEDY, Stream(), emitted_ids=[3])
    assert not engine.step()


def test_a_failing_step_fails_its_streams_and_ends_the_loop(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(burst: Burst) -> None:
        raise RuntimeError("boom")

    engine = hooked_engine(model, 2, EngineSettings(memory_bytes=MEMORY), before=explode)
    monkeypatch.setattr("threading.excepthook", lambda args: None)
    engine.start()
    stream = Stream()
    engine.submit("one", [2], SamplingParams(), stream)
    deadline = time.monotonic() + 60
    while engine.running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stream.error is not None
    assert "RuntimeError" in stream.error.message
    assert not engine.running
