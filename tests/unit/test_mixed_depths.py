"""Several depths in one batch: each row gets to the bit what it gets when only its depth runs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from helios.engine.backends.burst import Burst, Interrupt
from helios.engine.backends.kv_cache import KVCache
from helios.engine.backends.model import Model
from helios.engine.backends.runner import Runner, choose_runner
from helios.engine.kernels.layer import OWN_ROWS
from helios.engine.kernels.team import TEAM
from helios.engine.plan import load_plan
from helios.engine.scheduling import sequence as engine_sequence
from helios.engine.scheduling.batch import build_batch
from helios.engine.scheduling.detokenizer import Detokenizer
from helios.engine.scheduling.prompt_readings import PromptReadings
from helios.engine.settings import EngineSettings
from helios.modes import ExitMode
from helios.sampling import SamplingParams
from helios.served import ServedPlan
from tests.opt_variants import Head
from tests.variants import OPT_VARIANTS, save_variant

EXITS = (1, 2, 4, 6)
PRECISIONS = ("float32", "bfloat16", "int8")
BUNDLED = Path(__file__).parents[2] / "models"
BLOCK_TOKENS = 16


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before, worthwhile = TEAM.threads, TEAM.worthwhile
    # worthwhile 0: threads share the work even if there is little.
    TEAM.threads, TEAM.worthwhile = request.param, 0
    yield request.param
    TEAM.threads, TEAM.worthwhile = before, worthwhile


@dataclass(frozen=True)
class Request:
    """A prompt that comes at some step, is prefilled in chunks, and is continued under a depth."""

    prompt: list[int]
    depth: int
    sampling: SamplingParams
    arrival: int = 0
    chunk: int = 1000


@dataclass(eq=False)
class Stream:
    """A request that is served, and what it got."""

    request: Request
    sequence: engine_sequence.Sequence
    # Token, exit layer and summary of each step.
    tokens: list[tuple[Any, ...]] = field(default_factory=list)
    # Summary and the next token's logit for each sampled position of the prompt.
    readings: list[tuple[Any, ...]] = field(default_factory=list)
    # The logits of the last step of each call.
    logits: list[torch.Tensor] = field(default_factory=list)


def load(path: Path, precision: str) -> Model:
    """All layers, with the heads of all exits."""
    settings = EngineSettings(exit_mode=ExitMode.DYNAMIC, precision=precision, memory_bytes=256 << 20)
    return load_plan(path, None, settings).model


def runner_of(model: Model) -> Runner:
    return choose_runner(model, None, cuda_graphs=False, most_rows=8)


@torch.inference_mode()
def serve(model: Model, requests: Sequence[Request], burst_steps: int) -> list[Stream]:
    """Serves requests in one batch. Calls take up to `burst_steps` steps as soon as all decode."""
    runner, device = runner_of(model), torch.device("cpu")
    needed = [-(-(len(one.prompt) + one.sampling.max_tokens) // BLOCK_TOKENS) for one in requests]
    cache = KVCache.of(model.config, model.depth, sum(needed), BLOCK_TOKENS, model.kv_dtype, device)
    streams, taken = [], 0
    for request, blocks in zip(requests, needed, strict=True):
        sequence = engine_sequence.Sequence(
            request_id="",
            token_ids=list(request.prompt),
            prompt_tokens=len(request.prompt),
            sampling=request.sampling,
            detokenizer=Detokenizer.__new__(Detokenizer),
            sink=lambda _: None,
            plan=ServedPlan(model="one", depth=request.depth),
            blocks=list(range(taken, taken + blocks)),
        )
        taken += blocks
        streams.append(Stream(request, sequence))
    by_block = {stream.sequence.blocks[0]: stream for stream in streams}
    for number in range(1000):
        left = {
            stream: stream.request.sampling.max_tokens - stream.sequence.completion_tokens
            for stream in streams
            if stream.request.arrival <= number
        }
        running = [stream for stream, tokens in left.items() if tokens]
        if not running and len(left) == len(streams):
            break
        if not running:
            continue
        sequences = [stream.sequence for stream in running]
        scheduled = [
            (stream.sequence, min(stream.sequence.pending, stream.request.chunk)) for stream in running
        ]
        steps = 1
        if all(sequence.is_decoding for sequence in sequences):
            steps = min(burst_steps, *(left[stream] for stream in running))
        readings = PromptReadings(4)
        batch, readers = build_batch(scheduled, BLOCK_TOKENS, device, readings)
        found, exits = runner.run(batch, cache, Burst.of(steps, readers, (), Interrupt(), len(readings.rows)))
        for read, (row, target) in enumerate(zip(readings.rows, readings.targets, strict=True), len(readers)):
            stream = by_block[int(batch.tables[batch.row_tables[row], 0])]
            summary = found.summaries[read].tolist()
            stream.readings.append((exits[read], *summary, float(found.logits[read, target])))
        for sequence, count in scheduled:
            sequence.computed += count
        reads = batch.reads
        assert len(exits) == steps * reads
        for index, sequence in enumerate(readers):
            stream = by_block[sequence.blocks[0]]
            for read in range(index, steps * reads, reads):
                token = int(found.best[read])
                stream.tokens.append((token, exits[read], *found.summaries[read].tolist()))
                sequence.token_ids.append(token)
            sequence.computed += steps - 1
            stream.logits.append(found.logits[index].clone())
    for stream in streams:
        for layer in range(stream.request.depth, model.depth):
            assert not cache.keys[layer][stream.sequence.blocks].any(), "KV of layers that it does not have"
    return streams


def requests_of(depths: Sequence[int], vocabulary: int, tokens: int = 14) -> list[Request]:
    """Requests that decode while others are prefilled: prompts of 1 to 170 tokens, some in chunks."""
    lengths = (1, 30, 170, 47, 9, 64, 33, 100)
    samplings: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8},
        {},
        {"temperature": 1.5, "top_k": 9},
        {"repetition_penalty": 1.3},
        {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.2},
    ]
    return [
        Request(
            prompt=[(7 * index + 13 * place) % (vocabulary - 4) + 4 for place in range(length)],
            depth=depths[index % len(depths)],
            sampling=SamplingParams(
                max_tokens=tokens + index, ignore_eos=True, seed=index, **samplings[index % len(samplings)]
            ),
            arrival=index // 2,
            chunk=(1000, 20)[index % 2],
        )
        for index, length in enumerate(lengths)
    ]


def assert_each_is_as_among_its_own(
    model: Model, requests: Sequence[Request], burst_steps: int
) -> list[Stream]:
    together = serve(model, requests, burst_steps)
    for depth in {request.depth for request in requests}:
        mine = [stream for stream in together if stream.request.depth == depth]
        alone = serve(model, [stream.request for stream in mine], 1)
        for one, other in zip(mine, alone, strict=True):
            assert one.tokens == other.tokens
            assert one.readings == other.readings
            assert {token[1] for token in one.tokens} == {depth}
            ends = [len(one.sequence.token_ids), len(other.sequence.token_ids)]
            assert ends[0] == ends[1] == len(one.request.prompt) + one.request.sampling.max_tokens
            # Calls of several steps give the logits of their last step, which the last call ends with too.
            assert torch.equal(one.logits[0], other.logits[0])
            assert torch.equal(one.logits[-1], other.logits[-1])
    return together


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("name", "head"),
    [
        *((name, "shared") for name in OPT_VARIANTS if name != "gelu"),
        ("pre-norm", "norm"),
        ("pre-norm", "linear"),
        ("post-norm", "linear"),
        ("projected", "linear"),
        ("untied", "linear"),
        ("llama3", "norm"),
        ("odd-widths", "linear"),
        ("qwen3", "linear"),
    ],
)
def test_a_row_is_the_same_to_the_bit_whatever_the_depths_beside_it(
    tmp_path: Path, name: str, head: Head, precision: str, threads: int
) -> None:
    save_variant(tmp_path, name, seed=6, exits=EXITS, head=head)
    model = load(tmp_path, precision)
    requests = requests_of((4, 6, 1, 2), model.config.vocab_size)
    # With many rows each thread owns some of them, but soon fewer rows are left.
    assert threads * OWN_ROWS < 170
    together = assert_each_is_as_among_its_own(model, requests, burst_steps=1)
    assert sum(len(stream.readings) for stream in together) > 10
    assert len({token for stream in together for token, *_ in stream.tokens}) > 20


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("pre-norm", "shared"),
        ("post-norm", "norm"),
        ("projected", "linear"),
        ("llama", "linear"),
        ("qwen3", "norm"),
    ],
)
def test_rows_of_several_depths_share_a_burst(tmp_path: Path, name: str, head: Head, threads: int) -> None:
    save_variant(tmp_path, name, seed=7, exits=EXITS, head=head)
    model = load(tmp_path, "int8")
    requests = requests_of((2, 6, 4), model.config.vocab_size)
    together = assert_each_is_as_among_its_own(model, requests, burst_steps=5)
    assert any(len(stream.logits) < len(stream.tokens) for stream in together), (
        "some calls took several steps"
    )


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("name", ["helios-prose", "helios-tech"])
def test_bundled_models_serve_several_depths_at_once(name: str, threads: int) -> None:
    model = load(BUNDLED / name, "int8")
    requests = requests_of((6, 16, 2, 8), model.config.vocab_size)
    assert_each_is_as_among_its_own(model, requests, burst_steps=4)


@pytest.mark.parametrize("head", ["norm", "linear"])
@pytest.mark.parametrize("variant", ["pre-norm", "gelu"])
def test_a_deeper_model_serves_a_depth_as_if_it_had_no_more_layers(
    tmp_path: Path, variant: str, head: Head
) -> None:
    """gelu is not compiled, so torch runs the layers."""
    save_variant(tmp_path, variant, seed=8, exits=EXITS, head=head)
    deep = load(tmp_path, "float32")
    shallow = load_plan(tmp_path, 2, EngineSettings(memory_bytes=64 << 20)).model
    greedy = [
        Request([2, *range(20, 60)], 2, SamplingParams(max_tokens=9, ignore_eos=True)),
        Request([2, 5], 2, SamplingParams(max_tokens=9, ignore_eos=True)),
    ]
    told = [[stream.tokens for stream in serve(model, greedy, 1)] for model in (deep, shallow)]
    assert told[0] == told[1]
    assert {token[1] for tokens in told[0] for token in tokens} == {2}


def test_only_compiled_steps_of_known_depths_mix_them(tmp_path: Path) -> None:
    for variant in ("pre-norm", "gelu"):
        save_variant(tmp_path / variant, variant, seed=9, exits=EXITS)
    compiled, eager = (load(tmp_path / variant, "float32") for variant in ("pre-norm", "gelu"))
    assert runner_of(compiled).mixes_depths
    assert not runner_of(eager).mixes_depths
    assert not choose_runner(compiled, {2: 0.5}, cuda_graphs=False, most_rows=8).mixes_depths
    requests = requests_of((2, 6), 264)
    with pytest.raises(ValueError, match="too many"):
        serve(eager, requests, 1)
