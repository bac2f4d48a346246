"""A second plugin of the tests: notes, in the process that it is in, each call of a kernel that the registry made."""

from __future__ import annotations

import os


def plugin() -> None:
    """An entry point of vllm.general_plugins; writes "op kernel" lines into $KERNEL_CALLS, one file a process."""
    from kernel_registry import bound

    if hasattr(bound.make_kernel, "counts"):
        return
    make, path = bound.make_kernel, os.path.join(os.environ["KERNEL_CALLS"], str(os.getpid()))

    def make_kernel(implementation, request, *more):
        kernel = make(implementation, request, *more)

        def counting(*args, **kwargs):
            with open(path, "a") as file:
                file.write(f"{request.op} {implementation.name}\n")
            return kernel(*args, **kwargs)
        return counting

    make_kernel.counts = True
    bound.make_kernel = make_kernel
