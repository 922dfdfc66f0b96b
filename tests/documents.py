"""Code in Markdown pages: every fenced block that says `python` is run, in order, in one namespace per page.

A block that starts with `>>>` is a session whose output is compared (`...` stands for anything); others just run.
"""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str]]:
    """(line of its first line, from 1; text) of every block of Python."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start(1)) + 1, m.group(1)) for m in _BLOCK.finditer(text)]


def run(page: Path) -> int:
    """Run the page's code; how many blocks there were. Raises AssertionError with the report of what differed."""
    names: dict[str, Any] = {"__name__": "__main__"}
    found = blocks(page)
    report: list[str] = []
    for line, text in found:
        if not text.lstrip().startswith(">>>"):
            exec(compile("\n" * (line - 1) + text, page.name, "exec"), names)
            continue
        test = doctest.DocTestParser().get_doctest(text, names, f"{page.name}:{line}", str(page), line - 1)
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        runner.run(test, out=report.append, clear_globs=False)
        names.update(test.globs)
    assert not report, "".join(report)
    return len(found)
