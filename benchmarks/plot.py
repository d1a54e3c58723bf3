"""The pictures of the committed results: ``results/<folder>/<suite>-<what>.png`` beside the CSV that they show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ._results import RESULTS, Row, committed, picture_metadata
from .e2e_pictures import PICTURES as E2E_PICTURES

OVERHEAD = "call overhead"
COLOURS = {"hvprune": "tab:green", "plain PyTorch": "tab:blue", "released": "tab:red"}
MARKERS = "os^Dv*PX"


def draw(results: Path = RESULTS) -> list[Path]:
    """Every picture of every suite, as far as its results are there; returns the files written."""
    written = []
    for suite, draws in SUITES.items():
        for folder, rows in committed(suite, results).items():
            for what, (title, make) in draws.items():
                figure = make(rows)
                if figure is None:
                    continue
                path = results / folder / f"{suite}-{what}.png"
                title = f"{title} on {rows[0]['device']}"
                figure.suptitle(title)
                figure.savefig(path, dpi=100, metadata=picture_metadata(title, path.with_name(f"{suite}.csv")))
                written.append(path)
    return written


def floor_picture(rows: list[Row]) -> Figure | None:
    """How many times the floor every rival takes for one image of CLIP-L."""
    rows = [row for row in _compared(rows) if row["batch"] == "1" and row["of_floor"]]
    names = list(dict.fromkeys(_name(row) for row in rows))
    if not rows:
        return None
    figure = Figure(figsize=(9, 0.42 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots()
    for rival, style in _styles(rows).items():
        points = [(float(row["of_floor"]), names.index(_name(row))) for row in rows if row["rival"] == rival]
        axes.plot(*zip(*points, strict=True), linestyle="", label=rival, **style)
    axes.set(xscale="log", xlabel="multiple of the floor, one image of CLIP-L", yticks=range(len(names)))
    axes.set_yticklabels(names)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=5, fontsize="small")
    return figure


def batch_picture(rows: list[Row]) -> Figure | None:
    """Time against batch, an axes for each op and setting."""
    rows = [row for row in _compared(rows) if _time(row)]
    names = list(dict.fromkeys(_name(row) for row in rows))
    if not rows:
        return None
    styles, columns = _styles(rows), 3
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(12, 2.6 * lines + 0.8), layout="constrained")
    for axes, name in zip(
        figure.subplots(lines, columns, squeeze=False).flat, [*names, *[None] * columns], strict=False
    ):
        if name is None:
            axes.set_visible(False)
            continue
        shown = [row for row in rows if _name(row) == name]
        for rival in dict.fromkeys(row["rival"] for row in shown):
            points = sorted((int(row["batch"]), _time(row)) for row in shown if row["rival"] == rival)
            axes.plot(*zip(*points, strict=True), label=rival, **styles[rival])
        axes.set(xscale="log", yscale="log", title=name)
        batches = sorted({int(row["batch"]) for row in shown})
        axes.set_xticks(batches, labels=map(str, batches), minor=False)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    figure.supylabel("µs")
    lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    figure.legend(handles=list(lines.values()), loc="outside lower center", ncols=5, fontsize="small")
    return figure


def _compared(rows: list[Row]) -> list[Row]:
    """CLIP-L in the dtype that has baselines."""
    dtype = next((row["dtype"] for row in rows if row["rival"] == "released"), "float32")
    return [r for r in rows if r["shape"].startswith("CLIP-L") and r["dtype"] == dtype and r["setting"] != OVERHEAD]


def _name(row: Row) -> str:
    return ", ".join(filter(None, (row["op"], row["setting"])))


def _time(row: Row) -> float | None:
    """Microseconds on the GPU, or on the wall where there are no others."""
    text = row["device_us"] or row["wall_us"]
    return float(text) if text else None


def _styles(rows: list[Row]) -> dict[str, dict]:
    """A colour for each family of rivals, a marker for each rival; the same in every picture of a run."""
    rivals = list(dict.fromkeys(row["rival"] for row in rows))
    colour = {r: next((c for name, c in COLOURS.items() if r.startswith(name)), "tab:gray") for r in rivals}
    return {r: {"color": colour[r], "marker": MARKERS[i % len(MARKERS)]} for i, r in enumerate(rivals)}


# By suite and what a picture shows: its title and what draws it from the rows, or None if they do not suffice.
SUITES: dict[str, dict[str, tuple[str, Callable[[list[Row]], Figure | None]]]] = {
    "micro": {
        "floor": ("Multiple of the floor", floor_picture),
        "batch": ("Time against images of CLIP-L in a batch", batch_picture),
    },
    "e2e": E2E_PICTURES,
}
