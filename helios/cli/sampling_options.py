"""The options with which a command says how tokens are chosen and what their plan is chosen for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from helios.errors import InvalidRequestError
from helios.routing.preference import Preference
from helios.slo import Objective
from helios.v1 import generation_pb2

_Command = TypeVar("_Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--max-tokens", type=click.IntRange(min=0), help="Tokens to generate at most."),
    click.option("--temperature", type=float, help="0, the default, is greedy."),
    click.option("--top-k", type=click.IntRange(min=0), help="Sample among the k most likely tokens."),
    click.option("--top-p", type=float, help="Sample among the tokens that make up this probability."),
    click.option(
        "--repetition-penalty", type=float, help="Above 1: what was said already becomes less likely."
    ),
    click.option("--seed", type=click.IntRange(min=0, max=(1 << 64) - 1), help="Same seed, same text."),
    click.option("--stop", multiple=True, help="End before this string. Can be given several times."),
    click.option("--model", default="", help="Default: any model that is being served."),
    click.option(
        "--max-perplexity-increase",
        type=float,
        metavar="SHARE",
        help="Largest expected rise of its perplexity (0.02: 2 %). Default: the SLO's.",
    ),
    click.option(
        "--objective",
        type=click.Choice([one.value for one in Preference.OBJECTIVES]),
        help="What its plan is chosen for. Default: the SLO's.",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """The values of these options. None: the gateway's default."""

    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: tuple[str, ...]
    model: str
    max_perplexity_increase: float | None
    objective: str | None

    def sampling(self, *, ignore_eos: bool = False) -> generation_pb2.SamplingParams:
        """How tokens are chosen. Raises InvalidRequestError when a stop string is not UTF-8."""
        return generation_pb2.SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=[utf8(string, "--stop") for string in self.stop],
            ignore_eos=ignore_eos,
        )

    def parsed_objective(self) -> Objective | None:
        """What the plan is chosen for."""
        return None if self.objective is None else Objective(self.objective)


def request_options(command: _Command) -> _Command:
    """Adds the options. Their values are the fields of RequestOptions."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def utf8(argument: str, name: str) -> str:
    """The argument. Raises InvalidRequestError when it is not UTF-8. name: what it is, for the message."""
    # Python turns bytes in arguments that are not UTF-8 into lone surrogates.
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError(f"{name} is not UTF-8") from None
    return argument
