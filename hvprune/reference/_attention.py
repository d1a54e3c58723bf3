"""Shared by the two attention ops: layers as a list, and the mean that both end in."""

from __future__ import annotations

import torch


def as_layers(value: torch.Tensor | list[torch.Tensor] | tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


def widen(x: torch.Tensor) -> torch.Tensor:
    """float64 stays, everything else is computed in float32."""
    return x if x.dtype == torch.float64 else x.float()


def mean_attention(maps: list[torch.Tensor], num_prefix_tokens: int, rows: str) -> torch.Tensor:
    """(B, H, L, L) maps, one per layer -> (B, N): mean over layers, heads and query rows, prefix columns dropped."""
    if rows == "cls":
        maps = [attention[:, :, :1] for attention in maps]
    return torch.stack([attention.mean(dim=(1, 2))[:, num_prefix_tokens:] for attention in maps]).mean(0)
