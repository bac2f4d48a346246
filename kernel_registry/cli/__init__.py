"""The command line, `kernel-registry`. Each command lives in its own module, imported when it is asked for.

Exit codes: 0 done; 1 a check said no (lint, verify, run, diff, an explain that nothing serves); 2 the question or a
file it named is wrong, told in one message on stderr.
"""

from __future__ import annotations

import importlib

import click

from ..errors import RegistryError

_COMMANDS = {  # command -> module; the order is the order of --help
    "list": "listing", "explain": "explaining", "plan": "plans", "diff": "plans", "run": "running", "lint": "linting",
    "verify": "verifying", "bench": "benching", "tune": "tuning", "schema": "schemas",
}


class _Lazy(click.Group):
    """Imports a command's module when the command is looked up, and turns the registry's errors into messages."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module = importlib.import_module(f".{_COMMANDS[name]}", __package__)
        return getattr(module, f"{name}_command")

    def resolve_command(self, ctx: click.Context, args: list[str]):
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            from ..errors import suggestion

            ctx.fail(f"no command {args[0]!r}; {suggestion(args[0], _COMMANDS)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except RegistryError as error:
            from .common import complain

            complain(error)
        except ValueError as error:
            from ..traits.model_config import ConfigError
            from .common import complain

            if not isinstance(error, ConfigError):
                raise
            complain(error)
        ctx.exit(2)


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="kernel-registry", message="%(version)s")
def main() -> None:
    """Which kernel serves which call, and why.

    \b
    kernel-registry list                                  what exists
    kernel-registry plan deepseek-v3 --platform sm_90     what a model would get on a machine
    kernel-registry explain moe.topk num_experts=256 topk=8
    """
