"""Helios as a contender: `python -m bench.systems.helios_runner`. The protocol is bench/peers/runner.py's."""

import math
import sys
from pathlib import Path

from bench.load import decode
from bench.peers.runner import Continuation, Generate, Job, private_stdout, serve
from helios import catalog
from helios.engine import Engine, EngineSettings
from helios.engine.threads import set_threads
from helios.settings import SERVED_BURST_SECONDS, SERVED_PROMPT_READINGS


def load(job: Job) -> Generate:
    """Loads the engine. It does all that serving does: text, log probabilities and confidences."""
    set_threads(job.threads, job.precision)
    entry = catalog.read_model(Path(job.model))
    settings = EngineSettings(
        precision=job.precision,
        memory_bytes=job.memory_bytes,
        max_running=job.batch,
        # Chunks have no bound, because the peers' offline interfaces are made for throughput too.
        prefill_stretch=math.inf,
        burst_seconds=SERVED_BURST_SECONDS,
        prompt_readings=SERVED_PROMPT_READINGS,
    )
    engine = Engine.load(entry.path, job.depth, settings)

    def generate(prompts: list[list[int]], max_tokens: int) -> Continuation:
        run = decode.run(engine, prompts, max_tokens, len(prompts))
        return Continuation(
            token_ids=[list(ids) for ids in run.token_ids],
            seconds=run.seconds,
            first_token_seconds=run.ttft_ms.p50 / 1000,
            overhead=run.overhead,
        )

    return generate


if __name__ == "__main__":
    serve(load, sys.stdin, private_stdout())
