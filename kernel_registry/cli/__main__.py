"""`python -m kernel_registry.cli`."""

from . import main

main(prog_name="kernel-registry")
