"""The output of commands is complete and cuts no word, in narrow and wide terminals."""

import io
import json
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.cells import cell_len
from rich.console import Console, RenderableType

from bench.commands import demo
from bench.demo.outcome import SYSTEMS, Outcome, Row
from bench.load.latency import Latency
from bench.results import Report, Target
from helios.cli import cli, decisions, profile, status, top
from helios.cli.rows import Line, Rows, show
from helios.cli.snapshot import Snapshot
from helios.rates import WINDOW_TOKENS
from helios.slo import Slo
from helios.v1 import controller_pb2, inference_pb2, worker_pb2
from tests.profiles import exit_profile, model_profile

WIDTHS = pytest.mark.parametrize("width", [80, 200])
REASON = (
    "max_perplexity_increase: 0.5442 is above 0.05, with an error of 0.0123; min_agreement: 0.41 is below "
    "0.9; max_tpot_seconds: 0.0123 is above 0.01"
)
MODEL = "helios-prose-with-a-name-that-somebody-has-chosen"


def rendered(width: int, *parts: RenderableType) -> str:
    sink = io.StringIO()
    show(Console(width=width, file=sink), *parts)
    return sink.getvalue()


def check(text: str, width: int, *said: str) -> None:
    """Checks that the text is complete, word for word, and that no line is too long."""
    words = [word.strip(",:") for word in text.split()]
    for one in said:
        wanted = [word.strip(",:") for word in one.split()]
        assert any(words[at : at + len(wanted)] == wanted for at in range(len(words))), f"{one!r} in\n{text}"
    assert all(cell_len(line) <= width for line in text.splitlines()), text


@WIDTHS
@pytest.mark.parametrize("model", ["helios-prose", MODEL])
def test_decision_is_told_with_every_reason_whole(width: int, model: str) -> None:
    decision = controller_pb2.Decision(
        number=12,
        time=time.time(),
        trigger="reassessment",
        reason=f"{model} at depth 8 is the best for throughput within the bounds, 12.3% over {model}",
        chosen=[controller_pb2.WorkerPlan(worker_id="worker-0", model=model, depth=8)],
        outcome=controller_pb2.Outcome(requests=50, halted=f"the rollout halted at worker-1: {REASON}"),
        options=[
            controller_pb2.Option(model=model, depth=4, tokens_per_second=1234, refused=REASON),
            controller_pb2.Option(model=model, depth=8, tokens_per_second=987, perplexity_increase=0.01),
        ],
    )
    sink = io.StringIO()
    decisions._show(decision, Console(width=width, file=sink))
    check(
        sink.getvalue(),
        width,
        decision.reason,
        decision.outcome.halted,
        REASON,
        "1234",
        "987",
        "+1.0%",
        "TPOT",
    )


def snapshot(model: str) -> Snapshot:
    workers = [
        inference_pb2.WorkerState(
            worker_id=f"worker-{index}",
            address=f"127.0.0.1:2965{index}",
            ready=index == 0,
            reason="" if index == 0 else f"it has not answered for 12 seconds: {REASON}",
            telemetry=worker_pb2.Telemetry(
                model=model, depth=4, running=64, waiting=256, blocks_total=10, generated_tokens=12_345_678
            ),
        )
        for index in range(2)
    ]
    return Snapshot(
        gateway="127.0.0.1:50051",
        status=inference_pb2.GetServingStatusResponse(workers=workers),
        plan=controller_pb2.GetPlanResponse(
            mode="active",
            slo=Slo().to_proto(),
            leading=True,
            plans=[controller_pb2.WorkerPlan(worker_id="worker-0", pinned=True)],
            next_assessment="in 123 requests, or sooner when the breach counter says that traffic drifts",
        ),
        decisions=[controller_pb2.Decision(number=7, time=1.0, trigger="SLO", reason=REASON)],
        profiles={model: model_profile(model, [exit_profile(4, 0.9, sure=0.9)])},
        problems=[f"speeds cannot be compared: {REASON}"],
        before={},
    )


@WIDTHS
@pytest.mark.parametrize("model", ["helios-prose", MODEL])
def test_status_and_top_tell_all_of_a_worker_and_every_problem(width: int, model: str) -> None:
    seen = snapshot(model)
    assert seen.plan is not None
    told = (seen.status.workers[1].reason, f"problem: {seen.problems[0]}", model)
    text = rendered(width, *status._parts(seen))
    check(text, width, *told, "127.0.0.1:29651", seen.plan.next_assessment)
    for part in ("12,345,678", "ready pinned", "not ready", "agreeing", "wait", "90% (>= 0.50)"):
        assert part in text
    text = rendered(width, top.draw(seen))
    check(text, width, *told, f"SLO: {REASON}", f"CBC/{WINDOW_TOKENS}")
    for part in ("worker-0 pinned", "256", "64"):
        assert part in text


@WIDTHS
def test_status_and_top_tell_every_plan_of_a_worker_and_its_sequences(width: int) -> None:
    seen = snapshot("prose")
    load = seen.status.workers[0].telemetry
    for model, depth, running in (("prose", 4, 41), ("prose", 8, 22), ("tech", 6, 1)):
        load.plans.add(plan=worker_pb2.Plan(model=model, depth=depth), running=running)
    for view in (status._workers(seen), top.draw(seen)):
        words = rendered(width, view).replace(",", " ").split()
        assert {"prose", "tech", "4", "8", "6", "41", "22", "1"} <= set(words)


def test_json_of_a_worker_lists_its_plans() -> None:
    seen = snapshot("prose")
    one, other = seen.workers
    one.telemetry.plans.add(plan=worker_pb2.Plan(model="prose", depth=4), running=41)
    one.telemetry.plans.add(plan=worker_pb2.Plan(model="tech", depth=6), running=23)
    told = json.loads(json.dumps(seen.worker_as_dict(one)))
    assert told["plans"] == [
        {"model": "prose", "depth": 4, "running": 41},
        {"model": "tech", "depth": 6, "running": 23},
    ]
    assert told["exit_histogram"] is not None
    assert seen.worker_as_dict(other)["plans"] == [{"model": "prose", "depth": 4, "running": 64}]


@WIDTHS
def test_profile_is_shown_whole(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    measured = model_profile(MODEL, [exit_profile(4, 0.9, joules_per_token=0.00123), exit_profile(16, 0.8)])
    profile._show(measured.model_copy(update={"provenance": {"power": REASON}}), 0.05)
    check(capsys.readouterr().out, width, MODEL, f"power: {REASON}", "4 0.50 80% 90% 20.0 +49.2% 4.00 8.00")


@WIDTHS
@pytest.mark.parametrize("model", ["helios-prose", MODEL])
def test_models_are_listed_whole(width: int, model: str, tiny_models: Path, tmp_path: Path) -> None:
    directory = tmp_path / "a-folder-whose-path-is-wider-than-a-terminal-of-eighty-columns-is"
    directory.mkdir()
    (directory / model).symlink_to(tiny_models / "tiny")
    listed = CliRunner().invoke(
        cli, ["models", "list", "--models-dir", str(directory)], env={"COLUMNS": str(width)}
    )
    assert listed.exit_code == 0, listed.output
    # The path is one word, however long it is.
    assert str(directory) in listed.output
    for part in (model, "1, 2, 4", "512", "256"):
        assert part in listed.output


@WIDTHS
def test_report_of_a_bench_is_shown_whole(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    target = Target(f"tokens/s [saturated]: {REASON}", "at least 1.5x", "1.234", met=False)
    Report({}, [target], [("figures [of one day]", REASON), ("short", "1.5x")]).show()
    told = (REASON, target.name, "figures [of one day]", "at least 1.5x", "no", "1.5x")
    check(capsys.readouterr().out, width, *told)


@WIDTHS
def test_figures_of_the_demo_are_shown_whole(width: int) -> None:
    latency = Latency(p50=1234.5, p99=98765.4, p999=98765.4)
    rows = [
        Row(system, phase, 100, 3, (REASON,), 10.0, 12345.0, latency, latency, 1.2345, 0.1, 2.3456, 0.5, 0.99)
        for phase in ("all", "technical")
        for system in SYSTEMS
    ]
    outcome = Outcome(True, 2, {}, tuple(rows), {"technical": MODEL})
    sink = io.StringIO()
    console = Console(width=width, file=sink)
    show(console, demo._table(outcome, "all"))
    demo._explain(console, outcome, {"full": REASON}, 64)
    text = sink.getvalue()
    check(
        text,
        width,
        f"full: {REASON}",
        f"streams failed: {REASON}",
        f"The best candidates: {MODEL} on technical",
    )
    assert "1234/98765" in text
    assert "1234.5/98765.4" in text


def test_note_is_a_column_where_it_fits_and_below_the_table_where_it_does_not() -> None:
    rows = Rows("model", "depth", left=("model",), names=2, note="refused")
    rows.add("tiny", "4", note="it is too slow for the bound")
    rows.add("tiny", "8")
    wide, narrow, none = (
        [line.rstrip() for line in rendered(width, rows).splitlines() if line.strip()]
        for width in (60, 20, 8)
    )
    assert [" ".join(line.split()) for line in (wide[0], wide[2])] == [
        "model depth refused",
        "tiny 4 it is too slow for the bound",
    ]
    header, rule, *lines = narrow
    assert header.split() == ["model", "depth"]
    assert set(rule.strip()) == {"─"}
    assert [" ".join(line.split()) for line in lines[:2]] == ["tiny 4", "tiny 8"]
    assert lines[2:] == [
        "tiny 4: it is too",
        "  slow for the bound",
    ]
    assert "".join(none).replace(" ", "").startswith("tiny4:tiny8:tiny4:it")


def test_word_that_is_wider_than_the_terminal_stays_whole() -> None:
    path = "/a/very/long/path/to/a/log"
    assert rendered(10, Line(f"see {path} for more", indent=" ")).split() == ["see", path, "for", "more"]
