"""Adapters to serving runtimes. Each imports its runtime only when it is used; importing this package imports none."""
