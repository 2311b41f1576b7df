"""A probe says what a model's first exit says, costs no token its place, and is not computed twice."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helios.engine import Engine, EngineSettings, ExitMode, Output, SamplingParams
from helios.engine.backends.burst import Burst
from helios.engine.backends.kv_cache import KVCache
from helios.engine.backends.readout import Readout
from helios.engine.backends.runner import Runner
from helios.engine.evaluation.space import sequence_of
from helios.engine.evaluation.trace import trace_exits
from helios.engine.interface import PlanToLoad
from helios.engine.kernels.team import TEAM
from helios.engine.plan import Plan, load_plan, load_plans
from helios.engine.probe import Prober
from helios.engine.scheduling.batch import Batch, build_batch
from helios.engine.scheduling.sequence import Sequence as EngineSequence
from helios.errors import (
    CancelledError,
    HeliosError,
    OutOfMemoryError,
    PlanNotServedError,
    SequenceFailedError,
    SettingsError,
)
from helios.routing.probe import Probe, read_positions
from helios.served import ServedPlan
from tests.variants import save_variant

EXITS = (2, 4, 6)
MEMORY = 64 << 20
GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)
PROMPT = [2, *(5 + 7 * index % 250 for index in range(79))]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of one shape with the same tokenizer, and one of another shape."""
    path = tmp_path_factory.mktemp("models")
    save_variant(path / "first", "pre-norm", 21, exits=EXITS, head="linear")
    save_variant(path / "second", "pre-norm", 22, exits=EXITS, head="norm")
    save_variant(path / "wider", "projected", 23, exits=(1, 6), hidden_size=64)
    return path


@pytest.fixture(autouse=True)
def _goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill goes on after every probe, however small."""
    monkeypatch.setattr("helios.engine.probe.LEAST_ROWS", 0)


def settings_of(**changes: object) -> EngineSettings:
    return EngineSettings(**({"memory_bytes": MEMORY, "precision": "int8"} | changes))  # type: ignore[arg-type]


class Stream:
    """The outputs of one sequence, and the probe from which its route chose."""

    def __init__(
        self,
        engine: Engine,
        choose: Callable[[Probe], ServedPlan | None] | None = None,
        first: str | None = None,
        *,
        asks_for_all: bool = False,
    ) -> None:
        """first, asks_for_all: its route's first model, and whether this model's readings are not enough."""
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.error: HeliosError | None = None
        self.is_finished = False
        self.probe: Probe | None = None
        # Every probe that its route was given, and whether it was said to be complete.
        self.probes: list[tuple[Probe, bool]] = []
        self._choose = choose or (lambda _: engine.plan.served)
        self._first, self._asks_for_all = first, asks_for_all

    def __call__(self, output: Output) -> None:
        self.ids += [token.token_id for token in output.tokens]
        self.logprobs += [token.logprob for token in output.tokens]
        self.error, self.is_finished = output.error, output.finish is not None

    @property
    def route(self) -> "ScriptedRoute":
        return ScriptedRoute(self._asked, self._first)

    def _asked(self, probe: Probe, is_complete: bool) -> ServedPlan | None:
        self.probes.append((probe, is_complete))
        if self._asks_for_all and not is_complete:
            return None
        self.probe = probe
        return self._choose(probe)


@dataclass(frozen=True)
class ScriptedRoute:
    """A route that a function makes: (probe, whether it is complete) -> plan."""

    choose: Callable[[Probe, bool], ServedPlan | None]
    first_model: str | None = None

    def first(self, first_ids: Sequence[int]) -> str | None:
        return self.first_model

    def __call__(self, probe: Probe, *, is_complete: bool) -> ServedPlan | None:
        return self.choose(probe, is_complete)


def submit(
    engine: Engine,
    prompts: Iterable[Sequence[int]],
    choose: Callable[[Probe], ServedPlan | None] | None = None,
    *,
    routed: bool = True,
    sampling: SamplingParams = GREEDY,
) -> tuple[list[Stream], list[EngineSequence]]:
    streams, sequences = [], []
    for index, prompt in enumerate(prompts):
        stream = Stream(engine, choose)
        route = stream.route if routed else None
        sequences.append(engine.submit(f"{index}", list(prompt), sampling, stream, route=route))
        streams.append(stream)
    return streams, sequences


def run(engine: Engine) -> None:
    while engine.step():
        pass


def expected(plan: Plan, prompt: Sequence[int], tokens: int, readings: int) -> tuple[float, float]:
    """Mean nats and doubt at the first exit, from a trace of every position of the prompt."""
    at = read_positions(min(tokens, len(prompt) - 1), readings)
    (trace,) = trace_exits(plan, [prompt])
    doubts = -torch.tensor(trace.confidences[0, at]).log()
    return float(trace.nats[0, at].mean()), float(doubts.mean())


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize(
    ("variant", "head"),
    [
        ("pre-norm", "shared"),
        ("post-norm", "linear"),
        ("projected", "norm"),
        ("gelu", "linear"),
        ("qwen3", "linear"),
    ],
)
@pytest.mark.parametrize("depth", [2, 6])
def test_readings_are_those_of_the_first_exit(
    tmp_path: Path, variant: str, head: str, precision: str, depth: int
) -> None:
    save_variant(tmp_path / "m", variant, 5, exits=EXITS, head=head)  # type: ignore[arg-type]
    options = settings_of(precision=precision, probe_tokens=30, probe_readings=7, min_probe_tokens=4)
    whole = load_plan(tmp_path / "m", None, replace(options, exit_mode=ExitMode.DYNAMIC))
    engine = Engine.load(tmp_path / "m", depth, options)
    prompts = [PROMPT[:count] for count in (80, 31, 30, 6)]
    streams, sequences = submit(engine, prompts)
    run(engine)
    for prompt, stream, sequence in zip(prompts, streams, sequences, strict=True):
        assert stream.is_finished
        assert stream.probe is sequence.probe
        assert stream.probe is not None
        assert stream.probe.prompt_tokens == len(prompt)
        reading = stream.probe.readings["m"]
        count = min(30, len(prompt) - 1)
        assert (reading.depth, reading.tokens) == (2, len(read_positions(count, 7)))
        assert stream.probe.first_ids == tuple(prompt[:count])
        assert sequence.probed_tokens == count
        nats, doubt = expected(whole, prompt, 30, 7)
        assert reading.nats == pytest.approx(nats, abs=1e-4)
        assert reading.doubt == pytest.approx(doubt, abs=1e-4)


@dataclass
class CountingRunner:
    """Counts the prompt tokens that `runner` computes."""

    runner: Runner
    rows: int = 0

    @property
    def has_bursts(self) -> bool:
        return self.runner.has_bursts

    @property
    def mixes_depths(self) -> bool:
        return self.runner.mixes_depths

    @property
    def spare_blocks(self) -> int:
        return self.runner.spare_blocks

    def run(self, batch: Batch, cache: KVCache, burst: Burst) -> tuple[Readout, list[int]]:
        self.rows += batch.rows - batch.decode_rows
        return self.runner.run(batch, cache, burst)

    def release(self) -> None:
        self.runner.release()


def counting(path: Path, depth: int, options: EngineSettings) -> tuple[Engine, CountingRunner]:
    plan = load_plan(path, depth, options)
    runner = CountingRunner(plan.runner)
    return Engine(replace(plan, runner=runner), options), runner


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("depth", [2, 6])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"probe_tokens": 23},
        {"step_token_budget": 20, "max_running": 3, "probe_prompts": 2},
        {"prompt_readings": 4, "burst_seconds": 0.01},
    ],
    ids=["whole", "part of a block", "in chunks", "read and in bursts"],
)
def test_prefill_goes_on_where_the_probe_ended_and_tokens_are_the_same(
    models: Path, precision: str, depth: int, changes: dict[str, object]
) -> None:
    options = settings_of(precision=precision, **changes)
    prompts = [PROMPT[start : start + count] for start, count in ((0, 80), (1, 33), (2, 32), (3, 13), (4, 5))]
    plain, plain_rows = counting(models / "first", depth, options)
    before, _ = submit(plain, prompts, routed=False)
    run(plain)
    engine, rows = counting(models / "first", depth, options)
    streams, sequences = submit(engine, prompts)
    run(engine)
    for one, other, sequence in zip(before, streams, sequences, strict=True):
        assert one.is_finished
        assert other.is_finished
        assert one.ids == other.ids
        assert one.logprobs == other.logprobs
        assert sequence.probed is None
    probed = sum(sequence.probed_tokens for sequence in sequences)
    if "step_token_budget" in changes:
        # A chunk may be smaller than what was probed. Then the rest is computed again.
        assert plain_rows.rows - probed <= rows.rows < plain_rows.rows
    else:
        assert rows.rows == plain_rows.rows - probed
    assert (
        engine.telemetry().counters.prefill_tokens
        == plain.telemetry().counters.prefill_tokens
        == sum(map(len, prompts))
    )
    assert engine.telemetry().blocks_free == engine.telemetry().blocks_total


@pytest.mark.parametrize("threads", [1, 2])
def test_few_tokens_are_computed_again_and_many_are_not(
    models: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helios.engine.probe.LEAST_ROWS", 96)
    monkeypatch.setattr(TEAM, "threads", threads)
    for count, goes_on in ((2, False), (3, threads == 1), (6, True)):
        engine, rows = counting(models / "first", 6, settings_of())
        prompts = [PROMPT[start : start + 40] for start in range(count)]
        streams, sequences = submit(engine, prompts)
        run(engine)
        assert rows.rows == count * (40 - 32 * goes_on)
        assert [sequence.probed for sequence in sequences] == [None] * count
        plain = Engine.load(models / "first", 6, settings_of())
        expect, _ = submit(plain, prompts, routed=False)
        run(plain)
        assert [stream.logprobs for stream in streams] == [stream.logprobs for stream in expect]


@pytest.mark.parametrize(("variant", "block_tokens"), [("pre-norm", 4), ("gelu", 16)])
def test_models_that_torch_computes_go_on_as_well(tmp_path: Path, variant: str, block_tokens: int) -> None:
    save_variant(tmp_path / "m", variant, 5, exits=EXITS, head="norm")
    options = settings_of(precision="float32", block_tokens=block_tokens, probe_tokens=30)
    plain, plain_rows = counting(tmp_path / "m", 6, options)
    before, _ = submit(plain, [PROMPT], routed=False)
    run(plain)
    engine, rows = counting(tmp_path / "m", 6, options)
    after, _ = submit(engine, [PROMPT])
    run(engine)
    assert after[0].ids == before[0].ids
    assert after[0].logprobs == pytest.approx(before[0].logprobs, abs=1e-4)
    assert plain_rows.rows - rows.rows == 30


def test_short_prompts_have_no_readings(models: Path) -> None:
    engine = Engine.load(models / "first", 4, settings_of(min_probe_tokens=8))
    streams, sequences = submit(engine, [PROMPT[:1], PROMPT[:8], PROMPT[:9]])
    run(engine)
    assert [len(stream.probe.readings) for stream in streams if stream.probe] == [0, 0, 1]
    assert [sequence.probed_tokens for sequence in sequences] == [0, 0, 8]
    assert [stream.probe.first_ids for stream in streams if stream.probe] == [
        tuple(PROMPT[:1]),
        tuple(PROMPT[:8]),
        tuple(PROMPT[:8]),
    ]
    assert all(is_complete for stream in streams for _, is_complete in stream.probes)
    assert all(stream.is_finished for stream in streams)


def test_without_probe_tokens_routes_get_empty_probes_and_the_head_is_not_loaded(models: Path) -> None:
    engine = Engine.load(models / "first", 4, settings_of(probe_tokens=0))
    streams, _ = submit(engine, [PROMPT])
    run(engine)
    assert streams[0].probe == Probe(len(PROMPT), {}, ())
    assert streams[0].is_finished
    assert list(engine.plan.model.weights.exits) == [4]


def test_many_prompts_at_once_are_probed_in_rounds_and_first_come_first_served(models: Path) -> None:
    options = settings_of(probe_prompts=3, max_running=16)
    engine = Engine.load(models / "first", 4, options)
    prompts = [PROMPT[start : start + 20 + 3 * start] for start in range(10)]
    alone = []
    for prompt in prompts:
        (stream,), _ = submit(engine, [prompt])
        run(engine)
        alone.append(stream)
    engine = Engine.load(models / "first", 4, options)
    streams, sequences = submit(engine, prompts)
    for probed in (3, 6, 9, 10):
        assert engine.step()
        assert [stream.probe is not None for stream in streams] == [True] * probed + [False] * (10 - probed)
    run(engine)
    assert [stream.probe for stream in streams] == [stream.probe for stream in alone]
    assert [stream.ids for stream in streams] == [stream.ids for stream in alone]
    scheduled = [sequence.times.scheduled for sequence in sequences]
    assert scheduled == sorted(scheduled)


def queued(prober: Prober, plan: Plan, prompt: Sequence[int], chosen: ServedPlan) -> EngineSequence:
    seq = sequence_of(plan.served, plan.tokenizer, prompt, [])
    seq.route = ScriptedRoute(lambda *_: chosen)
    prober.add(seq)
    return seq


@torch.inference_mode()
def test_each_model_is_probed_and_each_sequence_goes_on_in_its_own_at_its_own_depth(models: Path) -> None:
    options = settings_of()
    plans = {name: load_plan(models / name, 6, options) for name in ("first", "second", "wider")}
    choices = [("first", 6), ("second", 4), ("first", 2), ("wider", 6), ("first", 4), ("second", 6)]
    chosen = [ServedPlan(model=model, depth=depth) for model, depth in choices]
    prober = Prober(options)
    sequences = [
        queued(prober, plans["first"], PROMPT[index : index + 20 + 6 * index], plan)
        for index, plan in enumerate(chosen)
    ]
    routed = prober.route(list(plans.values()), set(chosen))
    assert routed == [(seq, None) for seq in sequences]
    for name, plan in plans.items():
        whole = load_plan(models / name, None, replace(options, exit_mode=ExitMode.DYNAMIC))
        cache, exact = (
            KVCache.of(plan.model.config, 6, 40, 16, plan.model.kv_dtype, plan.model.device) for _ in range(2)
        )
        own = [seq for seq in sequences if seq.plan.model == name]
        for number, seq in enumerate(sequences):
            nats, doubt = expected(whole, seq.token_ids, 32, 12)
            assert seq.probe is not None
            assert seq.probe.readings[name].nats == pytest.approx(nats, abs=1e-4)
            assert seq.probe.readings[name].doubt == pytest.approx(doubt, abs=1e-4)
            seq.blocks = list(range(6 * number + 5, 6 * number - 1, -1))

        def advance(seq: EngineSequence, count: int) -> None:
            seq.computed += count

        left = prober.go_on(plan, [(seq, len(seq.token_ids)) for seq in own], cache, advance)
        assert left == [(seq, len(seq.token_ids) - seq.probed_tokens) for seq in own]
        assert [seq.computed for seq in own] == [seq.probed_tokens for seq in own]
        for seq in own:
            again = sequence_of(seq.plan, plan.tokenizer, seq.token_ids, seq.blocks)
            batch, _ = build_batch([(again, seq.probed_tokens)], 16, plan.model.device)
            plan.model.layers(0, 6, plan.model.embed(batch.token_ids, batch.positions), batch, exact)
            blocks = batch.tables
            for layer in range(seq.plan.depth):
                for found, wanted in zip(
                    cache.gather(layer, blocks), exact.gather(layer, blocks), strict=True
                ):
                    count = seq.probed_tokens
                    assert torch.equal(found[:, :, :count], wanted[:, :, :count])


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_routed_sequences_have_the_tokens_that_their_plans_alone_give(models: Path, precision: str) -> None:
    options = settings_of(precision=precision, probe_prompts=3, burst_seconds=0.01)
    choices = [("first", 2), ("first", 6), ("second", 4)]
    also = [PlanToLoad(models / name, depth) for name, depth in choices[1:]]
    engine = Engine.load(models / "first", 2, options, also=also)
    prompts = [PROMPT[index : index + 18 + 5 * index] for index in range(12)]
    plans = [
        ServedPlan(model=name, depth=depth) for name, depth in (choices[index % 3] for index in range(12))
    ]
    streams, sequences = [], []
    for index, (prompt, plan) in enumerate(zip(prompts, plans, strict=True)):
        stream = Stream(engine, lambda _, plan=plan: plan)  # type: ignore[misc]
        sequences.append(engine.submit(f"{index}", list(prompt), GREEDY, stream, route=stream.route))
        streams.append(stream)
    run(engine)
    assert all(stream.probe and set(stream.probe.readings) == {"first", "second"} for stream in streams)
    assert [sequence.plan for sequence in sequences] == plans
    for name, depth in choices:
        alone = Engine.load(models / name, depth, options)
        own = [index for index, plan in enumerate(plans) if (plan.model, plan.depth) == (name, depth)]
        expect, _ = submit(alone, [prompts[index] for index in own], routed=False)
        run(alone)
        assert [streams[index].ids for index in own] == [stream.ids for stream in expect]
        assert [streams[index].logprobs for index in own] == [stream.logprobs for stream in expect]
    assert engine.telemetry().blocks_free == engine.telemetry().blocks_total


def test_other_models_are_probed_only_where_the_first_one_does_not_say_enough(models: Path) -> None:
    # No prompt is cut into chunks.
    options = settings_of(probe_prompts=5, prefill_stretch=math.inf, step_token_budget=1024)
    choices = [("first", 2), ("first", 6), ("second", 4)]
    wanted = [PlanToLoad(models / name, depth) for name, depth in choices]
    prompts = [PROMPT[index : index + 14 + 2 * index] for index in range(24)]
    at_once = Engine.load(wanted[0].path, 2, options, also=wanted[1:])
    everything, _ = submit(at_once, prompts)
    run(at_once)

    plans = [replace(plan, runner=CountingRunner(plan.runner)) for plan in load_plans(wanted, options)]
    engine = Engine(plans[0], options, plans[1:])
    # Their first models differ within one probe. The readings of one are enough for every fifth.
    firsts = [("first", "second", None, "not loaded")[index % 4] for index in range(24)]
    asks = [first in ("first", "second") and index % 5 > 0 for index, first in enumerate(firsts)]
    chosen = [plans[index % 3].served for index in range(24)]
    streams, sequences = [], []
    for index, (prompt, first, plan) in enumerate(zip(prompts, firsts, chosen, strict=True)):
        stream = Stream(engine, lambda _, plan=plan: plan, first, asks_for_all=asks[index])  # type: ignore[misc]
        sequences.append(engine.submit(f"{index}", prompt, GREEDY, stream, route=stream.route))
        streams.append(stream)
    run(engine)

    gone_on = 0
    for stream, seq, whole, first, asked in zip(streams, sequences, everything, firsts, asks, strict=True):
        assert stream.is_finished
        assert whole.probe is not None
        stages = [probe.readings for probe, _ in stream.probes]
        complete = [is_complete for _, is_complete in stream.probes]
        of_all = whole.probe.readings
        tokens = len(whole.probe.first_ids)
        every = len(read_positions(tokens, tokens))
        is_whole = every <= options.probe_readings
        if first not in ("first", "second"):
            assert (stages, complete) == ([of_all], [is_whole])
        elif asked:
            assert stages[:2] == [{first: of_all[first]}, of_all]
            assert complete == ([False, True] if is_whole else [False, False, True])
            # What a sample does not tell, all positions of all models must.
            assert {one.tokens for one in stages[-1].values()} == {every}
            assert len(stages[-1]) == len(of_all)
        else:
            assert (stages, complete) == ([{first: of_all[first]}], [False])
        if seq.plan.model in stages[-1]:
            gone_on += seq.probed_tokens
    assert [seq.plan for seq in sequences] == chosen
    computed = sum(plan.runner.rows for plan in plans if isinstance(plan.runner, CountingRunner))
    assert computed == sum(map(len, prompts)) - gone_on
    for plan in plans:
        alone = Engine.load(models / plan.entry.name, plan.depth, options)
        own = [index for index, one in enumerate(chosen) if one == plan.served]
        expect, _ = submit(alone, [prompts[index] for index in own], routed=False)
        run(alone)
        assert [streams[index].ids for index in own] == [stream.ids for stream in expect]
        assert [streams[index].logprobs for index in own] == [stream.logprobs for stream in expect]


def test_a_route_that_fails_or_chooses_elsewhere_ends_its_own_sequence_only(models: Path) -> None:
    engine = Engine.load(models / "first", 4, settings_of())
    elsewhere = ServedPlan(model="second", depth=4)
    own = PlanNotServedError("somewhere else")

    def choose(probe: Probe) -> ServedPlan | None:
        if probe.prompt_tokens == 40:
            return elsewhere
        if probe.prompt_tokens == 41:
            raise own
        if probe.prompt_tokens == 42:
            raise ZeroDivisionError
        return None if probe.prompt_tokens == 43 else engine.plan.served

    streams, _ = submit(engine, [PROMPT[:count] for count in (39, 40, 41, 42, 43, 44)], choose)
    run(engine)
    assert [stream.is_finished for stream in streams] == [True, False, False, False, False, True]
    assert isinstance(streams[1].error, PlanNotServedError)
    assert "second at depth 4" in streams[1].error.message
    assert streams[2].error is own
    assert isinstance(streams[3].error, SequenceFailedError)
    assert isinstance(streams[4].error, SequenceFailedError)
    assert "chose no plan" in streams[4].error.message
    telemetry = engine.telemetry()
    assert (telemetry.running, telemetry.waiting) == (0, 0)
    assert telemetry.blocks_free == telemetry.blocks_total


def test_a_step_in_which_all_are_refused_is_not_the_last(models: Path) -> None:
    engine = Engine.load(models / "first", 4, settings_of(probe_prompts=2))
    streams, _ = submit(engine, [PROMPT] * 5, lambda _: ServedPlan(model="second", depth=4))
    run(engine)
    assert all(isinstance(stream.error, PlanNotServedError) for stream in streams)


def test_what_was_kept_goes_with_a_cancelled_sequence(models: Path) -> None:
    engine = Engine.load(models / "first", 4, settings_of(max_running=2, probe_prompts=2))
    submit(engine, [PROMPT], routed=False, sampling=SamplingParams(max_tokens=60, ignore_eos=True))
    sampling = SamplingParams(max_tokens=40, ignore_eos=True)
    streams, sequences = [], []
    for name in ("runs", "waits", "is not probed yet"):
        streams.append(Stream(engine))
        sequences.append(engine.submit(name, PROMPT[5:60], sampling, streams[-1], route=streams[-1].route))
    engine.step()
    assert [seq.probed is not None for seq in sequences] == [False, True, False]
    for name in ("waits", "is not probed yet"):
        engine.cancel(name)
    engine.step()
    assert [seq.probed for seq in sequences] == [None] * 3
    assert [type(stream.error) for stream in streams] == [type(None), CancelledError, CancelledError]
    run(engine)
    assert streams[0].is_finished
    assert streams[2].probe is None


@pytest.mark.parametrize("at_once", [8, 2])
def test_layers_are_kept_for_as_many_sequences_as_may_run(models: Path, at_once: int) -> None:
    options = settings_of(max_running=2, prefix_cache=False, probe_prompts=at_once)
    engine = Engine.load(models / "first", 4, options)
    streams, sequences = submit(engine, [PROMPT[start:] for start in range(7)])
    while engine.step():
        assert sum(seq.probed is not None for seq in sequences) <= 2
    assert all(seq.probe is not None for seq in sequences)
    plain = Engine.load(models / "first", 4, settings_of(max_running=2, prefix_cache=False))
    expect, _ = submit(plain, [PROMPT[start:] for start in range(7)], routed=False)
    run(plain)
    assert [stream.ids for stream in streams] == [stream.ids for stream in expect]


def test_preempted_sequences_have_the_same_tokens(models: Path) -> None:
    prompts = [PROMPT[start : start + 50] for start in range(0, 24, 3)]
    sampling = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.8, seed=7)
    plain = Engine.load(models / "first", 6, settings_of())
    expect, _ = submit(plain, prompts, routed=False, sampling=sampling)
    run(plain)
    with pytest.raises(OutOfMemoryError) as error:
        Engine.load(models / "first", 6, settings_of(memory_bytes=1))
    (least,) = re.findall(r"at least ([\d,]+)", error.value.message)
    engine = Engine.load(models / "first", 6, settings_of(memory_bytes=int(least.replace(",", ""))))
    streams, _ = submit(engine, prompts, sampling=sampling)
    run(engine)
    assert engine.telemetry().preemptions > 0
    assert [stream.ids for stream in streams] == [stream.ids for stream in expect]
    assert engine.telemetry().blocks_free == engine.telemetry().blocks_total


def test_a_prefix_that_is_cached_with_all_layers_is_used_instead(models: Path) -> None:
    engine, runner = counting(models / "first", 6, settings_of())
    first, _ = submit(engine, [PROMPT])
    run(engine)
    before = runner.rows
    again, (sequence,) = submit(engine, [PROMPT])
    run(engine)
    assert again[0].ids == first[0].ids
    assert again[0].probe == first[0].probe
    # The last token of the prompt.
    assert runner.rows - before == 1
    assert sequence.probed is None


@pytest.mark.parametrize(("name", "depth"), [("first", 2), ("first", 6), ("second", 4)])
def test_a_reload_before_the_prompt_is_computed_changes_no_token(models: Path, name: str, depth: int) -> None:
    engine = Engine.load(models / "first", 4, settings_of(max_running=1))
    submit(engine, [[3, 4, 5]], routed=False, sampling=SamplingParams(max_tokens=9, ignore_eos=True))
    stream = Stream(engine)
    sequence = engine.submit("waits", PROMPT, GREEDY, stream, route=stream.route)
    engine.step()
    assert sequence.probed is not None
    engine.reload(models / name, depth)
    run(engine)
    fresh = Engine.load(models / name, depth, settings_of())
    expect, _ = submit(fresh, [PROMPT], routed=False)
    run(fresh)
    assert stream.ids == expect[0].ids


def test_a_model_whose_numbers_overflow_gives_no_reading(tmp_path: Path) -> None:
    save_variant(tmp_path / "steep", "untied", 21, exits=EXITS)
    tensors = load_file(tmp_path / "steep" / "model.safetensors")
    layer = "model.decoder.layers.0"
    # Token 100 alone makes a state that is too large. It stands where the prompt is read.
    tensors["model.decoder.embed_tokens.weight"][100, 0] = 6e4
    tensors[f"{layer}.final_layer_norm.weight"].fill_(1)
    tensors[f"{layer}.final_layer_norm.bias"].zero_()
    tensors[f"{layer}.fc1.weight"].zero_()[:, 0] = 1e19
    tensors[f"{layer}.fc1.bias"].fill_(-4.5e19)
    tensors[f"{layer}.fc2.weight"].fill_(1e25)
    save_file(tensors, tmp_path / "steep" / "model.safetensors")
    engine = Engine.load(tmp_path / "steep", 4, settings_of(precision="float32"))
    streams, _ = submit(engine, [[*PROMPT[:21], 100, *PROMPT[21:30]], PROMPT[:31]])
    run(engine)
    assert [set(stream.probe.readings) for stream in streams if stream.probe] == [set(), {"steep"}]
    assert streams[1].is_finished


@pytest.mark.parametrize("name", ["probe_tokens", "probe_readings", "min_probe_tokens", "probe_prompts"])
def test_settings_out_of_range_are_named(name: str) -> None:
    with pytest.raises(SettingsError, match=name):
        settings_of(**{name: -1})
