"""The demo's picture: photo and importance on the left, what each method keeps on the right."""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import Tensor

SIDE = 408  # longer side of a panel in pixels, rounded down to whole patches
MARGIN, GAP, CAPTION, CAPTION_WIDTH = 44, 26, 70, 300
BACKGROUND, INK, FAINT, DIMMED = "#ffffff", "#16181d", "#6b7280", "#0e1016"

IMPORTANT, COVERING, FILLING = "#ff9f1c", "#22b8f0", "#b9c0cc"
LEGEND = (
    (IMPORTANT, "Most important", "HIVTP: best of its region", "VisPruner: best of the photo"),
    (COVERING, "For coverage", "HIVTP: best left in its window", "VisPruner: unlike the others kept"),
    (FILLING, "To fill the budget", "HIVTP: best of the rest"),
)
# Lightness rises evenly from one anchor to the next, so that equal steps of importance look equal.
HEAT = ("#0b0d2a", "#472178", "#a83279", "#f0744f", "#fdf0a6")


class Panel(NamedTuple):
    """What one method keeps: a caption of two lines and disjoint (N,) masks by their colour."""

    title: str
    subtitle: str
    masks: dict[str, Tensor]


def draw(photo: Image.Image, importance: Tensor, grid: tuple[int, int], rows: list[list[Panel]]) -> Image.Image:
    """Photo above importance (N,); to their right one or two rows of panels, the legend ending the second."""
    first, second = rows + [[]] * (2 - len(rows))
    cell = max(1, SIDE // max(grid))
    width, height = grid[1] * cell, grid[0] * cell
    photo = ImageOps.fit(photo, (width, height), Image.Resampling.BICUBIC)
    masks = (item for panel in first + second for item in panel.masks.items())
    legend = _legend({colour for colour, mask in masks if mask.any()})
    step_x, step_y = max(width, CAPTION_WIDTH) + GAP, CAPTION + height + GAP
    legend_x = (1 + len(second)) * step_x
    right = max((1 + len(first)) * step_x - GAP, legend_x + legend.width)
    bottom = step_y + CAPTION + max(height, legend.height)
    canvas = Image.new("RGB", (right + 2 * MARGIN, bottom + 2 * MARGIN), BACKGROUND)

    def place(row: int, column: int, image: Image.Image, title: str, subtitle: str) -> None:
        x, y = MARGIN + column * step_x, MARGIN + row * step_y
        _write(canvas, x, y + 27, title, 29)
        _write(canvas, x, y + 55, subtitle)
        canvas.paste(image, (x, y + CAPTION))

    place(0, 0, photo, "Photo", f"{grid[0]} x {grid[1]} = {grid[0] * grid[1]} patches")
    place(1, 0, _heat_map(importance, grid, (width, height)), "Importance", "attention received, log scale")
    for row, panels in enumerate((first, second)):
        for column, panel in enumerate(panels, 1):
            place(row, column, _kept(photo, panel.masks, grid, cell), panel.title, panel.subtitle)
    canvas.paste(legend, (MARGIN + legend_x, MARGIN + step_y + CAPTION))
    return canvas


def _write(canvas: Image.Image, x: int, y: int, text: str, size: int = 21, anchor: str = "ls") -> None:
    """A line of text with its baseline at y; what is not small is ink."""
    colour = FAINT if size == 21 else INK
    ImageDraw.Draw(canvas).text((x, y), text, colour, ImageFont.load_default(size), anchor=anchor)


def _heat_map(importance: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Image.Image:
    levels = importance.clamp(min=1e-30).log()
    low, high = levels.min(), levels.max()
    levels = ((levels - low) / (high - low).clamp(min=1e-6) * 255).round()
    image = Image.frombytes("L", (grid[1], grid[0]), bytes(levels.int().tolist()))
    image.putpalette(_heat_palette())
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST)


def _heat_palette() -> bytes:
    """256 RGB triples, linear between the anchors."""
    ramp = Image.new("RGB", (len(HEAT), 1))
    for x, anchor in enumerate(HEAT):
        ramp.putpixel((x, 0), ImageColor.getrgb(anchor))
    # Half a pixel is left out at both ends, where resizing would repeat the first and last anchor.
    return ramp.resize((256, 1), Image.Resampling.BILINEAR, box=(0.5, 0, len(HEAT) - 0.5, 1)).tobytes()


def _kept(photo: Image.Image, masks: dict[str, Tensor], grid: tuple[int, int], cell: int) -> Image.Image:
    """The photo, dark and grey where dropped; each connected group of kept patches framed in its colour."""
    grey = ImageOps.grayscale(photo).convert("RGB")
    image = Image.blend(grey, Image.new("RGB", photo.size, DIMMED), 0.75)
    line = min(max(1, cell // 7), 4)
    for colour, mask in masks.items():
        stencil = Image.frombytes("L", (grid[1], grid[0]), bytes((mask * 255).int().tolist()))
        stencil = stencil.resize(photo.size, Image.Resampling.NEAREST)
        inside = ImageOps.expand(stencil, line).filter(ImageFilter.MinFilter(2 * line + 1))
        image.paste(photo, mask=stencil)
        image.paste(colour, mask=ImageChops.subtract(stencil, ImageOps.crop(inside, line)))
    return image


def _legend(used: set[str]) -> Image.Image:
    """The colours in use, and the scale of importance."""
    entries = [entry for entry in LEGEND if entry[0] in used]
    height = sum(29 * len(lines) + 56 for _, _, *lines in entries) + 60
    image = Image.new("RGB", (SIDE, height), BACKGROUND)
    y = 0
    for colour, title, *lines in entries:
        image.paste(colour, (0, y + 3, 24, y + 27))
        _write(image, 40, y + 25, title, 25)
        for line in lines:
            y += 29
            _write(image, 40, y + 25, line)
        y += 56
    scale = Image.frombytes("L", (256, 1), bytes(range(256)))
    scale.putpalette(_heat_palette())
    image.paste(scale.convert("RGB").resize((SIDE, 24)), (0, y + 3))
    _write(image, 0, y + 52, "least important")
    _write(image, SIDE, y + 52, "most", anchor="rs")
    return image
