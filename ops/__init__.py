"""The ops: one folder a family, one folder an op; see each op's contract.py."""

if __name__ != "kernel_registry.ops":
    raise ImportError("import kernel_registry.ops, not ops")
