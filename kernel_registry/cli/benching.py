"""`bench`: every implementation on the model workloads, side by side."""

from __future__ import annotations

import click

from .common import interpret_option, open_registry, registry_options, table, write


@click.command("bench", short_help="Time implementations side by side.")
@click.option("--op", "ops", multiple=True, metavar="OP", help="Only this op; may be repeated.")
@click.option("--implementation", "implementations", multiple=True, metavar="NAME",
              help="Only this one (a variant by its own name), the reference and the chosen one; may be repeated.")
@click.option("--workload", "workloads", multiple=True, metavar="NAME",
              help="Only this model workload; may be repeated.")
@click.option("--tokens", type=click.IntRange(min=0), multiple=True, metavar="N",
              help="Rows per call; may be repeated.")
@click.option("--seconds", default=0.3, show_default=True,
              help="Measuring time per implementation, workload and count.")
@click.option("--json", "json_file", metavar="FILE", help="Write every row as JSON to FILE; - for stdout.")
@interpret_option
@registry_options
def bench_command(ops, implementations, workloads, tokens, seconds: float, json_file: str | None,
                  registry_file: str | None, overrides: tuple[str, ...], tiles: tuple[str, ...]) -> None:
    """Time per call of every implementation that runs here, its ratio to the reference timed beside it, and the regret
    of the registry's choice: its time over the best one's.

    On a GPU, replays of a CUDA graph over rotating inputs; on a CPU, the median of repeated calls. Times in the
    interpreter say nothing about a GPU.

    \b
    Example: kernel-registry bench --workload deepseek-v3 --tokens 1 --tokens 256
    """
    from ..bench import bench, to_json

    registry = open_registry(registry_file, overrides, tiles)
    rows = bench(registry, ops=ops, implementations=implementations, workloads=workloads, tokens=tokens,
                 seconds=seconds)
    if json_file:
        write(to_json(registry, rows), json_file)
    if json_file != "-":
        unlike = ": its times say nothing about a GPU" if registry.platform().kind == "interpreter" else ""
        click.echo(f"on {registry.platform()}{unlike}\n")
        table(("op", "workload", "tokens", "implementation", "us per call", "of reference", "chosen", "regret",
               "timed by"),
              [(r.op, r.workload, r.tokens, r.implementation, _number(r.microseconds, ".2f"), _number(r.ratio, ".3g"),
                "yes" if r.chosen else "", _number(r.regret, ".2f") if r.chosen else "", r.error or r.method)
               for r in rows],
              right=("tokens", "us per call", "of reference", "regret"))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
