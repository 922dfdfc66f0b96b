"""The command runtimes."""

from __future__ import annotations

from ..runtimes import usable_runtimes
from .terminal import JsonOption, QuietOption, show, working


def runtimes(as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """List the runtimes that models can be exported to and measured in, and why the others cannot be used here."""
    with working("runtimes", quiet) as work:
        work.step("looking at what is installed")
        found = usable_runtimes()
    data = {"runtimes": [status.to_dict() for status in found], "features": list(found.features)}
    show(as_json, data, str(found))
