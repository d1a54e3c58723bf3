"""LLaVA-NeXT: an image is a base tile plus a grid of tiles, unpadded and packed row by row with newlines."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import value_error
from ..selection import Selection
from .llava import PrunedLlava, gather


class TilePlan(NamedTuple):
    """How the stock model packs one image size.

    packed: (P,) int64, for each packed token its number tile * N + patch, or -1 for a newline
    boxes:  per tile the patches that survive unpadding, (top, bottom, left, right), half open
    """

    packed: Tensor
    boxes: tuple[tuple[int, int, int, int], ...]

    @property
    def num_newlines(self) -> int:
        return len(self.packed) - sum(self.valid)

    @property
    def valid(self) -> list[int]:
        return [(bottom - top) * (right - left) for top, bottom, left, right in self.boxes]


class PrunedLlavaNext(PrunedLlava):
    """Tiles are pruned one by one, among the patches that unpadding leaves; all newlines stay."""

    def install(self) -> None:
        self._plan = functools.lru_cache(maxsize=256)(self._make_plan)
        # A copy to the device waits for it, so what depends on the image sizes alone is copied once.
        self._on_device = functools.lru_cache(maxsize=256)(lambda device, numbers: torch.tensor(numbers, device=device))
        self._stock_pack = self._core.pack_image_features
        self._override(self._core, "pack_image_features", self._pack)
        super().install()

    def _make_plan(self, height: int, width: int) -> TilePlan:
        """Let the stock model pack the tokens' own numbers."""
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        size, side = (height, width), self._grid[0]
        config = self.model.config
        tiles = image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
        numbers = torch.arange(tiles * self._num_patches, dtype=torch.float64).view(tiles, self._num_patches, 1)
        newline = torch.full((1,), -1.0, dtype=torch.float64)
        (packed,), _ = self._stock_pack([numbers], [size], self._strategy, image_newline=newline)
        packed = packed.flatten().long()
        boxes = []
        for tile in range(tiles):
            patches = packed[packed.div(self._num_patches, rounding_mode="floor") == tile] % self._num_patches
            if len(patches) == 0:  # a tile of padding only
                boxes.append((0, 0, 0, 0))
                continue
            rows, columns = patches // side, patches % side
            edges = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
            boxes.append(tuple(int(edge) for edge in edges))
        return TilePlan(packed.to(self._core.device), tuple(boxes))

    def _plans(self, sizes) -> list[TilePlan]:
        sizes = sizes.tolist() if isinstance(sizes, Tensor) else sizes
        return [self._plan(int(height), int(width)) for height, width in sizes]

    def _budgets(self, plan: TilePlan, num_tokens: int) -> list[int]:
        """Tokens to keep in each tile: a function of the image size alone."""
        valid = plan.valid
        if self.method.per == "tile":
            return [min(num_tokens, size) for size in valid]
        total = min(num_tokens, sum(valid))
        shares = [total * size // sum(valid) for size in valid]
        # What the rounding left goes to the largest remainders, the earlier tile first.
        order = sorted(range(len(valid)), key=lambda tile: -(total * valid[tile] % sum(valid)))
        for tile in order[: total - sum(shares)]:
            shares[tile] += 1
        return shares

    def _count(self, plan: TilePlan, num_tokens: int | None) -> int:
        if num_tokens is None:
            return len(plan.packed)
        return sum(self._budgets(plan, num_tokens)) + plan.num_newlines

    def _check_budget(self, who: str, num_tokens: int | None) -> None:
        if self.method.per == "tile":
            super()._check_budget(who, num_tokens)

    def _select(self, call, queries, keys, features) -> Selection:
        scores = self.method.score(queries, keys, self._prefix, self._scale)
        call.plans = self._plans(call.sizes)
        boxes = [box for plan in call.plans for box in plan.boxes]
        if call.num_tokens is None:
            budgets = [None] * len(boxes)
        else:
            budgets = [budget for plan in call.plans for budget in self._budgets(plan, call.num_tokens)]
        groups = {}
        for tile, (box, budget) in enumerate(zip(boxes, budgets, strict=True)):
            if box[0] < box[1] and budget != 0:
                groups.setdefault((box, budget), []).append(tile)

        parts = []
        for (box, budget), tiles in groups.items():
            tiles = self._on_device(scores.device, tuple(tiles))
            part = self.method.pick(
                self._crop(scores, tiles, box), self._crop(features, tiles, box), _shape(box), budget
            )
            parts.append((tiles, self._uncrop(part.indices, box), part.counts))
        width = max((indices.shape[1] for _, indices, _ in parts), default=0)
        indices = scores.new_full((len(boxes), width), -1, dtype=torch.int64)
        counts = scores.new_zeros(len(boxes), dtype=torch.int32)
        for tiles, part, part_counts in parts:
            indices[tiles, : part.shape[1]] = part
            counts[tiles] = part_counts
        # One column more takes the -1 of the rows that keep less than the widest.
        mask = torch.zeros((len(boxes), self._num_patches + 1), dtype=torch.bool, device=scores.device)
        mask.scatter_(1, indices.where(indices >= 0, self._num_patches), True)
        return Selection(indices, counts, mask[:, :-1])

    def _crop(self, rows: Tensor, tiles: Tensor, box) -> Tensor:
        """(T, N, ...) to the tiles' patches inside the box, (t, n, ...)."""
        top, bottom, left, right = box
        return rows[tiles].unflatten(1, self._grid)[:, top:bottom, left:right].flatten(1, 2)

    def _uncrop(self, indices: Tensor, box) -> Tensor:
        top, _, left, right = box
        width = right - left
        whole = (indices // width + top) * self._grid[1] + indices % width + left
        return whole.where(indices >= 0, -1)

    def _gather(self, call, features: Tensor) -> Tensor:
        return gather(features, call.selection.indices)

    def _per_image(self, call, features) -> list[Tensor]:
        return list(features)

    def _pack(self, image_features, image_sizes, vision_feature_select_strategy=None, image_newline=None):
        """Stock packing of the kept tokens: per image (tiles, M, D) in, (tokens and newlines, D) out."""
        call = getattr(self._local, "call", None)
        if call is None:
            return self._stock_pack(image_features, image_sizes, vision_feature_select_strategy, image_newline)
        packed = []
        masks = call.selection.mask.split([len(plan.boxes) for plan in call.plans])
        for plan, features, mask in zip(call.plans, image_features, masks, strict=True):
            tiles, width = features.shape[:2]
            first = torch.arange(tiles, device=mask.device)[:, None] * width
            row_of = (mask.cumsum(1) - 1 + first).where(mask, -1).flatten()
            order = plan.packed.to(mask.device)
            rows = row_of[order.clamp(min=0)].where(order >= 0, tiles * width)  # the newline is the last row
            if call.num_tokens is None:
                rows = rows[rows >= 0]
            else:  # the count is known: compact without waiting for the device
                kept_first = (rows < 0).byte().argsort(stable=True)
                rows = rows[kept_first[: self._count(plan, call.num_tokens)]]
            table = torch.cat([features.flatten(0, 1), image_newline[None].to(features)])
            packed.append(table[rows])
        lengths = torch.tensor([len(image) for image in packed], device=packed[0].device)
        return packed, lengths

    def _counts(self, vision: dict, num_tokens: int | None) -> list[int]:
        return [self._count(plan, num_tokens) for plan in self._plans(vision["image_sizes"])]

    def _patch_processor(self, processor) -> None:
        stock = processor._get_number_of_features

        def number_of_features(height, width, tile_height, tile_width):
            plan, count = self._plan(height, width), stock(height, width, tile_height, tile_width)
            expected = len(plan.packed) + self._prefix  # the callers take one off for the CLS token
            if count != expected:  # different tiles would go unnoticed, with the model's count in the prompt
                size = f"{height}x{width}"
                raise value_error("hvprune", "processor", f"one that counts {expected} placeholders for {size}", count)
            return self._count(plan, self.method.num_tokens) + self._prefix

        self._override(processor, "_get_number_of_features", number_of_features)


def _shape(box) -> tuple[int, int]:
    top, bottom, left, right = box
    return bottom - top, right - left
