from __future__ import annotations

import torch
from torch import Tensor

from .. import _native, reference
from .._checks import (
    check_floats,
    check_int,
    check_num_tokens,
    check_ratio,
    check_same_device,
    type_error,
    value_error,
)
from .._registry import Op, from_triton
from ..selection import Selection, empty_selection


def diverse_select(
    similarity: Tensor,
    importance: Tensor,
    num_tokens: int,
    *,
    important_ratio: float = 0.5,
    removals_per_round: int = 8,
    return_trace: bool = False,
    backend: str = "auto",
) -> Selection | tuple[Selection, Tensor]:
    """VisPruner's selection: the most important tokens, then what is left of the others without duplicates.

    Important: the int(K * important_ratio) tokens of highest importance, K = ``num_tokens``. The residual list
    starts as the other tokens by importance descending. While it is longer than K_div = K - K_important, of its
    R tokens a are those at even positions and b those at odd ones; each a_i scores max_j similarity[a_i, b_j]; the
    r = min(removals_per_round, R - K_div, len(a)) highest are removed; the new list is the other a by score
    descending, then b unchanged. No matrix product happens in a round: ``similarity`` is read.

    Args:
        similarity: (B, N, N) in float32, float16 or bfloat16, as :func:`cosine_similarity` returns it.
        importance: (B, N) in float32, float16 or bfloat16.
        num_tokens: K in [0, N].
        important_ratio: share of important tokens, in [0, 1].
        removals_per_round: at least 1.
        return_trace: also return the residual list before the first and after every round.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        Selection with M = K, every count K. With ``return_trace`` a pair of it and the trace, (B, rounds + 1,
        N - K_important) int64, each list padded with -1. Equal importance: lower token index first; equal scores:
        earlier list position first; NaN importance ranks below -inf; a NaN similarity counts as -inf; an empty b
        makes every score -inf. Same bits on every backend.

    Memory: outputs; on a CPU also 24 * N bytes per thread, and 4 * N * N bytes per thread unless ``similarity`` is
    float32 with N a multiple of 16; with Triton 16 * B * N bytes. With CUDA, N is bounded by the shared memory of a
    block: 15 000 tokens on an H100, 10 000 on an A100.

    Raises:
        TypeError, ValueError: an argument is not as above.
        BackendUnavailable: the backend cannot run here.

    Source: VisPruner, arXiv 2412.01818, important and diverse tokens.
    """
    indices, counts, mask, *trace = _OP(
        similarity, importance, num_tokens, important_ratio, removals_per_round, return_trace, backend
    )
    selection = Selection(indices, counts, mask)
    return (selection, *trace) if return_trace else selection


def check_budget(op: str, importance, num_tokens, important_ratio, removals_per_round) -> None:
    check_floats(op, "importance", importance, "(B, N)", 2)
    check_num_tokens(op, num_tokens, importance.shape[1])
    check_ratio(op, "important_ratio", important_ratio)
    check_int(op, "removals_per_round", removals_per_round)
    if removals_per_round < 1:
        raise value_error(op, "removals_per_round", "at least 1", removals_per_round)


def _check(similarity, importance, num_tokens, important_ratio, removals_per_round, return_trace):
    op = "diverse_select"
    check_floats(op, "similarity", similarity, "(B, N, N)", 3)
    check_budget(op, importance, num_tokens, important_ratio, removals_per_round)
    batch, total = importance.shape
    if similarity.shape != (batch, total, total):
        raise value_error(op, "similarity", f"shaped {(batch, total, total)} like importance", similarity)
    check_same_device(op, "similarity", similarity, "importance", importance)
    if not isinstance(return_trace, bool):
        raise type_error(op, "return_trace", "a bool", return_trace)
    return importance


def _num_rounds(residual: int, num_diverse: int, removals_per_round: int) -> int:
    rounds = 0
    while residual > num_diverse:
        residual -= min(removals_per_round, residual - num_diverse, (residual + 1) // 2)
        rounds += 1
    return rounds


def _out(similarity, importance, num_tokens, important_ratio, removals_per_round, return_trace):
    batch, total = importance.shape
    selection = empty_selection(importance, batch, num_tokens, total)
    if not return_trace:
        return [*selection]
    num_important = int(num_tokens * important_ratio)
    residual = total - num_important
    rounds = _num_rounds(residual, num_tokens - num_important, removals_per_round)
    return [*selection, importance.new_empty(batch, rounds + 1, residual, dtype=torch.int64)]


def _reference(similarity, importance, num_tokens, important_ratio, removals_per_round, return_trace):
    result = reference.diverse_select(
        similarity,
        importance,
        num_tokens,
        important_ratio=important_ratio,
        removals_per_round=removals_per_round,
        return_trace=return_trace,
    )
    if not return_trace:
        return [*result]
    selection, trace = result
    return [*selection, trace]


def _compiled(similarity, importance, num_tokens, important_ratio, removals_per_round, return_trace):
    outputs = _out(similarity, importance, num_tokens, important_ratio, removals_per_round, return_trace)
    num_important = int(num_tokens * important_ratio)
    *selection, trace = outputs if return_trace else (*outputs, None)
    _native.launch(
        "diverse_select",
        *selection,
        trace,
        trace.shape[1] if return_trace else 0,
        similarity,
        importance,
        num_tokens,
        num_important,
        removals_per_round,
    )
    return outputs


_OP = Op(
    "diverse_select",
    "(Tensor similarity, Tensor importance, int num_tokens, float important_ratio=0.5,"
    " int removals_per_round=8, bool return_trace=False, str backend='auto')"
    " -> Tensor[]",
    check=_check,
    out=_out,
    backends={"cuda": _compiled, "triton": from_triton("diverse_select"), "cpu": _compiled, "reference": _reference},
)
