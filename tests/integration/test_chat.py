"""Conversations: messages over gRPC and `helios chat`, with real workers, gateways and sockets."""

import asyncio
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from helios import stack_state
from helios.client import AsyncClient, Client, generate_request
from helios.errors import CheckpointError, InvalidRequestError, UnavailableError, UnknownModelError
from helios.served import ServedPlan
from helios.v1.generation_pb2 import SamplingParams
from helios.v1.inference_pb2 import ChatMessage, ChatMessages
from tests.scripted_worker import (
    Request,
    Response,
    chunk,
    endless,
    finish,
    redirect,
    scripted_workers,
    well_behaved,
)
from tests.stack import Process, Stack, write_model, write_tokenizer
from tests.streams import stream, until

SHORT = SamplingParams(max_tokens=12, ignore_eos=True)
# Each message is one line between `<s>` and `</s>`. The tokenizer puts `</s>` before a text by itself.
TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% if message.content == 'bomb' %}{{ 10 ** (10 ** (9 + loop.index)) }}{% endif %}
{% if message.content == 'refuse' %}{{ raise_exception('No such talk here.') }}{% endif %}
<s>{{ message.role }} {{ message.content }}</s>
{% endfor %}{% if add_generation_prompt %}<s>assistant{% endif %}"""
CONTEXT = 256


def rendered(*messages: tuple[str, str]) -> str:
    said = "".join(f"<s>{role} {content}</s>\n" for role, content in messages)
    return f"</s>{said}<s>assistant"


def chat(*messages: tuple[str, str], drop: bool = False) -> ChatMessages:
    return ChatMessages(
        messages=[ChatMessage(role=role, content=content) for role, content in messages],
        drop_oldest_turns=drop,
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`talk` has a chat template, `plain` has none."""
    directory = tmp_path_factory.mktemp("chat-models")
    tokenizer_json = write_tokenizer()
    write_model(directory / "talk", tokenizer_json, seed=1, context=CONTEXT)
    write_model(directory / "plain", tokenizer_json, seed=2, context=CONTEXT)
    (directory / "talk" / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "</s>", "chat_template": TEMPLATE})
    )
    return directory


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Process]:
    """A gateway with a worker for each model."""
    parts = Stack(tmp_path_factory.mktemp("chat"), models)
    try:
        workers = [parts.start_worker(model=model).address for model in ("plain", "talk")]
        yield parts.start_gateway(workers, telemetry_seconds=0.05)
    finally:
        parts.close()


@pytest.fixture
async def client(gateway: Process) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(gateway.address) as connection:
        await until(lambda: all_ready(connection), "both workers to be ready")
        yield connection


async def all_ready(client: AsyncClient) -> bool:
    workers = (await client.status()).workers
    return bool(workers) and all(worker.ready for worker in workers)


@pytest.fixture(scope="module")
def tokenizer(models: Path) -> Tokenizer:
    return Tokenizer.from_file(str(models / "talk" / "tokenizer.json"))


@pytest.mark.parametrize("model", ["talk", ""])
async def test_messages_are_the_ids_of_the_rendered_template(
    client: AsyncClient, tokenizer: Tokenizer, model: str
) -> None:
    messages = (("system", "Parse."), ("user", "def f(x):"), ("assistant", " return"), ("user", "import"))
    ids = tokenizer.encode(rendered(*messages), add_special_tokens=False).ids
    assert ids.count(2) == 5, "the template's own start token and four ends"
    by_messages = await stream(client, generate_request(chat(*messages), model=model, sampling=SHORT))
    by_ids = await stream(client, generate_request(ids, model="talk", sampling=SHORT))
    assert by_messages.said == by_ids.said
    assert by_messages.finish.model == "talk"
    assert by_messages.finish.prompt_tokens == len(ids)
    assert by_messages.finish.dropped_messages == 0


@pytest.mark.parametrize(
    ("messages", "model", "reason"),
    [
        (chat(), "", "conversation is empty"),
        (chat(("user", "a")), "plain", "plain has no chat template; send text instead of messages"),
        (
            chat(("user", "a"), ("tool", "b")),
            "",
            r"messages\[1\].role must be system, user or assistant, not",
        ),
        (chat(("", "a")), "", "role must be"),
        (chat(*[("user", "a")] * 2049), "", "2049 messages; this gateway takes at most 2048"),
        (chat(("user", "x y z " * 200)), "", "prompt has .* tokens; the model's context of 256"),
        (chat(("user", "x y z " * 200), drop=True), "", "prompt has .* tokens; the model's context of 256"),
        (chat(("user", "word " * 1_000_000)), "", "may have at most 255; shorten it"),
        (chat(("user", "refuse")), "", "chat template of talk .*tokenizer_config.json.* No such talk here."),
    ],
)
async def test_a_bad_conversation_gets_invalid_argument_with_a_reason(
    client: AsyncClient, messages: ChatMessages, model: str, reason: str
) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        await stream(client, generate_request(messages, model=model, sampling=SHORT))


async def test_a_template_that_never_ends_is_ended_and_harms_no_other_stream(
    client: AsyncClient, gateway: Process
) -> None:
    request = generate_request("import", sampling=SHORT)
    alone = await stream(client, request)
    bomb = asyncio.create_task(stream(client, generate_request(chat(("user", "bomb")))))
    assert (await stream(client, request)).said == alone.said
    with pytest.raises(CheckpointError, match=r"chat template of talk .* needs more than 1 s of CPU time"):
        await bomb
    assert (await stream(client, generate_request(chat(("user", "a")), sampling=SHORT))).tokens
    assert "Traceback" not in gateway.log


async def test_the_oldest_turns_are_dropped_until_prompt_and_answer_fit(
    client: AsyncClient, tokenizer: Tokenizer
) -> None:
    system = ("system", "Parse.")
    turns = [(("user", f"number {turn} " * 6), ("assistant", "argument")) for turn in range(20)]
    whole = [system, *(message for turn in turns for message in turn), ("user", "parser")]
    answer = await stream(client, generate_request(chat(*whole, drop=True), sampling=SHORT))
    dropped = answer.finish.dropped_messages
    assert dropped
    assert dropped % 2 == 0
    kept = [system, *whole[1 + dropped :]]
    ids = tokenizer.encode(rendered(*kept), add_special_tokens=False).ids
    assert answer.said == (await stream(client, generate_request(ids, model="talk", sampling=SHORT))).said
    assert len(ids) + 12 <= CONTEXT
    one_more = [system, *whole[dropped - 1 :]]
    assert len(tokenizer.encode(rendered(*one_more), add_special_tokens=False).ids) + 12 > CONTEXT
    with pytest.raises(InvalidRequestError, match="tokens"):
        await stream(client, generate_request(chat(*whole), sampling=SHORT))


async def test_a_conversation_that_fits_loses_nothing_to_a_long_answer(client: AsyncClient) -> None:
    long = SamplingParams(max_tokens=2000, ignore_eos=True)
    request = generate_request(
        chat(("user", "a"), ("assistant", "b"), ("user", "c"), drop=True), sampling=long
    )
    answer = await stream(client, request)
    assert answer.finish.dropped_messages == 0
    assert answer.finish.prompt_tokens + len(answer.tokens) == CONTEXT


async def test_messages_beside_another_prompt_are_refused(gateway: Process) -> None:
    import grpc

    raw = (
        generate_request("a").SerializeToString() + generate_request(chat(("user", "a"))).SerializeToString()
    )
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="both text and messages"):
            async for _ in channel.unary_stream("/helios.v1.InferenceService/Generate")(raw):
                pass


# -- scripted workers: where conversations go ---------------------------------------------------------------


async def dies_after_three(request: Request, seconds: float) -> AsyncIterator[Response]:
    yield chunk(0, 1, 2)
    raise UnavailableError("gone")


async def test_a_lost_worker_is_followed_by_one_with_the_same_ids(stack: Stack, tokenizer: Tokenizer) -> None:
    async with scripted_workers(dies_after_three, well_behaved) as workers:
        for worker in workers:
            worker.chat_templates = {"tiny": TEMPLATE.replace("{{ bos_token }}", "</s>")}
        gateway = stack.start_gateway([worker.address for worker in workers])
        async with AsyncClient(gateway.address) as client:
            await until(lambda: all_ready(client), "the workers to be ready")
            request = generate_request(chat(("user", "a")), sampling=SamplingParams(max_tokens=6))
            whole = await stream(client, request)
    assert whole.finish.resumed == 1
    ids = tokenizer.encode(rendered(("user", "a")), add_special_tokens=False).ids
    asked = [(list(one.prompt_ids), list(one.emitted_ids)) for worker in workers for one in worker.requests]
    assert asked == [(ids, []), (ids, [100, 101, 102])]


async def test_only_models_with_the_same_template_serve_a_conversation(stack: Stack) -> None:
    plans = [ServedPlan(model=model, depth=4) for model in ("first", "second", "third")]

    async def redirects(request: Request, seconds: float) -> AsyncIterator[Response]:
        yield finish(0) if request.model else redirect(*((plan, 0.0) for plan in plans))

    async with scripted_workers(well_behaved, redirects) as workers:
        plain, several = workers
        several.serve(*plans)
        several.chat_templates = {"second": "like", "third": "unlike"}
        gateway = stack.start_gateway([worker.address for worker in workers])
        async with AsyncClient(gateway.address) as client:
            await until(lambda: all_ready(client), "the workers to be ready")
            await stream(client, generate_request(chat(("user", "a"))))
            await stream(client, generate_request(chat(("user", "a")), model="third"))
    assert plain.requests == []
    assert [request.model for request in several.requests] == ["second", "third"]


async def test_a_model_that_could_be_loaded_is_named_with_the_command_that_serves_it(stack: Stack) -> None:
    async with scripted_workers(well_behaved) as (worker,):
        worker.loadable = ["tiny", "talk"]
        gateway = stack.start_gateway([worker.address])
        async with AsyncClient(gateway.address) as client:
            await until(lambda: all_ready(client), "the worker to be ready")
            with pytest.raises(UnknownModelError, match=r"served are tiny.* `helios up --model talk`"):
                await stream(client, generate_request("a", model="talk"))
            with pytest.raises(UnknownModelError, match=r"model nope is not served; served are tiny$"):
                await stream(client, generate_request("a", model="nope"))


# -- the command --------------------------------------------------------------------------------------------


def helios(gateway: Process, *arguments: str) -> list[str]:
    options = ("--target", gateway.address, "--max-tokens", "12")
    return [sys.executable, "-m", "helios.cli", *arguments, *options]


def answer_to(gateway: Process, *messages: tuple[str, str]) -> str:
    with Client(gateway.address) as client:
        request = generate_request(chat(*messages), sampling=SamplingParams(max_tokens=12))
        return list(client.generate(request))[-1].text


def test_a_piped_conversation_keeps_what_was_said(gateway: Process) -> None:
    lines = "def f():\n\nimport sys\n/clear\nimport sys\n/quit\nnever\n"
    command = helios(gateway, "chat", "--system", "Parse.")
    said = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=60, check=False)
    assert (said.returncode, said.stderr) == (0, "")
    system = ("system", "Parse.")
    first = answer_to(gateway, system, ("user", "def f():"))
    second = answer_to(gateway, system, ("user", "def f():"), ("assistant", first), ("user", "import sys"))
    alone = answer_to(gateway, system, ("user", "import sys"))
    assert second != alone
    assert said.stdout == f"{first}\n{second}\n{alone}\n"


def test_a_long_conversation_is_cut_and_says_so_once(gateway: Process) -> None:
    lines = "".join(f"number {turn} of the arguments of a parser\n" for turn in range(16))
    said = subprocess.run(
        helios(gateway, "chat"), input=lines, capture_output=True, text=True, timeout=120, check=False
    )
    assert said.returncode == 0
    assert said.stderr.count("oldest turns") == said.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "line", "reason"),
    [
        (("--model", "plain"), b"a\n", "plain has no chat template"),
        (("--model", "nope"), b"a\n", "nope is not served"),
        ((), b"refuse\n", "No such talk here."),
        ((), b"\xff\n", "UTF-8"),
    ],
)
def test_a_piped_conversation_that_fails_is_one_line_on_stderr(
    gateway: Process, arguments: tuple[str, ...], line: bytes, reason: str
) -> None:
    said = subprocess.run(
        helios(gateway, "chat", *arguments), input=line, capture_output=True, timeout=60, check=False
    )
    assert said.returncode == 1
    assert said.stderr.startswith(b"error: ")
    assert reason in said.stderr.decode()
    assert said.stderr.count(b"\n") == 1


def test_generate_applies_the_template_when_it_is_told_to(gateway: Process) -> None:
    said = subprocess.run(
        helios(gateway, "generate", "--chat", "def f():"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert said.stdout == answer_to(gateway, ("user", "def f():")) + "\n", said.stderr


def test_without_a_stack_a_named_model_gets_one_for_the_command_alone(models: Path, tmp_path: Path) -> None:
    environment = os.environ | {"HELIOS_MODELS_DIR": str(models), "HELIOS_STATE_DIR": str(tmp_path)}

    def run(model: str) -> "subprocess.CompletedProcess[str]":
        command = ["generate", "--model", model, "--chat", "def f():", "--max-tokens", "12"]
        return subprocess.run(
            [sys.executable, "-m", "helios.cli", *command],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    said = run("talk")
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip()
    assert "`helios up --model talk` keeps one running" in said.stderr
    assert stack_state.read(tmp_path) is None
    assert run("nope").stderr.startswith("error: no model 'nope' in")


def test_client_of_the_readme_streams_an_answer(gateway: Process) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(from helios\.client .*?)```", readme, re.DOTALL)
    program = program.replace("127.0.0.1:50051", gateway.address)
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    with Client(gateway.address) as client:
        request = generate_request(chat(("user", "What is an early exit?")))
        assert said.stdout == list(client.generate(request))[-1].text, said.stderr


async def test_in_a_terminal_ctrl_c_ends_an_answer_and_ctrl_d_the_conversation(
    stack: Stack, tokenizer: Tokenizer
) -> None:
    async with scripted_workers(endless) as (worker,):
        worker.chat_templates = {"tiny": TEMPLATE.replace("{{ bos_token }}", "</s>")}
        gateway = stack.start_gateway([worker.address])
        async with AsyncClient(gateway.address) as client:
            await until(lambda: all_ready(client), "the worker to be ready")
        status = await asyncio.to_thread(_type_into, helios(gateway, "chat"))
        assert status == 0
        first, second = (list(request.prompt_ids) for request in worker.requests)
    said = (("user", "def f():"), ("assistant", "x"), ("user", "import"))
    assert first == tokenizer.encode(rendered(*said[:1]), add_special_tokens=False).ids
    assert second == tokenizer.encode(rendered(*said), add_special_tokens=False).ids


def _type_into(command: list[str]) -> int:
    """Runs the command at a terminal and types. Answers begin with `x` and do not end by themselves."""
    terminal, its_side = pty.openpty()
    process = subprocess.Popen(command, stdin=its_side, stdout=its_side, stderr=its_side)
    os.close(its_side)
    seen = b""

    def read_until(text: bytes) -> None:
        nonlocal seen
        while text not in seen:
            assert select.select([terminal], [], [], 60)[0], f"only {seen!r} came"
            seen += os.read(terminal, 4096)
        seen = seen.partition(text)[2]

    try:
        read_until(b"> ")
        os.write(terminal, b"refuse\n")
        read_until(b"No such talk here.\r\n> ")
        for line in (b"def f():", b"import"):
            os.write(terminal, line + b"\n")
            read_until(line + b"\r\nx")
            process.send_signal(signal.SIGINT)
            read_until(b"> ")
        os.write(terminal, b"\x04")
        return process.wait(60)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
