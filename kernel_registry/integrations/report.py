"""What an adapter did: which module of a runtime got which kernel and why, what stays with it, and the undo."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable


@dataclass(frozen=True)
class Row:
    """One module's part. `kernel` is None where it stays with the runtime's own code; `why` is told in both cases."""

    module: str
    kind: str
    op: str
    kernel: str | None
    why: str


@dataclass
class Report:
    """The rows of one switch, and how to undo it: `with enable(...):`, or `report.disable()`.

    `undo` are calls that put back what the switch replaced; they run once, last first."""

    title: str
    rows: list[Row] = field(default_factory=list)
    undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    @property
    def served(self) -> list[Row]:
        return [row for row in self.rows if row.kernel is not None]

    @property
    def declined(self) -> list[Row]:
        return [row for row in self.rows if row.kernel is None]

    @property
    def line(self) -> str:
        """The report in one line, for a log."""
        kernels = ", ".join(dict.fromkeys(f"{row.op}: {row.kernel}" for row in self.served)) or "none"
        reasons = "; ".join(dict.fromkeys(f"{row.kind}: {row.why}" for row in self.declined))
        return (f"{self.title}: {len(self.served)} of {len(self.rows)} run kernels of the registry ({kernels})"
                + (f"; {len(self.declined)} stay with the runtime ({reasons})" if reasons else ""))

    def __str__(self):
        groups: dict[tuple, list[str]] = {}
        for row in self.rows:
            groups.setdefault((row.kind, row.op, row.kernel, row.why), []).append(row.module)
        lines = [self.title]
        for (kind, op, kernel, why), modules in groups.items():
            where = modules[0] if len(modules) == 1 else f"{modules[0]} .. {modules[-1]}"
            lines.append(f"  {len(modules):3} {kind} ({where})")
            lines.append(f"      {op} -> {kernel or 'stays with the runtime'}: {why}")
        return "\n".join(lines)

    def disable(self) -> None:
        """Everything as it was before; a second time nothing. What can't be undone does not keep the rest from it."""
        errors = []
        while self.undo:
            try:
                self.undo.pop()()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *exc) -> None:
        self.disable()
