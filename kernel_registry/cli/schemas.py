"""`schema`: JSON Schema of the files, for editors."""

from __future__ import annotations

import json

import click


@click.command("schema", short_help="JSON Schema of the files, for editors.")
@click.option("--overrides", is_flag=True, help="Of an override file instead of a registry file.")
def schema_command(overrides: bool) -> None:
    """Prints the JSON Schema of a registry file, so that an editor can complete and check it.

    \b
    Example: kernel-registry schema > registry.schema.json
    """
    from ..schema import json_schema

    click.echo(json.dumps(json_schema("overrides" if overrides else "registry"), indent=2))
