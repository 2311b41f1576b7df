"""The figures of an evaluation for each exit equal those of transformers."""

import math
import statistics
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from helios.calibration import calibrated_threshold
from helios.catalog import read_model
from helios.engine.evaluation.candidate import Candidate, load_candidate
from helios.engine.evaluation.evaluate import evaluate
from helios.engine.evaluation.pace import Pace
from helios.engine.evaluation.settings import EvaluationSettings
from helios.engine.evaluation.speed import Speed, fit_speeds, timed_depths
from helios.engine.weights.loader import load_packed
from helios.errors import CancelledError, InvalidRequestError, SettingsError
from helios.history import CONFIDENCE_BINS, ModelProfile
from helios.modes import Precision
from helios.power_meter import power_meter
from tests.opt_variants import Head, byte_tokenizer, truncated
from tests.variants import save_variant

EXITS = (1, 3, 6)
PROMPTS = [[2, *range(10, 100)], [2, 50, 51, 52], [2, *range(200, 120, -1)]]
# With these there are more prompts than one batch continues.
PROMPTS += [[2, 60, start] for start in range(100, 107)]
SETTINGS = EvaluationSettings(generated_tokens=9, batches=(1, 3), repetitions=1, target_agreement=0.5)
# Largest difference in float32 between the engine's products and those of transformers.
NOISE = 1e-4


@pytest.mark.parametrize(
    ("variant", "head"),
    [
        ("pre-norm", "shared"),
        ("post-norm", "norm"),
        ("projected", "linear"),
        ("tied", "linear"),
        ("qwen2", "shared"),
        ("qwen3", "norm"),
    ],
)
def test_histogram_agreement_and_perplexity_are_those_of_transformers(
    tmp_path: Path, variant: str, head: Head
) -> None:
    reference = save_variant(tmp_path, variant, 5, exits=EXITS, head=head)
    profile = evaluate(load_candidate(read_model(tmp_path), SETTINGS), PROMPTS, SETTINGS)
    assert [one.depth for one in profile.exits] == list(EXITS)

    texts = [_continued(reference, prompt, SETTINGS.generated_tokens - 1) for prompt in PROMPTS]
    predicted = sum(len(prompt) - 1 for prompt in PROMPTS)
    text_bytes = sum(len(byte_tokenizer().decode(prompt[1:]).encode()) for prompt in PROMPTS)
    last = [_logits(reference, text) for text in texts]
    for one in profile.exits:
        logits = [_logits(truncated(reference, one.depth, tmp_path), text) for text in texts]
        joined, top = torch.cat(logits), torch.cat(last).argmax(dim=-1)
        confidence = joined.softmax(dim=-1).amax(dim=-1)
        agrees = joined.argmax(dim=-1) == top
        _assert_histogram(one.confidence_counts, confidence)
        _assert_histogram(one.agreement_counts, confidence[agrees])
        assert one.agreement == agrees.double().mean().item()
        nats = sum(
            -prompt_logits.log_softmax(dim=-1)[range(len(prompt) - 1), prompt[1:]].double().sum().item()
            for prompt, prompt_logits in zip(PROMPTS, logits, strict=True)
        )
        assert one.perplexity == pytest.approx(math.exp(nats / predicted), rel=1e-4)
        assert one.nats_per_byte == pytest.approx(nats / text_bytes, rel=1e-4)
    assert profile.tokens == sum(map(len, texts))
    assert profile.requests == len(PROMPTS)
    assert profile.bytes_per_token == text_bytes / predicted


def _continued(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        token = int(_logits(model, ids)[-1].argmax())
        if token == 2:
            break
        ids.append(token)
    return ids


@torch.inference_mode()
def _logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0]


def _assert_histogram(counts: tuple[int, ...], confidence: torch.Tensor) -> None:
    """Every tail of the histogram equals the reference's, except for tokens on the edge of a bin."""
    assert sum(counts) == len(confidence)
    for index in range(CONFIDENCE_BINS):
        edge, tail = index / CONFIDENCE_BINS, sum(counts[index:])
        surely = int((confidence >= edge + NOISE).sum())
        maybe = int((confidence >= edge - NOISE).sum())
        assert surely <= tail <= maybe


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_variant(path, "pre-norm", 7, exits=EXITS, head="linear")
    return path


@pytest.fixture(scope="module")
def candidate(model_path: Path) -> Candidate:
    return load_candidate(read_model(model_path), SETTINGS)


@pytest.fixture(scope="module")
def profile(candidate: Candidate) -> ModelProfile:
    return evaluate(candidate, PROMPTS, SETTINGS)


def test_sizes_are_those_of_a_partial_load(model_path: Path, profile: ModelProfile) -> None:
    entry = read_model(model_path)
    for one in profile.exits:
        part = load_packed(entry, one.depth, [one.depth], Precision.FLOAT32, torch.device("cpu"))
        assert one.weight_bytes == part.weight_bytes
        assert one.kv_bytes_per_token == 2 * 4 * one.depth * entry.config.hidden_size
        assert one.load_seconds > 0


def test_thresholds_are_calibrated_on_the_histogram_and_the_last_exit_takes_every_token(
    profile: ModelProfile,
) -> None:
    assert profile.full.threshold == 0
    assert profile.full.agreement == 1
    for one in profile.exits[:-1]:
        first = round(one.threshold * CONFIDENCE_BINS)
        above = sum(one.confidence_counts[first:])
        if one.threshold < 1:
            assert sum(one.agreement_counts[first:]) >= SETTINGS.target_agreement * above > 0


def test_every_batch_is_timed_and_depth_is_linear(profile: ModelProfile) -> None:
    low, middle, high = profile.exits
    assert [speed.batch for speed in middle.decode] == list(SETTINGS.batches)
    share = (3 - 1) / (6 - 1)
    expected = low.ttft_seconds + share * (high.ttft_seconds - low.ttft_seconds)
    assert middle.ttft_seconds == pytest.approx(expected)
    assert all(one.prefill_tokens_per_second > 0 for one in profile.exits)
    assert profile.wall_seconds > 0
    assert profile.cpu_seconds > 0


SECONDS = st.floats(1e-7, 1e3)


@st.composite
def timings(draw: st.DrawFn) -> tuple[list[int], dict[int, Speed]]:
    """The exits of a model, and arbitrary timings of those that are timed."""
    exits = sorted(draw(st.sets(st.integers(1, 48), min_size=1, max_size=8)))
    batches = sorted(draw(st.sets(st.integers(1, 64), min_size=1, max_size=4)))
    return exits, {
        depth: Speed({batch: draw(SECONDS) for batch in batches}, draw(SECONDS))
        for depth in timed_depths(exits)
    }


@given(timings())
def test_fitted_times_grow_with_depth_and_do_not_fall_with_the_batch_whatever_the_noise(
    measured: tuple[list[int], dict[int, Speed]],
) -> None:
    exits, timed = measured
    found = fit_speeds(timed, exits)
    assert list(found) == exits
    for speed in found.values():
        times = [speed.decode[batch] for batch in sorted(speed.decode)]
        assert times[0] > 0
        assert times == sorted(times)
    for shallow, deep in pairwise(found.values()):
        assert 0 < shallow.prefill_per_token < deep.prefill_per_token
        for batch, seconds in shallow.decode.items():
            assert seconds < deep.decode[batch]
    for (depth, shallow), (deeper, deep) in pairwise(found.items()):
        for batch, seconds in shallow.decode.items():
            # The fixed part of a step's time is not negative.
            assert deep.decode[batch] / deeper <= seconds / depth * (1 + 1e-9)


# Seconds of a decode step: the fixed part, and the part per layer. Every sequence in the batch adds a tenth.
LINE = st.tuples(st.floats(0, 1e-2), st.floats(1e-4, 1e-2))
BATCHES = (1, 8, 32)


def _linear(fixed: float, layer: float, depth: int) -> Speed:
    seconds = fixed + depth * layer
    return Speed({batch: seconds * (1 + batch / 10) for batch in BATCHES}, seconds / 10)


def _assert_close(found: dict[int, Speed], expected: dict[int, Speed], rel: float) -> None:
    for depth, speed in expected.items():
        assert found[depth].decode == pytest.approx(speed.decode, rel=rel)
        assert found[depth].prefill_per_token == pytest.approx(speed.prefill_per_token, rel=rel)


@given(LINE, st.sets(st.integers(1, 48), min_size=1, max_size=8).map(sorted))
def test_exactly_linear_times_are_fitted_exactly(line: tuple[float, float], exits: list[int]) -> None:
    expected = {depth: _linear(*line, depth) for depth in exits}
    _assert_close(
        fit_speeds({depth: expected[depth] for depth in timed_depths(exits)}, exits), expected, 1e-9
    )


@given(
    LINE,
    st.lists(st.floats(-1, 1), min_size=20, max_size=20),
    st.sampled_from((2, 6, 8, 12, 16)),
    st.sampled_from((*BATCHES, "prefill")),
    st.floats(1e-3, 1e3),
)
def test_one_wild_timing_among_five_moves_the_fit_by_little(
    line: tuple[float, float], noise: list[float], depth: int, kind: int | str, factor: float
) -> None:
    exits = (2, 4, 6, 8, 12, 16)
    expected = {depth: _linear(*line, depth) for depth in exits}

    def timed(by: float) -> dict[int, Speed]:
        """Timings with this much noise. One of them is far off."""
        errors = iter(noise)
        found = {
            one: Speed(
                {batch: seconds * (1 + by * next(errors)) for batch, seconds in expected[one].decode.items()},
                expected[one].prefill_per_token * (1 + by * next(errors)),
            )
            for one in timed_depths(exits)
        }
        wild = found[depth]
        if kind == "prefill":
            found[depth] = replace(wild, prefill_per_token=wild.prefill_per_token * factor)
        else:
            decode = {b: s * (factor if b == kind else 1) for b, s in wild.decode.items()}
            found[depth] = replace(wild, decode=decode)
        return found

    assert timed_depths(exits) == [2, 6, 8, 12, 16]
    _assert_close(fit_speeds(timed(0), exits), expected, 1e-9)
    # Noise of 0.1 % of a step changes a slope by up to 0.2 % of a step over the smallest gap, 2 layers. Over
    # 16 layers that is 1.6 %. A small fixed part that this noise hides counts as time of layers.
    for batch in BATCHES:
        full = expected[16].decode[batch]
        for one, speed in fit_speeds(timed(0.001), exits).items():
            assert speed.decode[batch] == pytest.approx(expected[one].decode[batch], abs=0.03 * full)


@pytest.mark.parametrize(
    ("exits", "timed"),
    [((6,), [6]), ((1, 6), [1, 6]), ((1, 3, 6), [1, 3, 6]), ((2, 4, 6, 8, 12, 16), [2, 6, 8, 12, 16])],
)
def test_first_last_and_spread_exits_are_timed(exits: tuple[int, ...], timed: list[int]) -> None:
    assert timed_depths(exits) == timed
    every = timed_depths(range(1, 25))
    assert (every[0], every[-1], len(every)) == (1, 24, 5)


@pytest.mark.parametrize("field", ["confidence_counts", "agreement_counts"])
def test_a_profile_with_impossible_counts_is_not_valid(profile: ModelProfile, field: str) -> None:
    document = profile.model_dump(mode="json")
    assert ModelProfile.model_validate(document) == profile
    document["exits"][0][field][3] = -1
    with pytest.raises(ValidationError, match=field):
        ModelProfile.model_validate(document)


def test_time_to_the_first_token_follows_the_length_of_prompts(
    candidate: Candidate, profile: ModelProfile
) -> None:
    longer = evaluate(candidate, [[2, *range(10, 210)]], SETTINGS, timed=profile)
    for one, before in zip(longer.exits, profile.exits, strict=True):
        tokens = 201 - statistics.median_low(map(len, PROMPTS))
        expected = before.ttft_seconds + tokens / before.prefill_tokens_per_second
        assert one.ttft_seconds == pytest.approx(expected)


def test_samples_are_the_prompts_one_by_one(profile: ModelProfile) -> None:
    assert [one.text_bytes for one in profile.samples] == [
        len(byte_tokenizer().decode(prompt[1:]).encode()) for prompt in PROMPTS
    ]
    assert len({one.id for one in profile.samples}) == len(PROMPTS)
    for index, one in enumerate(profile.exits):
        nats = math.fsum(sample.nats[index] for sample in profile.samples)
        assert one.nats_per_byte == pytest.approx(nats / sum(s.text_bytes for s in profile.samples))


def test_speeds_of_an_earlier_profile_are_taken_over_and_quality_is_not(
    candidate: Candidate, profile: ModelProfile
) -> None:
    again = evaluate(candidate, PROMPTS[:1], SETTINGS, timed=profile)
    for one, before in zip(again.exits, profile.exits, strict=True):
        assert one.decode == before.decode
        assert one.load_seconds == before.load_seconds
        assert one.tokens < before.tokens
    assert again.provenance["timed_at"] == profile.provenance["timed_at"]


@pytest.mark.parametrize("fact", ["hardware", "threads", "precision", "checkpoint"])
def test_speeds_measured_on_other_hardware_threads_precision_or_weights_are_measured_anew(
    candidate: Candidate, profile: ModelProfile, fact: str
) -> None:
    assert profile.provenance[fact]
    elsewhere = profile.model_copy(update={"provenance": {**profile.provenance, fact: "another"}})
    again = evaluate(candidate, PROMPTS[:1], SETTINGS, timed=elsewhere)
    assert again.provenance["timed_at"] != profile.provenance["timed_at"]
    assert again.provenance[fact] == profile.provenance[fact]


def test_speeds_at_other_batches_are_measured_anew(candidate: Candidate, profile: ModelProfile) -> None:
    measured = evaluate(candidate, PROMPTS[:1], replace(SETTINGS, batches=(2,)), timed=profile)
    assert [speed.batch for speed in measured.full.decode] == [2]


def test_a_checkpoint_without_exits_is_evaluated_at_full_depth(tmp_path: Path) -> None:
    save_variant(tmp_path, "pre-norm", 9, dtype=torch.bfloat16)
    settings = replace(SETTINGS, precision="bfloat16")
    found = evaluate(load_candidate(read_model(tmp_path), settings), PROMPTS[:2], settings)
    (only,) = found.exits
    assert (only.depth, only.threshold, only.agreement) == (6, 0, 1)
    # On a CPU, KV is in float16 when products are in bfloat16.
    assert only.kv_bytes_per_token == 2 * 2 * 6 * 32


def test_int8_is_evaluated_as_int8(model_path: Path, profile: ModelProfile) -> None:
    settings = replace(SETTINGS, precision="int8")
    found = evaluate(load_candidate(read_model(model_path), settings), PROMPTS, settings, timed=profile)
    assert found.provenance["precision"] == "int8"
    # Speeds that were measured in another precision are not reused.
    assert found.provenance["timed_at"] != profile.provenance["timed_at"]
    for one, exact in zip(found.exits, profile.exits, strict=True):
        assert 0 < one.weight_bytes < exact.weight_bytes
        assert one.perplexity == pytest.approx(exact.perplexity, rel=0.02)


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"batches": (8, 1)}, {"generated_tokens": 0}, {"precision": "float12"}):
        with pytest.raises(SettingsError, match=next(iter(wrong))):
            EvaluationSettings(**wrong)  # type: ignore[arg-type]


def test_a_fixed_threshold_and_a_configured_power_are_taken(candidate: Candidate) -> None:
    settings = EvaluationSettings(
        generated_tokens=1, batches=(2,), repetitions=1, threshold=0.8, power_watts=50
    )
    found = evaluate(candidate, [[2, 70, 80, 90]], settings)
    assert [one.threshold for one in found.exits] == [0.8, 0.8, 0]
    assert found.tokens == 4
    if found.provenance["power"] == "configured":
        for one in found.exits:
            assert one.joules_per_token == pytest.approx(50 * one.decode[0].step_seconds / 2)


def test_without_a_meter_and_a_figure_energy_is_unknown_not_zero(tmp_path: Path) -> None:
    assert power_meter("cpu", tmp_path) is None


def test_energy_of_all_packages_is_summed_across_a_wrap(tmp_path: Path) -> None:
    def write(package: str, energy: int) -> None:
        (tmp_path / package).mkdir(exist_ok=True)
        (tmp_path / package / "energy_uj").write_text(f"{energy}\n")
        (tmp_path / package / "max_energy_range_uj").write_text("10000000\n")

    for package, energy in (("intel-rapl:0", 9_000_000), ("intel-rapl:1", 0), ("intel-rapl:0:0", 5)):
        write(package, energy)
    meter = power_meter("cpu", tmp_path)
    assert meter is not None
    before = meter.read()
    write("intel-rapl:0", 1_000_000)
    write("intel-rapl:1", 3_000_000)
    assert meter.joules_since(before) == pytest.approx(2 + 3)


def test_what_cannot_be_evaluated_is_refused_with_the_reason(candidate: Candidate) -> None:
    for prompts, said in (([[2, 5000]], "5000"), ([[]], "no token"), ([[2]], "no text")):
        with pytest.raises(InvalidRequestError, match=said):
            evaluate(candidate, prompts, SETTINGS)


def test_a_stopped_evaluation_ends_between_requests(candidate: Candidate) -> None:
    pace = Pace()
    done = []

    def progress(count: int, _: int) -> None:
        done.append(count)
        if count == 1:
            pace.stop()

    with pytest.raises(CancelledError):
        evaluate(candidate, PROMPTS, SETTINGS, progress, pace)
    assert done == [0, 1]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=20), st.floats(0.1, 1))
def test_a_calibrated_threshold_is_the_lowest_from_which_enough_tokens_agree(
    bins: list[tuple[int, int]], target: float
) -> None:
    edges = [index / len(bins) for index in range(len(bins))]
    counts = [agreeing + other for agreeing, other in bins]
    agreements = [agreeing for agreeing, _ in bins]
    found = calibrated_threshold(edges, counts, agreements, target)
    good = [
        edges[index]
        for index in range(len(bins))
        if counts[index] and sum(agreements[index:]) / sum(counts[index:]) >= target
    ]
    assert found == min(good, default=1.0)
