"""`helios bench serve` and `prefill` over a tiny model: the whole bench with small sizes."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import bench.engine.prefill
from helios.cli import cli


def test_bench_serve_measures_both_ways_and_finds_parity(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Otherwise all tokens of such a small model would come in one message.
    monkeypatch.setenv("HELIOS_WORKER_BURST_SECONDS", "0")
    out = tmp_path / "serve.json"
    options = {
        "--json": out,
        "--models-dir": tiny_models,
        "--model": "tiny",
        "--depth": 2,
        "--workers": 1,
        "--streams": 6,
        "--max-tokens": 100,
    }
    arguments = [str(word) for option in options.items() for word in option]
    answer = CliRunner().invoke(cli, ["bench", "serve", *arguments], catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    report = json.loads(out.read_text())
    results = report["results"]
    assert (results["model"], results["depth"], results["num_layers"]) == ("tiny", 2, 4)
    for way in ("gateway", "straight_to_workers"):
        assert (results[way]["streams"], results[way]["tokens"], results[way]["failed"]) == (6, 600, 0)
        assert results[way]["tokens_per_second"] > 0
        assert 0 < results[way]["ttft_ms"]["p50"] <= results[way]["ttft_ms"]["p99"]
        assert 0 < results[way]["tpot_ms"]["p50"] <= results[way]["tpot_ms"]["p99"]
    assert results["parity"] == {"streams": 36, "equal": 36, "margins_at_first_difference": []}
    memory = results["memory"]
    assert memory["at_depth"]["bytes_read"] < memory["full"]["bytes_read"]
    assert memory["at_depth"]["kv_bytes_per_token"] * 2 == memory["full"]["kv_bytes_per_token"]
    assert {"no stream fails", "streams equal transformers' greedy output"} <= {
        target["name"] for target in report["targets"] if target["met"]
    }


def test_bench_prefill_measures_with_and_without_a_bound(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.engine.prefill, "random_model", lambda _shape, _directory: tiny_models / "long")
    out = tmp_path / "prefill.json"
    options = ["--json", str(out), "--chats", "2", "--chat-tokens", "60", "--prompt-tokens", "40"]
    answer = CliRunner().invoke(
        cli, ["bench", "prefill", *options, "--rounds", "1", "--threads", "1"], catch_exceptions=False
    )
    assert answer.exit_code == 0, answer.output
    results = json.loads(out.read_text())["results"]
    for found in results["time_between_tokens_ms"].values():
        assert [0 < one["p50"] <= one["p99"] for one in found] == [True]
    assert all(one > 0 for of_way in results["long_prompt_ttft_seconds"].values() for one in of_way)
    assert set(results["p99_against_chats_alone"]) == set(results["long_prompt_ttft_seconds"])
    # The first prompt computes a thousand tokens more than the second.
    assert results["shared_beginning"]["ratio"] > 1
