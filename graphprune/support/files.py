"""Reading and writing files. What is written is whole or nothing has changed; what is read is a file and no pipe.

New files are made in a hidden folder beside their place and renamed. A writer that is killed leaves its folder there;
the next writer of the same file removes it. Which folders are left over is told by a lock that a living writer holds.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import GraphPruneError
from .types import PathLike

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_ENDING = ".unfinished"
# Between making its folder and locking it a writer has this long, in seconds.
_PATIENCE = 60.0


def as_path(path: PathLike, what: str = "a file") -> Path:
    """`path` as a Path that the system can be asked for.

    Raises:
        GraphPruneError: it is no path (None, a number, bytes), or holds what no name of a file can hold.
    """
    try:
        found = Path(path)
        os.fsencode(found)
    except TypeError as error:
        raise GraphPruneError(f"expected the path of {what}, got {type(path).__name__}") from error
    except ValueError as error:
        raise GraphPruneError(f"{str(path)!r} is not the path of {what}: {error}") from error
    if "\0" in str(found):
        raise GraphPruneError(f"{str(path)!r} is not the path of {what}: it holds a null character")
    return found


def check_target(path: PathLike) -> Path:
    """`path` as a Path, if a file of that name can be made.

    Raises:
        GraphPruneError: its folder does not exist or is no folder, or the path itself is a folder, a pipe or a device.
    """
    target = as_path(path)
    if not target.name:
        raise GraphPruneError(f"{str(target)!r} is not the path of a file")
    folder = target.parent
    try:
        if not folder.exists():
            raise GraphPruneError(f"cannot write {target}: the folder {folder} does not exist; create it first")
        if not folder.is_dir():
            raise GraphPruneError(f"cannot write {target}: {folder} is not a folder")
        if target.is_dir():
            raise GraphPruneError(f"cannot write {target}: it is a folder; give the path of a file in it")
        if target.exists() and not target.is_file():
            raise GraphPruneError(
                f"cannot write {target}: it is a pipe, a socket or a device, whose place a file would take; give the "
                f"path of a file, and copy that"
            )
    except OSError as error:
        raise GraphPruneError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def check_source(path: PathLike) -> Path:
    """`path` as a Path, if there is a file to read. A pipe is none: whoever opens it may wait for ever.

    Raises:
        GraphPruneError: there is nothing of that name, or a folder, a pipe or a device.
    """
    source = as_path(path)
    try:
        if not source.is_file():
            other = source.exists() and not source.is_dir()
            raise GraphPruneError(
                f"cannot read {source}: "
                + ("it is a pipe, a socket or a device; give the path of a file" if other else "there is no such file")
            )
    except OSError as error:
        raise GraphPruneError(f"cannot read {source}: {error.strerror or error}") from error
    return source


def is_there(path: PathLike) -> bool:
    """Whether there is something of that name, of whatever kind.

    Raises:
        GraphPruneError: it is no path, or the system cannot say.
    """
    source = as_path(path)
    try:
        return source.exists()
    except OSError as error:
        raise GraphPruneError(f"cannot read {source}: {error.strerror or error}") from error


def read_bytes(path: PathLike, most: int | None = None) -> bytes:
    """All of a file; no more than `most` bytes.

    Raises:
        GraphPruneError: there is no such file, it cannot be read, or it is larger.
    """
    source = check_source(path)
    try:
        size = source.stat().st_size
        if most is not None and size > most:
            raise GraphPruneError(f"cannot read {source}: it has {size} bytes, more than {most}")
        return source.read_bytes()
    except OSError as error:
        raise GraphPruneError(f"cannot read {source}: {error.strerror or error}") from error


def make_folder(path: PathLike) -> Path:
    """The folder of that name, made with those around it where it is not there.

    Raises:
        GraphPruneError: it is no path, or cannot be made.
    """
    folder = as_path(path, "a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GraphPruneError(f"{folder} cannot be made a folder: {error.strerror or error}") from error
    return folder


@contextlib.contextmanager
def workspace(target: Path) -> Iterator[Path]:
    """A new empty folder beside `target`, on the same file system, and removed again whatever happens. What killed
    writers of `target` left there is removed too.

    Raises:
        GraphPruneError: nothing can be written beside `target`.
    """
    prefix = f".{target.name[:64]}."
    try:
        _clear_leftovers(target.parent, prefix)
        folder = Path(tempfile.mkdtemp(_ENDING, prefix, target.parent))
    except OSError as error:
        raise GraphPruneError(f"cannot write {target}: {error.strerror or error}; choose another folder") from error
    try:
        with _locked(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a workspace: on its folder itself, so that nothing lies in it."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _clear_leftovers(parent: Path, prefix: str) -> None:
    """Remove workspaces whose writer is gone. What cannot be told, or not be removed, stays."""
    if fcntl is None:
        return
    for folder in parent.glob(f"{_escaped(prefix)}*{_ENDING}"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or not folder.is_dir() or time.time() - folder.stat().st_mtime < _PATIENCE:
                continue
            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)


def _escaped(text: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[Path]:
    """A temporary path (same name, in a folder beside) to write to; it becomes `path` when the block ends well.

    After an error, a file that was already at `path` is as it was, and nothing is left behind. The new file has the
    permissions of the one that it replaces.

    Raises:
        GraphPruneError: `path` cannot be written, at the start or (a full disk) while the block writes.
    """
    target = check_target(path)
    with workspace(target) as folder:
        temporary = folder / target.name
        try:
            yield temporary
        except OSError as error:
            raise GraphPruneError(f"cannot write {target}: {error.strerror or error}") from error
        put_in_place(temporary, target)


def put_in_place(new: Path, final: Path) -> None:
    """Rename a file of a `workspace` to its final path, in one step, once all of it is on the disk. It has the
    permissions of the file that it replaces.

    Raises:
        GraphPruneError: it cannot be renamed; a file that has the name stays.
    """
    try:
        handle = os.open(new, os.O_RDWR)
        try:
            os.fsync(handle)  # some file systems say only now that the disk is full
        finally:
            os.close(handle)
        if final.exists():
            shutil.copymode(final, new)
        os.replace(new, final)
    except OSError as error:
        raise GraphPruneError(f"cannot write {final}: {error.strerror or error}") from error
