"""`helios models add-exits`, which `helios models` finds as an entry point."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from helios import catalog
from helios.cli.checkpoints import (
    find_checkpoint,
    force_option,
    models_dir_option,
    progress_bars,
)

if TYPE_CHECKING:
    from helios.catalog import ExitHeadKind


class _LayerList(click.ParamType[tuple[int, ...]]):
    name = "layers"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        parts = str(value).split(",")
        if not all(part.strip().isdecimal() for part in parts):
            self.fail(f"{value!r} is not a list of layers such as 2,4,6", param, ctx)
        return tuple(int(part) for part in parts)


@click.command("add-exits")
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--text",
    "texts",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    multiple=True,
    required=True,
    help="UTF-8 text of the kind that will be served, or .jsonl with `text` and perhaps `prompt`. Can be "
    "given several times.",
)
@click.option(
    "--exit-layers", type=_LayerList(), metavar="2,4,6", help="Default: every quarter of the model."
)
@click.option(
    "--head",
    type=click.Choice(["linear", "norm", "shared"]),
    default="linear",
    show_default=True,
    help="A norm and a matrix per exit; a norm per exit; or the model's own final norm, without tuning.",
)
@click.option("--steps", type=click.IntRange(min=1), default=500, show_default=True, help="Of tuning.")
@click.option(
    "--tokens-per-step", type=click.IntRange(min=1), default=2048, show_default=True, help="Of each step."
)
@click.option(
    "--passes",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Over the same part of the text.",
)
@click.option(
    "--length",
    type=click.IntRange(min=2),
    default=256,
    show_default=True,
    help="Tokens of a piece of text that the model reads at once.",
)
@click.option("--lr", type=click.FloatRange(min=0), default=1e-3, show_default=True, help="Learning rate.")
@click.option(
    "--exit-weight",
    type=click.FloatRange(min=0),
    default=0.5,
    show_default=True,
    help="How much the exits learn from the texts.",
)
@click.option(
    "--distill-weight",
    type=click.FloatRange(min=0),
    default=0.5,
    show_default=True,
    help="How much the exits learn from the last layer.",
)
@click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where an interrupted run keeps its state. Default: ~/.cache/helios/training/add-exits-NAME.",
)
@click.option("--exits-only", is_flag=True, help="Write the exits alone, to ship them without the model.")
@models_dir_option
@force_option
def add_exits(
    *,
    source: str,
    target: Path,
    texts: tuple[Path, ...],
    exit_layers: tuple[int, ...] | None,
    head: "ExitHeadKind",
    steps: int,
    tokens_per_step: int,
    passes: int,
    length: int,
    lr: float,
    exit_weight: float,
    distill_weight: float,
    state: Path | None,
    exits_only: bool,
    models_dir: Path | None,
    force: bool,
) -> None:
    """Tune exit heads on the frozen model SOURCE and write the early-exit model to TARGET.

    SOURCE is a folder, or the name of a model in the models directory. An interrupted run
    goes on from its last save when it is started again.
    """
    entry = find_checkpoint(source, models_dir)
    with progress_bars() as progress:
        task = progress.add_task(f"reading exits of {entry.name}", total=None)
        from training import add_exits as adding
        from training.tuning import TuningOptions

        def on_step(now: adding.Progress) -> None:
            text = f"{now.stage} exits of {entry.name}"
            if now.loss is not None:
                text += f", loss {now.loss:.3f}"
            progress.update(task, description=text, completed=now.step, total=now.steps)

        adding.add_exits(
            entry.path,
            target,
            exit_layers=exit_layers,
            head=head,
            texts=texts,
            options=TuningOptions(steps, tokens_per_step, passes, length, lr, exit_weight, distill_weight),
            state=state,
            exits_only=exits_only,
            force=force,
            progress=on_step,
        )
    facts = catalog.EarlyExitFacts.read(target, entry.num_layers)
    depths = ", ".join(map(str, facts.exit_layers))
    click.echo(f"{target}: {facts.num_layers} layers, depths {depths}, default {facts.default_depth}")
