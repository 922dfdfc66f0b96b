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
from graphprune.support.files import (
    as_path,
    check_source,
    check_target,
    is_there,
    make_folder,
    put_in_place,
    read_bytes,
    replacing,
)


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


def test_a_file_that_cannot_be_renamed_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")

    def fail(*paths: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(GraphPruneError, match=r"file.txt: No space left"), replacing(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]


def test_a_disk_that_is_full_when_the_file_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, new = tmp_path / "file.txt", tmp_path / "new.txt"
    target.write_text("old")
    new.write_text("new")

    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(GraphPruneError, match=r"file.txt: No space left"):
        put_in_place(new, target)
    assert target.read_text() == "old"


@pytest.mark.parametrize("path", [None, 3, 2.5, b"file", ["file"], object(), "a\0b", "\ud800"])
@pytest.mark.parametrize("function", [as_path, check_target, check_source, is_there, make_folder, read_bytes])
def test_what_is_no_path_is_refused(function: Any, path: Any) -> None:
    with pytest.raises(GraphPruneError, match="the path of a f"):
        function(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_no_reader_waits_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(GraphPruneError, match="is a pipe, a socket or a device"):
            read_bytes(tmp_path / name)
    with pytest.raises(GraphPruneError, match="is a pipe, a socket or a device"):
        check_source(os.devnull)
    for path in (tmp_path, tmp_path / "missing", tmp_path / ("x" * 300), tmp_path / "pipe" / "file"):
        with pytest.raises(GraphPruneError, match="cannot read"):
            check_source(path)


def test_files_that_are_too_large_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bytes(tmp_path / "file", 5) == b"12345"
    with pytest.raises(GraphPruneError, match="5 bytes, more than 4"):
        read_bytes(tmp_path / "file", 4)


def test_folders(tmp_path: Path) -> None:
    assert make_folder(tmp_path / "a" / "b").is_dir() and make_folder(tmp_path / "a").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(GraphPruneError, match="cannot be made a folder"):
        make_folder(tmp_path / "file")


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
