"""The compiled extension ``hvprune._C`` and what is needed to hand tensors to it.

The extension knows nothing of torch: it takes addresses, sizes and strides in elements. Outputs are allocated
here in Python; the native code writes into them.
"""

from __future__ import annotations

from importlib import import_module

import torch

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


def rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself if its last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.size(-1) <= 1 else x.contiguous()


def launch(op: str, lead: torch.Tensor, *args) -> None:
    """Runs the kernels of an op where ``lead`` is: with torch's number of threads, or in the GPU's current stream."""
    if lead.is_cpu:
        getattr(C, op + "_cpu")(*args, torch.get_num_threads())
    else:
        with torch.cuda.device(lead.device):
            getattr(C, op + "_cuda")(*args, torch.cuda.current_stream().cuda_stream)
