"""The cost of a call as such: every op on inputs so small that computing takes next to nothing."""

import torch

from hvprune import Selection, ops, reference

from ._floor import Work
from ._harness import Rival, as_float64, equal_to, hvprune_rivals, no_worse_than_torch
from .shapes import Case, Shape

TINY = Shape("4 tokens", (2, 2), 1, 1, 8, 8)
CASES = [Case(op, "call overhead", TINY, 1, torch.float32) for op in ops.__all__]


def work(case: Case) -> Work:
    """Nothing: the floor is the launch."""
    return Work(0)


def rivals(case: Case) -> dict[str, Rival]:
    grid, length = TINY.grid, TINY.length
    with torch.device(case.device):
        heads = torch.eye(length, TINY.head_dim).view(1, 1, length, TINY.head_dim)
        scores = torch.arange(4.0).view(1, 4)
        features = torch.eye(4, TINY.num_features).unsqueeze(0)
        inputs = {
            "aggregate_attention": (torch.eye(length).view(1, 1, length, length),),
            "attention_importance": (heads, heads),
            "hierarchical_select": (scores, grid),
            "cosine_similarity": (features,),
            "diverse_select": (torch.eye(4).unsqueeze(0), scores, 2),
            "gather_tokens": (features, torch.tensor([[0, 3]])),
            "hivtp_select": (heads, heads, grid),
            "vispruner_select": (features, scores, 2),
        }[case.op]
    expected = getattr(reference, case.op)(*inputs)
    if isinstance(expected, Selection):
        verify = equal_to(expected)
    else:
        verify = no_worse_than_torch(getattr(reference, case.op)(*as_float64(inputs)), expected)
    return hvprune_rivals(case, *inputs, verify=verify)


def test_call_overhead(measure):
    measure()
