from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native, reference
from .._checks import as_layers, check_float, check_layers, check_prefix, type_error, value_error
from .._registry import Op, from_triton


def attention_importance(
    queries: Tensor | Sequence[Tensor],
    keys: Tensor | Sequence[Tensor],
    *,
    num_prefix_tokens: int = 1,
    rows: str = "all",
    scale: float | None = None,
    logsumexp: Tensor | Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """:func:`aggregate_attention` straight from Q and K; no attention map is ever materialised.

    With A_l = softmax(scale * Q_l K_l^T) over all L keys and P = ``num_prefix_tokens``::

        importance[b, j] = mean over l, h, i of A_l[b, h, i, P + j]

    Args:
        queries, keys: (B, H, L, D) in float32, float16 or bfloat16 (with CUDA D up to 256), or one such per layer in
            a sequence. Memory laid out as (B, L, H, D), as a projection emits it, is taken as it is: pass
            ``q.view(B, L, H, D).transpose(1, 2)``.
        num_prefix_tokens: P, tokens before the patches: 1 for CLIP, 0 for SigLIP.
        rows: "all" averages all L query rows (HIVTP), "cls" takes row 0 alone (VisPruner) and needs P >= 1.
        scale: factor on the scores, ``D ** -0.5`` by default.
        logsumexp: (B, H, L) float32 per layer, the natural logarithm of each row's softmax denominator, when an
            attention kernel already has it; then maps are exp(scores - logsumexp).
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        (B, N) float32 with N = L - P, computed in float32 whatever the inputs are. A NaN anywhere in a layer's
        keys, or in a query row that counts, makes the whole image NaN, as the softmax does.

    Memory: on a CPU 8 * B * layers * H * L bytes, plus 4 * L * (D + 8) bytes per thread; with Triton
    4 * B * layers * H * N * ceil(L / 32) bytes at most; with CUDA B * (12 * N + 4) bytes.

    Raises:
        TypeError, ValueError: an argument is not as above.
        BackendUnavailable: the backend cannot run here.

    Source: HIVTP, arXiv 2509.23663 (mid-layer attention); VisPruner, arXiv 2412.01818 (CLS attention).
    """
    logsumexp = None if logsumexp is None else as_layers(logsumexp)
    return _OP(as_layers(queries), as_layers(keys), num_prefix_tokens, rows, scale, logsumexp, backend)


def check_queries_keys(op: str, queries, keys, scale) -> int:
    """Layers of Q and K that belong together; returns L."""
    check_layers(op, "queries", queries, "(B, H, L, D)")
    _, heads, length, dim = check_layers(op, "keys", keys, "(B, H, L, D)", like=queries[0])
    if len(keys) != len(queries):
        raise value_error(op, "keys", f"as many layers as queries, {len(queries)}", len(keys))
    if heads < 1 or dim < 1:
        raise value_error(op, "queries", "shaped (B, H, L, D) with H >= 1 and D >= 1", queries[0])
    if scale is not None:
        check_float(op, "scale", scale, "a float or None")
    return length


def _check(queries, keys, num_prefix_tokens, rows, scale, logsumexp):
    op = "attention_importance"
    check_prefix(op, check_queries_keys(op, queries, keys, scale), num_prefix_tokens, rows)
    lead = queries[0]
    if logsumexp is not None:
        if not isinstance(logsumexp, list):
            raise type_error(op, "logsumexp", "a tensor (B, H, L), a sequence of them or None", logsumexp)
        if len(logsumexp) != len(queries):
            raise value_error(op, "logsumexp", f"as many layers as queries, {len(queries)}", len(logsumexp))
        for layer in logsumexp:
            if not isinstance(layer, Tensor) or layer.dtype != torch.float32:
                raise type_error(op, "logsumexp", "a float32 tensor (B, H, L)", layer)
            if layer.shape != lead.shape[:3] or layer.device != lead.device:
                raise value_error(op, "logsumexp", f"shaped {tuple(lead.shape[:3])} on {lead.device}", layer)
    return lead


def _out(queries, keys, num_prefix_tokens, rows, scale, logsumexp):
    batch, _, length, _ = queries[0].shape
    return queries[0].new_empty(batch, length - num_prefix_tokens, dtype=torch.float32)


def _reference(queries, keys, num_prefix_tokens, rows, scale, logsumexp):
    return reference.attention_importance(
        queries, keys, num_prefix_tokens=num_prefix_tokens, rows=rows, scale=scale, logsumexp=logsumexp
    )


def _compiled(queries, keys, num_prefix_tokens, rows, scale, logsumexp, scratch=None):
    out = _out(queries, keys, num_prefix_tokens, rows, scale, logsumexp)
    scale = queries[0].shape[3] ** -0.5 if scale is None else scale
    _native.launch(
        "attention_importance",
        out,
        queries,
        keys,
        logsumexp or (),
        num_prefix_tokens,
        rows == "cls",
        scale,
        scratch,
    )
    return out


def _cuda(queries, keys, num_prefix_tokens, rows, scale, logsumexp):
    batch, _, length, _ = queries[0].shape
    scratch = queries[0].new_empty(batch * (12 * (length - num_prefix_tokens) + 4), dtype=torch.uint8)
    return _compiled(queries, keys, num_prefix_tokens, rows, scale, logsumexp, scratch)


_OP = Op(
    "attention_importance",
    "(Tensor[] queries, Tensor[] keys, int num_prefix_tokens=1, str rows='all', float? scale=None,"
    " Tensor[]? logsumexp=None, str backend='auto') -> Tensor",
    check=_check,
    out=_out,
    backends={"cuda": _cuda, "triton": from_triton("attention_importance"), "cpu": _compiled, "reference": _reference},
)
