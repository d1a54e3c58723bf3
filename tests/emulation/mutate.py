"""Deletes the barriers of a .cu file one at a time and shows which deletions the tests notice.

    python tests/emulation/mutate.py csrc/cuda/<op>.cu -- tests/test_cuda_emulated.py -k "small and <op>"

runs pytest under TSan once per barrier. A barrier whose loss goes unnoticed is either redundant or not tested.
Exit status: the number of barriers nobody missed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import build

BARRIER = re.compile(
    r"\b(?:hvp::)?(__syncthreads|__syncwarp|cluster_sync|exchange_wait|programmatic_wait|__threadfence(_block)?"
    r"|cp_async_wait<\w+>)\([^;]*\);"
)


def mutants(source: Path) -> Iterator[tuple[int, str, str]]:
    """(line, deleted statement, text of the mutant) of each barrier; lines keep their numbers."""
    text = source.read_text()
    for match in BARRIER.finditer(text):
        blank = "{}" + re.sub(r"[^\n]", " ", match.group())[2:]
        yield (
            text.count("\n", 0, match.start()) + 1,
            match.group(),
            f'#line 1 "{source}"\n' + text[: match.start()] + blank + text[match.end() :],
        )


def verdict(source: Path, mutant: str, pytest_arguments: Sequence[str]) -> str:
    """ "race", "deadlock", "wrong" (a test fails without either) or "unnoticed"."""
    build.CACHE.mkdir(parents=True, exist_ok=True)
    path = build.CACHE / f"mutant_{source.name}"
    path.write_text(mutant)
    sources = build.OPS if source in build.OPS else build.SELFTEST
    result = build.run_sanitized(
        ["-m", "pytest", "-x", "-q", "-s", "-p", "no:cacheprovider", *pytest_arguments],
        "thread",
        [path if s == source else s for s in sources],
    )
    path.unlink()
    output = result.stdout + result.stderr
    if "ThreadSanitizer: data race" in output:
        return "race"
    if "emulation: deadlock" in output:
        return "deadlock"
    if result.returncode == 0:
        return "unnoticed"
    if " failed" in output:
        return "wrong"
    raise RuntimeError(f"mutate: pytest did not run the tests of {source}\n{output}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--lines", type=int, nargs="+", help="only the barriers on these lines")
    parser.add_argument("pytest_arguments", nargs="+", metavar="-- pytest arguments")
    arguments = parser.parse_args()
    source = arguments.source.resolve()
    unnoticed = 0
    for line, statement, mutant in mutants(source):
        if arguments.lines and line not in arguments.lines:
            continue
        found = verdict(source, mutant, arguments.pytest_arguments)
        unnoticed += found == "unnoticed"
        print(f"{source.name}:{line}: {statement} {found}", flush=True)
    return unnoticed


if __name__ == "__main__":
    sys.exit(main())
