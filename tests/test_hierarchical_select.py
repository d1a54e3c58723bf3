from __future__ import annotations

import itertools

import pytest
import torch
from emulated import backends

from hvprune import ops
from hvprune.testing import CASES, DTYPES, assert_same_bits, expected

OP = "hierarchical_select"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", backends(OP), ids=str)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_equals_reference(case, backend, dtype):
    args, kwargs = case.inputs(dtype, backend.device)
    assert_same_bits(backend.call(OP, args, kwargs), expected(case, dtype))


def test_natural_mode_by_hand():
    # One region of 2 x 4, quota 2, two windows: 9 and 8 are kept, 7 wins the left window, 3 the right one.
    scores = torch.tensor([[9.0, 1.0, 8.0, 2.0, 7.0, 0.0, 3.0, 1.0]])
    selection = ops.hierarchical_select(scores, (2, 4), regions=(1, 1), keep_ratio=0.25)
    assert selection.indices.tolist() == [[0, 2, 4, 6]]
    assert selection.counts.tolist() == [4]
    assert selection.mask.tolist() == [[True, False, True, False, True, False, True, False]]


def test_fixed_mode_takes_kept_then_winners_then_the_rest():
    scores = torch.tensor([[9.0, 1.0, 8.0, 2.0, 7.0, 0.0, 3.0, 1.0]])
    kept = [ops.hierarchical_select(scores, (2, 4), regions=(1, 1), num_tokens=k).indices[0].tolist() for k in range(9)]
    order = [0, 2, 4, 6, 3, 1, 7, 5]  # 1 precedes 7: the same score, the lower index
    assert kept == [sorted(order[:k]) for k in range(9)]


def test_count_of_the_released_setting_spans_252_to_288():
    corner = torch.zeros(24, 24)
    corner[:6, :6] = corner[:6, 12:18] = corner[12:18, :6] = corner[12:18, 12:18] = 1.0  # fills whole windows
    spread = torch.zeros(24, 24)
    spread[::2, ::2] = 1.0  # one token of every window: its window still has a winner
    selection = ops.hierarchical_select(torch.stack([corner, spread]).reshape(2, 576))
    assert selection.indices.shape == (2, 288)
    assert selection.counts.tolist() == [252, 288]


def test_every_budget_nests_in_the_next():
    scores = torch.rand(1, 35, generator=torch.Generator().manual_seed(0))
    masks = [ops.hierarchical_select(scores, (5, 7), num_tokens=k).mask for k in range(36)]
    for k, (smaller, larger) in enumerate(itertools.pairwise(masks)):
        assert (smaller <= larger).all() and larger.sum() == k + 1
