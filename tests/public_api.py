"""The public names of the package and their signatures, as text: one line per name.

    python -m tests.public_api          # print them
    python -m tests.public_api --write  # after a deliberate change: write tests/public_api.txt anew, and commit it
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import graphprune

GOLDEN = Path(__file__).with_name("public_api.txt")


def public_modules() -> list[ModuleType]:
    """The package and the modules among its public names. Whatever else it holds may change without notice."""
    inside = [getattr(graphprune, name) for name in sorted(graphprune.__all__)]
    return [graphprune, *(value for value in inside if inspect.ismodule(value))]


def public_api() -> str:
    """One line per public name, in alphabetical order; names of one object under their first module only."""
    lines: list[str] = []
    known: dict[int, str] = {}
    for module in public_modules():
        for name in sorted(module.__all__):
            value, path = getattr(module, name), f"{module.__name__}.{name}"
            if inspect.isclass(value) or inspect.isfunction(value):
                first = known.setdefault(id(value), path)
                lines += [f"{path} = {first}"] if first != path else list(_described(path, value))
            elif not inspect.ismodule(value):
                lines.append(f"{path}: {type(value).__name__}")
    return "\n".join(lines) + "\n"


def _described(path: str, value: Any) -> Iterator[str]:
    if inspect.isfunction(value):
        yield f"def {path}{_signature(value)}"
        return
    bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object and not _is_private(base))
    made = _signature(value) if "__init__" in vars(value) else ""
    yield f"class {path}{made}" + (f" < {bases}" if bases else "")
    fields = getattr(value, "__dataclass_fields__", {})  # the signature shows them
    for name, member in sorted(_members(value).items()):
        if name.startswith("_") or name in fields:
            continue
        if isinstance(member, property):
            result = inspect.signature(member.fget).return_annotation if member.fget else inspect.Parameter.empty
            yield f"    {path}.{name} -> {result}"
        else:
            function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
            yield f"    {path}.{name}" + (_signature(function) if callable(function) else f": {type(member).__name__}")


def _members(value: type) -> dict[str, Any]:
    """What a class holds, with what it has from private classes of the package: readers see no other place for it."""
    inherited = [base for base in value.__mro__[:0:-1] if _is_private(base)]
    return {name: member for kind in (*inherited, value) for name, member in vars(kind).items()}


def _is_private(kind: type) -> bool:
    public = {id(getattr(module, name)) for module in public_modules() for name in module.__all__}
    return kind.__module__.startswith("graphprune.") and id(kind) not in public


class _Text:
    """Shown as it is, without quotes: annotations are strings here."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _signature(value: Any) -> str:
    found = inspect.signature(value)
    plain = [
        p if p.annotation is p.empty else p.replace(annotation=_Text(str(p.annotation)))
        for p in found.parameters.values()
    ]
    result = found.return_annotation
    shown = found.replace(parameters=plain, return_annotation=result if result is found.empty else _Text(str(result)))
    return re.sub(r" at 0x[0-9a-f]+", "", str(shown))  # defaults without a repr of their own show an address


def main() -> None:
    """Print the list, or write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {GOLDEN.name} anew")
    text = public_api()
    if parser.parse_args().write:
        GOLDEN.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
