"""The engines that are compared, each in one precision, and the processes in which they run."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.peers import runner
from bench.peers.environment import variables
from bench.peers.leash import leashed
from bench.peers.runner import Job
from helios.architectures.opt import OPT
from helios.architectures.spec import ModelConfig
from helios.errors import HeliosError, OutOfMemoryError, UnavailableError
from helios.hardware import available_memory
from helios.supervisor import reason_of_end

HELIOS = "helios"
# Bytes of a weight. ggml's types have scales for each 32 weights, in float16.
_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "q8_0": 34 / 32, "q4_1": 20 / 32}
# ggml multiplies its types of whole numbers in int8.
_PRODUCTS = {"q8_0": "int8", "q4_1": "int8"}
# llama.cpp, with the prebuilt server of xllamacpp, and compiled for this processor.
_LLAMA_CPP = ("llamacpp", "llamacpp-compiled")
# Memory of a process beside weights and KV: code, buffers and fragmentation.
_PROCESS_BYTES = 1 << 30
# An engine that takes longer for an answer hangs.
_ANSWER_SECONDS = 1800.0
_STOP_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Contender:
    """An engine in one precision, with a share of the layers."""

    engine: str
    precision: str
    depth_share: float = 1.0

    @property
    def name(self) -> str:
        """Its name on the command line and in results."""
        part = "" if self.depth_share == 1 else "-half"
        return f"{self.engine}-{self.precision}{part}"

    @property
    def is_peer(self) -> bool:
        """Whether it is an engine other than Helios."""
        return self.engine != HELIOS

    def depth(self, num_layers: int) -> int:
        """How many of `num_layers` layers it loads."""
        return max(1, int(num_layers * self.depth_share))

    def is_part_of(self, other: "Contender") -> bool:
        """Whether it is the same engine and precision with fewer layers."""
        mine = (self.engine, self.precision)
        return mine == (other.engine, other.precision) and self.depth_share < other.depth_share

    @property
    def weight_bytes(self) -> float:
        """Bytes that a step reads for each weight."""
        return _BYTES[self.precision]

    @property
    def products(self) -> str:
        """The precision in which it multiplies."""
        return _PRODUCTS.get(self.precision, self.precision)

    @property
    def is_rival(self) -> bool:
        """Whether Helios is compared with it: it is a peer with at least 8 bits for each weight."""
        return self.is_peer and self.weight_bytes >= 1

    @property
    def reads_gguf(self) -> bool:
        """Whether it reads models as GGUF files."""
        return self.engine in _LLAMA_CPP

    def serves(self, model_type: str) -> bool:
        """Whether its engine has the architecture. llama.cpp has no OPT."""
        return model_type != OPT.model_type or self.engine not in _LLAMA_CPP


# In the order of their turns. The tokens of all others are compared with those of the first.
CONTENDERS = (
    Contender("transformers", "float32"),
    Contender("transformers", "bfloat16"),
    Contender("ctranslate2", "float32"),
    Contender("ctranslate2", "int8"),
    Contender("vllm", "bfloat16"),
    *(Contender(engine, precision) for engine in _LLAMA_CPP for precision in ("q8_0", "q4_1")),
    Contender(HELIOS, "float32"),
    Contender(HELIOS, "bfloat16"),
    Contender(HELIOS, "int8"),
    Contender(HELIOS, "int8", 0.5),
)
PEERS = tuple(dict.fromkeys(one.engine for one in CONTENDERS if one.is_peer))


class Runner:
    """A contender's process, with a model loaded."""

    def __init__(self, contender: Contender, job: Job, python: Path, log: Path) -> None:
        """Starts it and waits until it has loaded. Raises UnavailableError with the last lines of its log."""
        self.contender = contender
        self._log = log
        module = (
            ("-m", "bench.systems.helios_runner")
            if not contender.is_peer
            else (str(Path(runner.__file__)), contender.engine)
        )
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                leashed([str(python), "-P", *module]),
                env=variables(contender.engine, job.threads, job.kv_bytes),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                # vLLM starts child processes. In one group they can be paused and ended together.
                process_group=0,
            )
        try:
            with awake(self.process_id):
                self.loaded_seconds = float(self._ask(asdict(job))["loaded_seconds"])
        except HeliosError:
            self.close()
            raise

    @property
    def process_id(self) -> int:
        """The id of the process, and of the group of all processes that it starts."""
        return self._process.pid

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> runner.Continuation:
        """Continues prompts of one length. Raises UnavailableError when the process cannot."""
        with awake(self.process_id):
            return runner.Continuation(**self._ask({"prompts": prompts, "max_tokens": max_tokens}))

    def close(self) -> None:
        """Ends the process and its children."""
        assert self._process.stdin is not None and self._process.stdout is not None
        # The end of its input stops an engine that still works.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process_id, signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process_id, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        hung = threading.Timer(_ANSWER_SECONDS, self._process.kill)
        hung.start()
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            hung.cancel()
        if not answer:
            raise UnavailableError(
                f"{self.contender.name} ended: {self._reason_of_end()} (all of it: {self._log})"
            )
        return dict(json.loads(answer))

    def _reason_of_end(self) -> str:
        return reason_of_end(self._log.read_text(errors="replace").splitlines())


class Runners:
    """The processes of one model's contenders. As many stay loaded as memory allows."""

    def __init__(self, pythons: Mapping[str, Path], logs: Path) -> None:
        """pythons: the interpreter of each engine. logs: a directory for the logs of the processes."""
        self._pythons, self._logs = pythons, logs
        self._open: list[Runner] = []
        self._warm: set[tuple[str, tuple[int, ...]]] = set()

    def get(self, contender: Contender, job: Job) -> Runner:
        """The contender's process. It is started if there is none.

        Raises OutOfMemoryError if it does not fit, and UnavailableError if it does not start.
        """
        for position, found in enumerate(self._open):
            if found.contender == contender:
                # The list is ordered by last use, so the one in use goes to its end.
                self._open.append(self._open.pop(position))
                return found
        needed = job.memory_bytes
        while needed > available_memory() and self._open:
            # Contenders take turns, so the one used last is needed again last.
            self._close(self._open.pop())
        if needed > (available := available_memory()):
            raise OutOfMemoryError(
                f"{contender.name} would need {needed >> 20} MiB of {available >> 20}; take a smaller batch"
            )
        log = self._logs / f"{contender.name}.log"
        started = Runner(contender, job, self._pythons[contender.engine], log)
        self._open.append(started)
        return started

    def warm_up(self, one: Runner, prompts: Sequence[Sequence[int]]) -> None:
        """Generates two tokens for prompts of this shape, once in the life of the process."""
        mark = (one.contender.name, (len(prompts), len(prompts[0])))
        if mark not in self._warm:
            one.generate(prompts, 2)
            self._warm.add(mark)

    def drop(self, contender: Contender) -> None:
        """Ends a contender's process, if there is one."""
        for one in [one for one in self._open if one.contender == contender]:
            self._open.remove(one)
            self._close(one)

    def close(self) -> None:
        """Ends all processes."""
        while self._open:
            self._close(self._open.pop())

    def _close(self, one: Runner) -> None:
        self._warm = {mark for mark in self._warm if mark[0] != one.contender.name}
        one.close()


@contextlib.contextmanager
def awake(group: int) -> Iterator[None]:
    """Lets the processes of a group run only inside the context, because idle engines spin for a while.

    The group must belong to this session. Then, if this process ends, the kernel wakes the paused group
    (setpgid(2), on orphaned process groups), and the group ends by itself.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGCONT)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGSTOP)


def needed_bytes(contender: Contender, config: ModelConfig, kv_bytes: int) -> int:
    """The most memory that a contender takes: weights, embeddings in float32, KV and the process itself.

    kv_bytes: bytes of the KV in bfloat16.
    """
    if contender.precision == "float32" or contender.engine == "ctranslate2":
        kv_bytes *= 2
    weights = config.parameters(contender.depth(config.num_layers)) * contender.weight_bytes
    return int(weights) + 4 * config.vocab_size * config.embed_size + kv_bytes + _PROCESS_BYTES


def pythons(peers: Mapping[str, Path]) -> dict[str, Path]:
    """The Python interpreter of each engine. Helios uses the one that runs now."""
    return {HELIOS: Path(sys.executable), **peers}
