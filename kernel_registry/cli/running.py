"""`run`: a model's own calls, executed on this machine and checked."""

from __future__ import annotations

import click

from .common import call_line, interpret_option, open_registry, registry_options, table


@click.command("run", short_help="Run a model's ops here and check the results.")
@click.argument("config")
@click.option("--tokens", type=click.IntRange(min=0), multiple=True, metavar="N",
              help="Rows per call; may be repeated. Default: 1, 16 and 256 (1 and 16 in the interpreter), and the "
              "first count of each range that another kernel serves, where that takes seconds.")
@click.option("--op", "ops", multiple=True, metavar="OP",
              help="Only this op, and not the layer that the ops make up; may be repeated.")
@click.option("--seed", default=0, show_default=True, help="Of the random inputs.")
@interpret_option
@registry_options
@click.pass_context
def run_command(ctx: click.Context, config: str, tokens: tuple[int, ...], ops: tuple[str, ...], seed: int,
                registry_file: str | None, overrides: tuple[str, ...], tiles: tuple[str, ...]) -> None:
    """Dispatches and executes each op of a model on this machine, on random inputs, and checks the results against the
    op's oracle. Exits 1 when a check fails.

    \b
    Example: kernel-registry run deepseek-v3 --tokens 1 --tokens 64
    """
    from ..planning import plan_model, read_config
    from ..run import run_model

    registry = open_registry(registry_file, overrides, tiles)
    model = read_config(config)
    planned = [row for row in plan_model(registry, model) if row.op in (ops or registry.catalog.ops)]
    rows = run_model(registry, model, tokens=tokens, ops=ops, seed=seed)
    if not planned:
        click.echo(f"{model.name} uses none of the {'named' if ops else 'registered'} ops")
        return
    click.echo(f"{model.name} on {registry.platform()}, random inputs, seed {seed}")
    for row in planned:
        click.echo(f"  {call_line(registry.catalog.op(row.op), row)}\n    {row.why}")
    click.echo()
    measured = any(r.max_weight_error is not None for r in rows)  # an oracle need not give it
    columns = ["op", "tokens", "kernel", "verdict", "max weight error", "undecided rows", "decided by"]
    table([c for c in columns if measured or c != "max weight error"],
          [[r.op, r.tokens, r.implementation or "NONE", r.verdict,
            *(["-" if r.max_weight_error is None else f"{r.max_weight_error:.1e}"] if measured else []),
            "-" if r.verdict == "not run" else f"{r.undecided} of {r.rows}", r.decided_by] for r in rows],
          right=("tokens", "max weight error", "undecided rows"))
    for op, reduced in dict.fromkeys((r.op, tuple(r.reduced.items())) for r in rows if r.reduced):
        sizes = ", ".join(f"{name}={value}" for name, value in reduced)
        click.echo(f"reduced: {op} was run with {sizes}; its real sizes are more than a CPU can take")
    for row in (r for r in rows if r.verdict == "not run"):
        click.echo(f"not run: {row.op} with {row.tokens} tokens ({row.implementation}): {row.detail}")
    failures = [r for r in rows if r.verdict == "failed"]
    for row in failures:
        click.echo(f"failed: {row.op} with {row.tokens} tokens: {row.detail}", err=True)
    if failures:
        ctx.exit(1)
