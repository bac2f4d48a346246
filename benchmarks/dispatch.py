"""What a dispatch costs on the host, beside something else: a Python call, a dict hit, TokenSpeed's select_kernel.

    python benchmarks/dispatch.py                   fetches tokenspeed-kernel 0.1.4 with pip into a temporary folder
    python benchmarks/dispatch.py --tokenspeed DIR  takes it from DIR (an unpacked wheel); `none` leaves it out
    python benchmarks/dispatch.py --json FILE       also writes the figures

Nanoseconds are the best of nine rounds; only the ratios travel between machines. TokenSpeed is measured as its product
code calls it: the format signature and the traits built per call, the selection answered from its cache. Its package
refuses to import without a GPU, so its selection modules are loaded under an empty parent package with a fake platform.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import timeit
import types
import zipfile
from pathlib import Path

from kernel_registry import Registry
from kernel_registry.lint import lint_file

TRAITS = dict(num_experts=256, num_expert_group=8, topk_group=4, topk=8, num_fused_shared_experts=0, dtype="float32")
CONTRACT = "kernel_registry.ops.moe.topk.contract:TopK"
EVERYTHING = ("platform", "dtype", "bias_dtype", "scoring", "has_bias", "renormalize", "score_dtype",
              "num_expert_group", "topk_group", "num_fused_shared_experts", "contiguous")


def nanoseconds(function, number: int = 100_000) -> float:
    return min(timeit.repeat(function, number=number, repeat=9)) / number * 1e9


def registry_of(folder: Path, count: int) -> Path:
    """A registry file with `count` implementations of moe.topk and a fallback, all with a target that does nothing."""
    (folder / "empty_kernels.py").write_text(textwrap.dedent("""
        def empty(**traits):
            def kernel(router_logits, correction_bias, *, routed_scaling_factor=1.0):
                return router_logits
            return kernel
        """))
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    anything = {name: "any" for name in EVERYTHING}
    entries = {f"kernel_{i}": {"target": "empty_kernels:empty", "when": {
        "platform": ["cuda>=sm_80"], "dtype": ["float32", "bfloat16"], "num_experts": i + 1, "topk": {"max": 32},
        "num_expert_group": "any", "topk_group": "any"}} for i in range(count)}
    entries["fallback"] = {"target": "empty_kernels:empty", "fallback": True, "when": anything}
    path = folder / f"registry_{count}.yaml"
    path.write_text(json.dumps({"version": 1, "ops": {"moe.topk": {"contract": CONTRACT, "implementations": entries}}},
                               indent=1))  # JSON is YAML
    return path


def tokenspeed(folder: str | None):
    """A function that does one product-form selection of TokenSpeed 0.1.4, or None with the reason printed."""
    if folder == "none":
        return None
    root = Path(folder) if folder else Path(tempfile.mkdtemp())
    try:
        if not folder:
            subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "tokenspeed-kernel==0.1.4",
                            "-d", str(root)], check=True, capture_output=True)
            with zipfile.ZipFile(next(root.glob("*.whl"))) as wheel:
                wheel.extractall(root, [n for n in wheel.namelist() if n.endswith(".py")])
        package = types.ModuleType("tokenspeed_kernel")
        package.__path__ = [str(root / "tokenspeed_kernel")]
        sys.modules["tokenspeed_kernel"] = package
        import torch
        from tokenspeed_kernel.platform import ArchVersion, Platform, PlatformInfo
        from tokenspeed_kernel.registry import register_kernel
        from tokenspeed_kernel.selection import select_kernel
        from tokenspeed_kernel.signature import dense_tensor_format, format_signature, format_signatures
    except Exception as error:  # a peer that is absent is a row that is absent
        print(f"# TokenSpeed is absent: {str(error).splitlines()[0]}")
        return None
    Platform.override(PlatformInfo("nvidia", ArchVersion(9, 0), "fake", 1, 0, 0.0, 132, 2048, 0))
    for name in ("a", "b", "c", "d"):
        register_kernel("moe", "sigmoid_bias_topk", name=name, solution=name,
                        signatures=format_signatures(("router_logits",), "dense", {torch.float32}))(lambda **_: None)
    dtype = torch.float32
    return lambda: select_kernel("moe", "sigmoid_bias_topk", format_signature(router_logits=dense_tensor_format(dtype)),
                                 traits={"tokens": 16, "experts": 256, "topk": 8}, override=None, solution=None)


def seconds_of(code: str, rounds: int = 9) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(arguments) -> list[tuple[str, float, str]]:
    rows: list[tuple[str, float, str]] = []
    folder = Path(tempfile.mkdtemp())
    small = Registry(registry_of(folder, 4), plugins=False, environment=False, platform="sm_90")
    kernel = small.dispatch("moe.topk", **TRAITS)
    raw, dispatch, table = kernel.raw, small.dispatch, {"key": 1}

    def call():
        return None
    rows.append(("a Python call", nanoseconds(lambda: call()), "ns"))
    rows.append(("a dict hit", nanoseconds(lambda: table["key"]), "ns"))
    ours = nanoseconds(lambda: dispatch("moe.topk", num_experts=256, num_expert_group=8, topk_group=4, topk=8,
                                        num_fused_shared_experts=0, dtype="float32"))
    rows.append(("dispatch, six traits, cached", ours, "ns"))
    plain = nanoseconds(lambda: raw(1, 2, routed_scaling_factor=2.5))
    bound = nanoseconds(lambda: kernel(1, 2, routed_scaling_factor=2.5))
    rows += [("the raw function", plain, "ns"), ("the bound kernel", bound, "ns"),
             ("bound over raw", bound - plain, "ns")]
    theirs = tokenspeed(arguments.tokenspeed)
    if theirs is not None:
        theirs()
        cost = nanoseconds(theirs, 20_000)
        rows += [("TokenSpeed select_kernel, product form, cached", cost, "ns"),
                 ("TokenSpeed over ours", cost / ours, "x")]

    path = registry_of(folder, 10_000)
    start = time.perf_counter()
    big = Registry(path, plugins=False, environment=False, platform="sm_90")
    big.catalog
    rows.append(("10,000 implementations: load", time.perf_counter() - start, "s"))
    cold = []
    for experts in (64, 128, 256, 512, 9_984):
        start = time.perf_counter()
        big.dispatch("moe.topk", **{**TRAITS, "num_experts": experts})
        cold.append((time.perf_counter() - start) * 1e3)
    rows.append(("10,000 implementations: cold dispatch, median", statistics.median(cold), "ms"))
    many = big.dispatch
    rows.append(("10,000 implementations: cached dispatch", nanoseconds(lambda: many(
        "moe.topk", num_experts=256, num_expert_group=8, topk_group=4, topk=8, num_fused_shared_experts=0,
        dtype="float32")), "ns"))
    start = time.perf_counter()
    lint_file(path)
    rows.append(("10,000 implementations: lint", time.perf_counter() - start, "s"))

    nothing = seconds_of("pass")
    rows.append(("python -c pass", nothing * 1e3, "ms"))
    rows.append(("import kernel_registry, on top", (seconds_of("import kernel_registry") - nothing) * 1e3, "ms"))
    rows.append(("kernel-registry explain", seconds_of(
        "import sys; sys.argv[1:] = ['explain', 'moe.topk', 'num_experts=256', 'topk=8']; "
        "from kernel_registry.cli import main; main()") * 1e3, "ms"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenspeed")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    rows = measure(arguments)
    print(f"Python {platform.python_version()}, {platform.machine()}")
    for name, value, unit in rows:
        print(f"{name:<52} {value:10.1f} {unit}")
    if arguments.json:
        figures = [dict(zip(("what", "value", "unit"), row)) for row in rows]
        Path(arguments.json).write_text(
            json.dumps({"python": platform.python_version(), "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
