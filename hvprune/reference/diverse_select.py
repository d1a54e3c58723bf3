from __future__ import annotations

import torch

from ..selection import Selection
from ._order import order_descending, selection_from_mask


def _remove_duplicates(
    similarity: torch.Tensor, residual: torch.Tensor, num_diverse: int, removals_per_round: int
) -> list[torch.Tensor]:
    """The residual list of one image before the first round and after every round."""
    lists = [residual]
    while len(residual) > num_diverse:
        a, b = residual[0::2], residual[1::2]
        removals = min(removals_per_round, len(residual) - num_diverse, len(a))
        pairs = similarity[a][:, b]
        # Without a partner nothing is a duplicate: -inf, list order decides.
        scores = pairs.amax(1) if len(b) else pairs.new_full((len(a),), float("-inf"))
        residual = torch.cat([a[order_descending(scores)][removals:], b])
        lists.append(residual)
    return lists


@torch.no_grad()
def diverse_select(
    similarity, importance, num_tokens, *, important_ratio=0.5, removals_per_round=8, return_trace=False
) -> Selection | tuple[Selection, torch.Tensor]:
    """VisPruner's important and diverse tokens; see :func:`hvprune.ops.diverse_select`."""
    batch, total = importance.shape
    num_important = int(num_tokens * important_ratio)
    order = order_descending(importance)
    similarity = similarity.masked_fill(similarity.isnan(), float("-inf"))
    mask = torch.zeros(batch, total, dtype=torch.bool, device=importance.device)
    mask.scatter_(1, order[:, :num_important], True)
    traces = []
    for image in range(batch):
        lists = _remove_duplicates(
            similarity[image], order[image, num_important:], num_tokens - num_important, removals_per_round
        )
        mask[image, lists[-1]] = True
        traces.append(torch.nn.utils.rnn.pad_sequence(lists, batch_first=True, padding_value=-1))
    selection = selection_from_mask(mask, num_tokens)
    if not return_trace:
        return selection
    if not traces:  # no image: the shape that one would have
        lists = _remove_duplicates(
            similarity.new_zeros(total, total),
            order.new_tensor(range(total - num_important)),
            num_tokens - num_important,
            removals_per_round,
        )
        return selection, order.new_empty(0, len(lists), total - num_important)
    return selection, torch.stack(traces)
