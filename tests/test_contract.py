"""What every op promises on every backend, whatever it computes."""

from __future__ import annotations

import threading

import pytest
import torch

from emulated import emulated
from hvprune import ops
from hvprune._registry import OPS
from hvprune.testing import CASES, Backend, assert_same_bits, backends, flatten, map_tensors


def pairs(*, emulate: bool = True, **kwargs) -> list:
    """Ops and backends, the CPU's with one instruction set: all of them share the code that is tested here."""
    return [
        pytest.param(op, backend, id=f"{op}-{backend}")
        for op in sorted(CASES)
        for backend in (
            *{backend.name: backend for backend in backends(op, **kwargs)}.values(),
            *(emulated(op) if emulate else []),
        )
    ]


def small_cases(op: str, backend=None) -> list:
    """Larger cases say nothing here that these do not; interpreted, a few of them do."""
    cases = [case for case in CASES[op] if case.is_small()]
    return cases[:: len(cases) // 3] if backend and backend.interpreted else cases


def tensors_of(value) -> list[torch.Tensor]:
    found = []
    map_tensors(value, lambda x: found.append(x) or x)
    return found


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values with other strides, a storage offset of odd elements and a contiguous last dimension."""
    if x.dim() == 0:
        return x
    shape = [size + 3 for size in x.shape]
    storage = x.new_empty([2, *shape])
    view = storage[1][tuple(slice(1, 1 + size) for size in x.shape)]
    return view.copy_(x)


def padded(x: torch.Tensor) -> torch.Tensor:
    """The same values in rows that are longer than they have to be, all aligned to 16 bytes."""
    return x.new_empty([*x.shape[:-1], (x.shape[-1] + 15) // 8 * 8])[..., : x.shape[-1]].copy_(x) if x.dim() else x


def last_dimension_strided(x: torch.Tensor) -> torch.Tensor:
    storage = x.new_empty([*x.shape[:-1], 2 * x.shape[-1]])
    return storage[..., ::2].copy_(x)


def reversed_memory(x: torch.Tensor) -> torch.Tensor:
    """The same values with the dimensions in memory the other way round."""
    return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))


@pytest.mark.parametrize("layout", [strided, padded, last_dimension_strided, reversed_memory])
@pytest.mark.parametrize("op, backend", pairs())
def test_layout_does_not_matter(op, backend, layout):
    for case in small_cases(op, backend):
        args, kwargs = case.inputs(torch.float16, backend.device)
        expected = backend.call(op, args, kwargs)
        assert_same_bits(backend.call(op, map_tensors(args, layout), map_tensors(kwargs, layout)), expected, str(case))


@pytest.mark.parametrize("op, backend", pairs(interpreted=False))
def test_expanded_batch(op, backend):
    for case in small_cases(op, backend):
        args, kwargs = map_tensors(case.inputs(torch.float32, backend.device), lambda x: x[:1])
        alone = backend.call(op, args, kwargs)
        expand = lambda x: x.expand(3 * len(x), *x.shape[1:])  # noqa: E731
        for result, single in zip(
            flatten(backend.call(op, map_tensors(args, expand), map_tensors(kwargs, expand))),
            flatten(alone),
            strict=True,
        ):
            assert_same_bits(result, torch.cat([single] * 3), str(case))


@pytest.mark.parametrize("op, backend", pairs())
@pytest.mark.parametrize("batch", [2, 7])
def test_batch_does_not_matter(op, backend, batch):
    for case in small_cases(op, backend):
        args, kwargs = case.inputs(torch.float32, backend.device)
        first = map_tensors((args, kwargs), lambda x: x[:1])
        if not len(flatten(backend.call(op, *first))[0]):
            continue
        others = map_tensors((args, kwargs), lambda x: torch.cat([x[-1:].roll(1, -1)] * (batch - 1)))

        def joined(position, first=first, others=others):
            def join(a, b):
                if isinstance(a, torch.Tensor):
                    return torch.cat([b[:position], a, b[position:]])
                if isinstance(a, dict):
                    return {key: join(a[key], b[key]) for key in a}
                return type(a)(map(join, a, b)) if isinstance(a, (list, tuple)) else a

            return join(first, others)

        alone = flatten(backend.call(op, *first))
        for position in (0, batch - 1):
            for result, single in zip(flatten(backend.call(op, *joined(position))), alone, strict=True):
                assert_same_bits(result[position : position + 1], single, f"{case} at {position} of {batch}")


@pytest.mark.parametrize("op", sorted(OPS))
def test_images_side_by_side_on_threads(op):
    """Inputs large enough for a batch to be spread over threads give what one thread gives."""
    case = max(CASES[op], key=lambda case: sum(x.numel() for x in tensors_of(case.inputs())))
    args, kwargs = map_tensors(case.inputs(), lambda x: torch.cat([x[:1], x[:1].roll(1, -1)] * 3))
    threads, results = torch.get_num_threads(), {}
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results[count] = getattr(ops, op)(*args, **kwargs, backend="cpu")
    finally:
        torch.set_num_threads(threads)
    for count, result in results.items():
        assert_same_bits(result, results[1], f"{case} with {count} threads")


@pytest.mark.parametrize("op, backend", pairs(interpreted=False))
def test_repeats_threads_and_inputs(op, backend):
    """Same bits every time and with any number of threads; inputs are left alone; no result requires grad."""
    threads = torch.get_num_threads()
    for case in small_cases(op, backend):
        args, kwargs = case.inputs(torch.float32, backend.device)
        differentiable = map_tensors((args, kwargs), lambda x: x.clone().requires_grad_(x.is_floating_point()))
        expected = backend.call(op, args, kwargs)
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                result = backend.call(op, *differentiable)
                assert_same_bits(result, expected, f"{case} with {count} threads")
                assert not any(tensor.requires_grad for tensor in flatten(result))
        finally:
            torch.set_num_threads(threads)
        for left, right in zip(tensors_of(differentiable), tensors_of(case.inputs(torch.float32)), strict=True):
            assert_same_bits(left.detach(), right, f"inputs of {case}")


@pytest.mark.parametrize("op, backend", pairs(interpreted=False, emulate=False))  # one emulated launch at a time
def test_many_python_threads(op, backend):
    case = small_cases(op)[0]
    args, kwargs = case.inputs(torch.float32, backend.device)
    expected, failures = backend.call(op, args, kwargs), []

    def work():
        try:
            for _ in range(20):
                assert_same_bits(getattr(ops, op)(*args, **kwargs, backend=backend.name), expected)
        except BaseException as failure:
            failures.append(failure)

    workers = [threading.Thread(target=work) for _ in range(4)]
    with backend.active():
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert failures == []


@pytest.mark.parametrize("op", sorted(OPS))
def test_outputs_are_what_the_fake_says(op):
    """Shape, dtype and strides of every backend's outputs."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for case in small_cases(op)[::6]:
        args, kwargs = case.inputs(torch.bfloat16)
        with FakeTensorMode() as mode:
            promised = flatten(
                getattr(ops, op)(*map_tensors(args, mode.from_tensor), **map_tensors(kwargs, mode.from_tensor))
            )
        for backend in [*backends(op, interpreted=False), *emulated(op), Backend("reference", "cpu")]:
            given = case.inputs(torch.bfloat16, backend.device)
            for made, fake in zip(flatten(backend.call(op, *given)), promised, strict=True):
                assert (made.shape, made.dtype) == (fake.shape, fake.dtype), f"{case} {backend}"
                assert made.stride() == fake.stride() or not made.numel(), f"{case} {backend}"
