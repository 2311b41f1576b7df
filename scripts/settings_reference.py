"""Writes the tables of docs/settings.md from the settings classes: `python scripts/settings_reference.py`.

A test fails when the tables are not current.
"""

import types
import typing
from pathlib import Path

from pydantic.fields import FieldInfo

from helios.settings import ServiceSettings
from services.controller.settings import ControllerSettings
from services.gateway.settings import GatewaySettings
from services.profiler.settings import ProfilerSettings
from services.worker.settings import WorkerSettings

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"
SERVICES: dict[str, type[ServiceSettings]] = {
    "gateway": GatewaySettings,
    "worker": WorkerSettings,
    "profiler": ProfilerSettings,
    "controller": ControllerSettings,
}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def table(settings: type[ServiceSettings]) -> str:
    """One row per setting: flag, variable, default, description and allowed values."""
    prefix = settings.model_config.get("env_prefix", "")
    rows = ["| flag | variable | default | what |", "| --- | --- | --- | --- |"]
    for name, field in settings.model_fields.items():
        flag = f"`--{name.replace('_', '-')}`"
        variable = f"`{prefix}{name.upper()}`"
        rows.append(f"| {flag} | {variable} | {_default(field)} | {_description(field)} |")
    return "\n".join(rows)


def render(page: str) -> str:
    """Returns the page with new tables. The table of each service is between two marks.

    Raises ValueError when a mark is missing.
    """
    for service, settings in SERVICES.items():
        begin, end = f"<!-- settings of the {service} -->", f"<!-- end of the {service} -->"
        head, old, rest = page.partition(begin)
        _, closed, tail = rest.partition(end)
        if not (old and closed):
            raise ValueError(f"the page lacks {begin} or {end}")
        page = f"{head}{begin}\n{table(settings)}\n{end}{tail}"
    return page


def _default(field: FieldInfo) -> str:
    return "" if field.default in (None, "") else f"`{field.default}`"


def _description(field: FieldInfo) -> str:
    limits = [
        f"{words} {getattr(bound, key)}"
        for bound in field.metadata
        for key, words in _BOUNDS.items()
        if getattr(bound, key, None) is not None
    ]
    if choices := _choices(field.annotation):
        limits.append("one of " + ", ".join(choices))
    text = (field.description or "").replace("|", "\\|")
    return f"{text} ({'; '.join(limits)})" if limits else text


def _choices(annotation: object) -> list[str]:
    """The values of a Literal, or of a Literal within a union."""
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return [str(value) for value in typing.get_args(annotation)]
    if origin in (typing.Union, types.UnionType):
        return [value for part in typing.get_args(annotation) for value in _choices(part)]
    return []


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
