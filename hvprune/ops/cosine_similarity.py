from __future__ import annotations

import torch
from torch import Tensor

from .. import _native, reference
from .._checks import HALF_DTYPES, check_floats
from .._registry import Op, from_triton


def cosine_similarity(features: Tensor, *, backend: str = "auto") -> Tensor:
    """Cosine of every pair of tokens of an image::

        similarity[b, i, j] = x_i . x_j / (|x_i| |x_j|)

    Args:
        features: (B, N, C) in float32, float16 or bfloat16.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        (B, N, N), float32 for float32 features, float16 for half ones (accumulated in float32). Symmetric bit for
        bit, and the same bits whatever else is in the batch. An all-zero row has cosine 0 with every token; a
        row that holds NaN or inf has -inf with every token, itself included: it is never a duplicate.

    Memory: the result; on a CPU also 4 * N * C bytes per image in work, with Triton a copy of the features.

    Raises:
        TypeError, ValueError: an argument is not as above.
        BackendUnavailable: the backend cannot run here.

    Source: VisPruner, arXiv 2412.01818 (similarity of the diverse tokens).
    """
    return _OP(features, backend)


def _check(features):
    check_floats("cosine_similarity", "features", features, "(B, N, C)", 3)
    return features


def _out(features):
    batch, total, _ = features.shape
    dtype = torch.float16 if features.dtype in HALF_DTYPES else torch.float32
    return features.new_empty(batch, total, total, dtype=dtype)


def _compiled(features):
    similarity = _out(features)
    _native.launch("cosine_similarity", similarity, features)
    return similarity


_OP = Op(
    "cosine_similarity",
    "(Tensor features, str backend='auto') -> Tensor",
    check=_check,
    out=_out,
    backends={
        "cuda": _compiled,
        "triton": from_triton("cosine_similarity"),
        "cpu": _compiled,
        "reference": reference.cosine_similarity,
    },
)
