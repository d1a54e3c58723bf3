"""The emulation itself: correct kernels give the right values in every thread order, seeded bugs are found."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EMULATION = Path(__file__).resolve().parent / "emulation"
sys.path.insert(0, str(EMULATION))

import build  # noqa: E402

SCHEDULES = [("forward", 0), ("reversed", 0), ("random", 1), ("random", 2)]
pytestmark = pytest.mark.skipif(not build.available(), reason="the headers of the CUDA toolkit are missing")
FIBERS = "boost" if build.has_boost() else "ucontext"
GUARD = -77  # what outputs hold before the call


@pytest.fixture(scope="module", params=["boost", "ucontext"])
def library(request):
    if request.param == "boost" and not build.has_boost():
        pytest.skip("fibers on Boost.Context need libboost-context-dev; those on ucontext are tested")
    if "HVP_EMULATION_LIBRARY" in os.environ:  # a process of build.run_sanitized
        return build.load_default()
    return build.load(build.build(ucontext=request.param == "ucontext"))


@pytest.fixture(params=SCHEDULES, ids=lambda s: f"{s[0]}{s[1] or ''}")
def emulated(request, library):
    library.configure(order=request.param[0], seed=request.param[1])
    yield library
    library.configure()


def ints(*shape):
    return torch.full(shape, GUARD, dtype=torch.int32)


def call(function, *arguments):
    return function(*(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments))


def random_ints(high, *shape, seed=0):
    return torch.randint(high, shape, dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


def signed(bits):
    return bits - (1 << 32) if bits >> 31 else bits


def test_values_intrinsics(emulated):
    num_threads = 80  # the last warp is half full
    values = random_ints(8, num_threads)
    results = ints(16, num_threads)
    call(emulated.intrinsics, values, results, num_threads)
    for thread in range(num_threads):
        lane, base = thread % 32, thread // 32 * 32
        warp = values[base : base + 32].tolist()
        half = warp[:16] if lane < 16 else warp[16:]
        same = [i for i, v in enumerate(warp) if v == warp[lane]]

        expected = [
            warp[3],
            warp[lane // 8 * 8 + (lane + 1) % 8],
            warp[lane ^ 5],
            warp[lane - 3 if lane >= 3 else lane],
            warp[lane + 2 if lane % 16 + 2 < 16 else lane],
            signed(sum((v & 1) << i for i, v in enumerate(warp))),
            int(7 in half),
            int(max(half) < 7),
            signed(sum(1 << i for i in same)),
            sum(half),
            max(warp),
            min(warp),
            sum(1 << v for v in set(warp)),
            sum(same),
            warp[lane].bit_count() + 32 - warp[lane].bit_length() + (warp[lane] & -warp[lane]).bit_length(),
            warp[1],
        ]
        assert results[:, thread].tolist() == expected, f"thread {thread}"


def test_values_histogram(emulated):
    values = random_ints(8, 1000)
    counts, largest = torch.zeros(8, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    total, float_total = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    votes = ints(3)
    call(emulated.histogram, values, counts, total, float_total, largest, votes, len(values))
    assert torch.equal(counts, values.bincount(minlength=8).int())
    assert total.item() == values.sum().item() << 32
    assert float_total.item() == values.sum().item() / 2
    assert largest.item() == 7
    assert votes.tolist() == [(values[:96] > 3).sum().item(), 1, 0]


def test_values_ticket_sum(emulated):
    values = random_ints(100, 1000)
    partial, total = ints(32), ints(1)
    call(emulated.ticket_sum, values, partial, torch.zeros(1, dtype=torch.int32), total, len(values))
    assert total.item() == 2 * values.sum().item()


def test_values_remove_largest(emulated):
    n, num_rounds, per_round = 200, 6, 5
    scores = random_ints(20, num_rounds, n).float()
    kept, num_kept = ints(n), ints(1)
    call(emulated.remove_largest, scores, kept, num_kept, n, num_rounds, per_round)
    left = torch.arange(n)
    for row in scores:
        order = row[left].argsort(descending=True, stable=True)
        left = left[order[per_round:].sort().values]
    assert num_kept.item() == len(left)
    assert kept[: len(left)].tolist() == left.tolist()
    assert (kept[len(left) :] == GUARD).all()


@pytest.mark.parametrize("cluster", [1, 4, 8])
def test_values_cluster_compact(emulated, cluster):
    n = 64 * cluster - 5
    values = torch.rand(3, n, generator=torch.Generator().manual_seed(cluster))
    indices, counts = ints(3, n), ints(3)
    call(emulated.cluster_compact, values, indices, counts, 3, n, 0.5, cluster)
    for row in range(3):
        expected = (values[row] > 0.5).nonzero().flatten().tolist()
        assert indices[row].tolist() == expected + [GUARD] * (n - len(expected))
        assert counts[row] == len(expected)


@pytest.mark.parametrize("cluster", [1, 2, 8])
def test_values_cluster_topk(emulated, cluster):
    n, k = 64 * cluster - 5, 9
    values = torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(s)) for s in range(2)]).int()
    largest = ints(2, k)
    call(emulated.cluster_topk, values, largest, 2, n, k, cluster)
    assert largest.tolist() == [list(range(n - 1, n - 1 - k, -1))] * 2


@pytest.mark.parametrize("m, n, k", [(16, 8, 16), (24, 16, 40)])
@pytest.mark.parametrize(
    "dtype, b_is_kn",
    [
        (torch.float16, False),
        (torch.float16, True),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
        (torch.float32, False),  # ldmatrix, and so its transpose, moves 16-bit elements only
    ],
    ids=str,
)
def test_values_matmul(emulated, dtype, b_is_kn, m, n, k):
    a, b = ((random_ints(17, *shape, seed=s) / 8 - 1).to(dtype) for s, shape in enumerate([(m, k), (n, k)]))
    c = torch.full((m, n), float("nan"))
    operand = [torch.float16, torch.bfloat16, torch.float32].index(dtype)
    call(emulated.matmul, a, b.T.contiguous() if b_is_kn else b, c, m, n, k, operand, b_is_kn)
    assert torch.equal(c, a.float() @ b.float().T)  # sums of multiples of 1/64: exact


def test_tf32_operands_are_rounded(library):
    a, b, c = torch.zeros(16, 8), torch.zeros(8, 8), torch.zeros(16, 8)
    a[0, 0], b[0, 0] = 1 + 2**-11, 1 - 2**-13  # ties go away from zero; the second is nearest to 1
    call(library.matmul, a, b, c, 16, 8, 8, 2, False)
    assert c[0, 0] == 1 + 2**-10


@pytest.mark.skipif(not build.has_boost(), reason="fibers on Boost.Context need libboost-context-dev")
def test_both_kinds_of_fibers_are_tested():
    modules = [build.load(build.build(ucontext=ucontext)) for ucontext in (False, True)]
    assert [m.fibers for m in modules] == ["boost", "ucontext"]


def run_bug(library, name):
    out = ints(256)
    call(library.bug, torch.arange(256, dtype=torch.int32), out, library.Bug.__members__[name])
    return out


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "divergent_barrier",
            r"deadlock\n(.*\n)*.*block \(1,0,0\): threads 0-99 wait at __syncthreads \(line \d+\)\n"
            r".*block \(1,0,0\): threads 251-255 wait at cluster_sync \(line \d+\)",
        ),
        ("lane_not_in_mask", r"__shfl_sync at line \d+: the calling lane is not in its own mask .*thread \(16,0,0\)"),
        ("ended_lane_in_mask", r"the mask names a lane that has ended"),
        ("mixed_functions", r"__shfl_sync at line \d+ meets __any_sync of other threads"),
        ("block_ends_early", r"shared memory of a block that has ended"),
        ("unknown_rank", r"rank is not in the cluster"),
        ("missing_programmatic_wait", r"never called programmatic_wait"),
        ("too_many_threads", r"^bug: cudaErrorInvalidConfiguration: .+ \(.*selftest_bugs\.cu:\d+\)$"),
    ],
)
def test_bug_is_an_error(library, name, message):
    with pytest.raises(RuntimeError, match=message):
        run_bug(library, name)
    assert (run_bug(library, "none") == 0).all()  # the next launch is not affected


def test_clusters_need_compute_capability_90(library):
    library.configure(compute_capability=80)
    try:
        with pytest.raises(RuntimeError, match="bug: cudaErrorNotSupported"):
            run_bug(library, "none")
    finally:
        library.configure()


def test_missing_barrier_shows_in_some_order(library):
    expected = torch.arange(255, -1, -1, dtype=torch.int32)
    right = []
    for order, seed in SCHEDULES:
        library.configure(order=order, seed=seed)
        right.append(torch.equal(run_bug(library, "missing_syncthreads"), expected))
    library.configure()
    assert not any(right)


def test_uninitialised_shared_memory_holds_the_fill(library):
    for fill, value in ((0x55, 0x55555555), (0x00, 0)):
        library.configure(fill=fill)
        assert run_bug(library, "uninitialised_shared")[0] == value
    library.configure()


def test_copy_lands_only_at_the_wait(library):
    assert (run_bug(library, "missing_copy_wait") == signed(0xEEEEEEEE)).all()


BUG = """
import sys; sys.path.insert(0, {path!r})
from array import array
import build
library = build.load_default()
values, out = array("i", range(256)), array("i", [0] * 256)
library.bug(values.buffer_info()[0], out.buffer_info()[0], library.Bug.{bug})
"""


@pytest.mark.sanitizer
@pytest.mark.parametrize(
    "bug, sanitize, report",
    [
        ("none", "thread", None),
        ("missing_syncthreads", "thread", "ThreadSanitizer: data race"),
        ("missing_syncwarp", "thread", "ThreadSanitizer: data race"),
        ("race_between_blocks", "thread", "ThreadSanitizer: data race"),
        ("missing_exchange_wait", "thread", "ThreadSanitizer: data race"),
        ("late_programmatic_wait", "thread", "ThreadSanitizer: data race"),
        ("none", "address,undefined", None),
        ("shared_out_of_bounds", "address,undefined", "AddressSanitizer: heap-buffer-overflow"),
    ],
)
def test_sanitizer_finds(bug, sanitize, report):
    script = BUG.format(path=str(EMULATION), bug=bug)
    result = build.run_sanitized(["-c", script], sanitize)
    if report is None:
        # ASan warns of ucontext itself, which fibers use where Boost.Context is not installed.
        lines = [line for line in result.stderr.splitlines() if "makecontext/swapcontext" not in line]
        assert result.returncode == 0 and not lines, result.stderr
    else:
        assert result.returncode != 0
        assert report in result.stderr and "selftest_bugs.cu:" in result.stderr, result.stderr


@pytest.mark.sanitizer
@pytest.mark.parametrize("sanitize", ["address,undefined", "thread"])
def test_sanitizer_finds_nothing_in_correct_kernels(sanitize):
    selection = f"test_values and {FIBERS} and (forward or random1)"
    arguments = ["-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", __file__, "-k", selection]
    result = build.run_sanitized(arguments, sanitize)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout + result.stderr
    assert "Sanitizer" not in result.stderr and "runtime error" not in result.stderr, result.stderr


MUTATION = """
import sys; sys.path.insert(0, {path!r})
from array import array
from pathlib import Path
import build, mutate
library, values = build.load_default(), array("f", [i % 7 / 7 for i in range(250)])

def work(left_out):
    library.configure(left_out_file=left_out[0], left_out_line=left_out[1])
    indices, counts = array("i", [0] * len(values)), array("i", [0])
    addresses = (a.buffer_info()[0] for a in (values, indices, counts))
    library.cluster_compact(*addresses, 1, len(values), 0.5, 4)
    return indices, counts

for barrier, verdict in mutate.verdicts(work, mutate.barriers([Path({path!r}) / "selftest.cu"])).items():
    print(barrier.text.partition("  // ")[2], verdict, sep=": ")
"""


@pytest.mark.sanitizer
def test_mutation_tells_needed_barriers_from_redundant_ones():
    result = build.run_sanitized(["-c", MUTATION.format(path=str(EMULATION))], "thread")
    assert result.returncode == 0, result.stderr
    assert "every block's total and s_indices are written: race" in result.stdout
    assert "s_partial may be used again: unnoticed" in result.stdout  # this kernel scans only once


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
@pytest.mark.parametrize("source", [s.name for s in build.SELFTEST if s.suffix == ".cu"])
def test_nvcc_compiles_the_same_source(source, tmp_path):
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90, 100)]
    flags = ["-std=c++17", "-Werror=all-warnings", *targets, *(f"-I{i}" for i in build.INCLUDES)]
    command = ["nvcc", *flags, "-c", str(EMULATION / source), "-o", str(tmp_path / "object.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
