"""A photo as queries, keys and features without weights: hand-made patch descriptors stand in for CLIP."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

PATCH = 14  # pixels per side of a patch, as in CLIP ViT-L/14
HEAD_DIM = 16
NUM_BINS = 8


class DemoError(Exception):
    """The demo cannot work with what it was given; the message is one line."""


def load_photo(path: Path, grid: tuple[int, int]) -> Image.Image:
    """Any file that Pillow reads, as upright 8-bit RGB: first frame, over white, deep greys scaled.

    Raises DemoError if there is no such photo, it is damaged or larger than Pillow deems safe, or has fewer
    pixels than the grid has patches along a side.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                photo = _to_rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = f"at most {Image.MAX_IMAGE_PIXELS} pixels"
        raise DemoError(f"photo must be of {limit}, got more in {str(path)!r}") from None
    except Exception as error:  # a decoder may raise anything on a damaged file
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise DemoError(f"photo must be a readable image file, got {str(path)!r} ({reason})") from None
    rows, columns = grid
    if photo.width < columns or photo.height < rows:
        expected = f"at least {columns} x {rows} pixels for a grid of {rows}x{columns} patches"
        raise DemoError(f"photo must be {expected}, got {photo.width} x {photo.height}")
    return photo


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] in "IF":  # 16-bit and float greys have no fixed range that convert() would know
        image = image.convert("F")
        low, high = image.getextrema()
        scale = 255 / (high - low) if high > low else 0.0
        image = image.point(lambda value: value * scale - low * scale).convert("L")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def encode(photo: Image.Image, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys (1, 4, N, 16) and features (1, N, 14), float32, of the N = gh * gw patches of a photo.

    The photo is scaled and cropped about its centre, as CLIP's own preprocessing does: patches stay square,
    and none of them is padding, which would be the rarest patch of all. Three descriptors, standardised over
    the patches, make a head each and all together the fourth: mean colour, spread of colour, histogram of
    gradient orientation. Q = -K: attention goes by dissimilarity, so rare and salient patches draw it. There
    is no CLS token; importance is the mean over all rows, as for SigLIP.
    """
    gh, gw = grid
    image = ImageOps.fit(photo, (gw * PATCH, gh * PATCH), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) / 255
    pixels = pixels.view(gh * PATCH, gw * PATCH, 3)
    dy, dx = torch.gradient(pixels.mean(-1))
    # Bins are centred on their orientation: an upright edge does not flicker between the first and the last.
    bins = (torch.atan2(dy, dx) * (NUM_BINS / torch.pi)).round().long() % NUM_BINS
    votes = F.one_hot(bins, NUM_BINS) * torch.hypot(dy, dx).unsqueeze(-1)

    colour = _patches(pixels, grid).mean(1)
    spread = _patches(pixels, grid).std(1)
    orientation = _patches(votes, grid).mean(1).sqrt()
    heads = [_standardise(x) for x in (colour, spread, orientation)]
    heads.append(torch.cat(heads, -1))
    keys = torch.stack([F.pad(head, (0, HEAD_DIM - head.shape[-1])) for head in heads])[None]
    return -keys, keys, heads[-1][None]


def _patches(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """(gh * PATCH, gw * PATCH, C) -> (N, PATCH * PATCH, C)."""
    x = x.unflatten(1, (grid[1], PATCH)).unflatten(0, (grid[0], PATCH))
    return x.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def _standardise(x: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over the patches; a descriptor that is the same everywhere becomes 0."""
    return (x - x.mean(0)) / x.std(0, correction=0).clamp(min=1e-4)
