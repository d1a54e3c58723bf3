# Computes  VisPruner from features and importance to the kept tokens: cosine_similarity, then
#           diverse_select.
# Work      Their kernels, three launches in all.
# Traffic   Theirs; the similarity [B, N, N] is written once and, at small B, read from L2.
# Numerics  Theirs, bit for bit.
# Source    VisPruner, arXiv 2412.01818.

from __future__ import annotations

from .cosine_similarity import cosine_similarity
from .diverse_select import diverse_select


def vispruner_select(features, importance, num_tokens, important_ratio, removals_per_round):
    """(B, N, C) and (B, N) -> indices (B, K) int64, counts (B,) int32, mask (B, N) bool."""
    similarity = cosine_similarity(features)
    return diverse_select(similarity, importance, num_tokens, important_ratio, removals_per_round, False)[:3]
