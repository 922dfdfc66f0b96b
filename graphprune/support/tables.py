"""Tables for a terminal, from rows of any kind."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import GraphPruneError


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of `table`.

    `key` is the key, the attribute or the position of the value in a row; or a function of the row. `format` is a
    format specification such as ".2f" or a function from the value to text; None is always shown as "-". With `wrap`
    long text is broken into lines where the terminal ends, instead of being cut off.
    """

    header: str
    key: str | int | Callable[[Any], Any]
    format: str | Callable[[Any], str] = ""
    justify: Literal["left", "right", "center"] = "right"
    wrap: bool = False

    def value(self, row: Any) -> Any:
        """What this column shows of `row`, before formatting."""
        if callable(self.key):
            return self.key(row)
        if isinstance(self.key, int) or isinstance(row, Mapping):
            return row[self.key]
        return getattr(row, self.key)

    def text(self, row: Any) -> str:
        """What this column shows of `row`."""
        value = self.value(row)
        if value is None:
            return "-"
        return self.format(value) if callable(self.format) else format(value, self.format)


def table(
    rows: Iterable[Any],
    columns: Sequence[Column | str],
    *,
    title: str | None = None,
    caption: str | None = None,
) -> Table:
    """A `rich` table of `rows` (mappings, sequences or objects), one line each.

    A column given as a string is its header and its key at once; the first column is set to the left, further ones
    to the right, where they are strings. Text is shown as it is: square brackets are no markup.

    Raises:
        GraphPruneError: there are no columns, or a row lacks what a column shows.
    """
    if not columns:
        raise GraphPruneError("a table needs at least one column")
    chosen = [
        column if isinstance(column, Column) else Column(column, column, justify="right" if i else "left")
        for i, column in enumerate(columns)
    ]
    result = Table(
        title=None if title is None else Text(title),
        caption=None if caption is None else Text(caption),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        pad_edge=False,
    )
    for column in chosen:
        result.add_column(Text(column.header), justify=column.justify, no_wrap=not column.wrap)
    for number, row in enumerate(rows):
        cells = []
        for column in chosen:
            try:
                cells.append(Text(column.text(row)))
            except (KeyError, IndexError, AttributeError) as error:
                raise GraphPruneError(f"row {number} of the table has nothing for column {column.header!r}") from error
        result.add_row(*cells)
    return result


def render(*items: Any, width: int = 160) -> str:
    """`rich` tables and strings as plain text of at most `width` characters a line, without colours."""
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, color_system=None, force_terminal=False, highlight=False, markup=False)
    for item in items:
        console.print(item, soft_wrap=isinstance(item, str))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()).strip("\n")
