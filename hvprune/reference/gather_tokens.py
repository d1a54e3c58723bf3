from __future__ import annotations

import torch

from ..selection import Selection


@torch.no_grad()
def gather_tokens(features, selection, *, pad_value=0.0) -> torch.Tensor:
    """The rows of the kept tokens; see :func:`hvprune.ops.gather_tokens`."""
    indices = selection.indices if isinstance(selection, Selection) else selection
    num_tokens = features.shape[1]
    if indices.device.type == "cpu" and ((indices < -1) | (indices >= num_tokens)).any():
        worst = indices[(indices < -1) | (indices >= num_tokens)][0].item()
        raise ValueError(f"gather_tokens: indices must be in [-1, N) with N={num_tokens}, got {worst}")
    padding = torch.tensor(pad_value, device=features.device).to(features.dtype)  # what is too large becomes inf
    padding = padding.expand(features.shape[0], 1, features.shape[2])
    rows = torch.where(indices < 0, num_tokens, indices).unsqueeze(-1).expand(-1, -1, features.shape[2])
    return torch.cat([features, padding], dim=1).gather(1, rows)
