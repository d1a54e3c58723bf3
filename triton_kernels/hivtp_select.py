# Computes  HIVTP from Q and K to the kept tokens: attention_importance over all rows, then
#           hierarchical_select.
# Work      Their kernels, three launches in all.
# Traffic   Theirs; the importance [B, N] goes through L2.
# Numerics  Theirs, bit for bit.
# Source    HIVTP, arXiv 2509.23663.

from __future__ import annotations

from .attention_importance import attention_importance
from .hierarchical_select import hierarchical_select


def hivtp_select(queries, keys, grid, num_prefix_tokens, scale, regions, keep_ratio, window, num_tokens):
    """Q and K (B, H, L, D) per layer -> indices (B, M) int64, counts (B,) int32, mask (B, N) bool."""
    importance = attention_importance(queries, keys, num_prefix_tokens, "all", scale, None)
    return hierarchical_select(importance, grid, regions, keep_ratio, window, num_tokens)
