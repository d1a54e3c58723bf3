from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native, reference
from .._checks import as_layers, check_prefix
from .._registry import Op, from_triton
from ..selection import Selection, empty_selection
from .attention_importance import check_queries_keys
from .hierarchical_select import check_hierarchy, num_selected, resolve_grid


def hivtp_select(
    queries: Tensor | Sequence[Tensor],
    keys: Tensor | Sequence[Tensor],
    grid: tuple[int, int] | None = None,
    *,
    num_prefix_tokens: int = 1,
    scale: float | None = None,
    regions: tuple[int, int] = (2, 2),
    keep_ratio: float = 0.25,
    window: tuple[int, int] = (2, 2),
    num_tokens: int | None = None,
    backend: str = "auto",
) -> Selection:
    """HIVTP from Q and K of the chosen layers to the kept tokens.

    The same bits as :func:`attention_importance` with ``rows="all"`` followed by :func:`hierarchical_select`, which
    state the arguments, the result, the memory and the errors.

    Source: HIVTP, arXiv 2509.23663; its released setting takes the layers of index 6, 7 and 8.
    """
    return Selection(
        *_OP(
            as_layers(queries),
            as_layers(keys),
            grid,
            num_prefix_tokens,
            scale,
            regions,
            keep_ratio,
            window,
            num_tokens,
            backend,
        )
    )


def _check(queries, keys, grid, num_prefix_tokens, scale, regions, keep_ratio, window, num_tokens):
    length = check_queries_keys("hivtp_select", queries, keys, scale)
    check_prefix("hivtp_select", length, num_prefix_tokens, "all")
    check_hierarchy("hivtp_select", length - num_prefix_tokens, grid, regions, keep_ratio, window, num_tokens)
    return queries[0]


def _out(queries, keys, grid, num_prefix_tokens, scale, regions, keep_ratio, window, num_tokens):
    batch, _, length, _ = queries[0].shape
    total = length - num_prefix_tokens
    grid = resolve_grid("hivtp_select", grid, total)
    width = num_selected(grid, regions, keep_ratio, window, num_tokens)
    return empty_selection(queries[0], batch, width, total)


def _reference(queries, keys, grid, num_prefix_tokens, scale, regions, keep_ratio, window, num_tokens):
    return reference.hivtp_select(
        queries,
        keys,
        grid,
        num_prefix_tokens=num_prefix_tokens,
        scale=scale,
        regions=regions,
        keep_ratio=keep_ratio,
        window=window,
        num_tokens=num_tokens,
    )


def _compiled(queries, keys, grid, num_prefix_tokens, scale, regions, keep_ratio, window, num_tokens, scratch=None):
    batch, _, length, dim = queries[0].shape
    total = length - num_prefix_tokens
    grid = resolve_grid("hivtp_select", grid, total)
    width = num_selected(grid, regions, keep_ratio, window, num_tokens)
    outputs = empty_selection(queries[0], batch, width, total)
    _native.launch(
        "hivtp_select",
        *outputs,
        queries,
        keys,
        num_prefix_tokens,
        dim**-0.5 if scale is None else scale,
        grid,
        regions,
        window,
        keep_ratio,
        width,
        num_tokens is not None,
        scratch,
    )
    return outputs


def _cuda(queries, keys, grid, num_prefix_tokens, *arguments):
    batch, _, length, _ = queries[0].shape
    scratch = queries[0].new_empty(batch * (16 * (length - num_prefix_tokens) + 4), dtype=torch.uint8)
    return _compiled(queries, keys, grid, num_prefix_tokens, *arguments, scratch)


_OP = Op(
    "hivtp_select",
    "(Tensor[] queries, Tensor[] keys, int[]? grid=None, int num_prefix_tokens=1, float? scale=None,"
    " int[] regions=[2, 2], float keep_ratio=0.25, int[] window=[2, 2], int? num_tokens=None,"
    " str backend='auto') -> (Tensor, Tensor, Tensor)",
    check=_check,
    out=_out,
    backends={
        "cuda": _cuda,
        "triton": from_triton("hivtp_select"),
        "cpu": _compiled,
        "reference": _reference,
    },
)
