from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import reference
from .._checks import as_layers, check_prefix
from .._registry import Op, from_triton
from ..selection import Selection
from .attention_importance import _compiled as attention_importance_cpu
from .attention_importance import _cuda as attention_importance_cuda
from .attention_importance import check_queries_keys
from .hierarchical_select import _compiled as hierarchical_select_compiled
from .hierarchical_select import _out as hierarchical_select_out
from .hierarchical_select import check_hierarchy


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
    lead = check_queries_keys("hivtp_select", queries, keys, scale)
    check_prefix("hivtp_select", lead.shape[2], num_prefix_tokens, "all")
    total = lead.shape[2] - num_prefix_tokens
    check_hierarchy("hivtp_select", total, grid, regions, keep_ratio, window, num_tokens)
    return lead


def _out(queries, keys, grid, num_prefix_tokens, scale, regions, keep_ratio, window, num_tokens):
    scores = queries[0][:, 0, num_prefix_tokens:, 0]
    return hierarchical_select_out(scores, grid, regions, keep_ratio, window, num_tokens)


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


def _cpu(queries, keys, grid, num_prefix_tokens, scale, *arguments):
    importance = attention_importance_cpu(queries, keys, num_prefix_tokens, "all", scale, None)
    return hierarchical_select_compiled(importance, grid, *arguments)


def _cuda(queries, keys, grid, num_prefix_tokens, scale, *arguments):
    importance = attention_importance_cuda(queries, keys, num_prefix_tokens, "all", scale, None)
    return hierarchical_select_compiled(importance, grid, *arguments, after_scores=True)


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
        "cpu": _cpu,
        "reference": _reference,
    },
)
