"""Runs the cases of every bench file under pytest-benchmark.

Each rival of a case is verified, then timed in TURNS turns, rivals taking turns, so that a slow phase of the machine
hits them all. With --benchmark-disable the batch-1 cases are verified and nothing is timed.
"""

from __future__ import annotations

from functools import lru_cache

import pytest

from ._harness import Results, peak_extra_mb, rival_names

TURNS = 3

results = Results()


def pytest_addoption(parser):
    parser.addoption("--csv", action="store_true", help="write benchmarks/results/cpu/micro.csv")


def pytest_generate_tests(metafunc):
    verify_only = metafunc.config.getoption("benchmark_disable")
    turns = range(1 if verify_only else TURNS)
    cases = [case for case in metafunc.module.CASES if case.batch == 1 or not verify_only]
    rows = [(case, rival, turn) for case in cases for turn in turns for rival in rival_names(case)]
    metafunc.parametrize(("case", "rival", "turn"), rows, ids=["-".join(map(str, row)) for row in rows])


@lru_cache(maxsize=1)  # the rivals of a case share inputs and oracle, and large inputs do not pile up
def solve(make_rivals, case):
    return make_rivals(case)


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    if config.getoption("--csv"):
        verdict = "no CSV: not every benchmark passed" if exitstatus else f"written: {results.write()}"
        terminalreporter.write_line(f"\n{verdict}")


@pytest.fixture
def measure(benchmark, request, case, rival, turn):
    """Verifies one rival of one case and times one turn of it."""

    def run():
        contender = solve(request.module.rivals, case)[rival]
        if turn == 0:
            contender.verify(contender.call())
            if case in getattr(request.module, "MEMORY_CASES", ()):
                results.peaks[case, rival] = peak_extra_mb(contender.call)
        benchmark.group = str(case)
        benchmark(contender.call)
        if benchmark.enabled:
            results.samples.setdefault((case, rival), []).extend(benchmark.stats.stats.data)

    return run
