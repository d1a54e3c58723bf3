from __future__ import annotations

import pytest
import torch
from emulated import backends

from hvprune import reference
from hvprune.testing import (
    CASES,
    DTYPES,
    assert_no_worse_than_torch,
    by_torch,
    numeric_oracle,
    oracle_and_torch,
)

OP = "attention_importance"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [*backends(OP), None], ids=lambda backend: str(backend or "reference"))
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_no_worse_than_torch(case, backend, dtype):
    args, kwargs = case.inputs(dtype, backend.device if backend else "cpu")
    result = backend.call(OP, args, kwargs) if backend else reference.attention_importance(*args, **kwargs)
    assert_no_worse_than_torch(result, *oracle_and_torch(case, dtype), str(case))


@pytest.mark.parametrize("backend", backends(OP), ids=str)
def test_sums_to_what_the_patches_receive(backend):
    # Without a prefix every row of a map sums to one, so the importance of an image does too.
    queries, keys = torch.randn(2, 3, 4, 50, 16, generator=torch.Generator().manual_seed(0)).to(backend.device)
    importance = backend.call(OP, (queries, keys), {"num_prefix_tokens": 0})
    torch.testing.assert_close(importance.sum(-1).cpu(), torch.ones(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", backends(OP), ids=str)
def test_equals_aggregate_of_the_maps(backend):
    queries, keys = torch.randn(2, 2, 4, 65, 32, generator=torch.Generator().manual_seed(0)).to(backend.device)
    maps = (queries @ keys.mT * 32**-0.5).softmax(-1)
    for rows in ("all", "cls"):
        from_maps = backend.call("aggregate_attention", (maps,), {"rows": rows})
        torch.testing.assert_close(backend.call(OP, (queries, keys), {"rows": rows}), from_maps, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", backends(OP), ids=str)
def test_extreme_scores_do_not_overflow(backend):
    queries = torch.randn(1, 1, 40, 8, generator=torch.Generator().manual_seed(0)).mul(1e4).to(backend.device)
    importance = backend.call(OP, (queries, queries), {})
    assert_no_worse_than_torch(
        importance, numeric_oracle(OP, (queries, queries), {}), by_torch(OP, (queries, queries), {})
    )
