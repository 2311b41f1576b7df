"""`helios bench paper`: what its figures are made of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import baselines, curve, footprint, held_out
from bench.subject import QUICK, Subject
from helios import catalog
from helios.engine import Engine, EngineSettings, ExitMode, SamplingParams
from helios.engine.exit_trace import trace_dynamic, trace_exits
from helios.engine.plan import Plan, load_plan
from helios.engine.tokenizer import load_tokenizer
from tests.opt_variants import save_variant

MEMORY = 64 << 20
PROMPT = "In the beginning"


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "small"
    save_variant(path, "pre-norm", seed=3, exits=[2, 4, 6], head="norm", thresholds={2: 0.05, 4: 0.1})
    return path


def generated(path: Path, depth: int, mode: ExitMode) -> tuple[list[int], list[Any]]:
    """The prompt's ids, and what an engine generates after them."""
    engine = Engine.load(path, depth, EngineSettings(exit_mode=mode, memory_bytes=MEMORY, max_running=2))
    ids = engine.plan.tokenizer.encode(PROMPT).ids
    return ids, list(engine.generate(ids, SamplingParams(max_tokens=12, ignore_eos=True)))


def whole(path: Path) -> Plan:
    return load_plan(path, None, EngineSettings(exit_mode=ExitMode.DYNAMIC, memory_bytes=MEMORY))


@pytest.mark.parametrize("depth", [2, 4, 6])
def test_a_traced_exit_is_what_an_engine_of_that_depth_serves(model_path: Path, depth: int) -> None:
    ids, tokens = generated(model_path, depth, ExitMode.GREEDY)
    (trace,) = trace_exits(whole(model_path), [[*ids, *(token.token_id for token in tokens)]])
    row, part = trace.index(depth), slice(len(ids) - 1, None)
    assert trace.top_ids[row, part].tolist() == [token.token_id for token in tokens]
    np.testing.assert_allclose(trace.nats[row, part], [-token.logprob for token in tokens], atol=1e-4)
    np.testing.assert_allclose(
        trace.confidences[row, part], [token.confidence for token in tokens], atol=1e-4
    )


def test_traced_dynamic_exits_are_those_of_the_dynamic_engine(model_path: Path) -> None:
    ids, tokens = generated(model_path, 6, ExitMode.DYNAMIC)
    plan = whole(model_path)
    text = [*ids, *(token.token_id for token in tokens)]
    trace = trace_dynamic(plan, [text, text], len(ids), plan.thresholds)
    # The first token is read from the prompt's prefill, which walks all layers.
    assert len(set(trace.exit_layers[0].tolist())) > 1
    for row in range(2):
        assert trace.exit_layers[row].tolist() == [token.exit_layer for token in tokens]
        assert trace.top_ids[row].tolist() == [token.token_id for token in tokens]
        np.testing.assert_allclose(trace.nats[row], [-token.logprob for token in tokens], atol=1e-4)


def test_windows_of_held_out_text_never_cross_documents(model_path: Path) -> None:
    tokenizer = load_tokenizer(model_path, catalog.read_model(model_path).facts).tokenizer
    for domain in held_out.DOMAINS:
        documents = held_out.documents(domain)
        windows = held_out.windows(tokenizer, domain, 100, limit=20)
        assert len(windows) == 20
        for window in windows:
            assert len(window) == 100
            text = tokenizer.decode(window).strip("\ufffd")
            assert any(text in document for document in documents)


def test_quality_at_full_depth_of_the_best_candidate_is_the_reference(model_path: Path) -> None:
    subject = Subject([catalog.read_model(model_path)], QUICK, MEMORY)
    for domain in held_out.DOMAINS:
        judge = subject.judge(domain)
        best = subject.quality(judge, judge.num_layers, domain)
        assert best.perplexity_increase == pytest.approx(0, abs=1e-9)
        assert best.agreement == 1
        shallow = subject.quality(judge, 2, domain)
        # One tokenizer: the increase per byte is that per token.
        assert shallow.perplexity_increase == pytest.approx(shallow.perplexity / best.perplexity - 1)
        model, depth = subject.fastest_within(domain, 1e9)
        assert (model, depth) == (judge, 2)


def curve_row(depth: int, increase: float, tpot_to_full: float) -> dict[str, Any]:
    return {
        "model": "m",
        "depth": depth,
        "weight_bytes": depth,
        "tpot_ms_batch_1": 10 * tpot_to_full,
        "tpot_to_full": tpot_to_full,
        "quality": {"prose": {"perplexity_increase": increase}},
    }


@pytest.mark.parametrize(("tpot_to_full", "met"), [(0.5, True), (0.6, False)])
def test_tpot_target_is_of_the_smallest_exit_within_the_bound(tpot_to_full: float, met: bool) -> None:
    rows = [curve_row(2, 0.06, 0.1), curve_row(4, 0.05, tpot_to_full), curve_row(6, 0, 1)]
    result = {"best_candidates": {"prose": {"model": "m", "depth": 6}}, "exits": rows}
    (target,) = curve.targets(result)
    assert target.met is met
    assert "m at depth 4" in str(target.measured)


def test_a_target_that_one_domain_misses_is_reported_as_missed() -> None:
    def ways(factor: float) -> Mapping[str, Any]:
        figures = {"ratio_to": {"full": factor, "dynamic_1": factor}, "multiplied_weights": 100}
        way = {"model": "m", "depth": 4, "single": figures, "saturated": figures}
        base = {load: {"multiplied_weights": 150} for load in ("single", "saturated")}
        bases = dict.fromkeys(("full", "dynamic_1"), base)
        return {"ways": bases | dict.fromkeys(("within_5", "within_1", "no_worse"), way)}

    targets = baselines.targets({"domains": {"prose": ways(2.5), "technical": ways(1.5)}})
    met = {target.name: target.met for target in targets}
    assert met == {
        "throughput against full, saturated, perplexity within +5 %": False,
        "throughput against full, saturated, perplexity within +1 %": True,
        "throughput against dynamic batch 1, concurrency 1, quality not worse": False,
        "throughput against dynamic batch 1, saturated, quality not worse": False,
    }
    assert all(
        "2.50x on prose (m at depth 4; by operations 1.50x)" in str(target.measured) for target in targets
    )
    assert all("1.50x on technical" in str(target.measured) for target in targets)


def test_batches_of_opt_1_3b_fill_their_budget_and_no_more(model_path: Path) -> None:
    result = footprint.measure(Subject([catalog.read_model(model_path)], QUICK, MEMORY))
    # 24 layers x (key + value) x 2048 x 2 bytes, of 2048 tokens.
    kv_of_a_sequence = 24 * 2 * 2048 * 2 * 2048
    for row in result["largest_batch"]:
        for batch, depth in ((row["greedy_batch"], 6), (row["dynamic_batch"], 24)):
            weights = footprint.OPT_1_3B.parameters(depth) * 2
            held = weights + batch * kv_of_a_sequence * depth // 24
            assert held <= row["budget_bytes"]
    assert result["largest_batch"][0]["dynamic_batch"] == 1
    for row in result["same_batch"]:
        assert row["dynamic"]["kv_bytes"] == row["batch"] * kv_of_a_sequence
        assert row["greedy"]["kv_bytes"] * 4 == row["dynamic"]["kv_bytes"]
        assert row["saved"] == pytest.approx(1 - row["greedy"]["total_bytes"] / row["dynamic"]["total_bytes"])
    assert footprint.OPT_1_3B.parameters() == 1_315_758_080


def test_memory_targets_are_missed_when_the_figures_are_low() -> None:
    row = {"budget_bytes": 1 << 30, "greedy_batch": 14, "dynamic_batch": 1, "ratio": 14.0}
    result = {"largest_batch": [row], "same_batch": [{"batch": 1, "saved": 0.7}, {"batch": 8, "saved": 0.6}]}
    assert [target.met for target in footprint.targets(result)] == [False, False]
