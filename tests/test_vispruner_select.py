from __future__ import annotations

import pytest

from hvprune.testing import assert_same_bits, combinations

OP = "vispruner_select"


@pytest.mark.parametrize("case, backend, dtype", combinations(OP), ids=str)
def test_equals_its_ops(case, backend, dtype):
    (features, importance, num_tokens), kwargs = case.inputs(dtype, backend.device)
    similarity = backend.call("cosine_similarity", (features,), {})
    expected = backend.call("diverse_select", (similarity, importance, num_tokens), kwargs)
    assert_same_bits(backend.call(OP, (features, importance, num_tokens), kwargs), expected)
