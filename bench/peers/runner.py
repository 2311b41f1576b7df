"""One engine in its own process: `python runner.py ENGINE`, in the environment that has the engine.

The first line of stdin is a Job as JSON; the answer is {"loaded_seconds"}. Every further line is
{"prompts", "max_tokens"}: the engine continues prompts of one length greedily, past the end of text, and the
answer is {"seconds", "first_token_seconds", "token_ids"}. Each line holds one JSON object. Whatever else the
engine prints goes to stderr. This file must not import Helios, which the peers' environments do not have.
"""

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

# Share of the machine's memory.
_MOST_MEMORY = 0.9


@dataclass(frozen=True, slots=True)
class Job:
    """What to load. A request has at most `batch` prompts, a sequence at most `sequence_tokens`."""

    model: str
    precision: str
    threads: int
    batch: int
    sequence_tokens: int
    # Memory that the engine may use, in bytes.
    memory_bytes: int
    # The part of it for the KV of all open sequences, in bfloat16.
    kv_bytes: int
    # Directory for a converted form of the model, if the engine needs one.
    cache: str
    depth: int | None = None


@dataclass(frozen=True, slots=True)
class Continuation:
    """Greedy continuations of prompts of one length. `first_token_seconds` is the median over the prompts.

    overhead: share of the decoding time that was not spent computing; None: the engine does not report it.
    """

    token_ids: list[list[int]]
    seconds: float
    first_token_seconds: float
    overhead: float | None = None


Generate = Callable[[list[list[int]], int], Continuation]
Load = Callable[[Job], Generate]


def transformers(job: Job) -> Generate:
    """`generate` of a Hugging Face model."""
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    torch.set_num_threads(job.threads)
    model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.precision))
    model.eval()
    model.generation_config.eos_token_id = None

    def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        mask = torch.ones_like(ids)
        output = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max_tokens)
        return [list(row) for row in output[:, ids.shape[1] :].tolist()]

    return _with_first_token_apart(generate)


def ctranslate2(job: Job) -> Generate:
    """`Generator.generate_batch`. The model is converted once, with its weights as they are stored."""
    import ctranslate2 as engine  # noqa: PLC0415

    converted = Path(job.cache) / f"{Path(job.model).name}-ctranslate2"
    if not converted.exists():
        unfinished = converted.with_name(f".{converted.name}-{os.getpid()}")
        engine.converters.TransformersConverter(job.model).convert(str(unfinished), quantization="bfloat16")
        unfinished.rename(converted)
    generator: Any = engine.Generator(
        str(converted),
        device="cpu",
        compute_type=job.precision,
        inter_threads=1,
        intra_threads=job.threads,
    )
    vocabulary = json.loads((converted / "vocabulary.json").read_text())

    def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        results = generator.generate_batch(
            [[vocabulary[token] for token in prompt] for prompt in prompts],
            # So that an end-of-text token does not end the output.
            min_length=max_tokens,
            max_length=max_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return [result.sequences_ids[0] for result in results]

    return _with_first_token_apart(generate)


def vllm(job: Job) -> Generate:
    """The offline `LLM` class with its defaults, and with room for the largest request."""
    from vllm import LLM, SamplingParams  # noqa: PLC0415

    machine_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    engine: Any = LLM(
        model=job.model,
        dtype=job.precision,
        max_num_seqs=job.batch,
        max_model_len=job.sequence_tokens,
        # On a CPU this is a share of the machine's memory. vLLM does not start when less is free.
        gpu_memory_utilization=min(_MOST_MEMORY, job.memory_bytes / machine_bytes),
        disable_log_stats=False,
    )

    def generate(prompts: list[list[int]], max_tokens: int) -> Continuation:
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        started = time.perf_counter()
        outputs = engine.generate(inputs, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        first = [output.metrics.first_token_latency for output in outputs]
        token_ids = [list(output.outputs[0].token_ids) for output in outputs]
        return Continuation(token_ids, seconds, statistics.median(first))

    return generate


def _with_first_token_apart(generate: Callable[[list[list[int]], int], list[list[int]]]) -> Generate:
    """For an engine that does not report the time of the first token: measures a run of one token."""

    def timed(prompts: list[list[int]], max_tokens: int) -> Continuation:
        started = time.perf_counter()
        token_ids = generate(prompts, max_tokens)
        seconds = time.perf_counter() - started
        started = time.perf_counter()
        generate(prompts, 1)
        return Continuation(token_ids, seconds, time.perf_counter() - started)

    return timed


def serve(load: Load, requests: TextIO, answers: TextIO) -> None:
    """Loads the model that the first line names, then answers every further line until the input ends."""

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    job = Job(**json.loads(requests.readline()))
    started = time.perf_counter()
    generate = load(job)
    answer({"loaded_seconds": time.perf_counter() - started})
    for line in requests:
        request = json.loads(line)
        # So that no run includes a full garbage collection.
        gc.collect()
        gc.freeze()
        run = generate(request["prompts"], request["max_tokens"])
        _check(run.token_ids, len(request["prompts"]), request["max_tokens"])
        answer(asdict(run))


def _check(token_ids: Sequence[Sequence[int]], prompts: int, max_tokens: int) -> None:
    """Raises RuntimeError unless all tokens were generated, because times would not be comparable."""
    lengths = [len(ids) for ids in token_ids]
    if lengths != [max_tokens] * prompts:
        raise RuntimeError(f"asked for {prompts} x {max_tokens} tokens, got {lengths}")


def private_stdout() -> TextIO:
    """This process's stdout, for answers only. All other output to stdout goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), mode="w")
    os.dup2(2, 1)
    return answers


ENGINES: dict[str, Load] = {"transformers": transformers, "ctranslate2": ctranslate2, "vllm": vllm}

if __name__ == "__main__":
    serve(ENGINES[sys.argv[1]], sys.stdin, private_stdout())
