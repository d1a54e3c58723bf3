from __future__ import annotations

import math
from functools import lru_cache

from torch import Tensor

from .. import _native, reference
from .._checks import check_floats, check_num_tokens, check_pair, check_ratio, value_error
from .._registry import Op, from_triton
from ..selection import Selection, empty_selection


def hierarchical_select(
    scores: Tensor,
    grid: tuple[int, int] | None = None,
    *,
    regions: tuple[int, int] = (2, 2),
    keep_ratio: float = 0.25,
    window: tuple[int, int] = (2, 2),
    num_tokens: int | None = None,
    backend: str = "auto",
) -> Selection:
    """HIVTP's two selection stages on a grid of scores: the best of each region, then the best of each window.

    Global stage: the grid is cut in Rh x Rw regions, region (i, j) covering rows floor(i * gh / Rh) up to
    floor((i + 1) * gh / Rh) - 1, likewise columns; each keeps its floor(keep_ratio * size) highest scores. Local
    stage: each region is tiled from its top left with windows (partial ones at its edge count); each keeps the
    highest score among its tokens not kept so far, if there is one.

    Natural mode (``num_tokens=None``) returns the union: 252 to 288 tokens of 24 x 24. Fixed mode returns exactly
    K = ``num_tokens``: globally kept tokens first, then window winners, then the rest, each by score descending.

    Args:
        scores: (B, N) in float32, float16 or bfloat16.
        grid: (gh, gw) with gh * gw = N; N must be a square if it is left out.
        regions: (Rh, Rw), regions per side.
        keep_ratio: share of each region that the global stage keeps, in [0, 1].
        window: (height, width) of a window in tokens.
        num_tokens: K in [0, N], or None.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        Selection with M = K, or in natural mode M = the most that any scores can keep (288 for the defaults).
        Equal scores: lower token index first. NaN ranks below -inf, -0 equals +0. Same bits on every backend.

    Memory: outputs, plus 13 * N bytes per thread on a CPU. With CUDA, N is bounded by the shared memory of a block:
    43 000 tokens on an H100, 31 000 on an A100.

    Raises:
        TypeError, ValueError: an argument is not as above.
        BackendUnavailable: the backend cannot run here.

    Source: HIVTP, arXiv 2509.23663, global and local stage.
    """
    return Selection(*_OP(scores, grid, regions, keep_ratio, window, num_tokens, backend))


def resolve_grid(op: str, grid, total: int) -> tuple[int, int]:
    """``grid`` itself, or the square of ``total`` tokens."""
    if grid is not None:
        return grid
    side = math.isqrt(total)
    if side * side != total:
        raise value_error(op, "grid", f"given when N={total} is not a square", None)
    return side, side


def check_hierarchy(op: str, total: int, grid, regions, keep_ratio, window, num_tokens) -> None:
    if grid is None:
        grid = resolve_grid(op, None, total)
    check_pair(op, "grid", grid)
    if grid[0] * grid[1] != total:
        raise value_error(op, "grid", f"(gh, gw) with gh * gw = N = {total}", grid)
    check_pair(op, "regions", regions)
    check_ratio(op, "keep_ratio", keep_ratio)
    check_pair(op, "window", window)
    if num_tokens is not None:
        check_num_tokens(op, num_tokens, total)


def _check(scores, grid, regions, keep_ratio, window, num_tokens):
    check_floats("hierarchical_select", "scores", scores, "(B, N)", 2)
    check_hierarchy("hierarchical_select", scores.shape[1], grid, regions, keep_ratio, window, num_tokens)
    return scores


@lru_cache(maxsize=64)
def most_kept(gh: int, gw: int, rh: int, rw: int, keep_ratio: float, wh: int, ww: int) -> int:
    """The most tokens that the natural mode can keep: per region its quota and one per window."""
    most = 0
    for i in range(rh):
        height = (i + 1) * gh // rh - i * gh // rh
        for j in range(rw):
            width = (j + 1) * gw // rw - j * gw // rw
            quota = int(keep_ratio * (height * width))
            most += quota + min(-(-height // wh) * -(-width // ww), height * width - quota)
    return most


def num_selected(grid, regions, keep_ratio, window, num_tokens) -> int:
    """M, the columns of the result."""
    return most_kept(*grid, *regions, keep_ratio, *window) if num_tokens is None else num_tokens


def _out(scores, grid, regions, keep_ratio, window, num_tokens):
    batch, total = scores.shape
    grid = resolve_grid("hierarchical_select", grid, total)
    return empty_selection(scores, batch, num_selected(grid, regions, keep_ratio, window, num_tokens), total)


def _reference(scores, grid, regions, keep_ratio, window, num_tokens):
    return reference.hierarchical_select(
        scores, grid, regions=regions, keep_ratio=keep_ratio, window=window, num_tokens=num_tokens
    )


def _compiled(scores, grid, regions, keep_ratio, window, num_tokens):
    batch, total = scores.shape
    grid = resolve_grid("hierarchical_select", grid, total)
    width = num_selected(grid, regions, keep_ratio, window, num_tokens)
    outputs = empty_selection(scores, batch, width, total)
    _native.launch(
        "hierarchical_select",
        *outputs,
        scores,
        grid,
        regions,
        window,
        keep_ratio,
        width,
        num_tokens is not None,
    )
    return outputs


_OP = Op(
    "hierarchical_select",
    "(Tensor scores, int[]? grid=None, int[] regions=[2, 2], float keep_ratio=0.25, int[] window=[2, 2],"
    " int? num_tokens=None, str backend='auto') -> (Tensor, Tensor, Tensor)",
    check=_check,
    out=_out,
    backends={
        "cuda": _compiled,
        "triton": from_triton("hierarchical_select"),
        "cpu": _compiled,
        "reference": _reference,
    },
)
