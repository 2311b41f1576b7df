"""`helios chat`: a conversation in the terminal."""

import asyncio
import contextlib
import sys
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import click

from helios.cli.answering import answering_gateway
from helios.cli.sampling_options import RequestOptions, request_options, utf8
from helios.cli.target import target_option
from helios.client import AsyncClient, generate_request
from helios.errors import HeliosError, InvalidRequestError
from helios.v1 import generation_pb2
from helios.v1.inference_pb2 import ChatMessage, ChatMessages

_QUIT, _CLEAR = "/quit", "/clear"
# Longest answer, if the gateway allows it. A text that is continued is shorter by default.
_MAX_TOKENS = 1024


@click.command()
@click.option("--system", help="What the model is told first, before the conversation.")
@request_options
@target_option("gateway")
def chat(*, system: str | None, target: str | None, **chosen: Any) -> None:
    """Talk to a model that has a chat template. Each line of stdin is a message.

    /clear forgets the conversation, /quit or Ctrl-D ends it, and Ctrl-C ends an answer. If no stack runs and
    --model is given, one is started for this command alone.
    """
    options = RequestOptions(**chosen)
    first = utf8(system or "", "--system")
    with (
        answering_gateway(target, options.model) as gateway,
        _Conversation(gateway, options, first) as conversation,
    ):
        if sys.stdin.isatty():
            _talk(conversation)
        else:
            for line in sys.stdin.buffer:
                if not conversation.take(_decoded(line)):
                    break


async def _connect(gateway: str) -> AsyncClient:
    # It must be made in the event loop.
    return AsyncClient(gateway)


def _talk(conversation: "_Conversation") -> None:
    """A conversation at a terminal, with line editing. An error ends only the answer, and so does Ctrl-C."""
    # Importing it gives `input` its line editing.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    click.secho(f"{_CLEAR} forgets the conversation, {_QUIT} or Ctrl-D ends it.", dim=True, err=True)
    goes_on = True
    while goes_on:
        try:
            goes_on = conversation.take(utf8(input("> "), "the message"))
        except EOFError:
            click.echo()
            goes_on = False
        except KeyboardInterrupt:
            click.echo()
        except HeliosError as error:
            click.echo(f"error: {error.message}", err=True)


def _decoded(line: bytes) -> str:
    try:
        return line.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"a line of stdin is not UTF-8: {error}") from error


class _Conversation:
    """The messages so far. If they no longer fit into the model's context, the oldest turns are forgotten.

    Answers are awaited in an event loop, where Ctrl-C only cancels. A KeyboardInterrupt within gRPC's code
    could leave a lock behind, and the next answer would never come.
    """

    def __init__(self, gateway: str, options: RequestOptions, system: str) -> None:
        """gateway: host:port. system: the first message, which stays. Empty: none."""
        self._loop = asyncio.Runner()
        self._client = self._loop.run(_connect(gateway))
        self._options = options
        self._head = [ChatMessage(role="system", content=system)] if system else []
        self._turns: list[ChatMessage] = []
        self._said_cut = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loop.run(self._client.close())
        self._loop.close()

    def take(self, line: str) -> bool:
        """Obeys a command or answers a message. Returns False when the conversation has ended."""
        if line == _CLEAR:
            self._turns.clear()
            self._said_cut = False
        elif line.strip() and line != _QUIT:
            self._loop.run(self._answer(line))
        return line != _QUIT

    async def _answer(self, line: str) -> None:
        """Streams the answer to a message. If it is cancelled, what was said so far is the answer.

        Raises HeliosError. Without an answer the message is forgotten.
        """
        if self._options.max_tokens is None:
            limits = (await self._client.status()).limits
            self._options = replace(self._options, max_tokens=min(_MAX_TOKENS, limits.max_tokens))
        messages = [*self._head, *self._turns, ChatMessage(role="user", content=line)]
        request = generate_request(
            ChatMessages(messages=messages, drop_oldest_turns=True),
            model=self._options.model,
            sampling=self._options.sampling(),
            max_perplexity_increase=self._options.max_perplexity_increase,
            objective=self._options.parsed_objective(),
        )
        said, dropped = "", 0
        try:
            async for event in self._client.generate(request):
                if isinstance(event, generation_pb2.Token):
                    said += event.text
                    click.echo(event.text, nl=False)
                    sys.stdout.flush()
                else:
                    dropped = event.dropped_messages
                    click.echo()
        except HeliosError:
            if said:
                click.echo()
            raise
        except asyncio.CancelledError:
            if said:
                self._turns = [*messages[len(self._head) :], ChatMessage(role="assistant", content=said)]
            raise
        self._turns = [*messages[len(self._head) + dropped :], ChatMessage(role="assistant", content=said)]
        if dropped and not self._said_cut:
            self._said_cut = True
            note = "The conversation no longer fits into the model's context. The oldest turns are left out."
            click.secho(note, dim=True, err=True)
