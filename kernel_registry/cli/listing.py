"""`list`: what exists."""

from __future__ import annotations

import click

from ..traits.trait import REQUIRED, written
from .common import open_registry, registry_options, table


@click.command("list", short_help="What exists: ops, implementations, traits.")
@click.argument("op", required=False)
@registry_options
def list_command(op: str | None, registry_file: str | None, overrides: tuple[str, ...], tiles: tuple[str, ...]) -> None:
    """Ops and their implementations, in the order in which they are asked. With OP, also its traits.

    \b
    Example: kernel-registry list moe.topk
    """
    registry = open_registry(registry_file, overrides, tiles)
    ops = [registry.catalog.op(op)] if op else list(registry.catalog.ops.values())
    table(("op", "implementation", "platforms", "what it is", "declared at"),
          [(o.name, i.name + " (fallback)" * i.fallback, i.box.sets.get("platform", "any"), _what(i), i.where)
           for o in ops for i in o.implementations])
    if op:
        click.echo(f"\nTraits of {op}:\n")
        table(("trait", "type", "kind", "default", "what it is"),
              [(t.name, "|".join(t.choices) or t.type, t.kind + ", dynamic" * t.dynamic, _default(t, ops[0]), t.doc)
               for t in ops[0].space.all.values()])
    elif len(ops) == 1:
        click.echo(f"\nIts traits: kernel-registry list {ops[0].name}")
    for failure in registry.state.plugin_failures:
        click.echo(f"plugin {failure.name} is left out: {failure.error}", err=True)


def _what(implementation) -> str:
    options = ", ".join(f"{name}={written(value)}" for name, value in implementation.options.items())
    return " ".join(filter(None, (implementation.summary, options and f"({options})")))


def _default(trait, op) -> str:
    if trait.name in op.space.derived:
        return "(derived)"
    if trait.dynamic:
        return "(read off each call)"
    if trait.type == "platform":
        return "(this machine)"
    return "(required)" if trait.default is REQUIRED else written(trait.default)
