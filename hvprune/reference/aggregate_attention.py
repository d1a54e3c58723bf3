from __future__ import annotations

import torch

from ._attention import as_layers, mean_attention, widen


@torch.no_grad()
def aggregate_attention(attentions, *, num_prefix_tokens=1, rows="all") -> torch.Tensor:
    """Mean attention each patch token receives; see :func:`hvprune.ops.aggregate_attention`."""
    return mean_attention([widen(attention) for attention in as_layers(attentions)], num_prefix_tokens, rows)
