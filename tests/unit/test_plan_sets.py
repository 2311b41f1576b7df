"""An engine serves several plans at once, and each sequence gets what its plan alone would give it."""

import errno
import functools
import itertools
import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

import helios
from helios.engine import Engine, EngineSettings, ExitMode, Output, SamplingParams
from helios.engine.interface import GeneratedToken, PlanToLoad
from helios.engine.scheduling.sequence import Sequence as EngineSequence
from helios.errors import (
    HeliosError,
    InvalidRequestError,
    OutOfMemoryError,
    PlanNotServedError,
    SettingsError,
    UnavailableError,
)
from helios.routing.probe import Probe
from helios.served import ServedPlan, successor
from tests.opt_variants import save_variant

BUNDLED = Path(helios.__file__).parents[1] / "models"
EXITS = (1, 2, 4, 6)
MEMORY = 64 << 20
# Engines that are compared have the same, because sums depend on it. Steps with blocks of this size are
# compiled, and mix depths.
BLOCK_TOKENS = 16
# With blocks of this size torch computes the steps, each of one depth.
ODD_BLOCK_TOKENS = 4
LONG = [2, *range(30, 71)]
GREEDY = SamplingParams(max_tokens=30, ignore_eos=True)
# Long enough for bursts of any length.
BURST = 10.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the models a and b."""
    path = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        save_variant(path / name, "pre-norm", 12 + seed, exits=EXITS, head="linear")
    return path


def plan(text: str) -> ServedPlan:
    """The plan that is written like a6."""
    return ServedPlan(model=text[0], depth=int(text[1:]))


def to_load(models: Path, *names: str) -> list[PlanToLoad]:
    return [PlanToLoad(models / plan(name).model, plan(name).depth) for name in names]


def load(models: Path, *names: str, settings: EngineSettings | None = None) -> Engine:
    first, *others = to_load(models, *names)
    settings = settings or EngineSettings(memory_bytes=MEMORY, block_tokens=BLOCK_TOKENS)
    return Engine.load(first.path, first.depth, settings, also=others)


def reload(engine: Engine, models: Path, *names: str) -> int:
    """Puts these plans in force. Returns the number of sequences that have moved."""
    first, *others = to_load(models, *names)
    return engine.reload(first.path, first.depth, also=others).sequences_moved


@dataclass(eq=False)
class Stream:
    """A submitted sequence and its tokens."""

    prompt: list[int]
    sampling: SamplingParams
    tokens: list[GeneratedToken] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    sequence: EngineSequence | None = None

    def __call__(self, output: Output) -> None:
        self.outputs.append(output)
        self.tokens += output.tokens

    @property
    def ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]

    @property
    def plans(self) -> list[str]:
        """The plan of each token."""
        return [f"{token.model}{token.exit_layer}" for token in self.tokens]

    @property
    def error(self) -> HeliosError | None:
        return self.outputs[-1].error if self.outputs else None


_names = itertools.count()


def submit(
    engine: Engine, name: str | None, prompt: Sequence[int], sampling: SamplingParams = GREEDY
) -> Stream:
    stream = Stream(list(prompt), sampling)
    served = None if name is None else plan(name)
    stream.sequence = engine.submit(f"{next(_names)}", stream.prompt, sampling, stream, plan=served)
    return stream


def drive(engine: Engine, until: Callable[[], bool] = lambda: False) -> None:
    while not until() and engine.step():
        pass


@functools.cache
def alone_engine(models: Path, name: str, settings: EngineSettings) -> Engine:
    """An engine of a single plan. It finds nothing that it computed before."""
    return load(models, name, settings=replace(settings, prefix_cache=False, memory_bytes=MEMORY))


def check_alone(models: Path, settings: EngineSettings, stream: Stream, *, exactly: bool = False) -> None:
    """Checks that each token is what its plan alone computes after the tokens before it.

    exactly: all figures are equal to the bit. Otherwise only the tokens are, because the last digits depend
    on how a prefix was cut into chunks.
    """
    ids, done = stream.ids, 0
    assert [token.index for token in stream.tokens] == list(range(stream.sampling.max_tokens))
    for name, part in itertools.groupby(stream.plans):
        count = len(list(part))
        alone, one = alone_engine(models, name, settings), Stream(stream.prompt, stream.sampling)
        alone.submit("alone", one.prompt, one.sampling, one, emitted_ids=ids[:done])
        drive(alone)
        assert ids[done : done + count] == one.ids[:count]
        assert not exactly or stream.tokens[done : done + count] == one.tokens[:count]
        done += count


@pytest.mark.parametrize("burst_seconds", [0.0, BURST])
@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_each_sequence_gets_the_tokens_of_its_own_plan(
    models: Path, precision: str, burst_seconds: float
) -> None:
    settings = EngineSettings(memory_bytes=MEMORY, precision=precision, burst_seconds=burst_seconds)
    engine = load(models, "a6", "b4", "a2", "b1", settings=settings)
    names = [None, "b4", "a2", "b1", "a6", "a2"]
    samplings = [
        SamplingParams(max_tokens=20 + 3 * number, ignore_eos=True, temperature=0.7 * (number % 2), seed=4)
        for number in range(len(names))
    ]
    streams = [
        submit(engine, name, [2, *range(20, 30 + 9 * number)], samplings[number])
        for number, name in enumerate(names)
    ]
    drive(engine)
    for name, stream in zip(names, streams, strict=True):
        assert set(stream.plans) == {name or "a6"}
        check_alone(models, settings, stream, exactly=True)
    assert engine.telemetry().blocks_free == engine.telemetry().blocks_total
    if burst_seconds:
        assert all(max(len(output.tokens) for output in stream.outputs) > 4 for stream in streams)


def test_the_bundled_models_serve_texts_side_by_side() -> None:
    settings = EngineSettings(memory_bytes=256 << 20, precision="int8")
    prose, tech = (BUNDLED / name for name in ("helios-prose", "helios-tech"))
    engine = Engine.load(prose, 6, settings, also=[PlanToLoad(prose, 2), PlanToLoad(tech, 8)])
    prompt = engine.plan.tokenizer.encode("The river was asked about the engine, and").ids
    streams = {served: Stream(prompt, GREEDY) for served in engine.served.plans}
    for served, stream in streams.items():
        engine.submit(f"{served}", prompt, GREEDY, stream, plan=served)
        # A neighbour of the same plan.
        engine.submit(f"{served} again", prompt[1:], GREEDY, lambda _: None, plan=served)
    drive(engine)
    for served, stream in streams.items():
        alone = Engine.load(BUNDLED / served.model, served.depth, settings)
        assert list(alone.generate(prompt, GREEDY)) == stream.tokens


@pytest.mark.parametrize("block_tokens", [BLOCK_TOKENS, ODD_BLOCK_TOKENS])
@pytest.mark.parametrize("memory", [MEMORY, 3 << 20])
def test_sequences_keep_or_change_their_plan_as_plans_come_and_go(
    models: Path, memory: int, block_tokens: int
) -> None:
    # A step has room for few prompt tokens beside decodes, so sequences move one after the other.
    settings = EngineSettings(
        memory_bytes=memory,
        block_tokens=block_tokens,
        max_running=12,
        step_token_budget=40,
        prefill_stretch=math.inf,
    )
    engine = load(models, "a2", settings=settings)
    sampling = SamplingParams(max_tokens=200, ignore_eos=True)

    def begin(*names: str) -> list[Stream]:
        found = [submit(engine, name, [2, 9, 30 + n], sampling) for n, name in enumerate(names)]
        drive(engine, lambda: all(len(stream.tokens) > 5 for stream in found))
        return found

    streams = begin("a2", "a2", "a2")
    # A plan is added.
    assert reload(engine, models, "a6", "a2") == 0
    streams += begin("a6", "a6", "a2")
    assert {stream.plans[-1] for stream in streams} == {"a2", "a6"}
    # Plans are replaced: a2 by a deeper one, a6 by a shallower one of the same model.
    assert reload(engine, models, "b2", "a4") == 6
    streams += begin("b2", "b2")
    assert [stream.plans[-1] for stream in streams] == ["a4"] * 6 + ["b2"] * 2
    # A model is dropped.
    assert reload(engine, models, "b2", "b6") == 6
    drive(engine)
    assert [stream.plans[-1] for stream in streams] == ["b2"] * 8
    for stream in streams:
        check_alone(models, settings, stream)
    assert engine.telemetry().blocks_free == engine.telemetry().blocks_total


@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_who_stays_and_who_moves_computes_what_it_would_alone_to_the_bit(
    models: Path, precision: str
) -> None:
    # Each prefix is computed in one chunk, as it is alone.
    settings = EngineSettings(
        memory_bytes=MEMORY,
        block_tokens=BLOCK_TOKENS,
        precision=precision,
        prefill_stretch=math.inf,
        prefix_cache=False,
    )
    engine = load(models, "a2", "b4", "a4", settings=settings)
    sampling = SamplingParams(max_tokens=80, ignore_eos=True, temperature=0.8, seed=9)
    names = ["a2", "b4", "a4", "a2", "b4"]
    streams = [submit(engine, name, [2, 9, 30 + n], sampling) for n, name in enumerate(names)]
    drive(engine, lambda: len(streams[-1].tokens) > 9)
    assert reload(engine, models, "b6", "a4", "b4") == 2
    late = submit(engine, "b6", LONG, sampling)
    drive(engine, lambda: len(late.tokens) > 9)
    assert reload(engine, models, "b4", "a6") == 4
    drive(engine)
    expected = [{"a2", "a4", "a6"}, {"b4"}, {"a4", "a6"}, {"a2", "a4", "a6"}, {"b4"}]
    assert [set(stream.plans) for stream in streams] == expected
    for stream in streams:
        check_alone(models, settings, stream, exactly=True)


def test_who_keeps_a_plan_or_needs_fewer_layers_is_not_computed_again(models: Path) -> None:
    engine = load(models, "a4")
    streams = [submit(engine, "a4", [2, 9 + n, *LONG]) for n in range(3)]
    drive(engine, lambda: len(streams[-1].tokens) > 3)
    prefilled = engine.telemetry().counters.prefill_tokens
    assert reload(engine, models, "b2", "a6", "a4") == 0
    assert reload(engine, models, "a4", "a1") == 0
    assert reload(engine, models, "a6", "a1") == 3
    drive(engine, lambda: len(streams[-1].tokens) > 9)
    moved = engine.telemetry().counters.prefill_tokens - prefilled
    assert moved >= 3 * len(LONG), "a deeper plan needs other layers"
    assert reload(engine, models, "b6", "a2") == 3
    drive(engine)
    assert engine.telemetry().counters.prefill_tokens - prefilled == moved
    assert [stream.sequence.preemptions for stream in streams if stream.sequence] == [1, 1, 1]
    assert all(set(stream.plans) == {"a4", "a6", "a2"} for stream in streams)


@pytest.mark.parametrize(
    ("old", "in_force", "expected"),
    [
        ("a4", ("b4", "a6", "a4"), "a4"),
        ("a4", ("b4", "a8", "a6", "a2"), "a6"),
        ("a4", ("b4", "a1", "a2"), "a2"),
        ("a4", ("b6", "b4"), "b6"),
    ],
)
def test_sequences_move_to_the_nearest_plan_that_is_as_deep(
    old: str, in_force: tuple[str, ...], expected: str
) -> None:
    assert successor(plan(old), list(map(plan, in_force))) == plan(expected)


def test_a_plan_that_ended_before_its_sequence_was_taken_in_is_replaced(models: Path) -> None:
    engine = load(models, "a2", "b4")
    first, named = submit(engine, None, LONG), submit(engine, "b4", LONG)
    reload(engine, models, "b6", "a1")
    drive(engine)
    assert set(first.plans) == {"a1"}
    assert set(named.plans) == {"b6"}


def test_telemetry_tells_the_plans_and_who_runs_under_them(models: Path) -> None:
    engine = load(models, "a4", "b2", "a2")
    for name in ("a4", "a4", "b2", None):
        submit(engine, name, [2, 9])
    engine.step()
    telemetry, served = engine.telemetry(), engine.served
    assert list(telemetry.plans.items()) == [(plan("a4"), 3), (plan("b2"), 1), (plan("a2"), 0)]
    assert (telemetry.plan, telemetry.running) == (plan("a4"), 4)
    assert (served.plan, served.plans) == (plan("a4"), (plan("a4"), plan("b2"), plan("a2")))
    sizes = [load(models, name).served for name in ("a4", "b2")]
    assert served.weight_bytes > sum(one.weight_bytes for one in sizes)
    assert served.kv_bytes_per_token == sizes[0].kv_bytes_per_token
    drive(engine)


def test_unsure_tokens_are_counted_by_the_threshold_of_their_plan(models: Path) -> None:
    settings = EngineSettings(memory_bytes=MEMORY)
    engine = Engine.load(
        models / "a",
        4,
        settings,
        threshold=1.0,
        also=[PlanToLoad(models / "a", 2, 0.0), *to_load(models, "b6")],
    )
    for name in ("a4", "a2", "b6"):
        submit(engine, name, [2, 9])
    drive(engine)
    counters = engine.telemetry().counters
    assert (counters.confidence_tokens, counters.high_exit_tokens) == (90, 30)


def test_a_model_is_loaded_once_and_what_is_loaded_is_not_read_again(models: Path) -> None:
    engine = load(models, "a6", "a2")
    alone = load(models, "a6").served
    head = 4 * (32 * 32 + 2 * 32)
    assert engine.served.bytes_read == alone.bytes_read + head
    assert engine.reload(models / "a", 2, also=to_load(models, "a6")).bytes_read == 0
    told: list[tuple[int, int]] = []
    read = engine.reload(
        models / "a", 2, lambda done, total: told.append((done, total)), also=to_load(models, "b4")
    )
    assert read.bytes_read == load(models, "b4").served.bytes_read
    assert told == [(count, 6) for count in range(1, 7)]


# -- memory ------------------------------------------------------------------------------------------------


def contexts(models: Path, count: float, **options: int) -> EngineSettings:
    """Settings with memory for plans of a up to depth 6, and for `count` full contexts of six layers."""
    settings = EngineSettings(memory_bytes=MEMORY, max_running=16, step_token_budget=64, **options)
    memory = load(models, "a6", "a1", settings=settings).plan.memory
    context = 256 * memory.kv_bytes_per_token
    room = memory.weight_bytes + memory.activation_bytes + int(count * context)
    return EngineSettings(memory_bytes=room, max_running=16, step_token_budget=64, **options)


def test_shallow_sequences_fit_where_deep_ones_do_not(models: Path) -> None:
    settings = contexts(models, 1.5)
    most = {}
    for name in ("a1", "a6"):
        engine, running = load(models, "a6", "a1", settings=settings), []
        streams = [submit(engine, name, [2, 9 + n] * 60) for n in range(12)]
        while engine.step():
            running.append(engine.telemetry().running)
        assert all(len(stream.tokens) == 30 for stream in streams)
        assert engine.telemetry().blocks_free == engine.telemetry().blocks_total
        most[name] = max(running)
    assert most["a1"] >= 2 * most["a6"]


def test_where_memory_is_ample_all_blocks_have_all_layers(models: Path) -> None:
    memory = load(models, "a6", "a1", "b2").plan.memory
    assert set(memory.layer_blocks) == {64 * 256 // BLOCK_TOKENS}
    assert len(memory.layer_blocks) == 6


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_when_memory_is_scarce_all_plans_sequences_end_with_their_own_tokens(
    models: Path, prefix_cache: bool
) -> None:
    settings = contexts(models, 1.2, block_tokens=BLOCK_TOKENS, prefix_cache=prefix_cache)
    engine = load(models, "a1", "a6", "a2", settings=settings)
    sampling = SamplingParams(max_tokens=100, ignore_eos=True)
    names = ["a6", "a1", "a2", "a6", "a1", "a1", "a6", "a2", "a6", "a1"]
    streams = [submit(engine, name, [2, 9, 30 + n % 3], sampling) for n, name in enumerate(names)]
    drive(engine)
    assert engine.telemetry().preemptions > 0
    assert engine.telemetry().blocks_free == engine.telemetry().blocks_total
    for name, stream in zip(names, streams, strict=True):
        assert set(stream.plans) == {name}
    for stream in streams[:3]:
        check_alone(models, EngineSettings(memory_bytes=MEMORY, block_tokens=BLOCK_TOKENS), stream)
    assert streams[3].ids == streams[6].ids == streams[0].ids


def test_a_share_says_how_many_blocks_a_depth_gets(models: Path) -> None:
    settings = contexts(models, 8)

    def blocks(share: float) -> dict[int, int]:
        also = [PlanToLoad(models / "a", 1, share=share)]
        return dict(Engine.load(models / "a", 6, settings, also=also).plan.memory.blocks)

    assert blocks(0.25)[1] < blocks(1)[1] < blocks(4)[1]
    assert blocks(0.25)[6] > blocks(1)[6] > blocks(4)[6] >= 256 // 16


def test_a_set_that_does_not_fit_names_what_would(models: Path) -> None:
    engine = load(models, "a6", "a2", settings=contexts(models, 1.5))
    before, stream = engine.served, submit(engine, "a2", [2, 9])
    with pytest.raises(
        OutOfMemoryError, match=r"a at depths 6, 2 and b at depth 6 .*these fit: a at depths 6, 2$"
    ):
        reload(engine, models, "a6", "a2", "b6")
    with pytest.raises(
        OutOfMemoryError, match=r"give at least [\d,]+, serve fewer plans .*; these fit: a at"
    ):
        reload(engine, models, "a6", "b6", "a2")
    assert engine.served == before
    drive(engine)
    assert len(stream.tokens) == 30
    with pytest.raises(OutOfMemoryError, match="depths of a that fit alone"):
        load(models, "a6", "b6", settings=EngineSettings(memory_bytes=1 << 20))


def test_a_deeper_plan_without_memory_for_its_layers_is_not_added(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(models, "a2")
    before, stream = engine.served, submit(engine, "a2", LONG)
    drive(engine, lambda: len(stream.tokens) > 3)
    map_memory = mmap.mmap

    def exhausted(file: int, size: int, **options: Any) -> mmap.mmap:
        # Small maps still work: a warm-up needs one block.
        if size > 1 << 14:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return map_memory(file, size, **options)

    with monkeypatch.context() as patched:
        patched.setattr("helios.engine.backends.kv_cache.mmap.mmap", exhausted)
        with pytest.raises(OutOfMemoryError, match=r"no memory for \d+ blocks of KV"):
            reload(engine, models, "a2", "a6")
    assert engine.served == before
    assert reload(engine, models, "a2", "a6") == 0
    drive(engine)
    assert stream.sequence is not None
    assert stream.sequence.preemptions == 0
    check_alone(models, EngineSettings(memory_bytes=MEMORY, block_tokens=BLOCK_TOKENS), stream)


# -- shared prefixes ---------------------------------------------------------------------------------------


def test_a_prefix_is_shared_with_shallower_plans_of_the_same_model_alone(models: Path) -> None:
    engine = load(models, "a4", "b4", "a2", "a6")

    def cached(name: str) -> int:
        before = engine.telemetry().cached_tokens
        stream = submit(engine, name, LONG)
        drive(engine)
        check_alone(
            models, EngineSettings(memory_bytes=MEMORY, block_tokens=BLOCK_TOKENS, prefix_cache=False), stream
        )
        return engine.telemetry().cached_tokens - before

    found = {name: cached(name) for name in ("a4", "a2", "b4", "a6", "a4", "b4", "b4")}
    assert cached("a6") == 32, "what it computed has replaced what fewer layers had"
    assert found == {"a4": 32, "a2": 32, "b4": 32, "a6": 0}
    assert engine.telemetry().blocks_free == engine.telemetry().blocks_total


def test_a_sequence_that_gets_another_model_finds_nothing_of_the_old_one(models: Path) -> None:
    engine = load(models, "a4", "b4")
    stream = submit(engine, "a4", LONG)
    drive(engine, lambda: len(stream.tokens) > 3)
    other = submit(engine, "a4", LONG)
    drive(engine, lambda: len(other.tokens) > 3)
    assert reload(engine, models, "b4") == 2
    drive(engine)
    for one in (stream, other):
        assert set(one.plans) == {"a4", "b4"}
        check_alone(
            models, EngineSettings(memory_bytes=MEMORY, block_tokens=BLOCK_TOKENS, prefix_cache=False), one
        )


# -- what prompts show -------------------------------------------------------------------------------------


def test_a_probed_prompt_is_told_with_what_its_plan_made_of_it(models: Path) -> None:
    settings = EngineSettings(memory_bytes=MEMORY, prompt_readings=8, prefix_cache=False)
    engine = load(models, "a6", "b2", settings=settings)
    prompt = [2, *range(30, 130)]
    probe = Probe(len(prompt), {})
    probed = {name: submit(engine, name, prompt) for name in ("a6", "b2")}
    for stream in probed.values():
        assert stream.sequence is not None
        stream.sequence.probe, stream.sequence.probed_tokens = probe, 32
    short = submit(engine, "a6", prompt[:33])
    assert short.sequence is not None
    short.sequence.probe, short.sequence.probed_tokens = Probe(33, {}), 32
    submit(engine, "b2", prompt)
    drive(engine)
    told = {one.plan: one for one in engine.served_prompts(0)}
    assert [one.number for one in engine.served_prompts(0)] == [1, 2]
    assert [one.number for one in engine.served_prompts(1)] == [2]
    for name in ("a6", "b2"):
        alone = load(models, name, settings=settings)
        submit(alone, name, prompt)
        drive(alone)
        counters = alone.telemetry().counters
        assert told[plan(name)].probe is probe
        assert 0 < told[plan(name)].tokens < counters.prompt_tokens_read
        assert 0 < told[plan(name)].nats < counters.prompt_nats
        whole = submit(engine, name, prompt)
        assert whole.sequence is not None
        whole.sequence.probe = probe
        drive(engine)
        last = engine.served_prompts(0)[-1]
        assert last.tokens == counters.prompt_tokens_read
        assert last.nats == pytest.approx(counters.prompt_nats)


# -- bad input ---------------------------------------------------------------------------------------------


def test_a_plan_that_is_not_in_force_is_refused_naming_those_that_are(models: Path) -> None:
    engine = load(models, "a4", "b2")
    for name in ("a2", "b4", "c2"):
        with pytest.raises(
            PlanNotServedError, match=r"is not in force here; in force: a at depth 4, b at depth 2$"
        ):
            submit(engine, name, [2])
    assert not engine.step()


def test_sets_that_no_engine_can_serve_are_refused(models: Path, tmp_path: Path) -> None:
    engine = load(models, "a4", "b2")
    before = engine.served
    with pytest.raises(InvalidRequestError, match="a at depth 2 is named twice"):
        reload(engine, models, "a2", "b4", "a2")
    with pytest.raises(InvalidRequestError, match="a at depth 6 is named twice"):
        engine.reload(models / "a", None, also=to_load(models, "a6"))
    for share in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InvalidRequestError, match="share of a plan must be above 0"):
            engine.reload(models / "a", 2, also=[PlanToLoad(models / "b", 2, share=share)])
    save_variant(tmp_path / "a", "pre-norm", 1, exits=EXITS)
    with pytest.raises(InvalidRequestError, match="two models have the name a"):
        engine.reload(models / "a", 2, also=[PlanToLoad(tmp_path / "a", 4)])
    save_variant(tmp_path / "wide", "pre-norm", 1, exits=EXITS, num_attention_heads=2)
    with pytest.raises(SettingsError, match="wide and a cannot be served together: their keys"):
        engine.reload(models / "a", 2, also=[PlanToLoad(tmp_path / "wide", 4)])
    save_variant(tmp_path / "other", "pre-norm", 1)
    text = (tmp_path / "other" / "tokenizer.json").read_text()
    (tmp_path / "other" / "tokenizer.json").write_text(text + "\n")
    with pytest.raises(InvalidRequestError, match="other has another tokenizer than a"):
        engine.reload(models / "a", 2, also=[PlanToLoad(tmp_path / "other")])
    assert engine.served == before
    drive(engine)


@pytest.mark.parametrize("exit_mode", [ExitMode.FULL, ExitMode.DYNAMIC])
def test_the_other_exit_modes_serve_one_plan(models: Path, exit_mode: ExitMode) -> None:
    settings = EngineSettings(memory_bytes=MEMORY, exit_mode=exit_mode)
    engine = load(models, "a6", settings=settings)
    with pytest.raises(SettingsError, match=f"exit mode {exit_mode} serves one plan, not 2"):
        reload(engine, models, "a6", "b6")
    stream = submit(engine, "a6", [2, 9])
    drive(engine)
    assert len(stream.tokens) == 30


def test_who_is_too_long_for_the_plan_it_gets_ends_alone(models: Path, tmp_path: Path) -> None:
    save_variant(tmp_path / "short", "pre-norm", 1, exits=EXITS, max_position_embeddings=64)
    engine = load(models, "a4", "b2")
    long, brief, staying = (
        submit(engine, name, [2, *range(30, 30 + tokens)])
        for name, tokens in (("a4", 60), ("a4", 9), ("b2", 60))
    )
    drive(engine, lambda: all(stream.tokens for stream in (long, brief, staying)))
    engine.reload(tmp_path / "short", 2, also=to_load(models, "b2"))
    drive(engine)
    assert isinstance(long.error, UnavailableError)
    assert "short at depth 2 cannot hold 91 tokens" in long.error.message
    assert len(brief.tokens) == len(staying.tokens) == 30
