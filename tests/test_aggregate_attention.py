from __future__ import annotations

import pytest

from hvprune import reference
from hvprune.testing import CASES, DTYPES, assert_no_worse_than_torch, combinations, oracle_and_torch

OP = "aggregate_attention"


@pytest.mark.parametrize("case, backend, dtype", combinations(OP), ids=str)
def test_no_worse_than_torch(case, backend, dtype):
    result = backend.call(OP, *case.inputs(dtype, backend.device))
    assert_no_worse_than_torch(result, *oracle_and_torch(case, dtype), str(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_reference_is_no_worse_than_torch(case, dtype):
    args, kwargs = case.inputs(dtype)
    result = reference.aggregate_attention(*args, **kwargs)
    assert_no_worse_than_torch(result, *oracle_and_torch(case, dtype), str(case))
