from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native, reference
from .._checks import as_layers, check_layers, check_prefix, value_error
from .._registry import Op, from_triton


def aggregate_attention(
    attentions: Tensor | Sequence[Tensor],
    *,
    num_prefix_tokens: int = 1,
    rows: str = "all",
    backend: str = "auto",
) -> Tensor:
    """Attention that each patch token receives, averaged over layers, heads and query rows.

    With A_l the softmaxed map of layer l and P = ``num_prefix_tokens``::

        importance[b, j] = mean over l, h, i of A_l[b, h, i, P + j]

    The rows i are all L query rows (``rows="all"``, HIVTP) or row 0 alone, the CLS token (``rows="cls"``,
    VisPruner). Prefix columns are dropped. Where the maps need not exist otherwise, use
    :func:`attention_importance`, which never makes them.

    Args:
        attentions: (B, H, L, L) maps in float32, float16 or bfloat16, or a sequence of such, one per layer (with CUDA
            at most 96).
        num_prefix_tokens: P, tokens before the patches: 1 for CLIP, 0 for SigLIP.
        rows: "all" or "cls"; "cls" needs P >= 1.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        (B, N) float32 with N = L - P. Sums in at least float32; NaN in a map is NaN in its column.

    Memory: on a CPU 8 * B * layers * H * N bytes; with Triton 4 * B * layers * H * N * ceil(L / 64) bytes.

    Raises:
        TypeError, ValueError: an argument is not as above.
        BackendUnavailable: the backend cannot run here.

    Source: HIVTP, arXiv 2509.23663 (mid-layer attention); VisPruner, arXiv 2412.01818 (CLS attention).
    """
    return _OP(as_layers(attentions), num_prefix_tokens, rows, backend)


def _check(attentions, num_prefix_tokens, rows):
    op = "aggregate_attention"
    _, heads, length, columns = check_layers(op, "attentions", attentions, "(B, H, L, L)")
    if length != columns or heads < 1:
        raise value_error(op, "attentions", "shaped (B, H, L, L) with H >= 1", attentions[0])
    check_prefix(op, length, num_prefix_tokens, rows)
    return attentions[0]


def _out(attentions, num_prefix_tokens, rows):
    batch, _, _, length = attentions[0].shape
    return attentions[0].new_empty(batch, length - num_prefix_tokens, dtype=torch.float32)


def _reference(attentions, num_prefix_tokens, rows):
    return reference.aggregate_attention(attentions, num_prefix_tokens=num_prefix_tokens, rows=rows)


def _compiled(attentions, num_prefix_tokens, rows):
    out = _out(attentions, num_prefix_tokens, rows)
    _native.launch("aggregate_attention", out, attentions, num_prefix_tokens, rows == "cls")
    return out


_OP = Op(
    "aggregate_attention",
    "(Tensor[] attentions, int num_prefix_tokens=1, str rows='all', str backend='auto') -> Tensor",
    check=_check,
    out=_out,
    backends={
        "cuda": _compiled,
        "triton": from_triton("aggregate_attention"),
        "cpu": _compiled,
        "reference": _reference,
    },
)
