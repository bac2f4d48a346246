"""`schema`: JSON Schema of the files, for editors."""

from __future__ import annotations

import json

import click


@click.command("schema", short_help="JSON Schema of the files, for editors.")
@click.option("--overrides", "kind", flag_value="overrides", help="Of an override file instead of a registry file.")
@click.option("--tiles", "kind", flag_value="tiles", help="Of a tiles file.")
def schema_command(kind: str | None) -> None:
    """Prints the JSON Schema of a registry file, so that an editor can complete and check it.

    \b
    Example: kernel-registry schema > registry.schema.json
    """
    from ..schema import json_schema

    click.echo(json.dumps(json_schema(kind or "registry"), indent=2))
