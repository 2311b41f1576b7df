"""`helios bench prefill`."""

from pathlib import Path

import click
from rich.console import Console

from bench.commands.options import cache_dir_option, count_option, json_option
from bench.systems.shapes import SHAPES


@click.command()
@json_option
@click.option(
    "--shape",
    type=click.Choice(list(SHAPES)),
    default="opt-125m",
    show_default=True,
    help="Model, with random weights.",
)
@count_option("--chats", default=8, help="Streams that run meanwhile.")
@count_option("--chat-tokens", at_least=4, default=256, help="Tokens of each stream.")
@count_option("--prompt-tokens", at_least=2, default=1500)
@count_option("--rounds", default=3)
@count_option("--threads", default=2, help="Threads of the engine.")
@click.option("--precision", default="auto", show_default=True)
@cache_dir_option("the random weights are")
def prefill(
    *,
    json_path: Path | None,
    shape: str,
    chats: int,
    chat_tokens: int,
    prompt_tokens: int,
    rounds: int,
    threads: int,
    precision: str,
    cache_dir: Path,
) -> None:
    """The time between a stream's tokens beside long prompts, and the time to the first token of a prompt
    whose beginning another one had."""
    from bench.engine import prefill as bench

    with Console(stderr=True).status("loading the model") as status:
        report = bench.measure(
            shape,
            chats=chats,
            chat_tokens=chat_tokens,
            prompt_tokens=prompt_tokens,
            rounds=rounds,
            threads=threads,
            precision=precision,
            cache_dir=cache_dir,
            say=status.update,
        )
    report.show()
    if json_path is not None:
        report.write(json_path)
