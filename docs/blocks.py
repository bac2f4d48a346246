"""Runs the code blocks of the documents, so that what they show is what happens.

    python docs/blocks.py                   runs README.md and docs/*.md; prints what differs, exits 1 if anything does
    python docs/blocks.py --write FILE...   writes the real output into the documents instead

The first words of a fence say what is done with a block; a document's blocks share one fresh folder, in order:

    yaml file=NAME, python file=NAME     written to that file
    yaml append=NAME                     added to the end of that file; with before=TEXT, above the first line with that
    python run                           executed; a `text output` block after it is what it prints
    console                              each line after `$ ` is executed, the lines below it are what it prints; a
                                         command that fails ends in `# exits N`
    console figures                      the same, but any number agrees with any other: timings

A line `...` of output stands for any lines. A table's rule agrees with a longer or shorter one: it is drawn under whole
paths, which are shown without the checkout's folder. Everything else is not executed. A document with the line
`<!-- in a checkout -->` runs in a copy of the repository. No GPU is used, so that the platform is cpu everywhere.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
_FENCE = re.compile(r"^```([^\n`]+)\n(.*?)^```$", re.M | re.S)
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")
_PARTS = ("kernel_registry", "ops", "traits", "registry.yaml", "tiles.yaml")


class Runner:
    """One document's folder and environment."""

    def __init__(self, folder: Path, checkout: bool):
        self.folder = folder
        if checkout:
            for part in _PARTS:
                if (ROOT / part).is_dir():
                    shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / part, folder / part)
        self.root = folder if checkout else ROOT
        keep = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("KERNEL_REGISTRY_")}
        self.environment = {**keep, "PYTHONPATH": os.pathsep.join((str(self.root), str(folder))), "NO_COLOR": "1",
                            "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}

    def run(self, command: list[str], expect: int = 0) -> str:
        done = subprocess.run(command, cwd=self.folder, env=self.environment, text=True, timeout=300,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode != expect:
            raise SystemExit(f"{command[-1]!r} exits {done.returncode}, expected {expect}:\n{done.stdout}")
        text = done.stdout.replace(f"{self.folder}{os.sep}", "").replace(f"{self.root}{os.sep}", "")
        return "\n".join(line.rstrip() for line in text.splitlines())

    def python(self, code: str) -> str:
        return self.run([sys.executable, "-c", code])

    def console(self, line: str) -> str:
        expect = re.search(r"#\s*exits (\d+)\s*$", line)
        tool = f'kernel-registry() {{ "{sys.executable}" -m kernel_registry.cli "$@"; }}; '
        return self.run(["bash", "-c", tool + line], int(expect[1]) if expect else 0)


def agrees(shown: str, real: str, figures: bool = False) -> bool:
    """Whether `shown`, in which a line `...` stands for any lines, is the output `real`. `figures`: but for numbers."""
    shown, real = (re.sub("─+", "─", text) for text in (shown, real))
    if figures:
        shown, real = (re.sub(r"[ ─]+", " ", _NUMBER.sub("1", text)) for text in (shown, real))
    lines = [re.escape(line.rstrip()) + "\n" if line.strip() != "..." else r"(?:.*\n)*?" for line in shown.splitlines()]
    return re.fullmatch("".join(lines), "".join(line.rstrip() + "\n" for line in real.splitlines())) is not None


def run_document(path: Path) -> str:
    """The document's text with the real output wherever what it shows does not agree with it."""
    text = path.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(Path(folder).resolve(), "<!-- in a checkout -->" in text)
        printed: list[str] = []

        def replace(match: re.Match) -> str:
            info, body = match[1].split(), match[2]
            options = dict(word.partition("=")[::2] for word in info[1:])
            if "file" in options or "append" in options:
                target = runner.folder / (options.get("file") or options["append"])
                target.parent.mkdir(parents=True, exist_ok=True)
                old = target.read_text(encoding="utf-8") if "append" in options else ""
                here = old.rindex("\n", 0, old.index(options["before"])) + 1 if "before" in options else len(old)
                target.write_text(old[:here] + body + old[here:], encoding="utf-8")
            elif "run" in options:
                printed[:] = [runner.python(body)]
            elif "output" in options:
                body = body if agrees(body, printed[0]) else printed[0] + "\n"
            elif info[0] == "console":
                body = _console(runner, body, "figures" in options)
            return f"```{match[1]}\n{body}```"
        return _FENCE.sub(replace, text)


def _console(runner: Runner, body: str, figures: bool) -> str:
    out = []
    for part in re.split(r"^(?=\$ )", body, flags=re.M):
        command, _, shown = part.partition("\n")
        if not command.startswith("$ "):
            out.append(part)
            continue
        real = runner.console(command[2:])
        same = agrees(shown.strip("\n"), real, figures)
        out.append(f"{command}\n{shown if same else real + chr(10) * bool(real)}")
    return "".join(out)


def documents() -> list[Path]:
    return [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.is_file()]


def main() -> None:
    write = "--write" in sys.argv
    names = [name for name in sys.argv[1:] if not name.startswith("-")]
    wrong = False
    for path in map(Path, names) if names else documents():
        before, after = path.read_text(encoding="utf-8"), run_document(path)
        if before != after:
            wrong = True
            if write:
                path.write_text(after, encoding="utf-8")
            print("".join(difflib.unified_diff(before.splitlines(True), after.splitlines(True), str(path), "real")))
    sys.exit(1 if wrong and not write else 0)


if __name__ == "__main__":
    main()
