"""What hvprune is measured against.

``released_*``: the algorithms as HIVTP (arXiv 2509.23663) and VisPruner (arXiv 2412.01818) were released, restated
in eager PyTorch and as slow as they are. Where the released code handles one image only, it is called once an image.
``plain_*``: the best formulation found in plain PyTorch. All take any float dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def released_mean_attention(maps: list[Tensor], num_prefix_tokens: int) -> Tensor:
    """HIVTP: (B, H, L, L) maps stacked, then the mean of layers, of heads and of rows, one after the other."""
    mean = torch.stack(maps, dim=1).mean(dim=1).mean(dim=1)
    return mean[:, :, num_prefix_tokens:].mean(dim=1)


def released_cls_attention(maps: list[Tensor], num_prefix_tokens: int) -> Tensor:
    """VisPruner: the first row of the last map, mean of heads."""
    return maps[-1][:, :, 0, num_prefix_tokens:].mean(dim=1)


def attention_maps(queries: list[Tensor], keys: list[Tensor]) -> list[Tensor]:
    """Eager attention of the layers needed; the released towers do this in all their layers."""
    return [(q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1) for q, k in zip(queries, keys, strict=True)]


def plain_mean_attention(maps: list[Tensor], num_prefix_tokens: int) -> Tensor:
    """Each map is reduced in one go, none is copied."""
    return torch.stack([m.mean(dim=(1, 2)) for m in maps]).mean(dim=0)[:, num_prefix_tokens:]


def plain_mean_importance(queries: list[Tensor], keys: list[Tensor], num_prefix_tokens: int) -> Tensor:
    """One map alive at a time."""
    layers = zip(queries, keys, strict=True)
    means = [(q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1).mean(dim=(1, 2)) for q, k in layers]
    return torch.stack(means).mean(dim=0)[:, num_prefix_tokens:]


def plain_cls_importance(queries: list[Tensor], keys: list[Tensor], num_prefix_tokens: int) -> Tensor:
    """Only the CLS row of the last layer is computed."""
    cls = queries[-1][:, :, :1]
    row = (cls * cls.shape[-1] ** -0.5 @ keys[-1].mT).softmax(dim=-1)
    return row[:, :, 0, num_prefix_tokens:].mean(dim=1)


def released_hierarchical_select(scores: Tensor, grid: tuple[int, int]) -> Tensor:
    """HIVTP for one image: (N,) scores -> ascending indices of the tokens kept, 2x2 regions and 2x2 windows.

    Region by region, windows in a loop over their rows, sets as masks that nonzero and boolean indexing read back:
    about 210 kernels and 16 nonzero for an image, the released code's own counts.
    """
    height, width = grid[0] // 2, grid[1] // 2
    tokens = torch.arange(len(scores), device=scores.device).view(grid)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    chosen = []
    for top in (0, height):
        for left in (0, width):
            inside = torch.zeros_like(tokens, dtype=torch.bool)
            inside[top : top + height, left : left + width] = True
            members = inside.flatten().nonzero().squeeze(1)
            kept[members[scores[members].topk(int(0.25 * len(members))).indices]] = True
            chosen.append((kept & inside.flatten()).nonzero().squeeze(1))
            left_over = scores.masked_fill(kept, float("-inf")).view(grid)
            winners, full = [], []
            for y in range(top, top + height, 2):
                strip = (slice(y, y + 2), slice(left, left + width))
                token, value, taken = (
                    x[strip].unfold(1, 2, 2).transpose(0, 1).flatten(1) for x in (tokens, left_over, kept.view(grid))
                )
                winners.append(token.gather(1, value.argmax(dim=1, keepdim=True)).squeeze(1))
                full.append(taken.all(dim=1))
            local = torch.zeros_like(kept)
            local[torch.cat(winners)[~torch.cat(full)]] = True
            chosen.append(local.nonzero().squeeze(1))
    return torch.cat(chosen).sort().values


def plain_hierarchical_select(scores: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """HIVTP for a batch without a loop: (B, N) -> indices padded with -1, counts, mask. Sides a multiple of 4."""
    batch, total = scores.shape
    height, width = grid[0] // 2, grid[1] // 2
    quota = int(0.25 * height * width)
    regions = scores.view(batch, 2, height, 2, width).transpose(2, 3).reshape(batch, 4, height * width)
    best = regions.topk(quota, sorted=False).indices
    kept = torch.zeros_like(regions, dtype=torch.bool).scatter_(2, best, True)
    kept = kept.view(batch, 2, 2, height, width).transpose(2, 3).reshape(batch, total)
    # (B, windows, 4): a window never straddles two regions
    left = scores.masked_fill(kept, float("-inf"))
    windows = left.view(batch, height, 2, width, 2).transpose(2, 3).reshape(batch, height * width, 4)
    value, winner = windows.max(dim=-1, keepdim=True)
    won = torch.zeros_like(windows, dtype=torch.bool).scatter_(2, winner, value > float("-inf"))
    mask = won.view(batch, height, width, 2, 2).transpose(2, 3).reshape(batch, total) | kept
    tokens = torch.arange(total, device=scores.device)
    indices = torch.where(mask, tokens, total).sort(dim=-1).values[:, : 4 * quota + height * width]
    return indices.masked_fill(indices == total, -1), mask.sum(dim=-1, dtype=torch.int32), mask


def released_vispruner_select(features: Tensor, importance: Tensor, num_tokens: int, important_ratio: float) -> Tensor:
    """VisPruner: (B, N) mask of the tokens kept. Every round gathers features and multiplies them."""
    num_important = int(num_tokens * important_ratio)
    order = importance.argsort(dim=-1, descending=True)
    residual = order[:, num_important:]
    unit = features / features.norm(dim=-1, keepdim=True)
    image = torch.arange(len(features), device=features.device).unsqueeze(1)
    while residual.shape[1] > num_tokens - num_important:
        length = residual.shape[1]
        removals = min(8, length - (num_tokens - num_important))
        even = torch.arange(0, length, 2).to(features.device)  # made on the host and copied, as released
        odd = torch.arange(1, length, 2).to(features.device)
        a, b = residual[:, even], residual[:, odd]
        scores = (unit[image, a] @ unit[image, b].mT).max(dim=-1).values
        left = scores.argsort(dim=-1, descending=True)[:, removals:]
        residual = torch.cat([a.gather(1, left), b], dim=1)
    mask = torch.zeros_like(importance, dtype=torch.bool)
    mask[image, order[:, :num_important]] = True
    mask[image, residual] = True
    return mask


def plain_diverse_select(similarity: Tensor, importance: Tensor, num_tokens: int, important_ratio: float) -> Tensor:
    """VisPruner's rounds on one matrix product: (B, N) mask. Image by image: index_select beats batched indexing."""
    num_important = int(num_tokens * important_ratio)
    order = importance.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(importance, dtype=torch.bool)
    mask.scatter_(1, order[:, :num_important], True)
    for matrix, residual, row in zip(similarity, order[:, num_important:], mask, strict=True):
        while len(residual) > num_tokens - num_important:
            a, b = residual[0::2], residual[1::2]
            removals = min(8, len(residual) - (num_tokens - num_important))
            scores = matrix.index_select(0, a).index_select(1, b).amax(dim=1)
            residual = torch.cat([a[scores.argsort(descending=True, stable=True)[removals:]], b])
        row[residual] = True
    return mask


def plain_cosine_similarity(features: Tensor) -> Tensor:
    unit = F.normalize(features, dim=-1)
    return unit @ unit.mT


def released_gather_tokens(features: Tensor, mask: Tensor) -> Tensor:
    """Boolean indexing; every image keeps the same number of tokens."""
    return features[mask].view(len(features), -1, features.shape[-1])


def plain_gather_tokens(features: Tensor, indices: Tensor) -> Tensor:
    return features.gather(1, indices.unsqueeze(-1).expand(-1, -1, features.shape[-1]))


def released_for_each_image(scores: Tensor, grid: tuple[int, int]) -> list[Tensor]:
    """HIVTP's released selection on a batch: one call an image."""
    return [released_hierarchical_select(image, grid) for image in scores]


def topk(scores: Tensor, num_tokens: int) -> Tensor:
    """(B, K) indices of the highest scores, best first."""
    return scores.topk(num_tokens).indices


def flash_colreduce_importance(queries: list[Tensor], keys: list[Tensor], num_prefix_tokens: int, cls: bool) -> Tensor:
    """flash-colreduce, which sums the columns of a layer's maps without making them, and the means of its results."""
    from flash_colreduce import flash_colreduce

    layers = zip(queries, keys, strict=True)
    means = [flash_colreduce(q[:, :, :1] if cls else q, k, reduction="mean").mean(dim=1) for q, k in layers]
    return torch.stack(means).mean(dim=0)[:, num_prefix_tokens:]
