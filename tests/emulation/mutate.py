"""Leaves out the barriers of the kernels, one at a time, and shows which losses are noticed.

    python tests/emulation/mutate.py                              every barrier of csrc/cuda
    python tests/emulation/mutate.py gather_tokens vispruner_select

The kernels are built once, with TSan; the emulation skips the barrier on a given line. A process per barrier and op
runs the op's small cases, and inputs that reach what these do not, and compares their bits with
those of the unchanged kernels. Exit status: the number of barriers that no op misses and ``KEPT`` does not explain.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import build  # noqa: E402

BARRIER = re.compile(
    r"\b(?:__syncthreads(?:_\w+)?|__syncwarp|cluster_sync|exchange_wait|programmatic_wait|__threadfence(?:_block)?"
    r"|cp_async_wait<[^;>]*>)\("
)
WRAPPERS = ("device.cuh", "mma.cuh")  # they define barriers and wait at none
RACE = 66  # TSan's exit status
# Barriers that no op misses, by file and statement with its comment, and why they stay.
KEPT: dict[tuple[str, str], str] = {}


class Barrier(NamedTuple):
    file: Path
    line: int
    text: str  # the whole line


def barriers(files: Iterable[Path]) -> list[Barrier]:
    return [
        Barrier(file, number, line.strip())
        for file in files
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if BARRIER.search(line.split("//")[0])
    ]


def barriers_of(op: str) -> list[Barrier]:
    """Those of the op's kernels and of the headers they include; of a pipeline, those between its kernels."""
    stages = {"hivtp_select": "hierarchical_select", "vispruner_select": "diverse_select"}
    files = [path for path in build.KERNELS if path.stem.startswith(stages.get(op, op))]
    for path in files:
        for name in re.findall(r'#include "(\w+\.cuh)"', path.read_text()):
            header = path.parent / name
            if header not in files and name not in WRAPPERS:
                files.append(header)
    return [barrier for barrier in barriers(files) if ("programmatic_wait" in barrier.text) == (op in stages)]


def verdicts(work: Callable[[tuple[str, int]], object], candidates: Iterable[Barrier]) -> dict[Barrier, str]:
    """How the loss of each barrier shows in ``work((file, line) of the barrier to leave out)``.

    "race", "error" of the emulation, "wrong" for another result, or "unnoticed". In a process of build.run_sanitized
    with "thread".
    """
    with tempfile.TemporaryDirectory() as folder:
        expected = Path(folder) / "expected"

        def verdict(left_out: tuple[str, int]) -> str:
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    if left_out[1]:
                        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the reports
                    result = repr(work(left_out)).encode()
                    if not left_out[1]:
                        expected.write_bytes(result)
                    status = 0 if result == expected.read_bytes() else 2
                except RuntimeError:
                    status = 3
                finally:
                    os._exit(status)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            names = {0: "unnoticed", 2: "wrong", 3: "error", RACE: "race"}
            if status not in names:
                raise RuntimeError(f"mutate: a process without {left_out} ended with status {status}")
            return names[status]

        unchanged = verdict(("", 0))
        if unchanged != "unnoticed":
            raise RuntimeError(f"mutate: {unchanged} with every barrier in place")
        return {barrier: verdict((str(barrier.file), barrier.line)) for barrier in candidates}


def work_of(op: str) -> Callable[[tuple[str, int]], object]:
    """Runs the op's small cases, and inputs for the paths that these do not take."""
    import torch

    from emulated import Emulated, emulated
    from hvprune.testing import CASES, flatten

    def normal(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))

    calls = [
        (backend.compute_capability, *case.inputs(torch.float32))
        for case in CASES[op]
        if case.is_small()
        for backend in emulated(op)
    ]
    if op == "attention_importance":
        wide = normal(2, 1, 2, 70, 128)
        logsumexp = (wide[0] @ wide[1].mT * 128**-0.5).logsumexp(-1)
        calls = [
            (86, tuple(wide), {}),  # keys in two panels
            (86, tuple(wide), {"logsumexp": logsumexp}),
            *calls[::2],
            (90, tuple(normal(2, 1, 512, 129, 1)), {"logsumexp": torch.zeros(1, 512, 129)}),  # two units; takes longest
        ]
    if op == "cosine_similarity":
        faint = normal(1, 40, 300)
        faint[0, ::7] *= 1e-25  # a second run of the tiles
        calls += [(90, (faint.to(dtype),), {}) for dtype in (torch.float32, torch.bfloat16)]

    def work(left_out: tuple[str, int]) -> list[bytes]:
        results = []
        for capability, args, kwargs in calls:
            # Reversed: the block that others read ends first. TSan needs no particular order.
            results += flatten(Emulated("reversed", 0, capability, left_out).call(op, args, kwargs))
        return [x.contiguous().view(torch.uint8).numpy().tobytes() for x in results if x.numel()]

    return work


def main(ops: list[str]) -> int:
    if "HVP_EMULATION_LIBRARY" not in os.environ:
        result = build.run_sanitized([__file__, *ops], "thread", build.OPS)
        print(result.stdout, result.stderr, sep="", end="")
        return result.returncode

    from hvprune.testing import CASES

    found: dict[Barrier, dict[str, str]] = {}
    for op in ops or sorted(CASES):
        for barrier, verdict in verdicts(work_of(op), barriers_of(op)).items():
            found.setdefault(barrier, {})[op] = verdict
    unexplained = 0
    for barrier, by_op in found.items():
        noticed = ", ".join(f"{verdict} ({op})" for op, verdict in by_op.items() if verdict != "unnoticed")
        reason = KEPT.get((barrier.file.name, barrier.text))
        unexplained += not noticed and reason is None
        place = f"{barrier.file.name}:{barrier.line}"
        print(f"{place}: {barrier.text}  -> {noticed or f'kept: {reason}' if reason else noticed or 'UNNOTICED'}")
    return unexplained


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", help="all of them by default")
    sys.exit(main(parser.parse_args().ops))
