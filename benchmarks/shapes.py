"""The real sizes that are measured, and the cases made of them."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Shape(NamedTuple):
    """What a vision encoder hands to the ops: L = P + N tokens, H heads of D features, C features in all."""

    name: str
    grid: tuple[int, int]
    num_prefix_tokens: int
    num_heads: int
    head_dim: int
    num_features: int

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def length(self) -> int:
        return self.num_prefix_tokens + self.num_tokens


CLIP_L = Shape("CLIP-L/14-336", (24, 24), 1, 16, 64, 1024)  # LLaVA-1.5, and each tile of LLaVA-NeXT
SIGLIP = Shape("SigLIP-so400m/14-384", (27, 27), 0, 16, 72, 1152)
GRID64 = Shape("64x64 grid", (64, 64), 1, 16, 64, 1024)  # CLIP-L on a photo of 896 pixels a side
SHAPES, BATCHES, DTYPES = (CLIP_L, SIGLIP, GRID64), (1, 8, 64), (torch.float32, torch.float16, torch.bfloat16)
LAYERS = 3  # HIVTP aggregates layers 6, 7 and 8


class Case(NamedTuple):
    """One problem that several rivals solve; ``setting`` is what its bench file varies besides the sizes."""

    op: str
    setting: str
    shape: Shape
    batch: int
    dtype: torch.dtype
    baselines: tuple[str, ...] = ()
    device: str = "cpu"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        words = (self.op, self.setting, self.shape.name, f"B={self.batch}", self.dtype_name)
        return " ".join(word for word in words if word)

    def randn(self, *shape: int) -> torch.Tensor:
        """Normal numbers, the same in every run, of the case's dtype and on its device."""
        generator = torch.Generator(self.device).manual_seed(0)
        return torch.randn(shape, generator=generator, device=self.device).to(self.dtype)


def cases(
    op: str, settings: tuple[str, ...] = ("",), baselines: tuple[str, ...] = (), any_grid: bool = True
) -> list[Case]:
    """Every shape, batch and dtype. any_grid: whether the baselines can handle the odd grid of SigLIP."""
    return [
        Case(op, setting, shape, batch, dtype, baselines if any_grid or shape is not SIGLIP else ())
        for setting in settings
        for dtype in DTYPES
        for shape in SHAPES
        for batch in BATCHES
    ]


def make_queries_and_keys(case: Case, layers: int = LAYERS) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(B, H, L, D) per layer in memory order (B, L, H, D), as a projection emits them."""
    shape = case.shape
    both = case.randn(2 * layers, case.batch, shape.length, shape.num_heads, shape.head_dim).transpose(2, 3)
    return list(both[:layers]), list(both[layers:])


def make_scores(case: Case) -> torch.Tensor:
    """(B, N), no two equal within an image: up to 4096 values that every dtype can hold."""
    ranks = case._replace(dtype=torch.float32).randn(case.batch, case.shape.num_tokens).argsort(-1)
    # From 2**-16 to 2**16 there are that many bfloat16 numbers, and float16 has them all.
    return (ranks + 0x3780).to(torch.int16).view(torch.bfloat16).to(case.dtype)


def make_features(case: Case) -> torch.Tensor:
    """(B, N, C) with duplicates to remove: patches of a few kinds and noise."""
    kinds = case.randn(case.batch, 24, case.shape.num_features)
    tokens = torch.arange(case.shape.num_tokens, device=case.device) % 24
    return kinds[:, tokens] + 0.5 * case.randn(case.batch, case.shape.num_tokens, case.shape.num_features)
