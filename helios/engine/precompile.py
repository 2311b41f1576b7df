"""`python -m helios.engine.precompile` compiles the kernels of workers and profilers in advance.

With `--all-targets` it compiles them for every class of processors, for images that may start on any of them.
Code for other classes than this machine's is compiled but never run.
"""

import argparse
import logging
import os
import pickle
import platform
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from helios import catalog
from helios.engine.engine import Engine
from helios.engine.evaluation.candidate import load_candidate
from helios.engine.evaluation.evaluate import evaluate
from helios.engine.evaluation.settings import EvaluationSettings
from helios.engine.kernels import jit, processor
from helios.engine.kernels.processors.target import Target
from helios.engine.settings import EngineSettings
from helios.errors import HeliosError

log = logging.getLogger(__name__)

_MEMORY_BYTES = 256 << 20
_PROMPT_TOKENS = 32


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1: something could not be compiled."""
    parser = argparse.ArgumentParser(prog="python -m helios.engine.precompile", description=__doc__)
    parser.add_argument("--models-dir", type=Path, help="default: the bundled models")
    parser.add_argument("--all-targets", action="store_true", help="for every class of processors")
    # For the subprocess of another target, which gets the signatures on stdin.
    parser.add_argument("--signatures", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        log.info("%s", jit.describe())
        if chosen.signatures:
            jit.compile_for(pickle.load(sys.stdin.buffer))
            return 0
        for entry in catalog.list_models(catalog.find_models_dir(chosen.models_dir)):
            call_all(entry.path)
    except HeliosError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return compile_for_others() if chosen.all_targets else 0


def call_all(model: Path) -> None:
    """Serves and evaluates a model like worker and profiler do by default, as briefly as possible."""
    Engine.load(model, settings=EngineSettings(precision="auto", memory_bytes=_MEMORY_BYTES))
    settings = EvaluationSettings(
        generated_tokens=2, batches=(1,), repetitions=1, precision="auto", memory_bytes=_MEMORY_BYTES
    )
    candidate = load_candidate(catalog.read_model(model), settings)
    ids = candidate.tokenizer.encode("And the LORD said unto Moses, " * _PROMPT_TOKENS).ids
    evaluate(candidate, [ids[:_PROMPT_TOKENS]], settings)


def compile_for_others() -> int:
    """Compiles, for all other targets, what this process has called. LLVM allows one target per process."""
    signatures = pickle.dumps(jit.signatures())

    def compile_for(target: Target) -> int:
        command = [sys.executable, "-m", "helios.engine.precompile", "--signatures"]
        variables = os.environ | {processor.VARIABLE: target.name}
        return subprocess.run(command, input=signatures, env=variables, check=False).returncode

    # On other architectures there are no classes, only Numba's own description of the processor.
    is_x86 = platform.machine() == "x86_64"
    others = [target for target in processor.TARGETS if is_x86 and target != processor.TARGET]
    with ThreadPoolExecutor(os.cpu_count()) as processes:
        return int(any(processes.map(compile_for, others)))


if __name__ == "__main__":
    sys.exit(main())
