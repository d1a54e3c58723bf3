"""The one ordering rule of hvprune, as a function."""

from __future__ import annotations

import torch

from ..selection import Selection


def order_descending(values: torch.Tensor, group: torch.Tensor | None = None) -> torch.Tensor:
    """Indices that sort the last dimension: lower group first, then higher value, then lower index.

    NaN ranks below -inf; -0 equals +0.
    """
    nan = values.isnan()
    order = (values + 0.0).masked_fill(nan, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    for key in (nan, group):  # least significant key first: every sort is stable
        if key is not None:
            order = order.gather(-1, key.gather(-1, order).long().argsort(dim=-1, stable=True))
    return order


def selection_from_mask(mask: torch.Tensor, width: int) -> Selection:
    """The Selection of a (B, N) mask, its indices padded with -1 to ``width`` columns."""
    num_tokens = mask.shape[1]
    tokens = torch.arange(num_tokens, device=mask.device)
    indices = torch.where(mask, tokens, num_tokens).sort(-1).values[:, :width]
    counts = mask.sum(-1, dtype=torch.int32)
    return Selection(indices.masked_fill(indices == num_tokens, -1), counts, mask)
