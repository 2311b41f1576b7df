"""`helios generate`: streams text to the terminal."""

import json
import sys
import time

import click
from google.protobuf.json_format import MessageToDict

from helios.cli.target import target_option
from helios.client import Client, Event, generate_request
from helios.errors import InvalidRequestError
from helios.routing.preference import Preference
from helios.slo import Objective
from helios.stack_state import find_gateway
from helios.v1 import generation_pb2


@click.command()
@click.argument("prompt")
@click.option("--max-tokens", type=click.IntRange(min=0), help="Tokens to generate at most.")
@click.option("--temperature", type=float, help="0, the default, is greedy.")
@click.option("--top-k", type=click.IntRange(min=0), help="Sample among the k most likely tokens.")
@click.option("--top-p", type=float, help="Sample among the tokens that make up this probability.")
@click.option("--repetition-penalty", type=float, help="Above 1: what was said already becomes less likely.")
@click.option("--seed", type=click.IntRange(min=0, max=(1 << 64) - 1), help="Same seed, same text.")
@click.option("--stop", multiple=True, help="End before this string. Can be given several times.")
@click.option("--ignore-eos", is_flag=True, help="Go on after the model's end of text.")
@click.option("--model", default="", help="Default: any model that is being served.")
@click.option(
    "--max-perplexity-increase",
    type=float,
    metavar="SHARE",
    help="Largest expected rise of its perplexity (0.02: 2 %). Default: the SLO's.",
)
@click.option(
    "--objective",
    type=click.Choice([one.value for one in Preference.OBJECTIVES]),
    help="What its plan is chosen for. Default: the SLO's.",
)
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds it may take.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per event.")
@target_option("gateway")
def generate(
    *,
    prompt: str,
    max_tokens: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float | None,
    seed: int | None,
    stop: tuple[str, ...],
    ignore_eos: bool,
    model: str,
    max_perplexity_increase: float | None,
    objective: str | None,
    timeout: float | None,
    as_json: bool,
    target: str | None,
) -> None:
    """Continue PROMPT, token by token. `-` reads it from stdin, without its last newline."""
    sampling = generation_pb2.SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=[_text(string, "--stop") for string in stop],
        ignore_eos=ignore_eos,
    )
    request = generate_request(
        _read_prompt(prompt),
        model=model,
        sampling=sampling,
        max_perplexity_increase=max_perplexity_increase,
        objective=None if objective is None else Objective(objective),
    )
    show = _show_json if as_json else _show_text
    started = time.monotonic()
    token_times = []
    with Client(find_gateway(target)) as client:
        for event in client.generate(request, timeout):
            show(event)
            if isinstance(event, generation_pb2.Token):
                token_times.append(time.monotonic() - started)
            elif not as_json and sys.stderr.isatty():
                click.secho(_summary(event, token_times), dim=True, err=True)


def _read_prompt(argument: str) -> str:
    if argument != "-":
        return _text(argument, "the prompt")
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"the prompt on stdin is not UTF-8: {error}") from error


def _text(argument: str, name: str) -> str:
    # Python turns bytes in arguments that are not UTF-8 into lone surrogates.
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError(f"{name} is not UTF-8") from None
    return argument


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
