"""The picture of a result: bars for what was timed, or lines where something grows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_COLUMNS = 4  # panels side by side


def draw(name: str, keys: Sequence[str], rows: Sequence[Row], path: Path) -> None:
    """Write a PNG; nothing where no row has a number to show."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    if name == "growth":
        found = _growth(figure, rows)
    else:
        found = _rivals(figure, rows) if name == "inference" else _bars(figure, keys, rows)
    if found:
        figure.savefig(path, dpi=100)


def _bars(figure: Any, keys: Sequence[str], rows: Sequence[Row]) -> bool:
    """Milliseconds (or GiB) in the order of the rows.

    The axis begins at 0; it is logarithmic where the smallest bar would hardly be seen.
    """
    bars = []
    for row in rows:
        label = " ".join(str(row[key]) for key in keys if row.get(key) not in ("", None))
        if "ms" in row:
            bars.append((label, row["ms"]))
        if "total" in row:
            bars.append((label, row["total"] / 2**30))
    if not bars:
        return False
    figure.set_size_inches(9, 1 + 0.2 * len(bars))
    axes = figure.subplots()
    axes.barh([label for label, _ in bars], [value for _, value in bars])
    axes.invert_yaxis()
    values = [value for _, value in bars]
    if max(values) > 50 * min(values):
        axes.set_xscale("log")
    axes.set_xlabel("GiB" if "total" in rows[0] else "milliseconds")
    return True


def _rivals(figure: Any, rows: Sequence[Row]) -> bool:
    """Images a second: a panel for each dense model and batch, a group for each model made of it, a bar for each
    rival."""
    from matplotlib.patches import Patch

    panels: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.get("times"):
            panels.setdefault((row["of"], row["dtype"], row["batch"]), []).append(row)
    if not panels:
        return False
    columns = min(len(panels), _COLUMNS)
    lines = -(-len(panels) // columns)
    figure.set_size_inches(4 * columns, 0.4 + 2.6 * lines)
    whos = list(dict.fromkeys(who for found in panels.values() for row in found for who in row["times"]))
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for axes, (of, found) in zip(grid, panels.items(), strict=False):
        for number, who in enumerate(whos):
            there = [(place, row) for place, row in enumerate(found) if who in row["times"]]
            places = [place + (number - (len(whos) - 1) / 2) * 0.8 / len(whos) for place, _ in there]
            speeds = [1e3 * row["batch"] / row["times"][who]["ms"] for _, row in there]
            axes.bar(places, speeds, 0.8 / len(whos), label=who, color=f"C{number}")
        axes.set_xticks(range(len(found)), [row["model"] for row in found])
        axes.set_title(f"{of[0]}, {of[1]}, batch {of[2]}", fontsize="medium")
        axes.set_ylabel("images/s")
    for axes in list(figure.axes)[len(panels) :]:
        axes.remove()
    names = {"nvit_jax": "nvit_jax", "onnx": "onnxruntime"}
    handles = [Patch(color=f"C{number}", label=names.get(who, f"PyTorch {who}")) for number, who in enumerate(whos)]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(whos))
    return True


def _growth(figure: Any, rows: Sequence[Row]) -> bool:
    """Time and memory against size, one picture for each axis, relative to the smallest size."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if "ms" in row:
            lines.setdefault(row["axis"], []).append(row)
    if not lines:
        return False
    figure.set_size_inches(3.2 * len(lines), 3)
    for axes, (axis, found) in zip(figure.subplots(1, len(lines), squeeze=False)[0], lines.items(), strict=True):
        found = sorted(found, key=lambda row: row["size"])
        sizes = [row["size"] / found[0]["size"] for row in found]
        for what, label in (("ms", "time"), ("working", "memory")):
            if what in found[0]:
                axes.loglog(sizes, [row[what] / found[0][what] for row in found], marker="o", label=label, base=2)
        axes.loglog(sizes, sizes, color="grey", linestyle=":", label="linear", base=2)
        axes.set_xticks(sizes, [f"{size:.3g}" for size in sizes])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(f"{axis}, {found[0]['size']} = 1")
        axes.legend()
    return True
