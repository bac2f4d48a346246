"""`explain`: why this implementation, and why not the others. Plain text; imports neither torch, triton nor rich."""

from __future__ import annotations

from typing import Sequence

import click

from ..catalog import Op
from .common import near, open_registry, registry_options


@click.command("explain", short_help="Why this implementation, and why not the others.")
@click.argument("op")
@click.argument("traits", nargs=-1, metavar="[TRAIT=VALUE]...")
@click.option("--config", metavar="CONFIG",
              help="Take the traits from a model: its config.json or folder, or a shipped model's name. TRAIT=VALUE "
              "then changes some of them.")
@click.option("--implementation", metavar="NAME", help="Ask for this one, as dispatch(implementation=NAME) does.")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of text.")
@registry_options
@click.pass_context
def explain_command(ctx: click.Context, op: str, traits: tuple[str, ...], config: str | None,
                    implementation: str | None, as_json: bool, registry_file: str | None,
                    overrides: tuple[str, ...], tiles: tuple[str, ...]) -> None:
    """Which implementation serves OP for these traits, and what every other one lacks.

    Marks: * chosen, ~ one predicate away from being chosen, x refused. Exits 1 when nothing serves the call.

    \b
    Examples:
      kernel-registry explain moe.topk num_experts=256 num_expert_group=8 topk_group=4 topk=8 platform=sm_90
      kernel-registry explain moe.topk --config deepseek-v3 dtype=bfloat16
    """
    registry = open_registry(registry_file, overrides, tiles)
    owner = registry.catalog.op(op)
    calls = model_calls(owner, config) if config else [{}]
    given = parse_traits(owner, traits)
    explanations = [registry.explain(op, implementation=implementation, **{**call, **given}) for call in calls]
    if as_json:
        texts = [explanation.json() for explanation in explanations]
        click.echo(texts[0] if len(texts) == 1 else "[" + ",\n".join(texts) + "]")
    else:
        click.echo("\n\n".join(near(explanation.text()) for explanation in explanations))
    if any(explanation.winner is None for explanation in explanations):
        ctx.exit(1)


def parse_traits(op: Op, pairs: Sequence[str]) -> dict[str, object]:
    """`name=value` texts as values for a dispatch; the traits themselves say what is wrong with one."""
    given: dict[str, object] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise click.UsageError(f"expected TRAIT=VALUE, got {pair!r}")
        trait = op.space.trait(name)
        if name in given:
            raise click.UsageError(f"{name} is given twice")
        given[name] = _value(trait.type, text)
    return given


def _value(kind: str, text: str) -> object:
    if kind == "int":
        try:
            return int(text)
        except ValueError:
            return text  # refused by the trait, in its words
    return {"true": True, "false": False}.get(text.lower(), text) if kind == "bool" else text


def model_calls(op: Op, config: str) -> list[dict[str, object]]:
    from ..planning import read_config

    found = [dict(workload.traits) for workload in op.contract.workloads(read_config(config))]
    if not found:
        raise click.UsageError(f"{config} makes no call to {op.name}")
    return found
