from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from graphprune.errors import GraphPruneError
from graphprune.support import files
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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_pipes_and_devices_are_refused_and_stay(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path(os.devnull)):
        before = os.stat(path)
        with pytest.raises(GraphPruneError, match="is a pipe, a socket or a device"), replacing(path):
            raise AssertionError("the block ran")
        assert os.path.samestat(before, os.stat(path))
    assert os.listdir(tmp_path) == ["pipe"] and stat.S_ISFIFO(os.stat(pipe).st_mode)


def test_new_files_get_ordinary_permissions_and_later_ones_keep_them(tmp_path: Path) -> None:
    target, plain = tmp_path / "file.txt", tmp_path / "plain.txt"
    plain.write_text("")
    with replacing(target) as temporary:
        temporary.write_text("new")
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    target.chmod(0o640)
    with replacing(target) as temporary:
        temporary.write_text("newer")
    assert stat.S_IMODE(target.stat().st_mode) == 0o640 and target.read_text() == "newer"


def test_an_error_of_the_system_while_writing_names_the_file(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(GraphPruneError, match=r"cannot write .*file.txt: No space left"), replacing(target):
        raise OSError(28, "No space left on device")
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.skipif(files.fcntl is None, reason="the system has no locks that end with their process")
def test_what_a_killed_writer_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    target, other = tmp_path / "file[1].txt", tmp_path / "other.txt"
    code = textwrap.dedent("""
        import sys, time
        from graphprune.support.files import replacing
        with replacing(sys.argv[1]) as temporary:
            temporary.write_text("half")
            print("written", flush=True)
            time.sleep(600)
        """)
    paths = (target, target, other)
    writers = [subprocess.Popen([sys.executable, "-c", code, p], stdout=subprocess.PIPE, text=True) for p in paths]
    try:
        assert all(writer.stdout is not None and writer.stdout.readline() == "written\n" for writer in writers)
        for writer in (writers[0], writers[2]):
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        assert len(os.listdir(tmp_path)) == 3
        with replacing(target) as temporary:  # too fresh: a writer may be about to lock its folder
            temporary.write_text("first")
        assert len(os.listdir(tmp_path)) == 4
        for folder in tmp_path.glob(".*"):
            os.utime(folder, (0, 0))
        with replacing(target) as temporary:
            temporary.write_text("second")
        left = [path.name for path in tmp_path.iterdir()]
        assert sorted(name[:6] for name in left) == [".file[", ".other", "file[1"]  # one lives, one is another file's
        assert target.read_text() == "second"
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
            assert writer.stdout is not None
            writer.stdout.close()
