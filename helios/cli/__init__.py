"""The `helios` command."""

import shlex
import shutil
import sys
import textwrap

import click

from helios import __version__
from helios.cli.lazy_group import LazyGroup, package_of, registered
from helios.errors import HeliosError

_COMMANDS = {
    "up": "helios.cli.up:up",
    "down": "helios.cli.up:down",
    "generate": "helios.cli.generate:generate",
    "chat": "helios.cli.chat:chat",
    "status": "helios.cli.status:status",
    "top": "helios.cli.top:top",
    "slo": "helios.cli.slo:slo",
    "pin": "helios.cli.pin:pin",
    "unpin": "helios.cli.pin:unpin",
    "decisions": "helios.cli.decisions:decisions",
    "profile": "helios.cli.profile:profile",
    "models": "helios.cli.models:models",
}
# Other packages register commands as entry points of this group.
_REGISTERED = "helios.commands"


@click.command(
    cls=LazyGroup,
    commands_at=_COMMANDS,
    registered_in=_REGISTERED,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="helios")
def cli() -> None:
    """Serves early-exit language models from the fewest layers that keep their quality."""


def main() -> None:
    """Runs the command line and exits: 0, 1 after an error, 2 after wrong usage, 130 after Ctrl-C."""
    try:
        status = cli.main(standalone_mode=False)
    except click.NoSuchOption as error:
        _with_dashes_hint(error, sys.argv[1:]).show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except ModuleNotFoundError as error:
        if (error.name or "helios").partition(".")[0] in _own_packages():
            raise
        extras = "helios-serving[engine,local,training]"
        click.echo(f"error: {error.name} is not installed: `pip install '{extras}'`", err=True)
        sys.exit(1)
    except HeliosError as error:
        click.echo(_for_reading(f"error: {error.message}"), err=True)
        sys.exit(1)
    sys.exit(status or 0)


def _own_packages() -> set[str]:
    """Packages of this project and of registered commands. If a module of theirs is missing, it is a bug."""
    from helios.cli.models import REGISTERED

    places = [*registered(_REGISTERED).values(), *registered(REGISTERED).values()]
    return {"helios", "services", *map(package_of, places)}


def _for_reading(text: str) -> str:
    """The text, wrapped between words when it is written to a terminal."""
    if not sys.stderr.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def _with_dashes_hint(error: click.NoSuchOption, words: list[str]) -> click.NoSuchOption:
    """The error, with a hint when an argument that begins with a dash was taken for an option."""
    given = next((word for word in words if word.startswith(error.option_name)), None)
    command = error.ctx.command if error.ctx is not None else None
    arguments = [one for one in command.params if isinstance(one, click.Argument)] if command else []
    # If click knows an option with nearly the same name, the user mistyped it.
    if given is None or error.ctx is None or not arguments or error.possibilities:
        return error
    hint = (
        "An argument that begins with a dash goes last, after --: "
        f"{error.ctx.command_path} -- {shlex.quote(given)}"
    )
    return click.NoSuchOption(error.option_name, f"{error.message} {hint}", ctx=error.ctx)
