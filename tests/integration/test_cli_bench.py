"""`helios bench serve` over a tiny model: the whole bench, small."""

import json
from pathlib import Path

from click.testing import CliRunner

from helios.cli import cli


def test_bench_serve_measures_both_ways_and_finds_parity(tiny_models: Path, tmp_path: Path) -> None:
    out = tmp_path / "serve.json"
    options = {
        "--json": out,
        "--models-dir": tiny_models,
        "--model": "tiny",
        "--depth": 2,
        "--workers": 1,
        "--streams": 6,
        "--max-tokens": 8,
    }
    arguments = [str(word) for option in options.items() for word in option]
    answer = CliRunner().invoke(cli, ["bench", "serve", *arguments], catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    report = json.loads(out.read_text())
    results = report["results"]
    assert (results["model"], results["depth"], results["num_layers"]) == ("tiny", 2, 4)
    for way in ("gateway", "straight_to_workers"):
        assert (results[way]["streams"], results[way]["tokens"], results[way]["failed"]) == (6, 48, 0)
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
