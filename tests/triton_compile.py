"""Compile and launch every Triton kernel for GPUs that are not here, through the launchers that would run it there.

A driver that only names a target stands in for the GPU. For NVIDIA, Triton's own launching code then runs down to
the driver library, of which there is a stub here: what would reach the GPU is compared with the arguments of the
call and with the kernel's parameters in PTX. For AMD a launch ends as a compilation. One row of the table per kernel
and target::

    python tests/triton_compile.py sm_80 sm_90 sm_100 gfx942 > table.csv

Runs in a process of its own: the interpreter that the other tests use cannot share one with the compiler.
"""

# ruff: noqa: E402  the stub comes before whatever might load the real library

from __future__ import annotations

import csv
import ctypes
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

NVIDIA = Path(find_spec("triton").origin).parent / "backends" / "nvidia"
FOLDER = tempfile.TemporaryDirectory()  # of the stub
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
os.environ["TRITON_LIBCUDA_PATH"] = FOLDER.name


def load_stub() -> ctypes.CDLL:
    """A library by the name of NVIDIA's driver whose functions do nothing, loaded before any other of that name."""
    sources = "".join((NVIDIA / name).read_text() for name in ("driver.c", "driver.py"))
    silent = set(re.findall(r"\bcu[A-Z]\w*(?=\()", sources)) - {"cuLaunchKernelEx", "cuPointerGetAttribute"}
    code = """
        int (*on_launch)(const unsigned *config, void *function, void **values, void **extra);
        int cuLaunchKernelEx(const unsigned *config, void *function, void **values, void **extra) {
            return on_launch(config, function, values, extra);
        }
        int cuPointerGetAttribute(unsigned long long *data, int attribute, unsigned long long pointer) {
            *data = pointer;
            return 0;
        }
    """ + "".join(f"int {name}() {{ return 0; }}\n" for name in sorted(silent))
    library = Path(FOLDER.name, "libcuda.so.1")
    command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-xc", "-", "-o", library]
    subprocess.run(command, input=code, text=True, check=True)
    return ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


STUB = load_stub()

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
COLUMNS = ("case", "kernel", "target", "warps", "registers", "stack", "local", "shared", "wgmma")
SHARED_MEMORY = 99 * 1024  # bytes that a block may have on the GPUs from sm_80 that have least, sm_86 and sm_120
C_TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
PTX_TYPES = {"i32": "u32", "i64": "u64", "fp32": "f32"}


def flat(value) -> Iterator:
    if isinstance(value, tuple):
        for item in value:
            yield from flat(item)
    else:
        yield value


class Launcher(CudaLauncher):
    """Triton's, which notes the arguments that its C code is to hand over."""

    arguments: list  # of the launch under way: (type, value), constants left out

    def __init__(self, src, metadata):
        super().__init__(src, metadata)
        self.types = list(flat(tuple(src.signature.values())))

    def __call__(self, *args):
        pairs = zip(self.types, flat(args[9:]), strict=True)  # after grid, stream, function, metadata and hooks
        Launcher.arguments = [(kind, value) for kind, value in pairs if kind != "constexpr"]
        super().__call__(*args)


class TargetOnlyDriver(DriverBase):
    """Answers what the compiler asks; each target is a device of its own, so that none takes another's kernels."""

    target = None
    launcher_cls = Launcher

    def __init__(self):
        self.utils = CudaUtils()
        self.utils.load_binary = lambda *args: (1, 1, 0, 0, 1024)  # module, function, registers, spills, threads
        self.utils.get_device_properties = lambda device: {"max_shared_mem": SHARED_MEMORY}

    @classmethod
    def is_active(cls):
        return True

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return str(self.target)

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_benchmarker(self):
        raise NotImplementedError


class Recorder:
    """Runs in place of every launch and keeps the kernels."""

    def __init__(self):
        self.kernels = []
        self.launch = None  # grid, block and values that reached the driver
        signature = ctypes.CFUNCTYPE(
            ctypes.c_int,
            ctypes.POINTER(ctypes.c_uint),
            ctypes.c_void_p,
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_void_p,
        )
        self.callback = signature(self.on_launch)  # kept alive here
        ctypes.c_void_p.in_dll(STUB, "on_launch").value = ctypes.cast(self.callback, ctypes.c_void_p).value
        self.run = JITFunction.run
        JITFunction.run = lambda function, *args, **options: self.record(function, *args, **options)

    def on_launch(self, config, function, values, extra) -> int:
        types = (C_TYPES.get(kind, ctypes.c_uint64) for kind, _ in Launcher.arguments)
        read = [ctypes.cast(values[i], ctypes.POINTER(kind)).contents.value for i, kind in enumerate(types)]
        self.launch = config[0:3], config[3:6], read  # CUlaunchConfig begins with grid and block
        return 0

    def record(self, function, *args, grid, warmup, **options) -> None:
        nvidia = triton.runtime.driver.active.get_current_target().backend == "cuda"
        self.launch = None
        kernel = self.run(function, *args, grid=grid, warmup=not nvidia, **options)
        self.kernels.append(kernel)
        if nvidia:
            self.check(kernel, grid)

    def check(self, kernel, grid) -> None:
        launched, block, values = self.launch
        blocks, rows = grid if len(grid) == 2 else (*grid, 1)
        assert launched == [blocks, rows, 1] and blocks * rows < 2**31 and rows < 2**16, (kernel.name, launched, grid)
        assert block == [32 * kernel.metadata.num_warps, 1, 1], (kernel.name, block)
        given = [value.data_ptr() if kind[0] == "*" else value for kind, value in Launcher.arguments]
        given = [ctypes.c_float(x).value if isinstance(x, float) else x for x in given]
        assert values == given, (kernel.name, values, given)
        head = re.search(r"\.entry (.*?)\)", kernel.asm["ptx"], re.S)[1]
        parameters = re.findall(r"\.param \.(\w+)", head)
        expected = [PTX_TYPES.get(kind, "u64") for kind, _ in Launcher.arguments]
        assert parameters == [*expected, "u64", "u64"], (
            kernel.name,
            parameters,
            expected,
        )  # and Triton's two scratches


def cases():
    """(op, case, positional arguments of the launcher): the shapes of CLIP ViT-L/14-336 and SigLIP so400m/14-384."""

    def heads_last(length, dim, dtype, num_layers):
        layer = torch.empty(1, length, 16, dim, dtype=dtype).transpose(1, 2)
        return [layer] * num_layers

    half, bfloat16 = torch.float16, torch.bfloat16
    maps = torch.empty(1, 16, 577, 577, dtype=half)
    scores = torch.empty(1, 576)
    yield "aggregate_attention", "all-fp16-577x3", ([maps] * 3, 1, "all")
    yield "aggregate_attention", "cls-fp16-577", ([maps], 1, "cls")
    clip, siglip = heads_last(577, 64, bfloat16, 3), heads_last(729, 72, half, 1)
    yield "attention_importance", "all-bf16-577x64x3", (clip, clip, 1, "all", None, None)
    yield "attention_importance", "all-fp16-729x72", (siglip, siglip, 0, "all", None, None)
    lse = [torch.empty(1, 16, 577)] * 3
    yield "attention_importance", "lse-bf16-577x64x3", (clip, clip, 1, "all", None, lse)
    long = heads_last(2305, 64, bfloat16, 1)
    yield "attention_importance", "all-bf16-2305x64", (long, long, 1, "all", None, None)
    clip32 = heads_last(577, 64, torch.float32, 1)
    yield "attention_importance", "all-fp32-577x64", (clip32, clip32, 1, "all", None, None)
    yield "attention_importance", "cls-bf16-577x64", (clip[:1], clip[:1], 1, "cls", None, None)
    yield "cosine_similarity", "fp16-576x1024", (torch.empty(1, 576, 1024, dtype=half),)
    yield "cosine_similarity", "bf16-729x1152", (torch.empty(1, 729, 1152, dtype=bfloat16),)
    yield "cosine_similarity", "fp32-576x1024", (torch.empty(1, 576, 1024),)
    similarity = torch.empty(1, 576, 576, dtype=half)
    yield "diverse_select", "fp16-576-128", (similarity, scores, 128, 0.5, 8, False)
    yield "diverse_select", "fp32-576-128-trace", (similarity.float(), scores, 128, 0.5, 8, True)
    features, indices = torch.empty(1, 576, 1024, dtype=bfloat16), torch.zeros(1, 128, dtype=torch.int64)
    yield "gather_tokens", "bf16-576x1024-128", (features, indices, 0.0)
    yield "hierarchical_select", "fp32-24x24", (scores, (24, 24), (2, 2), 0.25, (2, 2), None)
    yield "hierarchical_select", "fp32-24x24-128", (scores, (24, 24), (2, 2), 0.25, (2, 2), 128)


def limits():
    """The same of what makes other kernels or launches: sizes of one, many images, and images far apart."""
    one = torch.zeros(1)
    many = 65537  # more than the second and third dimension of a grid can have
    memory = torch.empty(2**31 + 64, dtype=torch.float16)  # nobody reads it

    def far(*shape):
        return memory.as_strided((2, *shape), (2**31, *torch.empty(shape).stride()))

    for name, batch, x in (
        ("ones", 1, lambda *shape: one.expand(1, *shape)),
        ("many", many, lambda *shape: one.expand(many, *shape)),
        ("far", 2, far),
    ):
        side = 1 if name == "ones" else 4
        queries = [x(1, side, side)]
        indices = torch.zeros(1, 1, dtype=torch.int64).expand(batch, 1)
        yield "aggregate_attention", name, (queries, 0, "all")
        yield "attention_importance", name, (queries, queries, 0, "all", None, None)
        if name != "ones":
            yield "aggregate_attention", name, (queries, 1, "cls")
            yield "attention_importance", name, (queries, queries, 1, "cls", None, [x(1, side).float()])
        yield "cosine_similarity", name, (x(side, side),)
        yield "diverse_select", name, (x(side, side), x(side), 1, 0.5, 1, False)
        yield "gather_tokens", name, (x(side, side), indices, 0.0)
        yield "hierarchical_select", name, (x(side), (1, side), (1, 1), 0.25, (1, 1), 1)


def resource_usage(kernel) -> tuple[int, int, int]:
    """Registers per thread, bytes of stack, bytes (CUDA) or registers (HIP) spilled to local memory."""
    if kernel.metadata.target.backend == "hip":
        text, names = kernel.asm["amdgcn"], ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(kernel.asm["cubin"])
            cubin.flush()
            command = [NVIDIA / "bin" / "cuobjdump", "--dump-resource-usage", cubin.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        names = ("REG", "STACK", "LOCAL")
    return tuple(int(re.search(rf"\b{name}: *(\d+)", text)[1]) for name in names)


def main(targets: list[str]) -> None:
    driver = TargetOnlyDriver()
    triton.runtime.driver.set_active(driver)
    recorder = Recorder()

    def launch(op, arguments):
        recorder.kernels.clear()
        getattr(importlib.import_module(f"hvprune.triton_kernels.{op}"), op)(*arguments)
        return recorder.kernels

    table = csv.writer(sys.stdout)
    table.writerow(COLUMNS)
    for target in targets:
        driver.target = TARGETS[target]
        for op, case, arguments in cases():
            for kernel in launch(op, arguments):
                meta, wgmma = kernel.metadata, kernel.asm.get("ptx", "").count("wgmma.mma_async")
                usage = resource_usage(kernel)
                table.writerow((f"{op}-{case}", meta.name, target, meta.num_warps, *usage, meta.shared, wgmma))
        for op, _, arguments in limits():
            launch(op, arguments)


if __name__ == "__main__":
    main(sys.argv[1:] or list(TARGETS))
