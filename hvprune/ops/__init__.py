"""The ops of hvprune. One file per op, named like it: contract, checks, native calls, registration."""

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
