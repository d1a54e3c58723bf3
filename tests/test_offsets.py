"""Offsets of more than 32 bits: images 2**31 elements apart, in memory of which only what is used exists."""

from __future__ import annotations

import mmap

import pytest
import torch

from hvprune.testing import CASES, assert_same_bits, backends, map_tensors


def far_apart(x: torch.Tensor) -> torch.Tensor:
    """The same values, the last image at least 2**31 elements after the first."""
    if x.dim() == 0 or len(x) < 2 or not x.is_floating_point():
        return x
    stride = max(2**31 // (len(x) - 1), x[0].numel()) + 8
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
    def inputs(case):
        return case.inputs(torch.float16, backend.device)

    def batch(case):
        sizes = []
        map_tensors(inputs(case), lambda x: sizes.append(len(x) if x.dim() and x.numel() else 0) or x)
        return min(sizes)

    cases = [case for case in CASES[op] if case.is_small() and batch(case) > 1][:2]
    assert cases
    for case in cases:
        args, kwargs = inputs(case)
        expected = backend.call(op, args, kwargs)
        assert_same_bits(backend.call(op, map_tensors(args, far_apart), map_tensors(kwargs, far_apart)), expected, case)
