"""`helios generate`: streams text to the terminal."""

import json
import sys
import time
from typing import Any

import click
from google.protobuf.json_format import MessageToDict

from helios.cli.answering import answering_gateway
from helios.cli.sampling_options import RequestOptions, request_options, utf8
from helios.cli.target import target_option
from helios.client import Client, Event, generate_request
from helios.errors import InvalidRequestError
from helios.v1 import generation_pb2
from helios.v1.inference_pb2 import ChatMessage, ChatMessages


@click.command()
@click.argument("prompt")
@click.option("--chat", is_flag=True, help="PROMPT is a user's message: apply the model's chat template.")
@request_options
@click.option("--ignore-eos", is_flag=True, help="Go on after the model's end of text.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds it may take.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per event.")
@target_option("gateway")
def generate(
    *,
    prompt: str,
    chat: bool,
    ignore_eos: bool,
    timeout: float | None,
    as_json: bool,
    target: str | None,
    **chosen: Any,
) -> None:
    """Continue PROMPT, token by token. `-` reads it from stdin, without its last newline.

    If no stack runs and --model is given, one is started for this command alone.
    """
    options = RequestOptions(**chosen)
    text = _read_prompt(prompt)
    request = generate_request(
        ChatMessages(messages=[ChatMessage(role="user", content=text)]) if chat else text,
        model=options.model,
        sampling=options.sampling(ignore_eos=ignore_eos),
        max_perplexity_increase=options.max_perplexity_increase,
        objective=options.parsed_objective(),
    )
    show = _show_json if as_json else _show_text
    token_times = []
    with answering_gateway(target, options.model) as gateway, Client(gateway) as client:
        started = time.monotonic()
        for event in client.generate(request, timeout):
            show(event)
            if isinstance(event, generation_pb2.Token):
                token_times.append(time.monotonic() - started)
            elif not as_json and sys.stderr.isatty():
                click.secho(_summary(event, token_times), dim=True, err=True)


def _read_prompt(argument: str) -> str:
    if argument != "-":
        return utf8(argument, "the prompt")
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"the prompt on stdin is not UTF-8: {error}") from error


def _show_text(event: Event) -> None:
    if isinstance(event, generation_pb2.Token):
        click.echo(event.text, nl=False)
        sys.stdout.flush()
    else:
        click.echo()


def _show_json(event: Event) -> None:
    fields = MessageToDict(event, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    # A field that may be unset is always there, as null.
    fields = {field.name: fields.get(field.name) for field in event.DESCRIPTOR.fields}
    if isinstance(event, generation_pb2.Finish):
        fields = {"event": "finish", **fields, "reason": _reason(event)}
    else:
        fields = {"event": "token", **fields}
    click.echo(json.dumps(fields, ensure_ascii=False))
    sys.stdout.flush()


def _reason(finish: generation_pb2.Finish) -> str:
    name = generation_pb2.FinishReason.Name(finish.reason)
    return name.removeprefix("FINISH_REASON_").lower()


def _summary(finish: generation_pb2.Finish, token_times: list[float]) -> str:
    """One line about a stream that has ended, and a second one if there is a reason for its plan."""
    parts = [f"{finish.completion_tokens} tokens ({_reason(finish)})"]
    if token_times:
        parts.append(f"{len(token_times) / token_times[-1]:.0f} tokens/s")
        parts.append(f"first after {token_times[0] * 1000:.0f} ms")
        parts.append(f"{finish.model}, {finish.depth} layers")
    if finish.resumed:
        parts.append(f"went on with another worker {finish.resumed} times")
    summary = " · ".join(parts)
    if finish.plan_reason:
        plan = f"{finish.model} at depth {finish.depth}"
        if finish.HasField("expected_perplexity_increase"):
            plan += f", perplexity {finish.expected_perplexity_increase:+.1%} expected"
        summary += f"\n{plan}: {finish.plan_reason}"
    return summary
