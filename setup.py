"""Builds hvprune._C with one ninja file: no torch, no CMake. Everything else is in pyproject.toml.

HVPRUNE_CUDA=auto|0|1   compile the CUDA kernels if nvcc is found (default), never, or fail without it
HVPRUNE_CUDA_ARCHS      compute capabilities, default "80;90;100"; PTX of the newest is added
CXX                     C++ compiler, default c++
"""

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.c*") if path.suffix in (".cpp", ".cu"))
X86_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}
NINJA_RULES = """
rule cxx
  command = $cxx -MMD -MF $out.d $cflags $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
rule cu
  command = $nvcc -MD -MF $out.d $cuflags -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $link $in -o $out
"""


def find_nvcc() -> str | None:
    """nvcc by HVPRUNE_CUDA, CUDA_HOME, CUDA_PATH, PATH and the usual place, None to build without CUDA."""
    mode = os.environ.get("HVPRUNE_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"HVPRUNE_CUDA must be 'auto', '0' or '1', got {mode!r}")
    if mode == "0":
        return None
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [f"{home}/bin/nvcc" for home in homes if home] + ["nvcc", "/usr/local/cuda/bin/nvcc"]
    found = next(filter(None, map(shutil.which, candidates)), None)
    if found is None and mode == "1":
        raise SystemExit("HVPRUNE_CUDA=1, but nvcc is neither in CUDA_HOME, CUDA_PATH, PATH nor /usr/local/cuda")
    return found


class NinjaBuild(build_ext):
    def build_extension(self, ext):
        import ninja
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)

        isas = X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}
        nvcc = find_nvcc()
        nvcc = nvcc if any(source.endswith(".cu") for source in SOURCES) else None  # nothing for it to compile
        archs = [int(arch) for arch in os.environ.get("HVPRUNE_CUDA_ARCHS", "80;90;100").split(";")] if nvcc else []
        print(f"hvprune: instruction sets {', '.join(isas)}; CUDA {archs or 'off'} ({nvcc or 'no nvcc used'})")

        cflags = "-std=c++17 -O3 -DNDEBUG -fPIC -fopenmp -fvisibility=hidden -Wall -Wno-psabi -Wno-uninitialized"
        cflags += " -Wno-maybe-uninitialized"  # false reports in the compiler's own AVX-512 headers
        cflags += " -DHVP_X86" if len(isas) > 1 else ""
        cflags += f" -DHVP_CUDA_ARCHS={','.join(map(str, archs))}" if archs else ""
        gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        gencode += [f"-gencode=arch=compute_{max(archs)},code=compute_{max(archs)}"] if archs else []
        include = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_paths()['include']}"

        objects, rules = [], []
        for source in SOURCES:
            if source.endswith(".cu"):
                variants = {"": ("cu", "")} if nvcc else {}
            elif source.startswith("csrc/cpu/") and source != "csrc/cpu/dispatch.cpp":
                variants = {f".{isa}": ("cxx", f"-DHVP_ISA={isa} {' '.join(isas[isa])}") for isa in isas}
            else:
                variants = {"": ("cxx", include)}
            for suffix, (rule, flags) in variants.items():
                objects.append(f"{source}{suffix}.o")
                rules.append(f"build {objects[-1]}: {rule} {ROOT / source}\n  flags = {flags}")
        # nvcc knows where its static runtime is; its own options aside, both links say the same.
        link = f"{nvcc} -shared -cudart static -Xcompiler=-fopenmp,-s -Xlinker=--exclude-libs,ALL"
        variables = {
            "cxx": shlex.join(shlex.split(os.environ.get("CXX", "c++"))),
            "nvcc": nvcc or "",
            "cflags": cflags,
            "cuflags": f"-std=c++17 -O3 -lineinfo -t2 -Xptxas --warn-on-spills -I{ROOT / 'csrc'} {' '.join(gencode)}"
            " -Xcompiler=-fPIC,-fvisibility=hidden",
            "link": link if nvcc else "$cxx -shared -fopenmp -s -Wl,--exclude-libs,ALL",
        }
        lines = [f"{name} = {value}" for name, value in variables.items()]
        (build / "build.ninja").write_text(
            "\n".join([*lines, NINJA_RULES, *rules, f"build {output}: link {' '.join(objects)}", ""])
        )
        subprocess.check_call([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build)])


setup(ext_modules=[Extension("hvprune._C", SOURCES)], cmdclass={"build_ext": NinjaBuild})
