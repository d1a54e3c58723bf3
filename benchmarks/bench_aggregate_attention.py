"""aggregate_attention: maps that a model already returned, against means of the stacked maps."""

from functools import partial

import torch

from hvprune import reference

from . import baselines
from ._harness import Rival, hvprune_rivals, no_worse_than_torch
from .shapes import Case, cases, make_queries_and_keys

ALL_ROWS, CLS_ROW = "3 layers, all rows", "1 layer, CLS row"
CASES = [
    *cases("aggregate_attention", (ALL_ROWS,), ("released", "plain PyTorch")),
    *(case for case in cases("aggregate_attention", (CLS_ROW,), ("released",)) if case.shape.num_prefix_tokens),
]


def rivals(case: Case) -> dict[str, Rival]:
    prefix, cls = case.shape.num_prefix_tokens, case.setting == CLS_ROW
    layers = make_queries_and_keys(case._replace(dtype=torch.float32), layers=1 if cls else 3)
    maps = [attention.to(case.dtype) for attention in baselines.attention_maps(*layers)]
    rows = {"num_prefix_tokens": prefix, "rows": "cls" if cls else "all"}
    released = baselines.released_cls_attention if cls else baselines.released_mean_attention
    plain = baselines.released_cls_attention if cls else baselines.plain_mean_attention
    oracle = torch.cat([reference.aggregate_attention([m[i : i + 1].double() for m in maps], **rows)
                        for i in range(case.batch)])  # fmt: skip
    verify = no_worse_than_torch(oracle, plain(maps, prefix))
    return {
        **hvprune_rivals(case, maps, **rows, verify=verify),
        "released": Rival(partial(released, maps, prefix), verify),
        "plain PyTorch": Rival(partial(plain, maps, prefix), verify),
    }


def test_aggregate_attention(measure):
    measure()
