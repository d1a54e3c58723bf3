"""Every op of hvprune in plain PyTorch: the meaning of the ops, written to be read.

Same signatures as :mod:`hvprune.ops` less ``backend``; any device; float64 inputs are computed in float64,
everything else in float32. Arguments are not checked here: :mod:`hvprune.ops` does that.
"""

from .aggregate_attention import aggregate_attention
from .attention_importance import attention_importance
from .cosine_similarity import cosine_similarity
from .diverse_select import diverse_select
from .gather_tokens import gather_tokens
from .hierarchical_select import hierarchical_select
from .hivtp_select import hivtp_select
from .vispruner_select import vispruner_select

__all__ = [
    "aggregate_attention",
    "attention_importance",
    "cosine_similarity",
    "diverse_select",
    "gather_tokens",
    "hierarchical_select",
    "hivtp_select",
    "vispruner_select",
]
