"""`helios bench paper --quick` over tiny models: the form of its results and arithmetic, never speed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bench.paper.policy.comparison import HINDSIGHT, ORACLE, PAPER, ROUTER, SINGLE
from bench.paper.sections import SECTIONS
from bench.systems.subject import QUICK
from helios.cli import cli

MODELS = ("tiny", "other")
# All sections are measured once, before the first test. Two of them start services.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def two_models(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("two")
    for name in MODELS:
        shutil.copytree(tiny_models / name, directory / name)
    return directory


def bench(models: Path, out: Path, *options: str) -> Result:
    arguments = ["bench", "paper", "--quick", "--json", str(out), "--models-dir", str(models)]
    arguments += ["--cache-dir", str(out.parent / "cache"), *options]
    return CliRunner().invoke(cli, arguments)


@pytest.fixture(scope="module")
def measured(two_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON file of all sections, with a report beside it."""
    out = tmp_path_factory.mktemp("paper") / "paper.json"
    answer = bench(two_models, out, "--report", str(out.with_suffix(".md")))
    assert answer.exit_code == 0, answer.output
    return out


def results(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())["results"])


def test_every_section_is_measured_with_machine_command_and_targets(measured: Path) -> None:
    content = json.loads(measured.read_text())
    assert content["machine"]["cores"] >= 1
    assert "quick" in content["results"]["settings"]
    assert set(SECTIONS) <= set(content["results"])
    assert all(content["results"][name]["cost"]["wall_seconds"] >= 0 for name in SECTIONS)
    assert all(set(target) == {"name", "target", "measured", "met"} for target in content["targets"])
    again = [target for name in SECTIONS for target in SECTIONS[name].targets(content["results"][name])]
    assert [target.name for target in again] == [target["name"] for target in content["targets"]]
    assert [target.met for target in again] == [target["met"] for target in content["targets"]]


def test_the_curve_has_every_exit_and_its_ratios_to_full(measured: Path) -> None:
    found = results(measured)["curve"]
    assert [(row["model"], row["depth"]) for row in found["exits"]] == [
        (name, depth) for name in sorted(MODELS) for depth in (1, 2, 4)
    ]
    for row in found["exits"]:
        for one in row["speed"]:
            # There is one round, so the median ratio is the ratio.
            ratio = one["decode_tokens_per_second"] / one["full_decode_tokens_per_second"]
            assert one["ratio_to_full"] == pytest.approx(ratio)
        if row["depth"] == row["num_layers"]:
            assert all(one["ratio_to_full"] == 1 for one in row["speed"])
            assert all(quality["agreement"] == 1 for quality in row["quality"].values())
    by_depth = {(row["model"], row["depth"]): row["kv_bytes_per_token"] for row in found["exits"]}
    assert by_depth["tiny", 4] == 4 * by_depth["tiny", 1]


def test_baselines_are_compared_in_the_same_run_with_their_quality(measured: Path) -> None:
    for domain in results(measured)["baselines"]["domains"].values():
        ways = domain["ways"]
        assert {"full", "dynamic_1", "dynamic_batched", "within_5", "within_1", "no_worse"} <= set(ways)
        for way in ways.values():
            for load in ("single", "saturated"):
                ratio = way[load]["tokens_per_second"] / ways["full"][load]["tokens_per_second"]
                assert way[load]["ratio_to"]["full"] == pytest.approx(ratio)
        assert ways["full"]["quality"]["agreement"] == 1
        assert ways["full"]["saturated"]["mean_exit_layer"] == 4
        layers = {name: way["single"]["multiplied_weights"] for name, way in ways.items()}
        assert layers["within_5"] <= layers["full"] < layers["dynamic_batched_th_0.8"]
        worst = ways["dynamic_1"]["quality"]["perplexity"]
        is_full = ways["no_worse"]["depth"] == 4
        assert is_full or ways["no_worse"]["quality"]["perplexity"] <= worst


def test_the_large_shape_is_measured_at_every_exit_against_all_its_layers(measured: Path) -> None:
    found = results(measured)["shape"]
    assert [row["depth"] for row in found["exits"]] == [1, 2, 3, 4]
    assert "random" in found["weights"]
    shallow, *_, full = found["exits"]
    assert full["kv_bytes_per_token"] == 4 * shallow["kv_bytes_per_token"]
    assert shallow["weight_bytes"] < full["weight_bytes"]
    for row in found["exits"]:
        assert [one["batch"] for one in row["speed"]] == [1, 2]
        assert all(one["tpot_ms"] > 0 for one in row["speed"])


def test_insights_are_shares_that_add_up(measured: Path) -> None:
    found = results(measured)["insights"]
    assert found["complementary"]
    for row in found["complementary"]:
        rest = row["second_of_the_rest"] or 0
        assert row["together"] == pytest.approx(row["first_alone"] + (1 - row["first_alone"]) * rest)
    for row in found["low_confidence"]:
        agreement = row["unsure_share"] * (row["unsure_agreement"] or 0)
        assert agreement <= row["agreement"] + 1e-6
    assert {row["model"] for row in found["locality"]} == set(MODELS)


def test_saturation_covers_batch_model_and_depth(measured: Path) -> None:
    found = results(measured)["saturation"]
    assert len(found["points"]) == len(MODELS) * 3 * 3
    for plan in found["plans"]:
        own = [
            point
            for point in found["points"]
            if (point["model"], point["depth"]) == (plan["model"], plan["depth"])
        ]
        assert plan["best_tokens_per_second"] == max(point["decode_tokens_per_second"] for point in own)
        assert plan["batch_in_memory"] >= 1


def test_the_policy_section_compares_with_hindsight_over_all_kinds_of_traffic(measured: Path) -> None:
    found = results(measured)["policy"]
    assert found["requests"] == 36
    default, fixed = found["default"], found["fixed_plans"]
    assert len(fixed) == len(MODELS) * 3
    for plan in fixed:
        # All times are relative to the same best time.
        ratio = plan["tokens_per_second"] / default["tokens_per_second"]
        assert default["time_to_best"] / plan["time_to_best"] == pytest.approx(ratio)
    assert min(plan["worst_phase_increase"] - plan["perplexity_increase"] for plan in fixed) >= -1e-9
    assert [drift["phase"] for drift in default["drifts"]] == ["technical", "mix"]
    assert found["timeline"][0]["first_request"] == 0
    assert set(found["drifting"]) == {"sudden", "long", "other order", "slow slide", "bursts", "mixtures"}
    assert set(found["steady"]) == {"prose", "technical", "mix"}
    for row in (*found["drifting"].values(), *found["steady"].values()):
        assert 0 <= row["within_bound"] <= row["traces"] >= 1
        assert row["priced_time_to_best"] > row["time_to_best"]
    standard = found["drifting"]["sudden"]
    assert standard["each"][0] == default
    assert len(standard["each"]) == standard["traces"] == 2
    times = [one["time_to_best"] for one in standard["each"]]
    assert standard["time_to_best"] == pytest.approx(sum(times) / 2)


def test_the_policy_section_has_the_papers_ablation_sweeps_and_setting(measured: Path) -> None:
    found = results(measured)["policy"]
    assert {"both", "switch", "deepen", "both, the paper's rule"} <= set(found["ablation"])
    # At these sizes there is one trace, the first of the standard traces.
    assert found["ablation"]["both"]["time_to_best"] == found["default"]["time_to_best"]
    assert {"reassess_requests", "drift_delay_requests", "false_alarms_per_day"} <= set(found["sweeps"])
    assert {"follow_up_requests", "profiled_requests"} <= set(found["sweeps"])
    assert set(found["paper_sweeps"]) == {"reassess_requests", "breach_limit", "threshold"}
    for rows in (*found["sweeps"].values(), *found["paper_sweeps"].values()):
        assert all(row["traces"] == 1 and row["tokens_per_second"] > 0 for row in rows)
        assert len({row["value"] for row in rows}) == len(rows)
    by_requests = found["sweeps"]["profiled_requests"]
    priced = [row["priced_time_to_best"] - row["time_to_best"] for row in by_requests]
    assert priced == sorted(priced)
    assert priced[0] < priced[-1]
    assert all(row["dynamic_tokens_per_second"] > 0 for row in found["paper_sweeps"]["threshold"])
    paper = found["paper_setting"]
    best = max(paper["dynamic_tokens_per_second"].values())
    assert paper["ratio"] == pytest.approx(paper["helios"]["tokens_per_second"] / best)
    profiling = found["profiling"]
    assert min(profiling[f"cpu_seconds_{what}"] for what in ("per_assessment", "once")) > 0
    share = profiling["cpu_seconds_per_request_and_model"] * QUICK.profiled_requests * len(MODELS)
    assert share == pytest.approx(profiling["cpu_seconds_per_assessment"])


def test_the_policy_section_compares_the_router_with_the_other_methods(measured: Path) -> None:
    found = results(measured)["policy"]["comparison"]
    methods = found["methods"]
    assert list(methods) == [HINDSIGHT, PAPER, SINGLE, ROUTER, ORACLE]
    assert methods[HINDSIGHT]["time_to_best"] == pytest.approx(1)
    assert all(row["traces"] == 2 for row in methods.values())
    router = methods[ROUTER]
    # It has learnt before, and its probes and the loading are in its time.
    assert router["evaluated"] == 0
    assert router["priced_time_to_best"] == router["time_to_best"]
    assert router["known_share"] == 0
    assert min(router["loading_share"], router["probing_share"]) > 0
    assert methods[ORACLE]["probing_share"] == 0
    assert set(found["learning"]) == {"36", "72"}
    for row in found["learning"].values():
        assert row["evaluated"] >= 24
        assert row["priced_time_to_best"] > row["time_to_best"]
    assert set(found["shapes"]) == {"other order", "slow slide", "bursts", "mixtures"}
    assert set(found["steady"]) == {"prose", "technical", "mix"}
    assert set(found["unseen"]) == {"Latin", "notation"}


def test_the_policy_serves_an_engine_that_reloads_and_loses_no_token(measured: Path) -> None:
    served = results(measured)["policy"]["served"]
    assert served["tokens"] == served["tokens_expected"] > 0
    assert served["events"]


def test_control_is_measured_on_real_services_with_and_without_it(measured: Path) -> None:
    found = results(measured)["control"]
    rates = found["rates"]
    assert len(rates["with"]) == len(rates["without"]) == 2
    costs = [1 - one / other for one, other in zip(rates["with"], rates["without"], strict=True)]
    assert found["throughput_cost"] == pytest.approx(sum(costs) / 2)
    assert all(0 <= share <= 1 for share in found["cpu_share"].values())
    (target,) = SECTIONS["control"].targets(found | {"throughput_cost": 0.021})
    assert not target.met


def test_a_plan_for_each_request_is_served_against_a_single_plan_and_a_fixed_one(measured: Path) -> None:
    found = results(measured)["served"]
    every = {"mix": found["mix"], **found["domains"]}
    assert set(every) == {"mix", "prose", "technical"}
    served = QUICK.rounds * QUICK.routed_requests
    for name, compared in every.items():
        for system in ("router", "single" if name == "mix" else "fixed"):
            assert len(compared[system]["rates"]) == QUICK.rounds
            assert compared[system]["rise"]["judged"] == served
            tokens = sum(plan["tokens"] for plan in compared[system]["plans"])
            assert tokens == served * found["output_tokens"]
    for compared in found["domains"].values():
        plans = [(plan["model"], plan["depth"]) for plan in compared["fixed"]["plans"]]
        assert plans == [(compared["fixed_plan"]["model"], compared["fixed_plan"]["depth"])]
        assert 0 < compared["ttft"]["requests"] <= QUICK.ttft_requests
        assert compared["ttft"]["ratio"] > 0


def test_no_token_is_lost_or_repeated_over_reloads_under_load(measured: Path) -> None:
    found = results(measured)["reloads"]
    assert len(found["reloads"]) == 6
    assert (found["lost"], found["repeated"], found["out_of_order"]) == (0, 0, 0)
    assert sum(reload["sequences_moved"] for reload in found["reloads"]) > 0
    assert found["stall_ms"]["all"]["p50"] > 0
    (tokens, _) = SECTIONS["reloads"].targets(found)
    assert tokens.met
    (tokens, _) = SECTIONS["reloads"].targets(found | {"repeated": 1})
    assert not tokens.met


def test_the_report_shows_all_sections_with_plots(measured: Path) -> None:
    text = measured.with_suffix(".md").read_text()
    for heading in (
        "Targets",
        "Every exit",
        "Baselines",
        "Memory",
        "Speed of",
        "insights",
        "Saturation",
        "The loop",
        "profiling and control",
        "Reloads",
    ):
        assert heading in text
    found = results(measured)["claims"]
    assert len(found) == 11
    assert all(claim["measured"] in text for claim in found)
    plots = sorted(path.name for path in measured.parent.glob("*.png"))
    assert len(plots) == 5
    assert all(f"({name})" in text for name in plots)


def test_a_stopped_bench_goes_on_with_the_sections_that_are_missing(
    two_models: Path, measured: Path, tmp_path: Path
) -> None:
    content = json.loads(measured.read_text())
    del content["results"]["memory"]
    content["results"]["insights"]["mark"] = "kept"
    out = tmp_path / "paper.json"
    out.write_text(json.dumps(content))
    answer = bench(two_models, out)
    assert answer.exit_code == 0, answer.output
    after = results(out)
    assert after["insights"]["mark"] == "kept"
    assert after["memory"]["largest_batch"] == results(measured)["memory"]["largest_batch"]


def test_one_section_runs_alone_and_is_measured_again(two_models: Path, tmp_path: Path) -> None:
    out = tmp_path / "paper.json"
    assert bench(two_models, out, "--only", "memory").exit_code == 0
    content = json.loads(out.read_text())
    assert set(content["results"]) == {"settings", "memory", "claims"}
    content["results"]["memory"]["largest_batch"] = []
    out.write_text(json.dumps(content))
    assert bench(two_models, out, "--only", "memory").exit_code == 0
    assert results(out)["memory"]["largest_batch"]


def test_figures_of_other_models_are_not_mixed_in(tiny_models: Path, measured: Path, tmp_path: Path) -> None:
    out = tmp_path / "paper.json"
    shutil.copy(measured, out)
    before = out.read_bytes()
    answer = bench(tiny_models, out)
    assert answer.exit_code != 0
    assert "measured with other models" in str(answer.exception or answer.output)
    assert out.read_bytes() == before
