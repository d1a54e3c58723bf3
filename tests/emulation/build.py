"""Compiles CUDA sources with g++ against the emulation and loads them as a Python module.

Objects and libraries are cached under build/emulation by the hash of everything they are made of.
``python tests/emulation/build.py [--sanitize address,undefined]`` prints the library's path.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "emulation"
MODULE = "hvp_emulation"
SELFTEST = tuple(HERE / name for name in ("selftest.cu", "selftest_mma.cu", "selftest_bugs.cu", "bindings.cpp"))
KERNELS = tuple(sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
OPS = (*KERNELS, HERE / "ops.cpp")
INCLUDES = (HERE, ROOT / "csrc", ROOT / "csrc" / "cuda")
HEADERS = (".h", ".cuh", ".hpp")


@cache
def cuda_include() -> Path:
    """The toolkit's headers, from CUDA_HOME or from what nvcc says of itself."""
    home = os.environ.get("CUDA_HOME")
    if not home and shutil.which("nvcc"):
        dry_run = subprocess.run(["nvcc", "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.*)$", dry_run.stderr, re.MULTILINE)
        home = top and top.group(1)
    if not home or not (Path(home) / "include" / "cuda_bf16.h").exists():
        raise RuntimeError("emulation: CUDA headers not found; put nvcc on PATH or set CUDA_HOME")
    return (Path(home) / "include").resolve()


def available() -> bool:
    """Whether there is a library to load, or what it takes to build one."""
    if "HVP_EMULATION_LIBRARY" in os.environ:
        return True
    try:
        return bool(cuda_include())
    except RuntimeError:
        return False


@cache
def has_boost() -> bool:
    probe = "#include <boost/context/detail/fcontext.hpp>\n"
    command = ["g++", "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(command, input=probe, text=True, capture_output=True).returncode == 0


@cache
def _compiler_version() -> str:
    return subprocess.run(["g++", "--version"], check=True, capture_output=True, text=True).stdout


def _cached(suffix: str, command: Sequence[str], inputs: Iterable[Path]) -> Path:
    """The output of ``command -o <output>``, run unless the same inputs went through it before."""
    digest = hashlib.sha256("\0".join((_compiler_version(), *command)).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    output = CACHE / (digest.hexdigest()[:24] + suffix)
    if not output.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = output.with_suffix(f".{os.getpid()}{suffix}")
        result = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"emulation: {' '.join(command)}\n{result.stderr}")
        partial.rename(output)
    return output


def _compile(source: Path, sanitize: str | None, ucontext: bool) -> Path:
    flags = ["-std=c++17", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-fvisibility=hidden"]
    flags += ["-fno-gnu-unique", "-ffp-contract=off", "-DHVP_EMULATE", *(f"-I{i}" for i in INCLUDES)]
    flags.append(f"-isystem{cuda_include()}")
    if ucontext and source.name == "emulation.cpp":
        flags.append("-DHVP_EMULATION_UCONTEXT")
    if source.name in ("bindings.cpp", "ops.cpp"):
        import pybind11

        # Without -O2: it is large, and only passes arguments on.
        flags += [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    else:
        flags.append("-O2")
    # Kernels only: the runtime's own switches and bookkeeping must stay invisible to the sanitizers.
    if sanitize and source.suffix == ".cu":
        flags += [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    headers = sorted(p for i in (HERE, ROOT / "csrc") for p in i.rglob("*") if p.suffix in HEADERS)
    command = ["g++", *flags, "-x", "c++", "-c", str(source)]
    return _cached(".o", command, [source, *headers])


def build(sources: Sequence[Path] = SELFTEST, *, sanitize: str | None = None, ucontext: bool | None = None) -> Path:
    """A Python extension module of the given .cu and .cpp files.

    Args:
        sources: files to compile; one of them defines the module ``hvp_emulation``.
        sanitize: None, "address,undefined" or "thread"; load such a library in a ``run_sanitized`` process.
        ucontext: True for fibers on ucontext, False for Boost.Context, None for Boost.Context if installed.

    Raises:
        RuntimeError: a file does not compile (with the compiler's message), or CUDA's headers are missing.
    """
    if ucontext is None:
        ucontext = not has_boost()
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda s: _compile(s, sanitize, ucontext), [HERE / "emulation.cpp", *sources]))
    command = ["g++", "-shared", *map(str, objects)]
    if sanitize:
        command.append(f"-fsanitize={sanitize}")
    if not ucontext:
        command.append("-lboost_context")
    return _cached(".so", command, objects)


def load(library: Path) -> ModuleType:
    """The module in ``library``; several may be loaded side by side."""
    name = f"{library.stem}.{MODULE}"  # pybind11 gives a second module of one name the first one's content
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


def load_default(sources: Sequence[Path] = SELFTEST) -> ModuleType:
    """The library that ``run_sanitized`` started this process with, else a plain build of ``sources``."""
    given = os.environ.get("HVP_EMULATION_LIBRARY")
    return load(Path(given) if given else build(sources))


def run_sanitized(
    arguments: Sequence[str], sanitize: str, sources: Sequence[Path] = SELFTEST
) -> subprocess.CompletedProcess[str]:
    """Runs Python with ``arguments``, where ``load_default`` gives ``sources`` built with ``sanitize``.

    The sanitizer's runtime has to be there before Python is: LD_PRELOAD, and libstdc++ with it, so that ASan finds
    the functions that throw. Leaks are not looked for: Python's own would drown them.

    Returns:
        Its output; findings are on stderr and make the exit status non-zero.
    """
    library = build(sources, sanitize=sanitize)
    preload = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in (["libtsan.so"] if sanitize == "thread" else ["libasan.so", "libstdc++.so"])
    ]
    environment = {
        **os.environ,
        "HVP_EMULATION_LIBRARY": str(library),
        "LD_PRELOAD": " ".join(preload),
        "OMP_NUM_THREADS": "1",
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sanitize", choices=["address,undefined", "thread"])
    print(build(sanitize=parser.parse_args().sanitize))
