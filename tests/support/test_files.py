from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from graphprune.errors import GraphPruneError
from graphprune.support.files import check_target, move_into_place, replacing, workspace


def test_a_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")
    with replacing(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old" and temporary.name == target.name
        assert temporary.parent.parent == tmp_path
    assert target.read_text() == "new" and os.listdir(tmp_path) == ["file.txt"]


def test_an_error_changes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(target) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]


def test_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(GraphPruneError, match="cannot write"), replacing(tmp_path / "file.txt"):
        pass
    assert os.listdir(tmp_path) == []


def test_bad_targets(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path / "a" / "b", "does not exist"),
        (tmp_path / "file" / "b", "is not a folder"),
        (tmp_path, "is a folder"),
        ("", "is not the path of a file"),
        (tmp_path / ("x" * 300), "cannot write"),
        (3, "expected the path of a file, got int"),
    ):
        with pytest.raises(GraphPruneError, match=message), replacing(path):  # type: ignore[arg-type]
            raise AssertionError("the block ran")


def test_several_files_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finals = [tmp_path / name for name in ("a", "b", "c")]
    finals[0].write_text("old a")
    finals[2].write_text("old c")
    original = os.replace

    def fail_for_c(source: Any, target: Any) -> None:
        if Path(target) == finals[2] and Path(source).name == "c":
            raise OSError(28, "No space left on device")
        original(source, target)

    def attempt() -> None:
        with workspace(tmp_path / "a") as folder:
            for final in finals:
                (folder / final.name).write_text(f"new {final.name}")
            move_into_place([(folder / final.name, final) for final in finals])

    monkeypatch.setattr(os, "replace", fail_for_c)
    with pytest.raises(GraphPruneError, match="No space left"):
        attempt()
    assert sorted(os.listdir(tmp_path)) == ["a", "c"]
    assert finals[0].read_text() == "old a" and finals[2].read_text() == "old c"
    monkeypatch.undo()
    attempt()
    assert [final.read_text() for final in finals] == ["new a", "new b", "new c"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_target("file.txt") == Path("file.txt")
    with replacing("file.txt") as temporary:
        temporary.write_text("x")
    assert os.listdir(tmp_path) == ["file.txt"]
