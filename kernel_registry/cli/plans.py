"""`plan`: the kernels that would serve a model; `diff`: what two frozen plans have otherwise."""

from __future__ import annotations

import click

from ..planning import PlanRow, freeze_model, plan_model, read_config
from .common import call_line, complain, near, open_registry, registry_options, table


@click.command("plan", short_help="Which kernels would serve a model, on any platform.")
@click.argument("configs", nargs=-1, required=True, metavar="CONFIG...")
@click.option("--platform", "platforms", multiple=True, metavar="PLATFORM",
              help="Plan for sm_90, gfx942, cpu, interpreter, ... or host, this machine; may be repeated.  "
              "[default: host]")
@click.option("--json", "json_file", metavar="FILE", help="Also write the plan (one CONFIG, one platform) to FILE, as "
              "freeze() would, for `diff`, load_plan() and ranks to compare.")
@registry_options
@click.pass_context
def plan_command(ctx: click.Context, configs: tuple[str, ...], platforms: tuple[str, ...], json_file: str | None,
                 registry_file: str | None, overrides: tuple[str, ...], tiles: tuple[str, ...]) -> None:
    """Which kernel each op of a model gets, and why. Runs nothing, so any platform can be planned for anywhere.

    CONFIG is a Hugging Face config.json, its folder, or the name of a shipped model.

    \b
    Examples:
      kernel-registry plan deepseek-v3 --platform sm_90 --platform gfx950
      kernel-registry plan ./my-model/config.json --json plan.json
    """
    registry = open_registry(registry_file, overrides, tiles)
    if json_file and (len(configs) > 1 or len(platforms) > 1):
        raise click.UsageError("--json holds the plan of one CONFIG on one --platform")
    failed = False
    for index, name in enumerate(configs):
        if index:
            click.echo()
        try:
            config = read_config(name)
            rows = plan_model(registry, config, platforms)
        except ValueError as error:  # one wrong config must not hide what the others get
            if len(configs) == 1:
                raise
            complain(error)
            failed = True
            continue
        _print(config, rows, registry)
        if json_file:
            plan = freeze_model(registry, config, *platforms)
            plan.save(json_file)
            click.echo(f"wrote {json_file}, fingerprint {plan.fingerprint[:16]}", err=True)
    if failed:
        ctx.exit(2)


def _print(config, rows: list[PlanRow], registry) -> None:
    source = f" ({near(str(config.source))})" if str(config.source) != config.name else ""
    click.echo(f"{config.name}{source}")
    if not rows:
        click.echo("  uses none of the registered ops")
        return
    for op, workload in dict.fromkeys((row.op, row.workload.name) for row in rows):
        row = next(r for r in rows if (r.op, r.workload.name) == (op, workload))
        click.echo(f"  {call_line(registry.catalog.op(op), row)}")
        for note in row.workload.notes:
            click.echo(f"    note: {note}")
    click.echo()
    host = str(registry.platform())
    lines = []
    for row in rows:  # a line for each case; what is as in the line above is left out
        cells = (row.op, row.layers, row.platform + " (host)" * (row.platform == host))
        told = ""
        for case, reason in zip(row.explanation.cases, row.reasons):
            lines.append((*cells, case.winner or "NONE", ", ".join(case.conditions), reason if reason != told else ""))
            cells, told = ("", "", ""), reason
    columns = ("op", "layers", "platform", "kernel", "when", "why")
    conditional = any(line[4] for line in lines)
    table([c for c in columns if c != "when" or conditional],
          [line if conditional else (*line[:4], line[5]) for line in lines], right=("layers",))


@click.command("diff", short_help="What two frozen plans have otherwise.")
@click.argument("a")
@click.argument("b")
@click.pass_context
def diff_command(ctx: click.Context, a: str, b: str) -> None:
    """What plan B has otherwise than plan A, a line each. Exits 0 when they are the same, 1 when they differ.

    \b
    Example: kernel-registry diff rank0.json rank1.json
    """
    from ..plan import Plan

    first, second = Plan.load(a), Plan.load(b)
    if first.fingerprint == second.fingerprint:
        click.echo(f"the same plan, fingerprint {first.fingerprint[:16]}")
        return
    for line in first.diff(second):
        click.echo(line)
    ctx.exit(1)
