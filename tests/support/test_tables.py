from __future__ import annotations

from types import SimpleNamespace

import pytest

from graphprune.errors import GraphPruneError
from graphprune.support.tables import Column, render, table


def test_rows_of_all_kinds() -> None:
    columns = [Column("name", "name", justify="left"), Column("value", "value", ",.2f")]
    for row in ({"name": "x", "value": 1234.5}, SimpleNamespace(name="x", value=1234.5)):
        assert render(table([row], columns)).splitlines()[-1].split() == ["x", "1,234.50"]
    by_place = table([("x", 1.5)], [Column("name", 0), Column("twice", lambda row: row[1] * 2)])
    assert render(by_place).splitlines()[-1].split() == ["x", "3.0"]


def test_plain_column_names_and_missing_values() -> None:
    text = render(table([{"a": "left", "b": None}, {"a": "x", "b": 22}], ["a", "b"], title="Title", caption="caption"))
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0] == "Title" and lines[-1] == "caption"
    assert "left    -" in lines and "x      22" in lines


def test_text_is_not_markup() -> None:
    text = render(table([{"a": "[bold]x[/bold]"}], ["a"], title="[t]"), "[red]plain")
    assert "[bold]x[/bold]" in text and "[t]" in text and "[red]plain" in text and "\x1b" not in text


def test_long_strings_are_not_wrapped() -> None:
    assert render("word " * 100).count("\n") == 0


def test_formats_may_be_functions() -> None:
    column = Column("a", "a", lambda value: f"<{value}>")
    assert column.text({"a": 3}) == "<3>" and column.text({"a": None}) == "-"


def test_errors() -> None:
    with pytest.raises(GraphPruneError, match="at least one column"):
        table([], [])
    for row in ({"b": 1}, SimpleNamespace(b=1)):
        with pytest.raises(GraphPruneError, match="row 1 of the table has nothing for column 'a'"):
            table([{"a": 1}, row], ["a"])
    assert table([], ["a"]).row_count == 0
