from __future__ import annotations

from ..selection import Selection
from .attention_importance import attention_importance
from .hierarchical_select import hierarchical_select


def hivtp_select(
    queries, keys, grid=None, *, num_prefix_tokens=1, scale=None,
    regions=(2, 2), keep_ratio=0.25, window=(2, 2), num_tokens=None,
) -> Selection:  # fmt: skip
    """HIVTP from Q and K; see :func:`hvprune.ops.hivtp_select`."""
    importance = attention_importance(queries, keys, num_prefix_tokens=num_prefix_tokens, scale=scale)
    return hierarchical_select(
        importance, grid, regions=regions, keep_ratio=keep_ratio, window=window, num_tokens=num_tokens
    )
