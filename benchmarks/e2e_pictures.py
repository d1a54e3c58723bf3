"""The pictures of ``hvprune bench e2e``, one axes for each model. ``hvprune bench plot`` draws them."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ._results import Row
from .e2e import PRESETS
from .papers import TITLES, UNPRUNED

STAGES = ("tower", "select", "projector", "merge", "prefill", "rest")
STYLES = {"eager": ("-", "full"), "static": (":", "left"), "captured": ("--", "none")}  # line, filling of the markers
# Colour and marker by how a variant's name begins.
FAMILIES = {
    "hvprune VisPruner": ("tab:green", "o"),
    "hvprune HIVTP": ("tab:blue", "s"),
    "released VisPruner": ("tab:red", "X"),
    "released HIVTP": ("tab:orange", "P"),
    UNPRUNED: ("black", "D"),
}
SHOWN_BY_BATCH = (UNPRUNED, "hvprune HIVTP 288", "hvprune HIVTP 1440", "hvprune VisPruner 128", "hvprune VisPruner 320")


def kept_picture(rows: list[Row]) -> Figure | None:
    """Time to first token against visual tokens, batch 1."""

    def draw(axes: Axes, rows: list[Row]) -> None:
        rows = [row for row in rows if row["batch"] == "1"]
        for mode in STYLES:
            for family in FAMILIES:
                points = sorted(
                    (int(row["visual_tokens"]), float(row["ttft_ms"]))
                    for row in rows
                    if row["mode"] == mode and row["variant"].startswith(family)
                )
                if points:
                    axes.plot(*zip(*points, strict=True), label=f"{family}, {mode}", **_style(family, mode))
        axes.set(xlabel="visual tokens, one photo", ylabel="ms", ylim=(0, None))

    return _figure(rows, draw)


def batch_picture(rows: list[Row]) -> Figure | None:
    """Time to first token against batch: unpruned, HIVTP and VisPruner at one budget."""

    def draw(axes: Axes, rows: list[Row]) -> None:
        for variant in SHOWN_BY_BATCH:
            for mode in ("eager", "captured"):
                points = sorted(
                    (int(row["batch"]), float(row["ttft_ms"]))
                    for row in rows
                    if row["mode"] == mode and row["variant"] == variant
                )
                if points:
                    axes.plot(*zip(*points, strict=True), label=f"{variant}, {mode}", **_style(variant, mode))
        batches = sorted({int(row["batch"]) for row in rows})
        axes.set(xscale="log", yscale="log", xlabel="photos in a batch", ylabel="ms")
        axes.set_xticks(batches, labels=map(str, batches), minor=False)

    return _figure(rows, draw)


def stages_picture(rows: list[Row]) -> Figure | None:
    """Where the time to the first token goes, batch 1, as bars in stages."""

    def draw(axes: Axes, rows: list[Row]) -> None:
        rows = [row for row in rows if row["batch"] == "1" and row["split_ttft_ms"]]
        names = [f"{row['variant']}, {row['mode']}" for row in rows]
        left = [0.0] * len(rows)
        for stage in STAGES:
            widths = [float(row[f"{stage}_ms"]) for row in rows]
            axes.barh(names, widths, left=left, label=stage)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.invert_yaxis()
        axes.set(xlabel="ms")
        axes.tick_params(axis="y", labelsize="small")

    return _figure(rows, draw, height=7)


def _style(variant: str, mode: str) -> dict:
    colour, marker = next(style for family, style in FAMILIES.items() if variant.startswith(family))
    line, filling = STYLES[mode]
    return {"color": colour, "marker": marker, "linestyle": line, "fillstyle": filling}


def _figure(rows: list[Row], draw, height: float = 4.5) -> Figure | None:
    """``draw`` for each model that has rows; None if none has."""
    presets = [preset for preset in PRESETS if any(row["preset"] == preset for row in rows)]
    if not presets:
        return None
    figure = Figure(figsize=(5.5 * len(presets), height), layout="constrained")
    for axes, preset in zip(figure.subplots(1, len(presets), squeeze=False).flat, presets, strict=True):
        draw(axes, [row for row in rows if row["preset"] == preset])
        axes.set_title(TITLES[preset])
        axes.grid(alpha=0.3)
    handles = {name: h for axes in figure.axes for h, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize="small")
    return figure


PICTURES = {
    "kept": ("Time to first token against visual tokens", kept_picture),
    "stages": ("Where the time to the first token goes", stages_picture),
    "batch": ("Time to first token against batch", batch_picture),
}
