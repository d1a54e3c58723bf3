"""aggregate_attention: maps that a model already returned, against means of the stacked maps."""

import torch

from hvprune import reference

from . import baselines
from ._floor import Work
from ._harness import Rival, hvprune_rivals, images_to_verify, no_worse_than_torch
from .shapes import LAYERS, Case, cases, make_queries_and_keys

ALL_ROWS, CLS_ROW = "3 layers, all rows", "1 layer, CLS row"
CASES = [
    *cases("aggregate_attention", (ALL_ROWS,), ("released", "plain PyTorch")),
    *(case for case in cases("aggregate_attention", (CLS_ROW,), ("released",)) if case.shape.num_prefix_tokens),
]


def work(case: Case) -> Work:
    """The rows that count of every map, without the prefix columns, and (B, N) float32; an addition each."""
    shape, cls = case.shape, case.setting == CLS_ROW
    rows = case.batch * shape.num_heads * (1 if cls else LAYERS * shape.length)
    entries = rows * shape.num_tokens
    moved = entries * case.dtype.itemsize + 4 * case.batch * shape.num_tokens
    # Whole maps are made, each from scores and a softmax in float32.
    layer, layers = case.batch * shape.num_heads * shape.length**2, 1 if cls else LAYERS
    return Work(moved, flops=entries, held=layer * (layers * case.dtype.itemsize + 8))


def rivals(case: Case) -> dict[str, Rival]:
    prefix, cls = case.shape.num_prefix_tokens, case.setting == CLS_ROW
    layers = zip(*make_queries_and_keys(case._replace(dtype=torch.float32), layers=1 if cls else LAYERS), strict=True)
    maps = [baselines.attention_maps([q], [k])[0].to(case.dtype) for q, k in layers]
    rows = {"num_prefix_tokens": prefix, "rows": "cls" if cls else "all"}
    released = baselines.released_cls_attention if cls else baselines.released_mean_attention
    plain = baselines.released_cls_attention if cls else baselines.plain_mean_attention
    images = images_to_verify(case.batch)
    one_by_one = [[m[i : i + 1] for m in maps] for i in images]
    oracle = [reference.aggregate_attention([m.double() for m in image], **rows) for image in one_by_one]
    by_torch = [plain(image, prefix) for image in one_by_one]
    verify = no_worse_than_torch(torch.cat(oracle), torch.cat(by_torch), images)
    return {
        **hvprune_rivals(case, maps, verify=verify, **rows),
        "released": Rival(released, (maps, prefix), verify, compiles=True),
        "plain PyTorch": Rival(plain, (maps, prefix), verify, compiles=True),
    }


def test_aggregate_attention(measure):
    measure()
