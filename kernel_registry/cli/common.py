"""What commands share: the options that name files, the registry they describe, and how results are printed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Callable, Iterable, Sequence

import click

from ..registry import Registry
from ..traits.trait import REQUIRED, written

_WIDE = 10_000  # of a pipe or file: nothing is cut or wrapped there
_STYLES = {"passed": "green", "failed": "bold red", "not run": "yellow"}


def registry_options(command: Callable) -> Callable:
    """Adds --registry, --overrides and --tiles."""
    command = click.option("--tiles", multiple=True, metavar="FILE",
                           help="A tiles file; may be repeated, later ones are stronger.")(command)
    command = click.option("--overrides", multiple=True, metavar="FILE",
                           help="An override file; may be repeated, later ones are stronger.")(command)
    return click.option("--registry", "registry_file", metavar="FILE", help="A registry file instead of the shipped "
                        "one.")(command)


def open_registry(registry_file: str | None, overrides: Sequence[str], tiles: Sequence[str]) -> Registry:
    """The registry that the options describe."""
    registry = Registry(registry_file)
    for path in overrides:
        registry.load_overrides(path)
    for path in tiles:
        registry.load_tiles(path)
    return registry


def interpret_option(command: Callable) -> Callable:
    """Adds --interpret, which has to be known before Triton is imported."""
    def choose(ctx, parameter, value):
        if value:
            os.environ["TRITON_INTERPRET"] = "1"
    flag = click.option("--interpret", is_flag=True, expose_value=False, is_eager=True, callback=choose,
                        help="Run Triton kernels on the CPU through Triton's interpreter (sets TRITON_INTERPRET=1).")
    return flag(command)


def complain(error: Exception) -> None:
    """An error as one message on stderr."""
    click.echo(f"error: {near(str(error))}", err=True)


def near(text: str) -> str:
    """`text` with paths below the current folder made relative to it: shorter, and the same place."""
    return text.replace(os.getcwd() + os.sep, "")


def call_line(op, row) -> str:
    """A PlanRow's call in one line: how many layers make it, and the traits that say something: the required ones and
    those that are not neutral."""
    traits = {n: t for n, t in op.space.traits.items() if t.type != "platform"}
    said = [(n, v) for n, v in row.explanation.traits.items()
            if n in traits and (traits[n].default is REQUIRED or traits[n].default != v)]
    arguments = [(n, v) for n, v in row.workload.arguments.items() if v is not None]
    return (f"{op.name} in {row.layers} layer{'s' * (row.layers != 1)}: "
            + ", ".join(f"{n}={written(v)}" for n, v in [*said, *arguments]))


def write(text: str, path: str) -> None:
    """`text` into the file `path`, or to stdout for "-"."""
    if path == "-":
        click.echo(text)
        return
    try:
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise click.FileError(path, hint=error.strerror) from None
    click.echo(f"wrote {path}", err=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()) -> None:
    """Prints a table: fitted to a terminal, whole and without colours elsewhere. `right` names columns of numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    on_terminal = sys.stdout.isatty()
    console = Console(file=sys.stdout, width=None if on_terminal else _WIDE, no_color=not on_terminal,
                      force_terminal=on_terminal, highlight=False)
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in columns:
        grid.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(near(str(cell)), style=_STYLES.get(str(cell), "")) for cell in row))
    with console.capture() as captured:
        console.print(grid)
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()).strip("\n"))
