"""Writing files: either the whole new file has the name, or nothing has changed.

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


def check_target(path: PathLike) -> Path:
    """`path` as a Path, if a file of that name can be made.

    Raises:
        GraphPruneError: its folder does not exist or is no folder, or the path itself is a folder, a pipe or a device.
    """
    try:
        target = Path(path)
    except TypeError as error:
        raise GraphPruneError(f"expected the path of a file, got {type(path).__name__}") from error
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
        move_into_place([(temporary, target)])


def move_into_place(moves: list[tuple[Path, Path]]) -> None:
    """Rename (new file, its final path) pairs, in order; all of them or, after an error, none.

    The new files lie in one `workspace`, where files that they replace are kept until all are in place.

    Raises:
        GraphPruneError: a file cannot be renamed.
    """
    undo: list[tuple[Path, Path | None]] = []
    try:
        for new, final in moves:
            kept: Path | None = None
            if final.exists():
                shutil.copymode(final, new)
            # A single rename needs no copy to go back to: it happens or it does not.
            if len(moves) > 1 and final.exists():
                kept = new.with_name(new.name + ".previous")
                os.replace(final, kept)
                undo.append((final, kept))
                os.replace(new, final)
            else:
                os.replace(new, final)
                undo.append((final, None))
    except OSError as error:
        for final, kept in reversed(undo):
            with contextlib.suppress(OSError):
                if kept is not None:
                    os.replace(kept, final)
                else:
                    final.unlink()
        raise GraphPruneError(f"cannot write {moves[-1][1]}: {error.strerror or error}") from error
