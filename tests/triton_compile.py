"""Compile every Triton kernel for GPUs that are not here, through the launchers that would run it there.

A driver that only names a target stands in for the GPU, and every launch becomes a compilation, so that
dtypes, alignments and launch options are those of a real call. One row of the table per kernel and target::

    python tests/triton_compile.py sm_80 sm_90 sm_100 gfx942 > table.csv

Runs in a process of its own: the interpreter that the other tests use cannot share one with the compiler.
"""

from __future__ import annotations

import csv
import importlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
COLUMNS = ("case", "kernel", "target", "warps", "registers", "stack", "local", "shared", "wgmma")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class TargetOnlyDriver(DriverBase):
    """Answers what the compiler asks; each target is a device of its own, so that none takes another's kernels."""

    target = None

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


def resource_usage(kernel) -> tuple[int, int, int]:
    """Registers per thread, bytes of stack, bytes (CUDA) or registers (HIP) spilled to local memory."""
    if kernel.metadata.target.backend == "hip":
        text, names = kernel.asm["amdgcn"], ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(kernel.asm["cubin"])
            cubin.flush()
            command = [CUOBJDUMP, "--dump-resource-usage", cubin.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        names = ("REG", "STACK", "LOCAL")
    return tuple(int(re.search(rf"\b{name}: *(\d+)", text)[1]) for name in names)


def main(targets: list[str]) -> None:
    driver = TargetOnlyDriver()
    triton.runtime.driver.set_active(driver)
    launched = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        launched.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only
    table = csv.writer(sys.stdout)
    table.writerow(COLUMNS)
    for target in targets:
        driver.target = TARGETS[target]
        for op, case, arguments in cases():
            launched.clear()
            getattr(importlib.import_module(f"hvprune.triton_kernels.{op}"), op)(*arguments)
            for kernel in launched:
                meta, wgmma = kernel.metadata, kernel.asm.get("ptx", "").count("wgmma.mma_async")
                usage = resource_usage(kernel)
                table.writerow((f"{op}-{case}", meta.name, target, meta.num_warps, *usage, meta.shared, wgmma))


if __name__ == "__main__":
    main(sys.argv[1:] or list(TARGETS))
