"""`lint`: what is wrong or suspicious in a registry file."""

from __future__ import annotations

import click

from .common import near, open_registry, registry_options


@click.command("lint", short_help="Check a registry file.")
@click.argument("file", required=False)
@click.option("--strict", is_flag=True, help="Warnings fail too.")
@registry_options
@click.pass_context
def lint_command(ctx: click.Context, file: str | None, strict: bool, registry_file: str | None,
                 overrides: tuple[str, ...], tiles: tuple[str, ...]) -> None:
    """Checks a registry file, or everything that is loaded, without a GPU and without importing a kernel.

    Finds ambiguities, entries that are never chosen, boxes that hold nothing, missing modules and calls that nothing
    serves. Exits 1 on an error (with --strict, on a warning too).

    \b
    Example: kernel-registry lint my_kernels.yaml
    """
    from ..errors import RegistryError
    from ..lint import Finding, lint_catalog, lint_file

    if file and registry_file:
        raise click.UsageError("give FILE or --registry, not both")
    if file and (overrides or tiles):
        raise click.UsageError("FILE is checked on its own; with overrides and tiles, check what is loaded: "
                               "--registry FILE")
    if file:
        findings = lint_file(file)
    else:
        try:
            registry = open_registry(registry_file, overrides, tiles)
            registry.state.tuned.read()  # a tiles file is read when a kernel asks for it, or here
            findings = lint_catalog(registry.catalog)
        except RegistryError as error:
            hint = f" ({error.hint})" if error.hint else ""
            findings = [Finding("error", str(error.where or "registry"), error.message + hint)]
    for finding in findings:
        click.echo(near(str(finding)))
    errors = sum(finding.level == "error" for finding in findings)
    click.echo(f"{errors} errors, {len(findings) - errors} warnings")
    if errors or (strict and findings):
        ctx.exit(1)
