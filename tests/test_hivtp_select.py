from __future__ import annotations

import pytest
from emulated import backends

from hvprune.testing import CASES, DTYPES, assert_same_bits

OP = "hivtp_select"
SELECT_ARGUMENTS = ("regions", "keep_ratio", "window", "num_tokens")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", backends(OP), ids=str)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_equals_its_ops(case, backend, dtype):
    args, kwargs = case.inputs(dtype, backend.device)
    importance_kwargs = {key: kwargs[key] for key in ("num_prefix_tokens", "scale") if key in kwargs}
    importance = backend.call("attention_importance", args, importance_kwargs)
    select_kwargs = {key: kwargs[key] for key in SELECT_ARGUMENTS if key in kwargs}
    expected = backend.call("hierarchical_select", (importance, kwargs.get("grid")), select_kwargs)
    assert_same_bits(backend.call(OP, args, kwargs), expected)
