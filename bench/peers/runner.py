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
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

# Share of the machine's memory.
_MOST_MEMORY = 0.9
# Tokens of a slot of llama.cpp's server beyond those that it serves.
_SLOT_MARGIN = 8


@dataclass(frozen=True, slots=True)
class Job:
    """What to load. A request has at most `batch` prompts, a sequence at most `sequence_tokens`."""

    # A checkpoint directory, or a GGUF file for llama.cpp.
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


def llamacpp(job: Job) -> Generate:
    """llama.cpp's server, as xllamacpp carries it, with a slot for each prompt."""
    import xllamacpp  # noqa: PLC0415

    # Ignores the environment's proxies, because the server is in this process.
    http = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    server: Any = None
    slots = 0

    def start(prompts: int) -> None:
        nonlocal server, slots
        if prompts == slots:
            return
        # Only one server is in memory.
        server = None
        params = xllamacpp.CommonParams()
        params.model.path = job.model
        # The server ends a text just before its slot is full.
        params.n_parallel, params.n_ctx = prompts, prompts * (job.sequence_tokens + _SLOT_MARGIN)
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job.threads
        # Takes the context as it is given, instead of one that fits into what memory is free now.
        params.fit_params = False
        # The server keeps no earlier prompts in memory.
        params.cache_ram_mib = params.n_ctx_checkpoints = 0
        params.port, params.verbosity = 0, 2  # warnings
        server, slots = xllamacpp.Server(params), prompts

    def generate(prompts: list[list[int]], max_tokens: int) -> Continuation:
        start(len(prompts))
        return timed(prompts, max_tokens)

    def complete(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        # Only the likeliest token is looked at.
        sampling = {"temperature": 0, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True}
        content = {"prompt": prompts, "n_predict": max_tokens, "cache_prompt": False, "return_tokens": True}
        request = urllib.request.Request(
            f"{server.listening_address}/completion",
            json.dumps(content | sampling).encode(),
            {"Content-Type": "application/json"},
        )
        with http.open(request) as response:
            found = json.load(response)
        # One prompt is answered without a list.
        answers = found if isinstance(found, list) else [found]
        return [answer["tokens"] for answer in sorted(answers, key=lambda answer: int(answer["index"]))]

    timed = _with_first_token_apart(complete)
    start(job.batch)
    return generate


def llamacpp_compiled(job: Job) -> Generate:
    """llama.cpp compiled for this processor, by llama-cpp-python: its `llama_decode`, without its server."""
    import llama_cpp as engine  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    engine.llama_backend_init()
    model: Any = engine.llama_model_load_from_file(job.model.encode(), engine.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {job.model}")
    vocab_size = engine.llama_vocab_n_tokens(engine.llama_model_get_vocab(model))
    batch_tokens = engine.llama_context_default_params().n_batch
    batch = engine.llama_batch_init(batch_tokens, 0, 1)
    context: Any = None
    sequences = 0

    def start(prompts: int) -> None:
        """Makes a context that has a sequence for each prompt."""
        nonlocal context, sequences
        if prompts == sequences:
            return
        if context is not None:
            engine.llama_free(context)
        params = engine.llama_context_default_params()
        params.n_seq_max, params.n_ctx = prompts, prompts * job.sequence_tokens
        params.n_threads = params.n_threads_batch = job.threads
        context, sequences = engine.llama_init_from_model(model, params), prompts
        if not context:
            raise RuntimeError(f"llama.cpp has no context for {prompts} x {job.sequence_tokens} tokens")

    def decode(rows: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """Computes rows of (sequence, position, token, whether it is read out).

        Returns the likeliest next token of each row that is read out.
        """
        batch.n_tokens = len(rows)
        for row, (sequence, position, token, is_read) in enumerate(rows):
            batch.token[row], batch.pos[row], batch.logits[row] = token, position, is_read
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
        if engine.llama_decode(context, batch):
            raise RuntimeError(f"llama.cpp could not compute {len(rows)} tokens")
        outputs = sum(is_read for *_, is_read in rows)
        if not outputs:
            return []
        logits = np.ctypeslib.as_array(engine.llama_get_logits(context), (outputs, vocab_size))
        return [int(token) for token in logits.argmax(axis=1)]

    def generate(prompts: list[list[int]], max_tokens: int) -> Continuation:
        start(len(prompts))
        engine.llama_memory_clear(engine.llama_get_memory(context), False)
        length = len(prompts[0])
        rows = [
            (sequence, position, token, position == length - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        began = time.perf_counter()
        latest: list[int] = []
        first_seconds = []
        for chunk in range(0, len(rows), batch_tokens):
            found = decode(rows[chunk : chunk + batch_tokens])
            latest += found
            first_seconds += [time.perf_counter() - began] * len(found)
        token_ids = [[token] for token in latest]
        for position in range(length, length + max_tokens - 1):
            latest = decode([(sequence, position, token, True) for sequence, token in enumerate(latest)])
            for ids, token in zip(token_ids, latest, strict=True):
                ids.append(token)
        return Continuation(token_ids, time.perf_counter() - began, statistics.median(first_seconds))

    start(job.batch)
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


ENGINES: dict[str, Load] = {
    "transformers": transformers,
    "ctranslate2": ctranslate2,
    "vllm": vllm,
    "llamacpp": llamacpp,
    "llamacpp-compiled": llamacpp_compiled,
}

if __name__ == "__main__":
    serve(ENGINES[sys.argv[1]], sys.stdin, private_stdout())
