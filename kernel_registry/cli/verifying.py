"""`verify`: every implementation against its own declaration."""

from __future__ import annotations

from collections import Counter

import click

from .common import interpret_option, open_registry, registry_options, table, write

_KINDS = ("model", "edge", "inside", "outside", "numerics")
_SHOWN = 20  # failures told in full


@click.command("verify", short_help="Test implementations against what they declare.")
@click.option("--op", "ops", multiple=True, metavar="OP", help="Only this op; may be repeated.")
@click.option("--implementation", "implementations", multiple=True, metavar="NAME",
              help="Only this one, a variant by its own name; may be repeated.")
@click.option("--budget", type=click.IntRange(min=3), metavar="N", help="Points run per implementation.  [default: 48]")
@click.option("--seed", default=0, show_default=True, help="Another seed tests other points.")
@click.option("--json", "json_file", metavar="FILE", help="Write every row as JSON to FILE; - for stdout.")
@interpret_option
@registry_options
@click.pass_context
def verify_command(ctx: click.Context, ops: tuple[str, ...], implementations: tuple[str, ...], budget: int | None,
                   seed: int, json_file: str | None, registry_file: str | None, overrides: tuple[str, ...],
                   tiles: tuple[str, ...]) -> None:
    """Runs every implementation inside, on the edges of and just outside what it declares, and on model workloads.

    Results are judged by the op's oracle; calls outside must be refused. What can't run on this machine is reported as
    not run. Exits 1 when something failed, or when nothing ran at all.

    \b
    Example: kernel-registry verify --implementation torch --budget 12
    """
    from ..verify import BUDGET, verify

    registry = open_registry(registry_file, overrides, tiles)
    report = verify(registry, ops=ops, implementations=implementations, budget=budget or BUDGET, seed=seed)
    if json_file:
        write(report.json(), json_file)
    if json_file != "-":
        _print(report)
    if not report.ok:
        ctx.exit(1)


def _print(report) -> None:
    click.echo(f"on {report.platform}, {report.budget} points per implementation, seed {report.seed}\n")
    table(("op", "implementation", "result", *_KINDS, "undecided model rows"),
          [_summary(op, name, result, [r for r in report.rows if (r.op, r.implementation) == (op, name)])
           for (op, name), result in report.results.items()],
          right=(*_KINDS, "undecided model rows"))
    unrun = Counter((r.implementation, r.detail) for r in report.rows if r.outcome == "not run")
    for (name, detail), count in unrun.items():
        click.echo(f"not run: {name}: {detail}" + (f" ({count} points)" if count > 1 else ""))
    for note in report.notes:
        click.echo(f"note: {note}")
    for row in report.failures[:_SHOWN]:
        click.echo(f"FAILED {row.implementation}, {row.where}{': ' if row.point else ''}{row.point}\n    {row.detail}")
    if len(report.failures) > _SHOWN:
        click.echo(f"and {len(report.failures) - _SHOWN} more failures; --json FILE has them all")
    passed = sum(r.outcome == "passed" for r in report.rows)
    nothing = not report.ok and not report.failures
    click.echo(f"{passed} passed, {len(report.failures)} failed, {sum(unrun.values())} not run"
               + ": nothing was verified on this machine" * nothing)


def _summary(op: str, name: str, result: str, rows: list) -> list:
    counts = Counter((r.where, r.outcome) for r in rows)
    cells = []
    for kind in _KINDS:
        passed, failed, unrun = (counts[kind, outcome] for outcome in ("passed", "failed", "not run"))
        cells.append(f"{passed}" + f", {failed} failed" * bool(failed) + f", {unrun} not run" * bool(unrun)
                     if passed + failed + unrun else "-")
    judged = sum(r.rows for r in rows if r.where == "model")
    undecided = sum(round(r.undecided * r.rows) for r in rows if r.where == "model")
    return [op, name, result, *cells, f"{undecided} of {judged}" if judged else "-"]
