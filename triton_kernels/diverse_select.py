# Computes  VisPruner's selection from similarity [B, N, N] and importance [B, N]: the K_imp most important
#           tokens, and of the list of the others, by importance, what rounds of removal leave: a = even
#           positions, b = odd ones, score_i = max_j similarity[a_i, b_j], drop the r highest a, new list =
#           the other a by score, then b.
# Work      One program per image runs every round. List and positions live in scratch memory, in L1 or L2; a
#           barrier separates each phase that writes them from the next one that reads them.
# Traffic   Reads s * R / 2 * N bytes of similarity per round of R tokens, s the size of an element, mostly
#           from L2: 5.7 MB per image in float16 for N = 576, K = 128. Everything else is at most 12 * N
#           bytes per round.
# Numerics  Integers only after the loads: scores become int32 keys of the same order. Equal importance:
#           lower token index first; equal scores: earlier list position first; NaN importance ranks below
#           -inf, NaN similarity counts as -inf, -0 equals +0, and without b every score is -inf.
# Source    VisPruner, arXiv 2412.01818, important and diverse tokens.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..ops.diverse_select import _out
from ._common import contiguous_rows, next_power_of_2, ordered_key, write_selection

BLOCK_A = 16  # rows of similarity read at once
MAX_BLOCK = 1024  # columns read at once, and elements of a list handled at once
BLOCK_RANK = 8  # keys that each element is compared with at once
NUM_WARPS = 16

# Positions of tokens outside the list.
IMPORTANT = tl.constexpr(-1)
REMOVED = tl.constexpr(-2)


@triton.jit
def _rank(key, place, keys_ptr, count, BLOCK_RANK: tl.constexpr):
    """How many of ``count`` keys precede: higher ones, and equal ones of earlier place."""
    rank = tl.zeros_like(place)
    for start in range(0, count, BLOCK_RANK):
        other = start + tl.arange(0, BLOCK_RANK)
        other_key = tl.load(keys_ptr + other, mask=other < count, other=0)
        before = (other_key[None, :] > key[:, None]) | (
            (other_key[None, :] == key[:, None]) & (other[None, :] < place[:, None])
        )
        rank += tl.sum((before & (other[None, :] < count)).to(tl.int32), 1)
    return rank


@triton.jit
def _write_trace(trace_ptr, list_ptr, length, width, BLOCK: tl.constexpr):
    for start in range(0, width, BLOCK):
        place = start + tl.arange(0, BLOCK)
        token = tl.load(list_ptr + place, mask=place < length, other=-1)
        tl.store(trace_ptr + place, token.to(tl.int64), mask=place < width)


@triton.jit(do_not_specialize=["num_lists", "K", "num_important", "removals_per_round"])
def _diverse_select_kernel(
    similarity_ptr,  # [B, N, N]
    similarity_stride_b,
    similarity_stride_n,
    importance_ptr,  # [B, N]
    importance_stride_b,
    indices_ptr,  # [B, K] int64
    counts_ptr,  # [B] int32
    mask_ptr,  # [B, N] bool
    trace_ptr,  # [B, rounds + 1, N - K_imp] int64, if TRACE
    num_lists,  # rounds + 1
    scratch_ptr,  # [B, 4, N] int32: keys, positions of the tokens, and the list before and after a round
    N,
    K,
    num_important,
    removals_per_round,
    TRACE: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    similarity_ptr += b * similarity_stride_b
    importance_ptr += b * importance_stride_b
    keys_ptr = scratch_ptr + b * 4 * N
    position_ptr = keys_ptr + N
    list_ptr = keys_ptr + 2 * N
    next_ptr = keys_ptr + 3 * N
    offset = tl.arange(0, BLOCK)

    # Order the tokens by importance.
    for start in range(0, N, BLOCK):
        token = start + offset
        value = tl.load(importance_ptr + token, mask=token < N, other=0.0)
        tl.store(keys_ptr + token, ordered_key(value.to(tl.float32)), mask=token < N)
    tl.debug_barrier()  # ranks compare with keys of other threads
    for start in range(0, N, BLOCK):
        token = start + offset
        key = tl.load(keys_ptr + token, mask=token < N, other=0)
        position = _rank(key, token, keys_ptr, N, BLOCK_RANK) - num_important
        tl.store(position_ptr + token, tl.maximum(position, IMPORTANT), mask=token < N)
        tl.store(list_ptr + position, token, mask=(token < N) & (position >= 0))
    tl.debug_barrier()  # the list is complete, and the keys may be overwritten

    length = N - num_important
    num_diverse = K - num_important
    width = length
    if TRACE:
        trace_ptr += b * num_lists * width
        _write_trace(trace_ptr, list_ptr, length, width, BLOCK)

    while length > num_diverse:
        num_a = (length + 1) // 2
        removals = tl.minimum(tl.minimum(removals_per_round, length - num_diverse), num_a)

        # Score each a: its highest similarity to a b.
        for start in range(0, num_a, BLOCK_A):
            place = start + tl.arange(0, BLOCK_A)
            a = tl.load(list_ptr + 2 * place, mask=place < num_a, other=0).to(tl.int64)
            score = tl.full([BLOCK_A], float("-inf"), tl.float32)
            for first in range(0, N, BLOCK):
                column = first + offset
                position = tl.load(position_ptr + column, mask=column < N, other=REMOVED)
                is_b = (position >= 0) & (position % 2 == 1)
                pair = similarity_ptr + a[:, None] * similarity_stride_n + column[None, :]
                value = tl.load(pair, mask=column[None, :] < N, other=0.0).to(tl.float32)
                value = tl.where(is_b[None, :] & (value == value), value, float("-inf"))
                score = tl.maximum(score, tl.max(value, 1))
            tl.store(keys_ptr + place, ordered_key(score), mask=place < num_a)
        tl.debug_barrier()  # every score is known, and no thread reads a position any more

        # Drop the first a by score and line up the others before the b.
        for start in range(0, num_a, BLOCK):
            place = start + offset
            a = tl.load(list_ptr + 2 * place, mask=place < num_a, other=0)
            key = tl.load(keys_ptr + place, mask=place < num_a, other=0)
            position = _rank(key, place, keys_ptr, num_a, BLOCK_RANK) - removals
            tl.store(position_ptr + a, tl.where(position >= 0, position, REMOVED), mask=place < num_a)
            tl.store(next_ptr + position, a, mask=(place < num_a) & (position >= 0))
            is_pair = 2 * place + 1 < length
            partner = tl.load(list_ptr + 2 * place + 1, mask=is_pair, other=0)
            tl.store(position_ptr + partner, num_a - removals + place, mask=is_pair)
            tl.store(next_ptr + num_a - removals + place, partner, mask=is_pair)
        tl.debug_barrier()  # the new list is complete, and the keys may be overwritten

        length -= removals
        swap_ptr = list_ptr
        list_ptr = next_ptr
        next_ptr = swap_ptr
        if TRACE:
            trace_ptr += width
            _write_trace(trace_ptr, list_ptr, length, width, BLOCK)

    # Emit what is left, in raster order.
    for start in range(0, N, BLOCK):
        token = start + offset
        position = tl.load(position_ptr + token, mask=token < N, other=REMOVED)
        tl.store(mask_ptr + b * N + token, position != REMOVED, mask=token < N)
    tl.debug_barrier()  # the selection reads the mask in another layout
    write_selection(mask_ptr + b * N, indices_ptr + b * K, counts_ptr + b, N, K, BLOCK)


def diverse_select(similarity, importance, num_tokens, important_ratio, removals_per_round, return_trace):
    """(B, N, N) and (B, N) -> indices (B, K) int64, counts (B,) int32, mask (B, N) bool[, trace]."""
    outputs = _out(similarity, importance, num_tokens, important_ratio, removals_per_round, return_trace)
    indices, counts, mask, *trace = outputs
    trace = trace[0] if return_trace else indices  # which is not written then
    if counts.numel() == 0:
        return outputs
    similarity, importance = contiguous_rows(similarity), contiguous_rows(importance)
    batch, total = importance.shape
    scratch = counts.new_empty((batch, 4, total))
    with torch.cuda.device_of(similarity):
        _diverse_select_kernel[(batch,)](
            similarity,
            *similarity.stride()[:2],
            importance,
            importance.stride(0),
            indices,
            counts,
            mask,
            trace,
            trace.shape[1],
            scratch,
            total,
            num_tokens,
            int(num_tokens * important_ratio),
            removals_per_round,
            TRACE=return_trace,
            BLOCK_A=BLOCK_A,
            BLOCK=min(next_power_of_2(max(total, 1)), MAX_BLOCK),
            BLOCK_RANK=BLOCK_RANK,
            num_warps=NUM_WARPS,
        )
    return outputs
