"""attention_importance: straight from Q and K, against attention maps that are made to be averaged."""

import torch

from hvprune import reference

from . import baselines
from ._floor import Work
from ._harness import FLASH, Rival, hvprune_rivals, images_to_verify, no_worse_than_torch
from .shapes import CLIP_L, LAYERS, Case, cases, make_queries_and_keys

ALL_ROWS, CLS_ROW = "3 layers, all rows", "1 layer, CLS row"
BASELINES = ("released", "plain PyTorch", FLASH)
CASES = [
    *cases("attention_importance", (ALL_ROWS,), BASELINES),
    *(case for case in cases("attention_importance", (CLS_ROW,), BASELINES) if case.shape.num_prefix_tokens),
]
MEMORY_CASES = (Case("attention_importance", ALL_ROWS, CLIP_L, 1, torch.float32, BASELINES[:2]),)


def work(case: Case) -> Work:
    """Q and K, of Q the rows that count, and (B, N) float32; a product of D terms and an exponential per entry."""
    shape, cls = case.shape, case.setting == CLS_ROW
    heads = case.batch * shape.num_heads * (1 if cls else LAYERS)
    rows = 1 if cls else shape.length
    entries = heads * rows * shape.length
    moved = heads * (rows + shape.length) * shape.head_dim * case.dtype.itemsize + 4 * case.batch * shape.num_tokens
    # The released maps of an image, to know PyTorch's error; as a rival, those of all images, and a copy of them.
    maps = shape.num_heads * shape.length**2 * (2 if cls else 2 * LAYERS + 1) * case.dtype.itemsize
    flops = 2 * entries * shape.head_dim
    return Work(moved, flops, exps=entries, held=maps, held_by_baselines=case.batch * maps)


def oracle(case: Case, queries: list, keys: list, **rows) -> torch.Tensor:
    """In float64 for the images to verify; image by image and head by head, since maps of all take much memory."""

    def head(x: torch.Tensor, i: int, h: int) -> torch.Tensor:
        return x[i : i + 1, h : h + 1].double()

    return torch.cat([
        torch.stack([
            reference.attention_importance([head(q, i, h) for q in queries], [head(k, i, h) for k in keys], **rows)
            for h in range(case.shape.num_heads)
        ]).mean(0)
        for i in images_to_verify(case.batch)
    ])  # fmt: skip


def rivals(case: Case) -> dict[str, Rival]:
    prefix, cls = case.shape.num_prefix_tokens, case.setting == CLS_ROW
    queries, keys = make_queries_and_keys(case, layers=1 if cls else LAYERS)
    rows = {"num_prefix_tokens": prefix, "rows": "cls" if cls else "all"}
    reduce = baselines.released_cls_attention if cls else baselines.released_mean_attention

    def released(queries, keys, prefix):
        return reduce(baselines.attention_maps(queries, keys), prefix)

    plain = baselines.plain_cls_importance if cls else baselines.plain_mean_importance
    images = images_to_verify(case.batch)
    by_torch = [released(*([x[i : i + 1] for x in layers] for layers in (queries, keys)), prefix) for i in images]
    verify = no_worse_than_torch(oracle(case, queries, keys, **rows), torch.cat(by_torch), images)
    inputs = (queries, keys, prefix)
    found = {
        **hvprune_rivals(case, queries, keys, verify=verify, **rows),
        "released": Rival(released, inputs, verify, compiles=True),
        "plain PyTorch": Rival(plain, inputs, verify, compiles=True),
    }
    if FLASH in case.baselines:
        found[FLASH] = Rival(baselines.flash_colreduce_importance, (*inputs, cls), verify, optional=True)
    return found


def test_attention_importance(measure):
    measure()
