"""The probes of benchmarks/probes compile, and the instructions that they time are in the machine code."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from test_cuda_resources import cuobjdump  # isort: skip

SOURCE = Path(__file__).parent.parent / "benchmarks" / "probes" / "probes.cu"
BARRIER, ARRIVE, FENCE, ASYNC_STORE, WAIT = "BAR.SYNC", "UCGABAR_ARV", "MEMBAR.ALL.GPU", "STAS", "SYNCS.PHASECHK"
# Kernel; instructions between its two clock reads, and how many at least; instructions that must not be there.
TIMED = [
    ("exchange_kernel<.*0>", {BARRIER: 1}, [ARRIVE, FENCE, ASYNC_STORE]),
    ("exchange_kernel<.*1>", {ARRIVE: 1, "UCGABAR_WAIT": 1}, [FENCE, ASYNC_STORE]),
    ("exchange_kernel<.*2>", {ARRIVE: 1, FENCE: 1}, [ASYNC_STORE]),
    ("exchange_kernel<.*3>", {ASYNC_STORE: 1, WAIT: 1}, [ARRIVE, FENCE]),
    ("rate_kernel<.*Exp2>", {"MUFU.EX2": 128}, ["MUFU.EX2.F16"]),
    ("rate_kernel<.*Exp2Half>", {"MUFU.EX2.F16": 256}, []),
    ("rate_kernel<.*Fma>", {"FFMA": 128}, []),
    ("rate_kernel<.*Max>", {"FMNMX": 128}, []),
    ("rate_kernel<.*MaxHalf>", {"HMNMX2": 128}, []),
    ("rate_kernel<.*MaxOfWarp>", {"REDUX.MAX": 128}, []),
    ("l2_kernel", {"LDG.E.128.STRONG.GPU": 8}, []),  # past L1
]


@pytest.fixture(scope="module")
def functions(tmp_path_factory) -> dict[str, list[str]]:
    """Instructions of every kernel, in order, by its demangled name."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    program = tmp_path_factory.mktemp("probes") / "probes"
    options = ["-std=c++17", "-O3", "-Xptxas", "--warn-on-spills", "-gencode=arch=compute_90,code=sm_90"]
    built = subprocess.run(["nvcc", *options, "-o", program, SOURCE], capture_output=True, text=True)
    assert built.returncode == 0 and not built.stderr, built.stderr
    dump = subprocess.run([cuobjdump(), "-sass", program], capture_output=True, text=True, check=True).stdout
    dump = subprocess.run(["c++filt"], input=dump, capture_output=True, text=True, check=True).stdout
    _, *parts = re.split(r"\n\s*Function : ", dump)
    return {
        part.partition("\n")[0].replace("(anonymous namespace)::", ""): re.findall(
            r"/\*[0-9a-f]{4}\*/\s+(?:@!?\w+ )?([\w.]+(?: [^;]*SR_CLOCKLO)?)", part
        )
        for part in parts
    }


def code_of(functions: dict[str, list[str]], kernel: str) -> list[str]:
    (found,) = [code for name, code in functions.items() if re.match(rf"(void )?{kernel}\(", name)]
    return found


@pytest.mark.parametrize("kernel, timed, absent", TIMED)
def test_machine_code(functions, kernel, timed, absent):
    code = code_of(functions, kernel)
    begin, end = (i for i, instruction in enumerate(code) if "SR_CLOCKLO" in instruction)
    loop = code[begin + 1 : end]
    for instruction, least in timed.items():
        assert sum(x.startswith(instruction) for x in loop) >= least, instruction
    for instruction in absent:
        assert not any(x.startswith(instruction) for x in loop), instruction


def test_graph_nodes_may_overlap(functions):
    code = code_of(functions, "node_kernel")
    assert code.index("PREEXIT") < code.index("ACQBULK") < code.index("STG.E")
