"""The case table of every op.

A case is one call: its inputs are made on a CPU from a seed that depends on its name alone, so every backend and
every machine sees the same bits.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import reference
from ..selection import Selection

SMALL = 6000


@dataclass(frozen=True)
class Case:
    """``make(generator, dtype) -> (args, kwargs)`` of one call."""

    op: str
    name: str
    make: Callable

    def __str__(self) -> str:
        return self.name

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu", variant: int = 0) -> tuple[tuple, dict]:
        """Other variants have other random numbers in the same shapes."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.op} {self.name}".encode()) + variant)
        args, kwargs = self.make(generator, dtype)
        return map_tensors(args, lambda x: x.to(device)), map_tensors(kwargs, lambda x: x.to(device))

    def is_small(self) -> bool:
        """Whether no input has more than SMALL elements: such a case takes no time on any backend."""
        sizes = []
        map_tensors(self.inputs(), lambda x: sizes.append(x.numel()) or x)
        return max(sizes) <= SMALL


def map_tensors(value, f: Callable[[Tensor], Tensor]):
    """``value`` with f applied to every tensor in its tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, Selection):
        return Selection(*(f(item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, f) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(item, f) for key, item in value.items()}
    return value


SCORE_KINDS = {
    "random": lambda g, shape: torch.randn(shape, generator=g),
    "all equal": lambda g, shape: torch.ones(shape),
    "two values": lambda g, shape: torch.randint(0, 2, shape, generator=g).float(),
    "seven values": lambda g, shape: torch.randint(-3, 4, shape, generator=g).float(),
    "signed zeros": lambda g, shape: torch.where(torch.rand(shape, generator=g) < 0.5, -0.0, 0.0),
    "one NaN": lambda g, shape: torch.randn(shape, generator=g).index_fill(
        1, torch.tensor([shape[1] // 2]), float("nan")
    ),
    "all NaN": lambda g, shape: torch.full(shape, float("nan")),
    "NaN and -inf": lambda g, shape: torch.where(torch.rand(shape, generator=g) < 0.5, float("nan"), float("-inf")),
    "half NaN": lambda g, shape: torch.randn(shape, generator=g).masked_fill(
        torch.rand(shape, generator=g) < 0.5, float("nan")
    ),
    "infinities": lambda g, shape: torch.randint(-1, 2, shape, generator=g) / 0.0,
    "denormals": lambda g, shape: torch.randint(-9, 10, shape, generator=g) * 2.0**-149,
    "last bits": lambda g, shape: 1.0 + torch.randint(0, 1024, shape, generator=g) * 2.0**-23,
    "attention": lambda g, shape: torch.randn(shape, generator=g).mul(2).softmax(-1),
}


def _scores(kind: str, *shape: int):
    return lambda generator, dtype: SCORE_KINDS[kind](generator, shape).to(dtype)


def _features(generator: torch.Generator, dtype: torch.dtype, batch: int, total: int, dim: int) -> Tensor:
    """Rows that share directions, as neighbouring patches do: cosines from about 0 to 1, some exact duplicates."""
    groups = max(1, total // 6)
    centres = torch.randn(batch, groups, dim, generator=generator)
    member = torch.randint(0, groups, (batch, total), generator=generator)
    features = centres.gather(1, member.unsqueeze(-1).expand(-1, -1, dim)) * 2
    features = features + torch.randn(batch, total, dim, generator=generator)
    if total > 8:
        features[:, total // 2] = features[:, 1]
    return features.to(dtype)


def _hierarchical(name: str, kind: str, batch: int, grid: tuple[int, int], **kwargs) -> Case:
    scores = _scores(kind, batch, grid[0] * grid[1])
    return Case("hierarchical_select", name, lambda g, dtype: ((scores(g, dtype), grid), kwargs))


def _diverse(name: str, kind: str, batch: int, total: int, num_tokens: int, *, special=None, **kwargs) -> Case:
    def make(generator, dtype):
        importance = _scores(kind, batch, total)(generator, dtype)
        similarity = reference.cosine_similarity(_features(generator, dtype, batch, total, 32)).to(dtype)
        if special is not None:
            similarity = special(similarity)
        return (similarity, importance, num_tokens), {"return_trace": True, **kwargs}

    return Case("diverse_select", name, make)


def _attention(
    name: str,
    batch=2,
    heads=3,
    length=17,
    dim=16,
    layers=1,
    layout="BLHD",
    spread=1.0,
    special=None,
    **kwargs,
):
    def make(generator, dtype):
        def tensor():
            x = torch.randn(batch, length, heads, dim, generator=generator).mul(spread).to(dtype).transpose(1, 2)
            return x if layout == "BLHD" else x.contiguous()

        queries, keys = [tensor() for _ in range(layers)], [tensor() for _ in range(layers)]
        if special is not None:
            special(queries, keys)
        options = dict(kwargs)
        if options.pop("with_logsumexp", False):
            options["logsumexp"] = [
                (q.double() @ k.double().mT * dim**-0.5).logsumexp(-1).float()
                for q, k in zip(queries, keys, strict=True)
            ]
        if layers == 1:
            queries, keys = queries[0], keys[0]
            options = {key: value[0] if key == "logsumexp" else value for key, value in options.items()}
        return (queries, keys), options

    return Case("attention_importance", name, make)


def _aggregate(name: str, batch=2, heads=3, length=17, layers=1, special=None, **kwargs) -> Case:
    def make(generator, dtype):
        maps = [
            torch.randn(batch, heads, length, length, generator=generator).softmax(-1).to(dtype) for _ in range(layers)
        ]
        if special is not None:
            special(maps)
        return ((maps if layers > 1 else maps[0]),), kwargs

    return Case("aggregate_attention", name, make)


def _cosine(name: str, batch: int, total: int, dim: int, special=None) -> Case:
    def make(generator, dtype):
        features = _features(generator, torch.float32, batch, total, dim)
        if special is not None:
            special(features)
        return (features.to(dtype),), {}

    return Case("cosine_similarity", name, make)


def _gather(name: str, batch: int, total: int, dim: int, width: int, padded: int = 0, **kwargs) -> Case:
    def make(generator, dtype):
        features = torch.randn(batch, total, dim, generator=generator).to(dtype)
        indices = (
            torch.stack([torch.randperm(total, generator=generator)[:width] for _ in range(batch)])
            if batch
            else torch.empty(0, width, dtype=torch.int64)
        )
        indices = indices.sort(-1).values
        if padded:
            indices[:, -padded:] = -1
        return (features, indices), kwargs

    return Case("gather_tokens", name, make)


def _set(index, value):
    """Writes a value at an index of the first tensor, or of the last one of a pair of lists."""

    def write(*lists):
        target = lists[-1]
        (target[-1] if isinstance(target, list) else target)[index] = value

    return write


_NAN, _INF = float("nan"), float("inf")

CASES: dict[str, list[Case]] = {
    "hierarchical_select": [
        _hierarchical("CLIP 24x24 natural", "attention", 3, (24, 24)),
        *[
            _hierarchical(f"CLIP 24x24 K={k}", "attention", 2, (24, 24), num_tokens=k)
            for k in (0, 1, 143, 144, 145, 287, 288, 289, 575, 576)
        ],
        _hierarchical("SigLIP 27x27", "random", 2, (27, 27)),
        _hierarchical("SigLIP 27x27 K=200", "random", 2, (27, 27), num_tokens=200),
        _hierarchical("64x64", "random", 1, (64, 64), regions=(4, 4)),
        _hierarchical("one token", "random", 2, (1, 1)),
        _hierarchical("one row", "random", 2, (1, 13), regions=(1, 3), window=(1, 2)),
        _hierarchical("one column", "random", 2, (13, 1), regions=(3, 1), window=(2, 1)),
        _hierarchical("more regions than rows", "random", 2, (3, 5), regions=(5, 7)),
        _hierarchical(
            "uneven regions, partial windows",
            "random",
            2,
            (7, 11),
            regions=(2, 3),
            window=(2, 3),
            keep_ratio=0.3,
        ),
        _hierarchical("window larger than region", "random", 2, (6, 6), window=(9, 9)),
        _hierarchical("window of one", "random", 2, (6, 6), window=(1, 1)),
        _hierarchical("keep none", "random", 2, (8, 8), keep_ratio=0.0),
        _hierarchical("keep all", "random", 2, (8, 8), keep_ratio=1.0),
        _hierarchical("keep all K=10", "random", 2, (8, 8), keep_ratio=1, num_tokens=10),
        _hierarchical("keep none K=50", "random", 2, (8, 8), keep_ratio=0.0, num_tokens=50),
        _hierarchical("no image", "random", 0, (4, 4)),
        _hierarchical("no image K=3", "random", 0, (4, 4), num_tokens=3),
        _hierarchical("5 images", "seven values", 5, (9, 6), keep_ratio=0.5),
        *[_hierarchical(f"{kind} natural", kind, 2, (12, 10)) for kind in SCORE_KINDS],
        *[_hierarchical(f"{kind} K=61", kind, 2, (12, 10), num_tokens=61) for kind in SCORE_KINDS],
    ],
    "diverse_select": [
        _diverse("CLIP K=128", "attention", 2, 576, 128),
        _diverse("CLIP K=64 ratio 0.75", "attention", 1, 576, 64, important_ratio=0.75),
        _diverse("odd residual", "attention", 1, 576, 66),
        _diverse("SigLIP K=100", "random", 1, 729, 100),
        *[_diverse(f"N=24 K={k}", "random", 2, 24, k) for k in (0, 1, 2, 3, 4, 5, 12, 23, 24)],
        _diverse("N=1 K=0", "random", 2, 1, 0),
        _diverse("N=1 K=1", "random", 2, 1, 1),
        _diverse("N=2 K=1", "random", 2, 2, 1),
        _diverse("N=7 to none", "random", 2, 7, 0, removals_per_round=3),
        _diverse("all important", "random", 2, 33, 17, important_ratio=1.0),
        _diverse("none important", "random", 2, 33, 17, important_ratio=0.0),
        _diverse("one removal per round", "random", 2, 33, 8, removals_per_round=1),
        _diverse("removals beyond half", "random", 2, 33, 8, removals_per_round=1000),
        _diverse("no image", "random", 0, 24, 8),
        *[_diverse(f"importance {kind}", kind, 2, 50, 20) for kind in SCORE_KINDS],
        _diverse("all similar", "random", 2, 50, 20, special=torch.ones_like),
        _diverse(
            "zeros of both signs",
            "random",
            2,
            50,
            20,
            special=lambda s: torch.where(s > 0.2, 0.0, -0.0).to(s.dtype),
        ),
        _diverse("nothing finite", "random", 2, 50, 20, special=lambda s: torch.full_like(s, -_INF)),
        _diverse("NaN similarity", "random", 2, 50, 20, special=lambda s: s.masked_fill(s > 0.5, _NAN)),
        _diverse("all NaN similarity", "random", 2, 50, 20, special=lambda s: torch.full_like(s, _NAN)),
        _diverse("infinite similarity", "random", 2, 50, 20, special=lambda s: s.masked_fill(s > 0.5, _INF)),
        _diverse("not symmetric", "random", 2, 50, 20, special=lambda s: s.triu() * 2 + s.tril() * -0.5),
    ],
    "gather_tokens": [
        _gather("CLIP K=128", 2, 576, 1024, 128),
        _gather("odd sizes", 3, 63, 33, 17),
        _gather("C=1", 2, 5, 1, 3),
        _gather("padding", 2, 20, 8, 10, padded=4),
        _gather("padding of NaN", 2, 20, 8, 10, padded=4, pad_value=_NAN),
        _gather("padding of 1e9", 2, 20, 8, 10, padded=4, pad_value=1e9),
        _gather("padding of 0.3", 2, 20, 8, 10, padded=4, pad_value=0.3),
        _gather("all padding", 2, 20, 8, 10, padded=10),
        _gather("all tokens", 2, 20, 8, 20),
        _gather("none kept", 2, 20, 8, 0),
        _gather("no image", 0, 20, 8, 5),
        _gather("many images", 70, 9, 40, 4),
    ],
    "aggregate_attention": [
        _aggregate("CLIP", 1, 4, 577, layers=2),
        _aggregate("three layers", layers=3),
        _aggregate("CLS row", layers=2, rows="cls"),
        _aggregate("no prefix", num_prefix_tokens=0),
        _aggregate("DINOv2 prefix", num_prefix_tokens=5, rows="cls"),
        _aggregate("one patch", length=2),
        _aggregate("one head, long", heads=1, length=70),
        _aggregate("no image", batch=0),
        _aggregate("NaN in one map", special=_set((0, 1, 3, 5), _NAN)),
        _aggregate("inf in one map", special=_set((1, 0, 3, 5), _INF)),
    ],
    "attention_importance": [
        _attention("CLIP", 1, 4, 577, 64, layers=2),
        _attention("CLIP CLS row", 2, 4, 577, 64, rows="cls"),
        _attention("CLIP logsumexp", 1, 4, 577, 64, with_logsumexp=True),
        _attention("SigLIP", 1, 2, 729, 72, num_prefix_tokens=0),
        _attention("three layers", layers=3),
        _attention("three layers, logsumexp", layers=3, with_logsumexp=True),
        _attention("three layers, CLS row", layers=3, rows="cls"),
        _attention("CLS row, logsumexp", rows="cls", with_logsumexp=True),
        _attention("contiguous", layout="BHLD"),
        _attention("DINOv2 prefix", num_prefix_tokens=5, rows="cls"),
        _attention("scale", scale=0.37),
        _attention("negative scale", scale=-0.2),
        _attention("D=1", dim=1),
        _attention("D=33", dim=33, length=50),
        _attention("D=128", dim=128, length=40),
        _attention("two tokens", length=2),
        _attention("one token, wide head", length=1, dim=130, num_prefix_tokens=0),
        _attention("one tile and one row", length=49),
        _attention("sharp", spread=6.0, length=60),
        _attention("no image", batch=0),
        _attention("NaN key", length=30, special=_set((0, 1, 3, 5), _NAN)),
        _attention("NaN key, CLS row", length=30, rows="cls", special=_set((0, 1, 3, 5), _NAN)),
        _attention("infinite key", length=30, special=_set((1, 0, 4, 2), _INF)),
        _attention("NaN query", length=30, special=lambda q, k: _set((0, 1, 3, 5), _NAN)(q)),
        _attention("zero keys", special=lambda q, k: k[0].zero_()),
    ],
    "cosine_similarity": [
        _cosine("CLIP", 1, 576, 1024),
        _cosine("odd sizes", 3, 63, 77),
        _cosine("one token", 2, 1, 8),
        _cosine("C=1", 2, 9, 1),
        _cosine("49 tokens", 2, 49, 130),
        _cosine("no image", 0, 9, 8),
        _cosine("zero rows", 2, 20, 40, special=_set((slice(None), slice(3, 7)), 0.0)),
        _cosine("all zero", 1, 20, 40, special=_set(slice(None), 0.0)),
        _cosine("NaN in a row", 2, 20, 40, special=_set((0, 4, 39), _NAN)),
        _cosine("inf in a row", 2, 20, 40, special=_set((1, 4, 0), _INF)),
        _cosine("zero and NaN rows", 1, 20, 40, special=lambda f: (_set((0, 4, 3), _NAN)(f), _set((0, 5), 0.0)(f))),
    ],
    "hivtp_select": [],
    "vispruner_select": [],
}


def _hivtp(case: Case, **kwargs) -> Case:
    def make(generator, dtype):
        (queries, keys), options = case.make(generator, dtype)
        return (queries, keys), {**options, **kwargs}

    return Case("hivtp_select", case.name, make)


def _vispruner(name: str, batch: int, total: int, dim: int, num_tokens: int, kind="attention", special=None, **kwargs):
    def make(generator, dtype):
        features = _features(generator, torch.float32, batch, total, dim)
        if special is not None:
            special(features)
        return (features.to(dtype), _scores(kind, batch, total)(generator, dtype), num_tokens), kwargs

    return Case("vispruner_select", name, make)


CASES["hivtp_select"] = [
    _hivtp(_attention("CLIP natural", 1, 4, 577, 64, layers=3)),
    _hivtp(_attention("CLIP K=192", 2, 2, 577, 64), num_tokens=192),
    _hivtp(
        _attention("5x7, no prefix", length=35, num_prefix_tokens=0),
        grid=(5, 7),
        regions=(2, 3),
        keep_ratio=0.3,
    ),
    _hivtp(_attention("3x2 windows, scale", length=37, scale=0.3), window=(3, 2)),
    _hivtp(_attention("no image", batch=0)),
    _hivtp(_attention("NaN key", special=_set((0, 1, 3, 5), _NAN)), num_tokens=9),
]
CASES["vispruner_select"] = [
    _vispruner("CLIP K=128", 1, 576, 1024, 128),
    _vispruner("CLIP K=64 ratio 0.75", 1, 576, 256, 64, important_ratio=0.75),
    *[_vispruner(f"N=50 K={k}", 3, 50, 33, k) for k in (0, 1, 2, 25, 49, 50)],
    _vispruner("all important", 2, 50, 16, 20, important_ratio=1.0),
    _vispruner("none important", 2, 50, 16, 20, important_ratio=0.0),
    _vispruner("ties in importance", 2, 50, 16, 20, kind="two values"),
    _vispruner("NaN importance", 2, 50, 16, 20, kind="half NaN"),
    _vispruner("zero and NaN rows", 2, 50, 16, 20, special=lambda f: (_set((0, 4, 3), _NAN)(f), _set((0, 5), 0.0)(f))),
    _vispruner("no image", 0, 50, 16, 20),
    _vispruner("five images", 5, 64, 48, 24, removals_per_round=3),
]
