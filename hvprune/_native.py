"""The compiled extension ``hvprune._C``: a function per op in ``_C.cpu`` and, built with CUDA, in ``_C.cuda``.

It is linked with no library of torch: it asks tensors for their address and strides as Python does. Outputs are
allocated here in Python; the native code writes into them.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import get_num_threads

try:
    C, _IMPORT_ERROR = import_module("hvprune._C"), None
except ImportError as error:  # a source tree that was never built, or a damaged install
    C, _IMPORT_ERROR = None, str(error)

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum DType in csrc/common.h


def why_no_cpu() -> str | None:
    return None if C is not None else f"hvprune._C could not be imported: {_IMPORT_ERROR}"


def why_no_cuda() -> str | None:
    if C is None:
        return why_no_cpu()
    if not C.cuda_archs:
        return "hvprune._C was built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def launch(op: str, output: torch.Tensor, *args) -> None:
    """Runs the kernels of an op where its output is: with torch's number of threads, or in the GPU's current stream."""
    if output.is_cpu:
        getattr(C.cpu, op)(output, *args, get_num_threads())
    else:
        with torch.cuda.device(output.device):
            getattr(C.cuda, op)(output, *args, torch.cuda.current_stream().cuda_stream)
