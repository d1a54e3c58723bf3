"""A few calls of every op, their results checked, with next to nothing of torch on the device: for compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/sanitized.py cuda triton

Without torch's cache every tensor is an allocation of its own, so that no overrun and no unwritten element hides in
another's memory. The backend cpu is for a test of this file.
"""

from __future__ import annotations

import sys
import time

import torch

from hvprune.testing import (
    CASES,
    NUMERIC_OPS,
    PIPELINES,
    Backend,
    assert_no_worse_than_torch,
    assert_same_bits,
    expected,
    flatten,
    oracle_and_torch,
)

SMALL_CASES = 6  # of an op, spread over its table


def cases(op: str) -> list[tuple]:
    """Small cases in both sizes of element, and the first, which has the size of a real encoder."""
    small = [case for case in CASES[op] if case.is_small()]
    chosen = small[:: max(1, len(small) // SMALL_CASES)]
    return [(case, dtype) for case in chosen for dtype in (torch.float16, torch.float32)] + [
        (CASES[op][0], torch.float16)
    ]


def run(backend: Backend) -> None:
    for op in CASES:
        for case, dtype in cases(op):
            begin = time.perf_counter()
            result = backend.call(op, *case.inputs(dtype, backend.device))
            if op in NUMERIC_OPS:
                assert_no_worse_than_torch(result, *oracle_and_torch(case, dtype), str(case))
            elif op in PIPELINES:
                [x.cpu() for x in flatten(result)]  # test_<op>.py compares; here its launches are watched
            else:
                assert_same_bits(result, expected(case, dtype), str(case))
            print(f"{time.perf_counter() - begin:7.2f} s  {backend} {op}: {case}, {dtype}", flush=True)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run(Backend(name, "cpu" if name == "cpu" else "cuda"))
