"""Registers, shared memory, stack and spills of every kernel, read from the extension as it was built."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from hvprune import _native
from resource_table import record

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(not _native.C.cuda_archs, reason="hvprune._C was built without CUDA")


def cuobjdump() -> str:
    """The one on PATH, or that of Triton's package."""
    triton = find_spec("triton")
    packaged = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton else Path()
    return shutil.which("cuobjdump") or str(packaged)


@pytest.fixture(scope="module")
def usage() -> list[dict]:
    """One row per arch and kernel, also in build/kernel_resources.csv."""
    command = [cuobjdump(), "-res-usage", _native.C.__file__]
    dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = subprocess.run(["c++filt"], input=dump, capture_output=True, text=True, check=True).stdout
    rows, arch = [], None
    for line, following in zip(names.splitlines(), names.splitlines()[1:], strict=False):
        if found := re.match(r"arch = (\w+)", line):
            arch = found.group(1)
        if found := re.match(r"\s*Function (?:void )?(.*_kernel.*):$", line):
            numbers = dict(re.findall(r"(\w+):(\d+)", following))
            kernel = re.sub(r"\(anonymous namespace\)::|\b\w+::", "", found.group(1))
            kernel = re.sub(r"\([^()]*\)$", "", kernel)
            names = {"registers": "REG", "shared": "SHARED", "stack": "STACK", "local": "LOCAL"}
            usage = {column: int(numbers[name]) for column, name in names.items()}
            rows.append({"arch": arch, "kernel": kernel, **usage})
    record("cuda", rows)
    return rows


def test_every_kernel_is_there_for_every_arch(usage):
    sources = [path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu")]
    kernels = {name for text in sources for name in re.findall(r"__global__[^;{]*?(\w+_kernel)\(", text)}
    assert kernels
    for arch in _native.C.cuda_archs:
        found = {re.match(r"\w+", row["kernel"]).group() for row in usage if row["arch"] == f"sm_{arch}"}
        assert found == kernels


def test_no_stack_and_no_spills(usage):
    assert [row for row in usage if row["stack"] or row["local"]] == []


def test_a_block_of_1024_threads_fits(usage):
    registers_of_an_sm = 65536
    bounded = [row for row in usage if re.match("diverse_select|hierarchical_select", row["kernel"])]
    assert bounded and all(1024 * row["registers"] <= registers_of_an_sm for row in bounded)
