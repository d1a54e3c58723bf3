"""The least time that a row could take on this machine: what it has to do over what the machine can do, measured.

    floor = launch + max(bytes / copy bandwidth, flops / matrix product rate, exps / exponential rate)

All four rates come from the same run as the row. On a CPU small copies stay in its caches, as the inputs of small
rows do, so a row is held against the copy nearest in size; and no exponential rate is measured there, since torch's
own exponential is not the fastest that the processor can do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from hvprune._registry import why_unavailable

from ._timing import Cpu, Gpu, device_samples, wall_samples


class Work(NamedTuple):
    """What any implementation has to do at least: every input read once, every output written once.

    What it takes to measure it only decides whether a case fits in memory: besides inputs and results, ``held`` bytes
    for the case and ``held_by_baselines`` for those of its rivals that are no ops.
    """

    bytes: int
    flops: int = 0
    exps: int = 0
    held: int = 0
    held_by_baselines: int = 0


def selection_bytes(batch: int, width: int, num_tokens: int) -> int:
    """Of a Selection: (B, M) int64 indices, (B,) int32 counts, (B, N) bool mask."""
    return batch * (8 * width + 4 + num_tokens)


class Ceilings(NamedTuple):
    """What the machine does at best."""

    launch: float  # seconds of the least call: a fill of one element
    copy: dict[int, float]  # bytes moved (read and written) -> bytes per second
    matmul: dict[torch.dtype, float]  # FLOP per second
    exp: float | None  # exponentials per second, None if they are no part of the floor

    def copy_rate(self, size: int) -> float:
        return self.copy[min(self.copy, key=lambda moved: max(moved, size) / max(min(moved, size), 1))]

    def matmul_rate(self, dtype: torch.dtype) -> float:
        return self.matmul[dtype]

    def floor(self, work: Work, dtype: torch.dtype) -> float:
        """Seconds."""
        limits = [work.bytes / self.copy_rate(work.bytes), work.flops / self.matmul_rate(dtype)]
        if self.exp is not None:
            limits.append(work.exps / self.exp)
        return self.launch + max(limits)


def measure(machine: Cpu | Gpu, dtypes: Iterable[torch.dtype], budget: float) -> Ceilings:
    gpu = machine.type == "cuda"
    device = machine.device if gpu else torch.device("cpu")

    def seconds(call: Callable[[], Any]) -> float:
        """The best of many, timed as the rows are."""
        if not gpu:
            return min(wall_samples(call, machine, budget))
        call()
        replay, _ = machine.capture(call)
        return min(device_samples([replay], machine, budget))

    def copy_rate(moved: int) -> float:
        source, target = torch.ones(2, moved // 2, dtype=torch.uint8, device=device)
        return moved / seconds(lambda: target.copy_(source))

    def matmul_rate(dtype: torch.dtype) -> float:
        side = 8192 if gpu else 1024
        a, b, out = torch.randn(3, side, side, device=device).to(dtype)
        return 2 * side**3 / seconds(lambda: torch.mm(a, b, out=out))

    one = torch.zeros(1, device=device)
    rates = {dtype: matmul_rate(dtype) for dtype in dtypes}
    if not gpu:  # a CPU may be slower in half precision than kernels that widen to float32
        rates = {dtype: max(rate, rates.get(torch.float32, 0.0)) for dtype, rate in rates.items()}
    exp = None
    if gpu and why_unavailable("triton") is None:
        from ._exp_kernel import EXPS, exponentiate

        exp = EXPS / seconds(lambda: exponentiate(one))
    sizes = (1 << 31,) if gpu else (1 << 16, 1 << 20, 1 << 24, 1 << 28)
    launch = seconds(lambda: one.fill_(0.0))
    return Ceilings(launch, {size: copy_rate(size) for size in sizes}, rates, exp)
