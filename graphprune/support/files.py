"""Writing files: either the whole new file has the name, or nothing has changed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import GraphPruneError


def check_target(path: str | os.PathLike[str]) -> Path:
    """`path` as a Path, if a file of that name can be made.

    Raises:
        GraphPruneError: its folder does not exist or is no folder, or the path itself is a folder.
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
    except OSError as error:
        raise GraphPruneError(f"cannot write {target}: {error.strerror or error}") from error
    return target


@contextlib.contextmanager
def workspace(target: Path) -> Iterator[Path]:
    """A new empty folder beside `target`, on the same file system, and removed again whatever happens.

    Raises:
        GraphPruneError: nothing can be written beside `target`.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name[:64]}.", dir=target.parent))
    except OSError as error:
        raise GraphPruneError(f"cannot write {target}: {error.strerror or error}; choose another folder") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path (same name, in a folder beside) to write to; it becomes `path` when the block ends well.

    After an error, a file that was already at `path` is as it was, and nothing is left behind.

    Raises:
        GraphPruneError: `path` cannot be written.
    """
    target = check_target(path)
    with workspace(target) as folder:
        temporary = folder / target.name
        yield temporary
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
