"""Tables and lines that show everything and cut no word, even in a narrow terminal."""

import textwrap
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

# Wider than any table.
_UNBOUNDED = 100_000


def show(console: Console, *parts: RenderableType) -> None:
    """Prints parts. A word wider than the terminal is not cut; the terminal wraps it."""
    for part in parts:
        console.print(part, crop=False, highlight=False)


@dataclass(frozen=True, slots=True)
class Line:
    """A text that is wrapped between words. Lines after the first are indented."""

    text: str
    style: str = ""
    indent: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        for paragraph in self.text.splitlines():
            for line in textwrap.wrap(
                paragraph,
                options.max_width,
                initial_indent=self.indent,
                subsequent_indent=f"{self.indent}  ",
                break_long_words=False,
                break_on_hyphens=False,
            ):
                yield Text(line, self.style, no_wrap=True, overflow="ignore")


@dataclass(frozen=True, slots=True)
class _Row:
    cells: tuple[Text, ...]
    note: str
    style: str
    ends_section: bool


class Rows:
    """A table of short cells. A row may have a note of any length.

    Notes are the last column if the table fits with them, otherwise lines below the table. If the table
    itself does not fit, each row becomes a line, in which every cell follows the name of its column.
    """

    def __init__(self, *columns: str, left: Collection[str] = (), names: int = 1, note: str = "") -> None:
        """left: columns that are aligned to the left. names: how many of the first columns name a row.

        note: the heading of the notes.
        """
        self._columns = columns
        self._left = left
        self._names = names
        self._note = note
        self._rows: list[_Row] = []

    def add(self, *cells: str | Text, note: str = "", style: str = "", ends_section: bool = False) -> None:
        """Adds a row. A str is shown literally, without markup."""
        texts = tuple(cell if isinstance(cell, Text) else Text(cell) for cell in cells)
        self._rows.append(_Row(texts, note, style, ends_section))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        unbounded = options.update(max_width=_UNBOUNDED)
        has_notes = any(row.note for row in self._rows)
        for with_notes, padding in ((True, 1), (False, 1), (False, 0)):
            table = self._table(padding, with_notes=with_notes and has_notes)
            if console.measure(table, options=unbounded).maximum <= options.max_width:
                yield table
                break
        else:
            with_notes = False
            yield from map(self._as_line, self._rows)
        if not with_notes:
            for row in self._rows:
                if row.note:
                    yield Line(f"{self._name(row)}: {row.note}", row.style)

    def _table(self, padding: int, *, with_notes: bool) -> Table:
        table = Table(
            box=box.SIMPLE_HEAD,
            padding=(0, padding, 0, 0),
            pad_edge=False,
            show_header=any(self._columns),
        )
        for column in self._columns:
            table.add_column(column, justify="left" if column in self._left else "right", no_wrap=True)
        if with_notes:
            table.add_column(self._note, no_wrap=True)
        for row in self._rows:
            notes = (Text(row.note),) if with_notes else ()
            table.add_row(*row.cells, *notes, style=row.style, end_section=row.ends_section)
        return table

    def _name(self, row: _Row) -> str:
        return " ".join(cell.plain for cell in row.cells[: self._names])

    def _as_line(self, row: _Row) -> Line:
        told = zip(self._columns[self._names :], row.cells[self._names :], strict=True)
        cells = [f"{column} {' / '.join(cell.plain.split(chr(10)))}".strip() for column, cell in told]
        return Line(f"{self._name(row)}: {', '.join(filter(None, cells))}", row.style)
