"""attention_importance: straight from Q and K, against attention maps that are made to be averaged."""

from functools import partial

import torch

from hvprune import reference

from . import baselines
from ._harness import Rival, hvprune_rivals, no_worse_than_torch
from .shapes import CLIP_L, Case, cases, make_queries_and_keys

ALL_ROWS, CLS_ROW = "3 layers, all rows", "1 layer, CLS row"
BASELINES = ("released", "plain PyTorch")
CASES = [
    *cases("attention_importance", (ALL_ROWS,), BASELINES),
    *(case for case in cases("attention_importance", (CLS_ROW,), BASELINES) if case.shape.num_prefix_tokens),
]
MEMORY_CASES = (Case("attention_importance", ALL_ROWS, CLIP_L, 1, torch.float32, BASELINES),)


def rivals(case: Case) -> dict[str, Rival]:
    prefix, cls = case.shape.num_prefix_tokens, case.setting == CLS_ROW
    queries, keys = make_queries_and_keys(case, layers=1 if cls else 3)
    rows = {"num_prefix_tokens": prefix, "rows": "cls" if cls else "all"}
    reduce = baselines.released_cls_attention if cls else baselines.released_mean_attention

    def released():
        return reduce(baselines.attention_maps(queries, keys), prefix)

    plain = baselines.plain_cls_importance if cls else baselines.plain_mean_importance
    oracle = torch.cat([
        reference.attention_importance(*([x[i : i + 1].double() for x in layers] for layers in (queries, keys)), **rows)
        for i in range(case.batch)
    ])  # fmt: skip
    verify = no_worse_than_torch(oracle, released())
    return {
        **hvprune_rivals(case, queries, keys, **rows, verify=verify),
        "released": Rival(released, verify),
        "plain PyTorch": Rival(partial(plain, queries, keys, prefix), verify),
    }


def test_attention_importance(measure):
    measure()
