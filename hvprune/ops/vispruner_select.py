from __future__ import annotations

from torch import Tensor

from .. import _native, reference
from .._checks import check_floats, check_same_device, value_error
from .._registry import Op, from_triton
from ..selection import Selection, empty_selection
from .cosine_similarity import _out as cosine_similarity_out
from .diverse_select import check_budget


def vispruner_select(
    features: Tensor,
    importance: Tensor,
    num_tokens: int,
    *,
    important_ratio: float = 0.5,
    removals_per_round: int = 8,
    backend: str = "auto",
) -> Selection:
    """VisPruner from features and importance to the kept tokens.

    The same bits as :func:`cosine_similarity` followed by :func:`diverse_select`, which state the arguments, the
    result and the errors. The importance is :func:`attention_importance` with ``rows="cls"`` at the layer of the
    features, or ``rows="all"`` for an encoder without CLS token.

    Memory: on a CPU 4 * R * (C + R) bytes per image in work, R = N - int(num_tokens * important_ratio): the
    similarity of the important tokens is never computed. On a GPU the similarity of all tokens, as
    :func:`cosine_similarity` returns it.

    Source: VisPruner, arXiv 2412.01818; published settings (K, ratio): (128, 0.5), (64, 0.75).
    """
    return Selection(*_OP(features, importance, num_tokens, important_ratio, removals_per_round, backend))


def _check(features, importance, num_tokens, important_ratio, removals_per_round):
    op = "vispruner_select"
    check_floats(op, "features", features, "(B, N, C)", 3)
    check_budget(op, importance, num_tokens, important_ratio, removals_per_round)
    batch, total = importance.shape
    if features.shape[0] != batch or features.shape[1] != total:
        raise value_error(op, "features", f"shaped (B, N, C) with B={batch}, N={total} like importance", features)
    check_same_device(op, "features", features, "importance", importance)
    return features


def _out(features, importance, num_tokens, important_ratio, removals_per_round):
    batch, total = importance.shape
    return empty_selection(features, batch, num_tokens, total)


def _reference(features, importance, num_tokens, important_ratio, removals_per_round):
    return reference.vispruner_select(
        features,
        importance,
        num_tokens,
        important_ratio=important_ratio,
        removals_per_round=removals_per_round,
    )


def _compiled(features, importance, num_tokens, important_ratio, removals_per_round, similarity=None):
    outputs = _out(features, importance, num_tokens, important_ratio, removals_per_round)
    num_important = int(num_tokens * important_ratio)
    _native.launch(
        "vispruner_select",
        *outputs,
        features,
        importance,
        num_tokens,
        num_important,
        removals_per_round,
        similarity,
    )
    return outputs


def _cuda(features, *arguments):
    return _compiled(features, *arguments, similarity=cosine_similarity_out(features))


_OP = Op(
    "vispruner_select",
    "(Tensor features, Tensor importance, int num_tokens, float important_ratio=0.5,"
    " int removals_per_round=8, str backend='auto') -> (Tensor, Tensor, Tensor)",
    check=_check,
    out=_out,
    backends={"cuda": _cuda, "triton": from_triton("vispruner_select"), "cpu": _compiled, "reference": _reference},
)
