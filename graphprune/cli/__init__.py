"""The command line: `graphprune inspect | doctor | advise | prune | pipeline | export | bench |
runtimes | latency-table`.

Models are named `module:function`; see `factories.load_factory`. Results go to standard output, everything
else (progress, warnings, errors, what a model prints) to standard error.
"""

from __future__ import annotations

from typing import Annotated

import typer

from .._version import __version__
from .deploying import bench, export
from .listing import runtimes
from .looking import advise, doctor, inspect
from .pruning import prune
from .timing import write_table
from .training import run_pipeline

app = typer.Typer(
    name="graphprune",
    help="Structured pruning of PyTorch models: look at one, prune it, export it, measure it.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"graphprune {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


for _command in (inspect, doctor, advise, prune, export, bench, runtimes):
    app.command()(_command)
app.command("pipeline")(run_pipeline)
app.command("latency-table")(write_table)


def main() -> None:
    """The entry point of the command `graphprune`."""
    app(prog_name="graphprune")
