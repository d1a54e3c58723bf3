"""The CUDA kernels under emulation: no order of threads changes a bit, and the sanitizers find nothing."""

from __future__ import annotations

import re

import pytest
import torch

from emulated import Emulated, build, emulated, library
from hvprune import reference
from hvprune.testing import (
    CASES,
    DTYPES,
    NUMERIC_OPS,
    assert_no_worse_than_torch,
    assert_same_bits,
    expected,
    flatten,
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


@pytest.mark.sanitizer
@pytest.mark.skipif(not PAIRS, reason="no CUDA headers to emulate with")
@pytest.mark.parametrize("sanitize", ["address,undefined", "thread"])
def test_sanitizer_finds_nothing(sanitize):
    arguments = ["-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", __file__, "-k", "test_small_cases"]
    result = build.run_sanitized(arguments, sanitize, build.OPS)
    assert result.returncode == 0 and f"{len(PAIRS)} passed" in result.stdout, result.stdout + result.stderr
    assert "Sanitizer" not in result.stderr and "runtime error" not in result.stderr, result.stderr


@pytest.mark.sanitizer
@pytest.mark.skipif(not PAIRS, reason="no CUDA headers to emulate with")
@pytest.mark.parametrize("op", sorted(CASES))
def test_every_barrier_is_needed_and_its_loss_noticed(op):
    result = build.run_sanitized([str(build.HERE / "mutate.py"), op], "thread", build.OPS)
    assert result.returncode == 0, result.stdout + result.stderr


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


# Batches that are launched in another way than one image: with other tiles, more work per block, smaller clusters.
LARGE_BATCHES = [
    ("attention_importance", (normal(32, 16, 130, 4), normal(32, 16, 130, 4)), {}),
    ("cosine_similarity", (normal(64, 64, 40, dtype=torch.float16),), {}),
    ("diverse_select", (normal(17, 24, 24), normal(17, 24), 7), {}),
]


@pytest.mark.skipif(not PAIRS, reason="no CUDA headers to emulate with")
@pytest.mark.parametrize("capability", [90, 86, 80])
@pytest.mark.parametrize("op, args, kwargs", LARGE_BATCHES, ids=[row[0] for row in LARGE_BATCHES])
def test_large_batches_do_not_change_a_bit(op, args, kwargs, capability):
    backend = Emulated(compute_capability=capability)
    together = flatten(backend.call(op, args, kwargs))
    for image in (0, -1):
        one = map_tensors(args, lambda x, image=image: x[image : None if image else 1])
        alone = flatten(Emulated().call(op, one, kwargs))
        assert_same_bits([x[image : None if image else 1] for x in together], alone, f"image {image}")


@pytest.mark.skipif(not PAIRS, reason="no CUDA headers to emulate with")
@pytest.mark.parametrize("op, kernels, memsets", [("hivtp_select", 2, 1), ("vispruner_select", 2, 0)])
def test_launches_of_a_pipeline(op, kernels, memsets):
    """The nodes of its CUDA graph."""
    args, kwargs = small_cases(op)[0].inputs()
    before = library().num_kernels(), library().num_memsets()
    Emulated().call(op, args, kwargs)
    assert (library().num_kernels() - before[0], library().num_memsets() - before[1]) == (kernels, memsets)


TOO_LARGE = [
    (
        "aggregate_attention",
        ([torch.zeros(1, 1, 2, 2)] * 97,),
        {},
        "attentions must be at most 96 layers on a GPU, got 97",
    ),
    (
        "attention_importance",
        (torch.zeros(1, 1, 2, 257),) * 2,
        {},
        "queries must be at most 256 wide on a GPU, got 257",
    ),
    (
        "hierarchical_select",
        (torch.zeros(1, 50000), (200, 250)),
        {},
        "scores must be of few enough tokens for the 232320 bytes of shared memory of a block,"
        " got 50000 tokens, which need 262508",
    ),
    (
        "diverse_select",
        (torch.zeros(20000).expand(1, 20000, 20000), torch.zeros(1, 20000), 5),
        {},
        "similarity must be of few enough tokens for the 232320 bytes of shared memory of a block,"
        " got 20000 tokens, which need 305152",
    ),
]


@pytest.mark.skipif(not PAIRS, reason="no CUDA headers to emulate with")
@pytest.mark.parametrize("op, args, kwargs, message", TOO_LARGE, ids=[row[0] for row in TOO_LARGE])
def test_what_no_gpu_can_hold_is_refused(op, args, kwargs, message):
    with pytest.raises(ValueError, match="^" + re.escape(f"{op}: {message}") + "$"):
        Emulated().call(op, args, kwargs)
