"""Offsets of more than 32 bits: the last image 2**31 elements after the first, in memory that mostly does not exist."""

from __future__ import annotations

import mmap

import pytest
import torch

from hvprune.testing import CASES, assert_same_bits, backends, map_tensors


def far_apart(x: torch.Tensor) -> torch.Tensor:
    """The same values; the stride itself has 32 bits, its product with the number of an image has not."""
    if not x.is_floating_point():
        return x
    stride = 2**31 // (len(x) - 1) + 8
    memory = mmap.mmap(-1, (stride * (len(x) - 1) + x[0].numel()) * x.element_size())
    view = torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, (stride, *torch.empty(x.shape[1:]).stride()))
    return view.copy_(x)


@pytest.mark.parametrize(
    "op, backend",
    [
        pytest.param(op, backend, id=f"{op}-{backend}")
        for op in sorted(CASES)
        for backend in {backend.name: backend for backend in backends(op) if backend.device == "cpu"}.values()
    ],
)
def test_images_far_apart(op, backend):
    def has_elements(case):
        sizes = []
        map_tensors(case.inputs(), lambda x: sizes.append(x.numel()) or x)
        return min(sizes) > 0

    cases = [case for case in CASES[op] if case.is_small() and has_elements(case)][:2]
    assert cases
    for case in cases:
        args, kwargs = map_tensors(case.inputs(torch.float16), lambda x: torch.cat([x] * 3))
        expected = backend.call(op, args, kwargs)
        assert_same_bits(backend.call(op, map_tensors(args, far_apart), map_tensors(kwargs, far_apart)), expected, case)
