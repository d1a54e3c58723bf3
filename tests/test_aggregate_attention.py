from __future__ import annotations

import pytest
from emulated import backends

from hvprune import reference
from hvprune.testing import CASES, DTYPES, assert_no_worse_than_torch, oracle_and_torch

OP = "aggregate_attention"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [*backends(OP), None], ids=lambda backend: str(backend or "reference"))
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_no_worse_than_torch(case, backend, dtype):
    args, kwargs = case.inputs(dtype, backend.device if backend else "cpu")
    result = backend.call(OP, args, kwargs) if backend else reference.aggregate_attention(*args, **kwargs)
    assert_no_worse_than_torch(result, *oracle_and_torch(case, dtype), str(case))
