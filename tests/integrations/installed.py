"""Packages that look installed: metadata on disk as pip writes it, so that a runtime finds their entry points."""

from __future__ import annotations

from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


def own_entry_points() -> dict[str, dict[str, str]]:
    """The entry points that this project declares, by group: what installing it registers."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]


def pretend_installed(site: Path, distribution: str, entry_points: dict[str, dict[str, str]]) -> None:
    """Writes into `site`, which is to stand on PYTHONPATH, what an installation of the distribution would."""
    info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    lines = [f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
             for group, points in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
