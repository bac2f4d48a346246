"""What benchmarks/topk.py measured, as a drawing and as the tables of docs/benchmarks.md: no figure is copied by hand.

    python benchmarks/plot_topk.py FILE.json                        prints the tables
    python benchmarks/plot_topk.py FILE.json --full                 also every time
    python benchmarks/plot_topk.py FILE.json --draw docs/topk.svg   draws time against tokens, a panel per shape (needs
                                                                    matplotlib: the extra `bench`); --dtype says which

A later row of FILE.json replaces an earlier one of the same shape, dtype and tokens. Rows of another machine or other
versions of torch and Triton than the last row's are left out, and counted.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

FLOORS = ("floor", "empty", "bytes")
TITLES = {
    "dsv3": "DeepSeek-V3", "minimax_m2": "MiniMax-M2", "glm45": "GLM-4.5", "kimi_k2": "Kimi-K2", "kimi_k3": "Kimi-K3",
    "qwen3_moe": "Qwen3-MoE", "qwen3_next": "Qwen3-Next", "gpt_oss": "gpt-oss", "mixtral": "Mixtral",
    "deepseek_v4": "DeepSeek-V4",
}
PROJECTS = {  # a colour per project, of the Okabe-Ito palette, which the colour-blind can tell apart
    "sglang": "#0072B2", "vllm": "#D55E00", "flashinfer": "#009E73", "tokenspeed": "#CC79A7",
    "triton_kernels": "#E69F00", "torch": "#56B4E9",
}


# ---- reading ---------------------------------------------------------------------------------------------------------

def peer_times(row) -> dict[str, float]:
    """Microseconds by peer, of those that ran."""
    return {name: us for name, us in row["us"].items() if us and name not in FLOORS and name != "ours"}


def best_peer(row) -> str | None:
    """The fastest one that is not ours; None where no peer ran."""
    times = peer_times(row)
    return min(times, key=times.get, default=None)


def ahead(row) -> float | None:
    """The best peer's time over ours: above 1, ours is faster."""
    peer, mine = best_peer(row), row["us"].get("ours")
    return row["us"][peer] / mine if peer and mine else None


def over_floor(row) -> float | None:
    mine, floor = row["us"].get("ours"), row["us"].get("floor")
    return mine / floor if mine and floor else None


def regret(row) -> float | None:
    """The chosen implementation's time over the best one's; None where they were not all timed."""
    times = {name: us for name, us in row.get("variants", {}).items() if us}
    return times[row["chosen"]] / min(times.values()) if row["chosen"] in times else None


def title(row) -> str:
    c = row["shape"]
    groups = f"/{c['G']}/{c['TG']}" if c["G"] > 1 else ""
    return f"{TITLES.get(row['config'], row['config'])} {c['E']}{groups}/{c['K']}"


def read(path) -> tuple[list[dict], int]:
    """(the rows that count, how many do not: of another machine or other versions)."""
    def origin(row):
        return row["machine"], row["torch"], row["triton"]

    rows = [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
    same = [row for row in rows if origin(row) == origin(rows[-1])]
    latest = {(row["kind"], row["config"], row["dtype"], row["tokens"]): row for row in same}
    return list(latest.values()), len(rows) - len(same)


# ---- tables ----------------------------------------------------------------------------------------------------------

def table(heads, lines) -> str:
    rule = ["---"] * len(heads)
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in [heads, rule, *lines])


def by_tokens(rows, cell) -> str:
    """A line per shape and a column per number of tokens; `cell` gives a row's text, or None."""
    columns = sorted({row["tokens"] for row in rows})
    found = {(title(row), row["tokens"]): cell(row) or "" for row in rows}
    shapes = dict.fromkeys(title(row) for row in rows)
    return table(["", *columns], [[shape, *(found.get((shape, n), "") for n in columns)] for shape in shapes])


def times(rows) -> str:
    """A line per row with every time in it."""
    names = dict.fromkeys(name for row in rows for name in (*FLOORS, *row["us"]) if name != "ours")
    names = [name for name in (*names, "ours") if any(name in row["us"] for row in rows)]

    def told(row, name):
        return "" if name not in row["us"] else "refused" if row["us"][name] is None else f"{row['us'][name]:.2f}"
    return table(["", "tokens", *names],
                 [[title(row), row["tokens"], *(told(row, name) for name in names)] for row in rows])


def number(value, note="") -> str | None:
    return None if value is None else f"{value:.2f}{note}"


def report(rows, full=False) -> str:
    """Every table, as markdown."""
    last = rows[-1]
    held = ", ".join(f"{name} {version}" for name, version in last["peers"].items())
    bandwidth = f", a large copy moves {last['copy_bytes_per_s'] / 1e12:.2f} TB/s" if "copy_bytes_per_s" in last else ""
    parts = [f"{last['machine']}, torch {last['torch']}, Triton {last['triton']}{bandwidth}. Peers: {held or 'torch'}."]
    graph = [row for row in rows if row["kind"] == "graph"]
    for dtype in dict.fromkeys(row["dtype"] for row in graph):
        some = [row for row in graph if row["dtype"] == dtype]
        parts += [f"### Best peer over ours, {dtype} logits",
                  by_tokens(some, lambda row: number(ahead(row), f" {best_peer(row)}")),
                  f"### Ours over the floor, {dtype} logits", by_tokens(some, lambda row: number(over_floor(row)))]
        if any(regret(row) for row in some):
            parts += [f"### Regret of the choice, {dtype} logits",
                      by_tokens(some, lambda row: number(regret(row), f" {row['chosen']}"))]
        if full:
            parts += [f"### Microseconds per call, {dtype} logits", times(some)]
    for dtype in dict.fromkeys(row["dtype"] for row in rows if row["kind"] == "host"):
        parts += [f"### Host time of one eager call of one token, {dtype} logits, microseconds",
                  times([row for row in rows if row["kind"] == "host" and row["dtype"] == dtype])]
    wrong = [f"- {title(row)}, {row['dtype']}, {row['tokens']} tokens: {name} {count}"
             for row in graph for name, count in row["wrong_rows"].items()]
    parts += ["### Rows routed otherwise than float64 does", "\n".join(wrong) or "None."]
    return "\n\n".join(parts)


# ---- drawing ---------------------------------------------------------------------------------------------------------

def style(name, project, nth) -> dict:
    """How a line looks: a project's colour, and for its second and third kernel another dash and marker."""
    return dict(color=PROJECTS.get(project, "#999999"), linestyle=("-", "--", ":")[nth % 3], marker="os^"[nth % 3],
                markersize=3, linewidth=1.3, label=name, zorder=2)


def draw(rows, path, dtype="float32"):
    """Time against tokens, both logarithmic, one panel per shape. Plain torch is left out: it is off the scale."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "topk", "font.size": 8})  # the same file again
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    rows = sorted((row for row in rows if row["kind"] == "graph" and row["dtype"] == dtype), key=lambda r: r["tokens"])
    if not rows:
        raise SystemExit(f"no times of {dtype} logits to draw")
    present = {row["config"] for row in rows}
    shapes = [name for name in (*TITLES, *sorted(present - set(TITLES))) if name in present]
    names = sorted({name for row in rows for name in peer_times(row)} - {"torch"})
    styles: dict[str, dict] = {
        "floor": dict(color="#777777", linestyle="-", linewidth=1, label="floor: read, sum, write", zorder=1),
        "empty": dict(color="#777777", linestyle="--", linewidth=1, label="floor: an empty launch", zorder=1),
        "bytes": dict(color="#777777", linestyle=":", linewidth=1.4, label="floor: bytes at copy bandwidth", zorder=1)}
    for project in PROJECTS:
        for nth, name in enumerate(n for n in names if n.startswith(project)):
            styles[name] = style(name, project, nth)
    styles["ours"] = dict(color="black", linestyle="-", linewidth=2.2, marker="o", markersize=4, label="ours", zorder=3)

    across = min(5, len(shapes))
    down = -(-len(shapes) // across)
    figure, panels = plt.subplots(down, across, figsize=(2.4 * across + 0.4, 2.9 * down + 0.9), sharex=True,
                                  sharey=True, squeeze=False)
    lowest = min(us for row in rows for name, us in row["us"].items() if us and name in ("empty", "floor", "ours"))
    highest = max(us for row in rows for name, us in row["us"].items() if us and name in styles)
    for panel in panels.flat[len(shapes):]:
        panel.set_visible(False)
    for panel, shape in zip(panels.flat, shapes):
        mine = [row for row in rows if row["config"] == shape]
        for name, look in styles.items():
            points = [(row["tokens"], row["us"][name]) for row in mine if row["us"].get(name)]
            if points:
                panel.plot(*zip(*points), **look)
        panel.set_title(title(mine[0]), fontsize=9)
        panel.set(xscale="log", yscale="log", ylim=(lowest * 0.7, highest * 1.3))
        panel.grid(True, which="major", color="#e6e6e6", linewidth=0.6)
        panel.xaxis.set_major_locator(FixedLocator([1, 16, 128, 1024, 16384]))
        panel.yaxis.set_major_locator(FixedLocator([a * 10**b for b in range(-2, 6) for a in (1, 2, 5)]))
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[:, 0]:
        panel.set_ylabel("microseconds")
    for column in range(across):  # the lowest panel there is in each column bears the numbers
        panel = panels[(len(shapes) - 1 - column) // across, column]
        panel.set_xlabel("tokens")
        panel.tick_params(labelbottom=True)
    drawn = {line.get_label(): line for panel in panels.flat for line in panel.get_lines()}
    order = ["ours", *(n for n in styles if n in drawn and n != "ours"), *(styles[n]["label"] for n in FLOORS)]
    order = [label for label in order if label in drawn]
    height = figure.get_size_inches()[1]
    columns = min(len(order), 1 + across)
    figure.legend([drawn[label] for label in order], order, loc="lower center", ncols=columns, frameon=False)
    figure.suptitle(f"moe.topk, {dtype} logits, per call in a CUDA graph\n{rows[-1]['machine']}, "
                    f"torch {rows[-1]['torch']}, Triton {rows[-1]['triton']}", fontsize=9)
    figure.tight_layout(rect=(0, 0.18 * (1 + -(-len(order) // columns)) / height, 1, 1))
    figure.savefig(path, dpi=150, metadata={"Date": None} if str(path).endswith("svg") else None)
    plt.close(figure)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("file", help="what benchmarks/topk.py --out wrote")
    ap.add_argument("--full", action="store_true", help="also every time")
    ap.add_argument("--draw", metavar="PATH", help="the .svg or .png to draw")
    ap.add_argument("--dtype", default="float32", help="of the logits in the drawing")
    args = ap.parse_args()
    rows, others = read(args.file)
    if args.draw:
        draw(rows, args.draw, args.dtype)
    else:
        print(report(rows, args.full))
        if others:
            print(f"\n({others} rows of another machine or other versions left out)")


if __name__ == "__main__":
    main()
