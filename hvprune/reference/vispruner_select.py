from __future__ import annotations

from ..selection import Selection
from .cosine_similarity import cosine_similarity
from .diverse_select import diverse_select


def vispruner_select(features, importance, num_tokens, *, important_ratio=0.5, removals_per_round=8) -> Selection:
    """VisPruner from features and importance; see :func:`hvprune.ops.vispruner_select`."""
    return diverse_select(
        cosine_similarity(features), importance, num_tokens,
        important_ratio=important_ratio, removals_per_round=removals_per_round,
    )  # fmt: skip
