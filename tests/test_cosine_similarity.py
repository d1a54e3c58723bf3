from __future__ import annotations

import pytest
import torch

from hvprune import reference
from hvprune.testing import (
    CASES,
    DTYPES,
    Case,
    assert_no_worse_than_torch,
    assert_same_bits,
    backends,
    combinations,
    oracle_and_torch,
)

OP = "cosine_similarity"


@pytest.mark.parametrize("case, backend, dtype", combinations(OP), ids=str)
def test_no_worse_than_torch(case, backend, dtype):
    result = backend.call(OP, *case.inputs(dtype, backend.device))
    assert_no_worse_than_torch(result, *oracle_and_torch(case, dtype), str(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_reference_is_no_worse_than_torch(case, dtype):
    args, kwargs = case.inputs(dtype)
    result = reference.cosine_similarity(*args, **kwargs)
    assert_no_worse_than_torch(result, *oracle_and_torch(case, dtype), str(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", backends(OP), ids=str)
def test_symmetric_bit_for_bit(backend, dtype):
    for case in filter(Case.is_small, CASES[OP]):
        args, kwargs = case.inputs(dtype, backend.device)
        similarity = backend.call(OP, args, kwargs)
        assert_same_bits(similarity, similarity.mT, str(case))


EXTREMES = {
    torch.float32: [1e-44, 1e-38, 1e-30, 1e19, 1e30, 3e38],
    torch.float16: [1e-6, 6e4],
    torch.bfloat16: [1e-30, 5e18, 3e38],
}


@pytest.mark.parametrize("backend", [*backends(OP), None], ids=lambda backend: str(backend or "reference"))
@pytest.mark.parametrize("dtype, scale", [(dtype, scale) for dtype in EXTREMES for scale in EXTREMES[dtype]], ids=str)
def test_norm_neither_overflows_nor_vanishes(backend, dtype, scale):
    # Entries of one size, so that the cosines are those of their signs, whatever the size is rounded to.
    signs = torch.randint(0, 2, (1, 70, 64), generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    features = signs.to(dtype) * torch.tensor(scale, dtype=dtype)
    result = backend.call(OP, (features.to(backend.device),), {}) if backend else reference.cosine_similarity(features)
    expected = (signs @ signs.mT) / 64
    torch.testing.assert_close(result.cpu().float(), expected, rtol=0, atol=torch.finfo(result.dtype).eps * 8)
