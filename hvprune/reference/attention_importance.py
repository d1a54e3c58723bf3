from __future__ import annotations

import torch

from ._attention import as_layers, mean_attention, widen


@torch.no_grad()
def attention_importance(queries, keys, *, num_prefix_tokens=1, rows="all", scale=None, logsumexp=None) -> torch.Tensor:
    """Mean attention from Q and K, every map materialised; see :func:`hvprune.ops.attention_importance`."""
    queries, keys = as_layers(queries), as_layers(keys)
    normalisers = [None] * len(queries) if logsumexp is None else as_layers(logsumexp)
    maps = []
    for query, key, normaliser in zip(queries, keys, normalisers, strict=True):
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        scores = widen(query) @ widen(key).transpose(-1, -2) * factor
        if normaliser is None:
            maps.append(scores.softmax(-1))
        else:
            maps.append((scores - normaliser.to(scores.dtype).unsqueeze(-1)).exp())
    return mean_attention(maps, num_prefix_tokens, rows)
