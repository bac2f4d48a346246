"""The documents: what they show is what happens, the reference is what the code says, links lead somewhere."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


blocks = load("blocks")
PAGES = {str(path.relative_to(ROOT)): path for path in blocks.documents()}
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.M | re.S)


def test_the_pages_are_there():
    assert {"README.md", "docs/concepts.md", "docs/registry.md", "docs/add_a_kernel.md", "docs/overrides.md",
            "docs/moe_topk.md", "docs/moe_experts.md", "docs/tiles.md", "docs/benchmarks.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows_is_what_happens(page):
    shown, real = PAGES[page].read_text(encoding="utf-8"), blocks.run_document(PAGES[page])
    difference = "".join(difflib.unified_diff(shown.splitlines(True), real.splitlines(True), page, "what happens"))
    assert not difference, f"{difference}\n`python docs/blocks.py --write {page}` takes over what happens"


def test_the_executed_pages_have_something_to_execute():
    """Against a fence that is not recognised: the page would pass with nothing run."""
    for page in ("README.md", "docs/concepts.md", "docs/add_a_kernel.md", "docs/overrides.md", "docs/moe_topk.md",
                 "docs/moe_experts.md", "docs/tiles.md"):
        infos = [info.split() for info, _ in FENCE.findall(PAGES[page].read_text(encoding="utf-8"))]
        assert sum("run" in info or info[:1] == ["console"] for info in infos) >= 1, page
        for info in infos:
            assert not info or info[0] in ("console", "sh", "python", "yaml", "text"), info
            options = {word.partition("=")[0] for word in info[1:]}
            assert options <= {"run", "output", "file", "append", "before", "figures"}, info


def test_a_wrong_output_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python run\nprint(1)\nprint(2)\nprint(3)\n```\n```text output\n1\n...\n3\n```\n")
    assert blocks.run_document(page) == page.read_text()
    page.write_text(page.read_text().replace("...\n3", "...\n4"))
    assert blocks.run_document(page) != page.read_text()
    page.write_text("```console\n$ echo ' a ─────'\n a ──\n```\n")  # a rule under a path, in another checkout
    assert blocks.run_document(page) == page.read_text()
    page.write_text("```console\n$ echo ' a b'\n a ──\n```\n")
    assert blocks.run_document(page) != page.read_text()
    page.write_text("```console\n$ echo took 3.25 us\ntook 17 us\n```\n")
    assert "took 3.25 us" in blocks.run_document(page)
    page.write_text(page.read_text().replace("console", "console figures"))
    assert blocks.run_document(page) == page.read_text()
    page.write_text("```console\n$ false\n```\n")
    with pytest.raises(SystemExit, match="exits 1, expected 0"):
        blocks.run_document(page)


def test_the_reference_is_generated_from_the_code():
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\n`python docs/generate.py` writes it anew"


@pytest.mark.parametrize("page", PAGES)
def test_yaml_blocks_are_valid_files(page, tmp_path):
    from kernel_registry import document, schema
    from kernel_registry.catalog import build

    for info, body in FENCE.findall(PAGES[page].read_text(encoding="utf-8")):
        if info.startswith("yaml") and body.startswith("version:"):
            parsed = document.parse(body, page)
            if "\nops:" in body:
                build([(parsed, schema.validate(schema.RegistryFile, parsed).ops)])
            elif "\ntiles:" in body:
                schema.validate(schema.TilesFile, parsed)
            else:
                schema.validate(schema.OverrideFile, parsed)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", PAGES[page].read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        found = (PAGES[page].parent / path).resolve() if path else PAGES[page]
        assert found.exists(), f"{page} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", found.read_text(encoding="utf-8")), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page}: #{anchor}"


def test_paths_that_pages_name_exist():
    for page, path in PAGES.items():
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:kernel_registry|ops|traits|docs|examples|benchmarks|tests)/[\w./]+)`", text):
            assert (ROOT / name).exists(), f"{page} names {name}"


def test_the_order_of_the_engines_modules_is_the_real_one():
    """docs/concepts.md: a module imports from its own row and the rows above it; every module has a row."""
    import ast

    table = PAGES["docs/concepts.md"].read_text(encoding="utf-8").partition("| modules | one idea |")[2]
    rows = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]
    row_of = {module: index for index, row in enumerate(rows) for module in row}
    files = {path.stem for path in (ROOT / "kernel_registry").glob("*.py")} - {"__init__"} | {"cli"}
    assert set(row_of) == files
    for module in files - {"cli"}:
        tree = ast.parse((ROOT / "kernel_registry" / f"{module}.py").read_text(encoding="utf-8"))
        typing_only = {id(n) for f in ast.walk(tree) if isinstance(f, ast.If) and ast.unparse(f.test) == "TYPE_CHECKING"
                       for n in ast.walk(f)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and id(node) not in typing_only:
                names = [node.module.partition(".")[0]] if node.module else [alias.name for alias in node.names]
                below = [name for name in names if name in files and row_of[name] > row_of[module]]
                assert not below, f"{module} imports {below}, which docs/concepts.md has below it"
