"""`tune`: the fastest launch parameters on this machine, written where the registry finds them."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path

import click

from .common import interpret_option, near, open_registry, registry_options, table
from .explaining import model_calls, parse_traits


@click.command("tune", short_help="Find the fastest tiles on this machine.")
@click.argument("op")
@click.argument("traits", nargs=-1, metavar="[TRAIT=VALUE]...")
@click.option("--config", metavar="CONFIG",
              help="Take the traits from a model: its config.json or folder, or a shipped model's name. TRAIT=VALUE "
              "then changes some of them.")
@click.option("--workload", "workloads", multiple=True, metavar="NAME",
              help="Take the traits from a model workload of `bench`; may be repeated.")
@click.option("--implementation", "implementations", multiple=True, metavar="NAME",
              help="Only this one; may be repeated. Default: all that take tiles.")
@click.option("--tokens", type=click.IntRange(min=1), multiple=True, metavar="N",
              help="Rows per call; may be repeated. Default: as `bench`.")
@click.option("--output", default="tiles.yaml", show_default=True, metavar="FILE", help="Where rows are written.")
@click.option("--again", is_flag=True, help="Also what FILE has already, for this device and these versions.")
@click.option("--seconds", default=0.1, show_default=True, help="Measuring time per candidate.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
              help="Compile candidates in so many processes first; each holds inputs of its own.")
@click.option("--verbose", is_flag=True, help="Tell of each candidate that does not compile or launch, why.")
@interpret_option
@registry_options
@click.pass_context
def tune_command(ctx: click.Context, op: str, traits: tuple[str, ...], config: str | None, workloads: tuple[str, ...],
                 implementations: tuple[str, ...], tokens: tuple[int, ...], output: str, again: bool, seconds: float,
                 jobs: int, verbose: bool, registry_file: str | None, overrides: tuple[str, ...],
                 tiles: tuple[str, ...]) -> None:
    """Times every tile that an implementation of OP proposes for these traits, on this machine, and writes the fastest
    that the op's oracle passes into FILE, one number of tokens after the other.

    What FILE holds already is skipped, so that an interrupted run goes on where it stopped. Exits 1 when a tile that
    was the fastest is wrong (it is not written), or when none works.

    \b
    Example: kernel-registry tune moe.experts --workload deepseek-v3-tp8 --tokens 1 --tokens 32 --output tiles.yaml
    """
    from .. import shipped_registry
    from ..harness import harness
    from ..tiles import files, said
    from ..tuning import NOTHING, WRITTEN, tune

    registry = open_registry(registry_file, overrides, tiles)
    owner = registry.catalog.op(op)
    if config and workloads:
        raise click.UsageError("give --config or --workload, not both")
    given = parse_traits(owner, traits)
    calls = model_calls(owner, config) if config else \
        [_workload(harness(owner), name) for name in workloads] if workloads else [{}]
    click.echo(f"on {registry.state.tuned.device(registry.platform(), ask_torch=True) or registry.platform()}")
    if jobs > 1 and sys.stderr.isatty():
        click.echo(f"compiling in {jobs} processes before anything is timed", err=True)
    rows = []
    for call in calls:
        call = {**call, **given}
        click.echo(f"\n{owner.name} {said(owner, owner.space.request(call, registry.platform).traits)}\n")
        with _progress() as progress:
            found = tune(registry, op, call, output=output, implementations=implementations, tokens=tokens, again=again,
                         seconds=seconds, jobs=jobs, progress=progress)
        _print(found)
        rows += found
    for row in rows:
        for attempt in row.failed if verbose else ():
            click.echo(f"failed: {_place(row)} {_text(attempt.tile)}: {attempt.error}", err=True)
        for tile, reason in row.wrong:
            click.echo(f"WRONG: {_place(row)} {_text(tile)}: {reason}", err=True)
    found_again = [Path(f).absolute() for f in files(registry_file or shipped_registry(), tiles, environment=True)]
    if any(row.outcome == WRITTEN for row in rows) and Path(output).absolute() not in found_again:
        click.echo(f"\nused with --tiles {output}, KERNEL_REGISTRY_TILES={output} or registry.load_tiles({output!r})")
    if any(row.wrong or row.outcome == NOTHING for row in rows):
        ctx.exit(1)


def _workload(tools, name: str) -> dict[str, object]:
    from ..errors import UnknownNameError, suggestion

    if name not in tools.workloads:
        raise UnknownNameError(f"no workload {name!r}", hint=suggestion(name, tools.workloads))
    return dict(tools.workloads[name])


@contextmanager
def _progress():
    """A function that shows each candidate in a line, with a bar below, on a terminal; elsewhere nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    console = Console(file=sys.stderr, highlight=False)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task("", total=None)

        def show(event) -> None:
            if hasattr(event, "number"):  # a candidate, not the outcome of all
                title = f"{event.implementation}, {event.tokens} token{'s' * (event.tokens != 1)}"
                outcome = f"{event.microseconds:10.2f} us" if event.microseconds is not None else \
                    f"{'failed':>13}  {event.error:.100}"
                console.print(Text(f"{title}  {outcome}  {_text(event.tile)}"))
                bars.update(bar, description=title, completed=event.number, total=event.of)
            elif event.tile is not None:
                console.print(Text(f"{event.implementation}, {event.tokens} tokens: {event.outcome} "
                                   f"{_text(event.tile)}", style="green"))
        yield show


def _print(rows) -> None:
    table(("implementation", "tokens", "outcome", "us per call", "of default", "tried", "failed", "timed by", "tile"),
          [(r.implementation, r.tokens, r.outcome, "-" if r.microseconds is None else f"{r.microseconds:.2f}",
            "-" if r.ratio is None else f"{r.ratio:.2f}", r.tried or "-", len(r.failed) if r.tried else "-",
            r.method or "-", _text(r.tile) if r.tile is not None else near(r.detail)) for r in rows],
          right=("tokens", "us per call", "of default", "tried", "failed"))


def _place(row) -> str:
    return f"{row.implementation}, {row.tokens} token{'s' * (row.tokens != 1)},"


def _text(tile, place: str = "") -> str:
    """A tile in one line: "up.BLOCK_M=16 up.BLOCK_N=64"."""
    return " ".join(_text(value, f"{place}{key}.") if isinstance(value, dict) else f"{place}{key}={value}"
                    for key, value in tile.items())
