from __future__ import annotations

import torch
from torch import Tensor

from .. import _native, reference
from .._checks import check_float, check_floats, check_same_device, type_error, value_error
from .._registry import Op, from_triton
from ..selection import Selection


def gather_tokens(
    features: Tensor,
    selection: Selection | Tensor,
    *,
    pad_value: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """The rows of the kept tokens::

        out[b, m] = features[b, indices[b, m]], or pad_value where indices[b, m] = -1

    Args:
        features: (B, N, C) in float32, float16 or bfloat16.
        selection: a Selection, or its (B, M) int64 ``indices``. Values outside [-1, N) raise ValueError on a CPU;
            on a GPU they are not looked at (that would wait for the device) and the result is undefined.
        pad_value: fills the rows of index -1.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        (B, M, C) of the features' dtype, bit for bit the rows given.

    Memory: the result.

    Raises:
        TypeError, ValueError: an argument is not as above.
        BackendUnavailable: the backend cannot run here.
    """
    indices = selection.indices if isinstance(selection, Selection) else selection
    return _OP(features, indices, pad_value, backend)


def _check(features, indices, pad_value):
    op = "gather_tokens"
    check_floats(op, "features", features, "(B, N, C)", 3)
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        raise type_error(op, "selection", "a Selection or int64 indices (B, M)", indices)
    if indices.dim() != 2 or indices.shape[0] != features.shape[0]:
        raise value_error(op, "selection", f"shaped (B, M) with B={features.shape[0]}", indices)
    check_same_device(op, "selection", indices, "features", features)
    check_float(op, "pad_value", pad_value)
    return features


def _out(features, indices, pad_value):
    return features.new_empty(features.shape[0], indices.shape[1], features.shape[2])


def _reference(features, indices, pad_value):
    return reference.gather_tokens(features, indices, pad_value=pad_value)


def _compiled(features, indices, pad_value):
    out = _out(features, indices, pad_value)
    _native.launch("gather_tokens", out, features, indices, pad_value)
    return out


_OP = Op(
    "gather_tokens",
    "(Tensor features, Tensor indices, float pad_value=0.0, str backend='auto') -> Tensor",
    check=_check,
    out=_out,
    backends={"cuda": _compiled, "triton": from_triton("gather_tokens"), "cpu": _compiled, "reference": _reference},
)
