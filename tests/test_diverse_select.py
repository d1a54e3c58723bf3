from __future__ import annotations

import pytest
import torch
from emulated import backends

from hvprune import ops
from hvprune.testing import CASES, DTYPES, assert_same_bits, expected

OP = "diverse_select"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", backends(OP), ids=str)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_equals_reference(case, backend, dtype):
    args, kwargs = case.inputs(dtype, backend.device)
    assert_same_bits(backend.call(OP, args, kwargs), expected(case, dtype))


def test_removes_the_duplicate_by_hand():
    # Residual list 0..5 by importance, a = 0, 2, 4 and b = 1, 3, 5: 2 is the copy of 3 and goes.
    similarity = torch.eye(6)
    similarity[2, 3] = similarity[3, 2] = 0.9
    importance = torch.tensor([[6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    selection, trace = ops.diverse_select(
        similarity[None], importance, 5, important_ratio=0.0, removals_per_round=8, return_trace=True
    )
    assert selection.indices.tolist() == [[0, 1, 3, 4, 5]]
    assert trace.tolist() == [[[0, 1, 2, 3, 4, 5], [0, 4, 1, 3, 5, -1]]]


@pytest.mark.parametrize("num_tokens, rounds", [(32, 68), (64, 64), (128, 56), (192, 48), (256, 40)])
def test_number_of_rounds_of_the_paper_settings(num_tokens, rounds):
    generator = torch.Generator().manual_seed(0)
    similarity, importance = torch.rand(1, 576, 576, generator=generator), torch.rand(1, 576, generator=generator)
    _, trace = ops.diverse_select(similarity, importance, num_tokens, return_trace=True)
    assert trace.shape == (1, rounds + 1, 576 - num_tokens // 2)


@pytest.mark.parametrize("backend", backends(OP), ids=str)
def test_trace_does_not_change_the_selection(backend):
    for case in CASES[OP]:
        args, kwargs = case.inputs(torch.float32, backend.device)
        traced, _ = backend.call(OP, args, kwargs)
        assert_same_bits(backend.call(OP, args, {**kwargs, "return_trace": False}), traced, str(case))
