"""The extension as it was built: what it exports, what it needs, and what the source distribution carries."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from hvprune import _native
from hvprune._registry import OPS

ROOT = Path(__file__).parent.parent


def test_imports_without_torch():
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("hvprune._C", {_native.C.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "torch" not in sys.modules and "numpy" not in sys.modules
print(module.cpu_isa())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == _native.C.cpu_isas()[-1]


def test_exports_every_op():
    assert {name for name in dir(_native.C.cpu) if not name.startswith("_")} == set(OPS)


needs_cuda = pytest.mark.skipif(not _native.C.cuda_archs, reason="hvprune._C was built without CUDA")


@needs_cuda
def test_exports_the_cuda_kernels():
    exported = {name for name in dir(_native.C.cuda) if not name.startswith("_")}
    assert exported == {op for op in OPS if "cuda" in OPS[op].backends}


def test_cuda_compiled_where_it_was_asked_for():
    assert _native.C.cuda_archs or os.environ.get("HVPRUNE_CUDA") != "1"


def X(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)  # on a CPU: a launch that fails reads no element


LAYERS = [X(1, 1, 2, 1)]
SELECTION = X(1, 1), X(1), X(1, 1)


@needs_cuda
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    "op, arguments",
    [
        ("aggregate_attention", (X(1, 1), [X(1, 1, 2, 2)], 1, False)),
        ("attention_importance", (X(1, 1), LAYERS, LAYERS, (), 1, False, 1.0, X(4))),
        ("cosine_similarity", (X(1, 1, 1), X(1, 1, 1))),
        ("diverse_select", (*SELECTION, None, 0, X(1, 1, 1), X(1, 1), 1, 1, 8)),
        ("gather_tokens", (X(1, 1, 1), X(1, 1, 1), X(1, 1), 0.0)),
        ("hierarchical_select", (*SELECTION, X(1, 1), *[(1, 1)] * 3, 1.0, 1, False)),
        ("hivtp_select", (*SELECTION, LAYERS, LAYERS, 1, 1.0, *[(1, 1)] * 3, 1.0, 1, False, X(5))),
        ("vispruner_select", (*SELECTION, X(1, 1, 1), X(1, 1), 1, 1, 8, X(1, 1, 1))),
    ],
)
def test_without_a_device_a_launch_names_op_error_and_line(op, arguments):
    # A pipeline launches the kernels of its ops.
    launched = {"hivtp_select": "attention_importance", "vispruner_select": "cosine_similarity"}.get(op, op)
    message = rf"^{launched}: cudaError\w+: .+ \(.*csrc/cuda/({launched}\w*\.cu|device\.cuh):\d+\)$"
    with pytest.raises(RuntimeError, match=message):
        getattr(_native.C.cuda, op)(*arguments, 0)


def test_links_neither_torch_nor_cuda():
    libraries = subprocess.run(["ldd", _native.C.__file__], capture_output=True, text=True, check=True).stdout
    assert "libgomp" in libraries
    assert not re.search("torch|c10|cudart|cublas|python", libraries)


def test_isa_of_another_machine_is_refused():
    with pytest.raises(ValueError, match=r"set_cpu_isa: name must be one of cpu_isas\(\), got sve"):
        _native.C.set_cpu_isa("sve")


@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), ids=lambda path: path.name)
def test_kernels_share_no_code_between_instruction_sets(source, tmp_path):
    """A weak function compiled with AVX-512 could be the one copy that the linker keeps for every machine."""
    if source.name == "dispatch.cpp":
        return  # compiled once, for any machine
    compiler = os.environ.get("CXX", "c++").split()
    compiled = tmp_path / "kernel.o"
    flags = ["-std=c++17", "-O1", "-fopenmp", "-Wno-psabi", "-DHVP_ISA=baseline"]
    subprocess.run([*compiler, *flags, "-c", str(source), "-o", str(compiled)], check=True)
    symbols = subprocess.run(["nm", "-C", str(compiled)], capture_output=True, text=True, check=True).stdout
    shared = [line for line in symbols.splitlines() if re.search(r" [WVu] ", line)]
    assert [line for line in shared if "__gxx_personality_v0" not in line] == []
    defined = [line.split(" T ")[1] for line in symbols.splitlines() if " T " in line]
    assert defined and all(name.startswith("hvprune::baseline::") for name in defined)


def test_source_distribution_is_complete(tmp_path):
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".*", "*.so", "build", "dist", "*.egg-info", "__pycache__", "results")
    shutil.copytree(ROOT, tree, ignore=ignored)
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)], cwd=tree, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.split("/", 1)[1] for name in packed.getnames() if "/" in name}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in ("benchmarks", "csrc", "hvprune", "triton_kernels")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".h", ".cuh", ".cpp", ".cu", ".py")
    }
    assert wanted - names == set()
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= names


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"HVPRUNE_CUDA": "yes"}, "HVPRUNE_CUDA must be 'auto', '0' or '1', got 'yes'"),
        ({"HVPRUNE_CUDA": "1"}, "HVPRUNE_CUDA=1, but nvcc is neither in"),
    ],
)
def test_build_refuses(environment, message, tmp_path):
    code = f"""
import os, runpy, shutil, setuptools
shutil.which = lambda name: None  # a machine without nvcc
setuptools.setup = lambda **options: None
runpy.run_path({str(ROOT / "setup.py")!r})["find_nvcc"]()
"""
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1 and message in result.stderr
