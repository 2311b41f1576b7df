"""Several decode steps in one call give the same tokens as single steps."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from helios.engine import Engine, EngineSettings, ExitMode, FinishReason, Output, SamplingParams
from helios.engine.backends.burst import Burst, Interrupt
from helios.engine.kernels.team import TEAM
from helios.errors import SettingsError
from tests.opt_variants import save_variant
from tests.runners import hooked_engine

EXITS = (1, 2, 4, 6)
PROMPTS = [[2, *range(10 + 9 * index, 20 + 12 * index)] for index in range(5)]
# Long enough for bursts of any length.
BURST = 10.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "random"
    save_variant(path, "pre-norm", 21, exits=EXITS)
    return path


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before, worthwhile = TEAM.threads, TEAM.worthwhile
    TEAM.threads, TEAM.worthwhile = request.param, 0
    yield request.param
    TEAM.threads, TEAM.worthwhile = before, worthwhile


def settings_of(
    burst_seconds: float, mode: ExitMode = ExitMode.GREEDY, memory: int = 64 << 20
) -> EngineSettings:
    return EngineSettings(
        exit_mode=mode,
        threshold=0.05 if mode is ExitMode.DYNAMIC else None,
        memory_bytes=memory,
        burst_seconds=burst_seconds,
        max_running=8,
        step_token_budget=64,
    )


def load(
    path: Path, burst_seconds: float, mode: ExitMode = ExitMode.GREEDY, memory: int = 64 << 20
) -> Engine:
    return Engine.load(path, settings=settings_of(burst_seconds, mode, memory))


def serve(engine: Engine, samplings: list[SamplingParams]) -> list[list[Output]]:
    """The outputs for each prompt. All prompts are served together."""
    said: list[list[Output]] = [[] for _ in samplings]
    for index, sampling in enumerate(samplings):
        engine.submit(f"{index}", PROMPTS[index], sampling, said[index].append)
    while engine.step():
        pass
    assert engine.telemetry().blocks_free == engine.telemetry().blocks_total
    return said


def told(said: list[Output]) -> tuple[object, ...]:
    tokens = [
        (t.index, t.token_id, t.text, t.logprob, t.confidence, t.exit_layer) for o in said for t in o.tokens
    ]
    return (*tokens, said[-1].finish)


@pytest.mark.parametrize("mode", [ExitMode.GREEDY, ExitMode.DYNAMIC])
def test_bursts_say_the_same_in_fewer_outputs(model: Path, mode: ExitMode, threads: int) -> None:
    plain = load(model, 0, mode)
    first = serve(plain, [SamplingParams(max_tokens=40, ignore_eos=True)] * 5)
    text = first[1][-1].finish
    assert text is not None
    samplings = [
        SamplingParams(max_tokens=40, ignore_eos=True),
        # This stop string ends the text in the middle of a burst.
        SamplingParams(max_tokens=40, ignore_eos=True, stop=(text.text[13:16],)),
        SamplingParams(max_tokens=17),
        SamplingParams(max_tokens=33, ignore_eos=True),
        SamplingParams(max_tokens=1),
    ]
    expected = serve(plain, samplings)
    bursting = load(model, BURST, mode)
    got = serve(bursting, samplings)
    assert [told(said) for said in got] == [told(said) for said in expected]
    assert got[1][-1].finish is not None
    assert got[1][-1].finish.reason is FinishReason.STOP
    # After one step its time is known. The next call takes all tokens that the shortest sequence has left.
    assert all(len(said) < 14 for said in got)
    assert max(len(output.tokens) for said in got for output in said) > 4
    counters = bursting.telemetry().counters
    assert counters.generated_tokens == plain.telemetry().counters.generated_tokens - 5 * 40


@pytest.mark.parametrize("mode", [ExitMode.GREEDY, ExitMode.DYNAMIC])
def test_bursts_draw_what_is_drawn_step_by_step(model: Path, mode: ExitMode, threads: int) -> None:
    samplings = [
        SamplingParams(max_tokens=30, ignore_eos=True),
        SamplingParams(max_tokens=30, ignore_eos=True, temperature=0.8, seed=5),
        SamplingParams(max_tokens=30, ignore_eos=True, temperature=2.0, top_k=7, seed=2**64 - 1),
        SamplingParams(max_tokens=22, ignore_eos=True, temperature=0.7, top_p=0.8, seed=7),
        SamplingParams(max_tokens=30, ignore_eos=True, temperature=0.9, repetition_penalty=1.5),
    ]
    said = []
    for burst_seconds in (0, BURST):
        engine = load(model, burst_seconds, mode)
        said.append(serve(engine, samplings))
    one_by_one, at_once = said
    assert [told(one) for one in at_once] == [told(one) for one in one_by_one]
    assert [len(output.tokens) for output in one_by_one[1]] == [1] * 30
    assert max(len(output.tokens) for output in at_once[1]) > 4
    ids = [[token.token_id for output in one for token in output.tokens] for one in at_once]
    assert len(set(map(tuple, ids))) == 5


def test_a_penalty_is_for_all_that_came_before_within_a_burst_too(model: Path) -> None:
    """The penalty is so large that no token comes twice, not even one of the prompt."""
    sampling = SamplingParams(max_tokens=100, ignore_eos=True, repetition_penalty=1e6)
    (said,) = serve(load(model, BURST), [sampling])
    ids = [token.token_id for output in said for token in output.tokens]
    assert max(len(output.tokens) for output in said) > 50
    assert len({*ids, *PROMPTS[0]}) == 100 + len(PROMPTS[0])


def test_a_burst_that_is_interrupted_goes_on_in_the_next_one(model: Path, threads: int) -> None:
    sampling = SamplingParams(max_tokens=100, ignore_eos=True, temperature=0.8, seed=3)
    (expected,) = serve(load(model, 0), [sampling])
    said = list[Output]()

    def interrupt(burst: Burst) -> None:
        # In the third call, after earlier interrupts have been cleared.
        if len(said) == 2 and burst.interrupt is not None:
            burst.interrupt.ask()

    engine = hooked_engine(model, None, settings_of(BURST), before=interrupt)
    engine.submit("0", PROMPTS[0], sampling, said.append)
    while engine.step():
        pass
    assert [len(output.tokens) for output in said] == [1, 1, 1, 97]
    assert told(said) == told(expected)
    assert engine.telemetry().counters.steps == 100


def test_a_burst_ends_with_the_end_of_a_text(model: Path, tmp_path: Path, threads: int) -> None:
    sampling = SamplingParams(max_tokens=60, ignore_eos=True, temperature=1.0, seed=1)
    (said,) = serve(load(model, 0), [sampling])
    ids = [token.token_id for output in said for token in output.tokens]
    last = next(token_id for token_id in ids[20:] if token_id not in ids[:20])
    path = tmp_path / "ending"
    shutil.copytree(model, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"eos_token_id": [2, last]}))
    engine = load(path, BURST)
    (ended,) = serve(engine, [replace(sampling, ignore_eos=False)])
    assert ended[-1].finish is not None
    assert ended[-1].finish.reason is FinishReason.EOS
    assert [token.token_id for output in ended for token in output.tokens] == ids[: ids.index(last) + 1]
    # No step was computed in vain.
    assert engine.telemetry().counters.steps == ids.index(last) + 1
    assert max(len(output.tokens) for output in ended) > 10
    # A request that ignores this end of text goes on.
    assert serve(engine, [sampling])[0][-1].finish == said[-1].finish


def test_whoever_wants_something_interrupts_a_burst(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, asked = load(model, BURST), list[str]()
    monkeypatch.setattr(Interrupt, "ask", lambda _: asked.append("asked"))
    engine.submit("0", PROMPTS[0], SamplingParams(max_tokens=100), lambda _: None)
    engine.cancel("0")
    engine.reload(model, 2)
    engine.stop()
    assert len(asked) == 4


def test_a_burst_takes_no_blocks_from_others(model: Path) -> None:
    """The pool holds little more than one context, so it has no blocks for a burst when all decode."""
    samplings = [SamplingParams(max_tokens=160, ignore_eos=True)] * 3
    plain, bursting = load(model, 0, memory=1_100_000), load(model, BURST, memory=1_100_000)
    assert plain.telemetry().blocks_total < 3 * (160 + 10) // 16
    expected, got = serve(plain, samplings), serve(bursting, samplings)
    assert [[t.token_id for o in said for t in o.tokens] for said in got] == [
        [t.token_id for o in said for t in o.tokens] for said in expected
    ]
    assert bursting.telemetry().preemptions <= plain.telemetry().preemptions + 2


def test_a_burst_ends_with_the_context(model: Path) -> None:
    engine = load(model, BURST)
    context = engine.plan.model.config.context_tokens
    said: list[Output] = []
    engine.submit("long", [2] * (context - 20), SamplingParams(max_tokens=500, ignore_eos=True), said.append)
    while engine.step():
        pass
    assert said[-1].finish is not None
    assert said[-1].finish.completion_tokens == 20


def test_sequences_go_on_after_a_reload_between_bursts(model: Path) -> None:
    engine = load(model, BURST)
    said: list[Output] = []
    engine.submit("one", PROMPTS[0], SamplingParams(max_tokens=60, ignore_eos=True), said.append)
    for _ in range(3):
        engine.step()
    engine.submit("two", PROMPTS[1], SamplingParams(max_tokens=5, ignore_eos=True), lambda _: None)
    engine.reload(model, 2)
    engine.reload(model, 4)
    while engine.step():
        pass
    tokens = [token for output in said for token in output.tokens]
    assert [token.index for token in tokens] == list(range(60))


@pytest.mark.parametrize("seconds", [-0.001, float("inf"), float("nan")])
def test_a_burst_has_a_length(seconds: float) -> None:
    with pytest.raises(SettingsError, match="burst_seconds"):
        EngineSettings(burst_seconds=seconds)
