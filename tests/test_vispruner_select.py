from __future__ import annotations

import pytest
from emulated import backends

from hvprune.testing import CASES, DTYPES, assert_same_bits

OP = "vispruner_select"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", backends(OP), ids=str)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_equals_its_ops(case, backend, dtype):
    (features, importance, num_tokens), kwargs = case.inputs(dtype, backend.device)
    similarity = backend.call("cosine_similarity", (features,), {})
    expected = backend.call("diverse_select", (similarity, importance, num_tokens), kwargs)
    assert_same_bits(backend.call(OP, (features, importance, num_tokens), kwargs), expected)
