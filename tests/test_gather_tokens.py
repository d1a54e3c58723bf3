from __future__ import annotations

import pytest
import torch
from emulated import backends

from hvprune import ops
from hvprune.testing import CASES, DTYPES, assert_same_bits, expected

OP = "gather_tokens"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", backends(OP), ids=str)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_equals_reference(case, backend, dtype):
    args, kwargs = case.inputs(dtype, backend.device)
    assert_same_bits(backend.call(OP, args, kwargs), expected(case, dtype))


def test_takes_a_selection():
    features = torch.arange(12.0).reshape(1, 6, 2)
    selection = ops.hierarchical_select(torch.arange(6.0)[None], (2, 3), num_tokens=2)
    assert selection.indices.tolist() == [[3, 5]]
    assert ops.gather_tokens(features, selection).tolist() == [[[6.0, 7.0], [10.0, 11.0]]]


def test_natural_selection_is_padded():
    features = torch.ones(2, 576, 4)
    selection = ops.hierarchical_select(torch.rand(2, 576, generator=torch.Generator().manual_seed(1)))
    gathered = ops.gather_tokens(features, selection, pad_value=-5.0)
    expected = torch.where(torch.arange(288) < selection.counts[:, None], 1.0, -5.0)
    assert_same_bits(gathered, expected[..., None].expand(-1, -1, 4))


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("bad", [5, -2, 2**62])
def test_index_out_of_range_is_an_error(name, bad):
    features, indices = torch.ones(2, 5, 3), torch.tensor([[0, 1], [4, bad]])
    with pytest.raises(ValueError, match=rf"gather_tokens: indices must be in \[-1, N\) with N=5, got {bad}$"):
        ops.gather_tokens(features, indices, backend=name)


@pytest.mark.parametrize("backend", backends(OP), ids=str)
def test_copies_every_bit_pattern(backend):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).reshape(1, 256, 256)
    indices = torch.arange(256, device=backend.device)[None]
    gathered = backend.call(OP, (patterns.to(backend.device), indices), {})
    assert torch.equal(gathered.cpu().view(torch.int16), patterns.view(torch.int16))
