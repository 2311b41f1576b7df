"""A click group that imports a command only when it is used, so no command waits for another's imports."""

import importlib
import importlib.util
from collections.abc import Mapping

import click


class LazyGroup(click.Group):
    """A group whose commands are named as `module:attribute`.

    Other packages register commands as entry points of their distribution (importlib.metadata), so this
    package does not contain their names.
    """

    def __init__(
        self,
        *args: object,
        commands_at: Mapping[str, str] | None = None,
        registered_in: str = "",
        **attributes: object,
    ) -> None:
        """commands_at: where each command is. registered_in: the group of entry points; empty: none."""
        super().__init__(*args, **attributes)  # type: ignore[arg-type]  # passes click's own arguments on
        self._commands_at = commands_at or {}
        self._registered_in = registered_in

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """The names: first those of `commands_at` in order, then all others alphabetically."""
        return [*self._commands_at, *sorted({*self.commands, *self._registered()})]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports a command and returns it. None: there is no such command."""
        place = self._commands_at.get(cmd_name)
        if place is None and cmd_name not in self.commands:
            place = self._registered().get(cmd_name)
        if place is None:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = place.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{place} is not a command")
        return command

    def _registered(self) -> dict[str, str]:
        """The place of each registered command. Commands of missing packages are left out (as in images)."""
        return {
            name: place
            for name, place in registered(self._registered_in).items()
            if importlib.util.find_spec(package_of(place)) is not None
        }


def registered(group: str) -> dict[str, str]:
    """The entry points of a group: name, and `module:attribute`. Nothing is imported."""
    from importlib.metadata import entry_points

    return {one.name: one.value for one in entry_points(group=group)} if group else {}


def package_of(place: str) -> str:
    """The top-level package of a `module:attribute`."""
    return place.partition(":")[0].partition(".")[0]
