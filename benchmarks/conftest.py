"""Runs the cases of every bench file under pytest-benchmark: ``hvprune bench`` without its CSV and its device times.

Each rival of a case is verified before it is timed. With --benchmark-disable one image of the encoders is verified in
every dtype, and nothing is timed.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from ._harness import plan, rival_names
from .shapes import GRID64

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc):
    cases = plan(metafunc.module, DEVICE)
    if metafunc.config.getoption("benchmark_disable"):
        cases = [case for case in cases if case.batch == 1 and case.shape is not GRID64]
    rows = [(case, rival) for case in cases for rival in rival_names(case)]
    metafunc.parametrize(("case", "rival"), rows, ids=["-".join(map(str, row)) for row in rows])


@lru_cache(maxsize=1)  # the rivals of a case share inputs and oracle, and large inputs do not pile up
def solve(make_rivals, case):
    return make_rivals(case)


@pytest.fixture
def measure(benchmark, request, case, rival):
    """Verifies and times one rival of one case."""

    def run():
        contender = solve(request.module.rivals, case)[rival]
        if contender.optional:
            pytest.importorskip("flash_colreduce")
        contender.check()
        benchmark.group = str(case)
        benchmark(wait_for, contender.call, contender.inputs)

    return run


def wait_for(call, inputs):
    result = call(*inputs)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return result
