from __future__ import annotations

import pytest
import torch
from emulated import backends

from hvprune import reference
from hvprune.testing import (
    CASES,
    DTYPES,
    assert_no_worse_than_torch,
    assert_same_bits,
    oracle_and_torch,
)

OP = "cosine_similarity"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [*backends(OP), None], ids=lambda backend: str(backend or "reference"))
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_no_worse_than_torch(case, backend, dtype):
    args, kwargs = case.inputs(dtype, backend.device if backend else "cpu")
    result = backend.call(OP, args, kwargs) if backend else reference.cosine_similarity(*args, **kwargs)
    assert_no_worse_than_torch(result, *oracle_and_torch(case, dtype), str(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", backends(OP), ids=str)
def test_symmetric_bit_for_bit(backend, dtype):
    for case in CASES[OP]:
        args, kwargs = case.inputs(dtype, backend.device)
        similarity = backend.call(OP, args, kwargs)
        assert_same_bits(similarity, similarity.mT, str(case))


@pytest.mark.parametrize("backend", [*backends(OP), None], ids=lambda backend: str(backend or "reference"))
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e19, 1e30, 3e38])
def test_norm_neither_overflows_nor_vanishes(backend, scale):
    # Entries of one size, exact in float32 even as subnormals: cosines of signs.
    signs = torch.randint(0, 2, (1, 9, 64), generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    features = signs * torch.tensor(scale)
    result = backend.call(OP, (features.to(backend.device),), {}) if backend else reference.cosine_similarity(features)
    torch.testing.assert_close(result.cpu(), (signs @ signs.mT) / 64, rtol=0, atol=1e-6)
