"""The CUDA kernels under emulation: no order of threads changes a bit, and the sanitizers find nothing."""

from __future__ import annotations

import pytest
import torch

from emulated import Emulated, build, emulated
from hvprune import reference
from hvprune.testing import (
    CASES,
    DTYPES,
    NUMERIC_OPS,
    assert_no_worse_than_torch,
    assert_same_bits,
    expected,
    map_tensors,
    oracle_and_torch,
)

SMALL = 4096  # elements of the largest input
PAIRS = [
    pytest.param(op, backend.compute_capability, id=f"{op}-sm_{backend.compute_capability}")
    for op in sorted(CASES)
    for backend in emulated(op)
]


def small_cases(op: str) -> list:
    def largest(case) -> int:
        sizes = [0]
        map_tensors(case.inputs(), lambda x: sizes.append(x.numel()))
        return max(sizes)

    return [case for case in CASES[op] if largest(case) <= SMALL]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op, capability", PAIRS)
def test_equals_reference(op, capability, dtype):
    """Small cases in every dtype, and in float16 the first, which has the size of a real encoder."""
    backend = Emulated(compute_capability=capability)
    real = CASES[op][:1] if dtype == torch.float16 else []
    for case in [*real, *small_cases(op)]:
        args, kwargs = case.inputs(dtype)
        result = backend.call(op, args, kwargs)
        if op in NUMERIC_OPS:
            assert_no_worse_than_torch(result, *oracle_and_torch(case, dtype), str(case))
        elif op == "hivtp_select":
            importance_kwargs = {key: kwargs[key] for key in ("num_prefix_tokens", "scale") if key in kwargs}
            importance = backend.call("attention_importance", args, importance_kwargs)
            select_kwargs = {key: value for key, value in kwargs.items() if key not in (*importance_kwargs, "grid")}
            args = importance, kwargs.get("grid")
            assert_same_bits(result, reference.hierarchical_select(*args, **select_kwargs), str(case))
        elif op == "vispruner_select":
            similarity = backend.call("cosine_similarity", args[:1], {})
            assert_same_bits(result, reference.diverse_select(similarity, *args[1:], **kwargs), str(case))
        else:
            assert_same_bits(result, expected(case, dtype), str(case))


@pytest.mark.parametrize("op, capability", PAIRS)
@pytest.mark.parametrize("order, seed", [("reversed", 0), ("random", 1), ("random", 2)])
def test_order_of_threads_does_not_matter(op, capability, order, seed):
    for case in small_cases(op):
        args, kwargs = case.inputs(torch.float16)
        forward = Emulated(compute_capability=capability).call(op, args, kwargs)
        other = Emulated(order, seed, capability).call(op, args, kwargs)
        assert_same_bits(other, forward, f"{case}, {order} {seed}")


@pytest.mark.parametrize("op, capability", PAIRS)
def test_small_cases_in_random_order(op, capability):
    for case in small_cases(op):
        args, kwargs = case.inputs(torch.float32)
        result = Emulated("random", 3, capability).call(op, args, kwargs)
        if op in NUMERIC_OPS:
            assert_no_worse_than_torch(result, *oracle_and_torch(case, torch.float32), str(case))
        elif op in ("hivtp_select", "vispruner_select"):
            pass  # their two kernels are watched; test_<op>.py compares with the ops they are made of
        else:
            assert_same_bits(result, expected(case, torch.float32), str(case))


@pytest.mark.skipif(not PAIRS, reason="no CUDA headers to emulate with")
@pytest.mark.parametrize("sanitize", ["address,undefined", "thread"])
def test_sanitizer_finds_nothing(sanitize):
    arguments = ["-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", __file__, "-k", "test_small_cases"]
    result = build.run_sanitized(arguments, sanitize, build.OPS)
    assert result.returncode == 0 and f"{len(PAIRS)} passed" in result.stdout, result.stdout + result.stderr
    assert "Sanitizer" not in result.stderr and "runtime error" not in result.stderr, result.stderr
