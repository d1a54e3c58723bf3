"""What is measured and how it is kept: rivals that verify their result, the environment, the CSV."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hvprune import ops
from hvprune._registry import BACKENDS, OPS

from ._results import ENVIRONMENT, environment, results_path, write_csv
from .shapes import Case

COLUMNS = (
    "op", "setting", "shape", "batch", "dtype", "rival", "median_us", "p20_us", "p80_us", "peak_extra_mb", *ENVIRONMENT
)  # fmt: skip


class Rival(NamedTuple):
    """One way to solve a case. ``verify`` raises AssertionError if what ``call`` returned is wrong."""

    call: Callable[[], Any]
    verify: Callable[[Any], None]


def backends(case: Case) -> list[str]:
    """The backends of hvprune that can run the case here; the reference is the oracle, not a rival."""
    op = OPS[case.op]
    return [b for b in BACKENDS if b != "reference" and op.why_unavailable(b, case.device) is None]


def rival_names(case: Case) -> list[str]:
    return [f"hvprune {backend}" for backend in backends(case)] + list(case.baselines)


def hvprune_rivals(case: Case, *args, verify: Callable[[Any], None], **kwargs) -> dict[str, Rival]:
    """The op of the case on each backend."""
    function = getattr(ops, case.op)
    return {f"hvprune {b}": Rival(partial(function, *args, backend=b, **kwargs), verify) for b in backends(case)}


def equal_to(expected: Any) -> Callable[[Any], None]:
    """Bitwise equality of a tensor or of every tensor of a sequence."""

    def verify(actual):
        pair = ([actual], [expected]) if isinstance(expected, torch.Tensor) else (actual, expected)
        for got, want in zip(*pair, strict=True):
            assert torch.equal(got, want), f"differs from the reference: {got} is not {want}"

    return verify


def equal_in_float64(function: Callable, expected: Any, *inputs) -> Callable[[Any], None]:
    """A baseline's choices in float64: in float32 its own rounding may flip one, and the dedup amplifies that."""

    def verify(_):
        equal_to(expected)(function(*as_float64(inputs)))

    return verify


def as_float64(inputs: Iterable) -> list:
    """The floating-point tensors of a sequence, nested or not, in float64; anything else unchanged."""

    def widen(value):
        if isinstance(value, list):
            return as_float64(value)
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return [widen(value) for value in inputs]


def no_worse_than_torch(oracle: torch.Tensor, same_dtype: torch.Tensor) -> Callable[[Any], None]:
    """Error against the float64 oracle at most twice that of PyTorch in the same dtype, plus one rounding."""
    torch_error = (same_dtype.double() - oracle).abs().max().item()

    def verify(actual):
        error = (actual.double() - oracle).abs().max().item()
        limit = 2 * torch_error + torch.finfo(actual.dtype).eps * oracle.abs().max().item()
        assert error <= limit, f"error {error:.3g} is above {limit:.3g}; PyTorch's own is {torch_error:.3g}"

    return verify


def peak_extra_mb(call: Callable[[], Any]) -> float:
    """Resident memory (MB) that a call adds at its highest point, native allocations and outputs included.

    The first call starts threads and loads code; freed pages then go back to the kernel, so that whatever the
    second call touches counts again. Linux and glibc; the kernel counts to within about 0.3 MB.
    """

    def resident(field: str) -> float:
        return int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6

    call()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


class Results:
    """Samples of one run, in seconds per call, and peak memory; one CSV row per case and rival."""

    def __init__(self):
        self.samples: dict[tuple[Case, str], list[float]] = {}
        self.peaks: dict[tuple[Case, str], float] = {}

    def rows(self) -> list[dict[str, str]]:
        return [self._row(case, rival) for case, rival in self.samples]

    def _row(self, case: Case, rival: str) -> dict[str, str]:
        samples = torch.tensor(self.samples[case, rival], dtype=torch.float64) * 1e6
        p20, median, p80 = samples.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
        peak = self.peaks.get((case, rival))
        return {
            "op": case.op, "setting": case.setting, "shape": case.shape.name, "batch": str(case.batch),
            "dtype": case.dtype_name, "rival": rival,
            "median_us": f"{median:.4g}", "p20_us": f"{p20:.4g}", "p80_us": f"{p80:.4g}",
            "peak_extra_mb": "" if peak is None else f"{peak:.3g}",
        }  # fmt: skip

    def write(self) -> Path:
        """Overwrites the file of this device."""
        facts, path = environment(), results_path("micro", "cpu")
        write_csv(path, COLUMNS, (row | facts for row in self.rows()))
        return path
