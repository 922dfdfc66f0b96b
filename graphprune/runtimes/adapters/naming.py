"""What a library says when it fails, short enough for a message."""

from __future__ import annotations


def first_lines(error: BaseException, lines: int = 2) -> str:
    """The kind of an error, and the first lines of it that say something."""
    said = first_of(str(error), lines)
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def first_of(text: str, lines: int = 1) -> str:
    """The first lines of a text that are not blank, in one; "" where all are."""
    said = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(said[:lines])[:500].rstrip(".")
