"""The backend of the tests that runs the CUDA kernels on a CPU: hvprune's own glue, launching tests/emulation.

It is there wherever the CUDA toolkit's headers are; nothing of it needs a GPU.
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hvprune import _native, ops, testing
from hvprune._registry import OPS

sys.path.insert(0, str(Path(__file__).resolve().parent / "emulation"))

import build


@cache
def library():
    """The emulated kernels; in a process of build.run_sanitized, its sanitized build of them."""
    return build.load_default(build.OPS)


@dataclass(frozen=True)
class Emulated:
    """Like hvprune.testing.Backend: an order of threads and blocks, and the compute capability of the device."""

    order: str = "forward"
    seed: int = 0
    compute_capability: int = 90
    left_out: tuple[str, int] = ("", 0)  # file and line of a barrier, for emulation/mutate.py

    name = "emulated"
    device = "cpu"
    interpreted = False
    _lock = threading.RLock()  # one launch at a time

    def __str__(self) -> str:
        return f"emulated-{self.order}{self.seed or ''}-sm_{self.compute_capability}"

    def call(self, op: str, args: tuple, kwargs: dict):
        with self.active():
            return getattr(ops, op)(*args, **kwargs, backend="cpu")

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """CPU tensors take the functions of the cuda backend, and these launch the emulated kernels."""
        cpu = "cpu", "cpu"
        with self._lock:
            before = _native.launch, {op: op._chosen.get(cpu) for op in OPS.values()}
            library().configure(
                order=self.order,
                seed=self.seed,
                compute_capability=self.compute_capability,
                left_out_file=self.left_out[0],
                left_out_line=self.left_out[1],
            )
            _native.launch = _launch
            for op in OPS.values():
                op._chosen[cpu] = op.backends.get("cuda")
            try:
                yield
            finally:
                _native.launch = before[0]
                for op, chosen in before[1].items():
                    op._chosen[cpu] = chosen


def _launch(op: str, *args) -> None:
    stream = 0
    getattr(library(), op)(*args, stream)


def emulated(op: str) -> list[Emulated]:
    """The op on a device with thread block clusters, and on one without if its kernels tell them apart."""
    if not build.available() or "cuda" not in OPS[op].backends:
        return []
    sources = [path.read_text() for path in build.KERNELS if path.stem.startswith(op)]
    devices = [90, 80] if any(re.search("compute_capability|max_shared_bytes", text) for text in sources) else [90]
    return [Emulated(compute_capability=device) for device in devices]


def backends(op: str) -> list:
    """hvprune.testing.backends and the emulated ones."""
    return [*testing.backends(op), *emulated(op)]
