from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ..selection import Selection
from ._order import order_descending, selection_from_mask


def region_bounds(size: int, parts: int) -> list[tuple[int, int]]:
    """Part i of a side covers floor(i * size / parts) up to, not including, floor((i + 1) * size / parts)."""
    return [(i * size // parts, (i + 1) * size // parts) for i in range(parts)]


def _cells(top: int, bottom: int, left: int, right: int, width: int, device) -> torch.Tensor:
    """Token indices of a rectangle of the grid, in raster order."""
    rows = torch.arange(top, bottom, device=device) * width
    return (rows[:, None] + torch.arange(left, right, device=device)).flatten()


def _windows(bounds: tuple[int, int, int, int], window: tuple[int, int], width: int, device) -> Iterator[torch.Tensor]:
    """Token indices of each window of a region; those at the lower and right edge may be partial."""
    top, bottom, left, right = bounds
    for y in range(top, bottom, window[0]):
        for x in range(left, right, window[1]):
            yield _cells(y, min(y + window[0], bottom), x, min(x + window[1], right), width, device)


@torch.no_grad()
def hierarchical_select(
    scores, grid=None, *, regions=(2, 2), keep_ratio=0.25, window=(2, 2), num_tokens=None
) -> Selection:
    """HIVTP's global and local stage; see :func:`hvprune.ops.hierarchical_select`."""
    batch, total = scores.shape
    height, width = (math.isqrt(total),) * 2 if grid is None else grid
    kept = torch.zeros(batch, total, dtype=torch.bool, device=scores.device)  # by the global stage
    winners = torch.zeros_like(kept)  # of the local stage
    most = 0  # the most tokens that the natural mode can keep
    for top, bottom in region_bounds(height, regions[0]):
        for left, right in region_bounds(width, regions[1]):
            region = _cells(top, bottom, left, right, width, scores.device)
            quota = int(keep_ratio * len(region))
            best = order_descending(scores[:, region])[:, :quota]
            kept.scatter_(1, region[best], True)
            windows = list(_windows((top, bottom, left, right), window, width, scores.device))
            most += quota + min(len(windows), len(region) - quota)
            for members in windows:
                taken = kept[:, members]
                winner = members[order_descending(scores[:, members], group=taken)[:, :1]]
                winners.scatter_(1, winner, ~taken.all(-1, keepdim=True))
    if num_tokens is None:
        return selection_from_mask(kept | winners, most)
    group = torch.where(kept, 0, torch.where(winners, 1, 2))
    mask = torch.zeros_like(kept).scatter_(1, order_descending(scores, group)[:, :num_tokens], True)
    return selection_from_mask(mask, num_tokens)
