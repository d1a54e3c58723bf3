# Computes  importance[b, j] = mean over layers, heads and rows i of softmax(scale * Q_l K_l^T)[b, h, i, P +
#           j]: Q, K [B, H, L, D] per layer -> [B, N] float32; the rows are all L or row 0 alone.
# Work      All rows: one program sums the columns of BLOCK_Q rows of one map into scratch, grid B * layers *
#           H * row tiles. Up to SINGLE_PASS_MAX keys it holds the scores of its rows in registers and
#           computes each once; beyond, and in float32, one pass over the keys finds maximum and sum of each
#           row and a second one recomputes the scores; given the logsumexp, the second alone is needed. Then
#           the mean over all row tiles. Row 0: one program per BLOCK_K scores, then one program per image
#           for softmax and mean.
# Traffic   Reads s * B * layers * H * L * D bytes of Q and, mostly from L2, that times row tiles of K, s the
#           size of an element; writes and reads 4 * B * layers * H * row tiles * N bytes of scratch. Row 0:
#           K once.
# Numerics  Scores, exponentials and sums in float32 (no TF32), the mean in float64, in an order fixed by the
#           shape of one image. NaN and inf go where the softmax takes them.
# Source    HIVTP, arXiv 2509.23663 (mid-layer attention); VisPruner, arXiv 2412.01818 (CLS attention).

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl

from ..ops.attention_importance import _out
from ._common import cdiv, contiguous_rows, dot, next_power_of_2, pick_layer
from .aggregate_attention import mean_rows

SINGLE_PASS_MAX = 1024  # keys whose scores fit in registers, of half inputs
# Rows, keys per tile, warps.
SINGLE_PASS = (32, 128, 8)
TWO_PASS = (64, 64, 8)
SINGLE_PASS_MAX_D = 128
STEP_D = 64  # dimensions multiplied at once, as many as one row of a swizzled operand holds
FLOAT32_STEP_D = 16  # a product without tensor cores holds its whole operands in registers
MIN_STEP_D = 16  # what tl.dot takes
CLS_BLOCK_K, CLS_NUM_WARPS = 64, 4
CLS_MEAN_TILE, CLS_MEAN_NUM_WARPS = 8192, 8  # elements held at once


@triton.jit
def _find_tile(queries, keys, part, H, tiles, ALIGN: tl.constexpr):
    """Q, its row stride, K, its row stride and the first row of one of B * layers * H * tiles parts."""
    tile = part % tiles
    h = part // tiles % H
    layer = part // (tiles * H) % len(queries)
    b = part // (tiles * H * len(queries))
    query_ptr, query_stride_b, query_stride_h, query_stride_i = pick_layer(queries, layer, ALIGN)
    key_ptr, key_stride_b, key_stride_h, key_stride_j = pick_layer(keys, layer, ALIGN)
    query_ptr += b * query_stride_b + h * query_stride_h
    key_ptr += b * key_stride_b + h * key_stride_h
    return query_ptr, query_stride_i, key_ptr, key_stride_j, b, layer, h, tile


@triton.jit
def _load_rows(ptr, stride, row, L, d, D: tl.constexpr):
    """[len(row), len(d)]; rows past the end repeat the last one, so that nothing but real values is multiplied."""
    row = tl.minimum(row, L - 1).to(tl.int64)[:, None]
    return tl.load(ptr + row * stride + d[None, :], mask=d[None, :] < D, other=0.0)


@triton.jit
def _load_queries(ptr, stride, row, L, D: tl.constexpr, STEP_D: tl.constexpr, LAST_D: tl.constexpr):
    """A tuple of [len(row), STEP_D], and of [len(row), LAST_D] for what is left of D."""
    queries = ()
    for i in tl.static_range(D // STEP_D):
        queries += (_load_rows(ptr, stride, row, L, i * STEP_D + tl.arange(0, STEP_D), D),)
    if LAST_D > 0:
        queries += (_load_rows(ptr, stride, row, L, D // STEP_D * STEP_D + tl.arange(0, LAST_D), D),)
    return queries


@triton.jit
def _score(queries, key_ptr, key_stride, key, L, scale, D: tl.constexpr, BLOCK_Q: tl.constexpr, STEP_D: tl.constexpr):
    """scale * K Q^T, [len(key), BLOCK_Q]: with the keys first, the sums over rows need few exchanges."""
    score = tl.zeros([key.shape[0], BLOCK_Q], tl.float32)
    for i in tl.static_range(len(queries)):
        keys = _load_rows(key_ptr, key_stride, key, L, i * STEP_D + tl.arange(0, queries[i].shape[1]), D)
        score = dot(keys, tl.trans(queries[i]), score)
    return score * scale


@triton.jit
def _single_pass_kernel(
    queries,  # per layer: pointer to [B, H, L, D], strides of b, h, i
    keys,
    partial_ptr,  # [B, layers, H, row tiles, N] float32
    H,
    L,
    N,
    scale,
    D: tl.constexpr,
    ALIGN: tl.constexpr,  # divides D and every stride
    KEY_TILES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEP_D: tl.constexpr,
    LAST_D: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    query_ptr, query_stride, key_ptr, key_stride, _, _, _, tile = _find_tile(
        queries, keys, part, H, tl.cdiv(L, BLOCK_Q), ALIGN
    )
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query = _load_queries(query_ptr, query_stride, row, L, D, STEP_D, LAST_D)

    # Score every key.
    scores = ()
    highest = tl.full([BLOCK_K, BLOCK_Q], float("-inf"), tl.float32)
    for i in tl.static_range(KEY_TILES):
        key = i * BLOCK_K + tl.arange(0, BLOCK_K)
        score = _score(query, key_ptr, key_stride, key, L, scale, D, BLOCK_Q, STEP_D)
        if i == KEY_TILES - 1:
            score = tl.where(key[:, None] < L, score, float("-inf"))
        highest = tl.maximum(highest, score)
        scores += (score,)
    row_highest = tl.max(highest, 0)

    # Exponentiate and sum over the keys.
    weights = ()
    total = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
    for i in tl.static_range(KEY_TILES):
        weight = tl.exp(scores[i] - row_highest[None, :])
        total += weight
        weights += (weight,)

    # Normalise and sum over the rows.
    share = tl.where(row < L, 1.0 / tl.sum(total, 0), 0.0)
    for i in tl.static_range(KEY_TILES):
        column = i * BLOCK_K + tl.arange(0, BLOCK_K) - (L - N)
        received = tl.sum(weights[i] * share[None, :], 1)
        tl.store(partial_ptr + part * N + column, received, mask=(column >= 0) & (column < N))


@triton.jit
def _two_pass_kernel(
    queries,  # per layer: pointer to [B, H, L, D], strides of b, h, i
    keys,
    logsumexp,  # per layer: pointer to [B, H, L] float32, strides of b, h, i, if HAS_LOGSUMEXP
    partial_ptr,  # [B, layers, H, row tiles, N] float32
    H,
    L,
    N,
    scale,
    D: tl.constexpr,
    ALIGN: tl.constexpr,  # divides D and every stride
    HAS_LOGSUMEXP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEP_D: tl.constexpr,
    LAST_D: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    query_ptr, query_stride, key_ptr, key_stride, b, layer, h, tile = _find_tile(
        queries, keys, part, H, tl.cdiv(L, BLOCK_Q), ALIGN
    )
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query = _load_queries(query_ptr, query_stride, row, L, D, STEP_D, LAST_D)

    # Find what to subtract from the scores of each row, and the share of each exponential.
    if HAS_LOGSUMEXP:
        normaliser_ptr, stride_b, stride_h, stride_i = pick_layer(logsumexp, layer)
        normaliser_ptr += b * stride_b + h * stride_h
        highest = tl.load(normaliser_ptr + tl.minimum(row, L - 1) * stride_i)
        share = tl.where(row < L, 1.0, 0.0)
    else:
        highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        for start in range(0, L, BLOCK_K):
            key = start + tl.arange(0, BLOCK_K)
            score = _score(query, key_ptr, key_stride, key, L, scale, D, BLOCK_Q, STEP_D)
            score = tl.where(key[:, None] < L, score, float("-inf"))
            higher = tl.maximum(highest, tl.max(score, 0))
            base = tl.where(higher == float("-inf"), 0.0, higher)  # every score so far may be -inf
            total = total * tl.exp(highest - base) + tl.sum(tl.exp(score - base[None, :]), 0)
            highest = higher
        share = tl.where(row < L, 1.0 / total, 0.0)

    # Exponentiate, normalise and sum the columns.
    for start in range(0, L, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        score = _score(query, key_ptr, key_stride, key, L, scale, D, BLOCK_Q, STEP_D)
        received = tl.sum(tl.exp(score - highest[None, :]) * share[None, :], 1)
        column = key - (L - N)
        tl.store(partial_ptr + part * N + column, received, mask=(column >= 0) & (column < N))


@triton.jit
def _cls_scores_kernel(
    queries,  # per layer: pointer to [B, H, L, D], strides of b, h, i
    keys,
    logsumexp,  # per layer: pointer to [B, H, L] float32, strides of b, h, i, if HAS_LOGSUMEXP
    scores_ptr,  # [B, layers, H, L] float32: less logsumexp, if there is one
    H,
    L,
    scale,
    D: tl.constexpr,
    ALIGN: tl.constexpr,  # divides D and every stride
    HAS_LOGSUMEXP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(L, BLOCK_K)
    query_ptr, _, key_ptr, key_stride, b, layer, h, tile = _find_tile(queries, keys, part, H, tiles, ALIGN)
    key = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    query = tl.load(query_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    product = _load_rows(key_ptr, key_stride, key, L, d, D).to(tl.float32) * query[None, :]
    score = tl.sum(product, 1) * scale
    if HAS_LOGSUMEXP:
        normaliser_ptr, stride_b, stride_h, _ = pick_layer(logsumexp, layer)
        score -= tl.load(normaliser_ptr + b * stride_b + h * stride_h)
    tl.store(scores_ptr + part // tiles * L + key, score, mask=key < L)


@triton.jit
def _cls_mean_kernel(
    scores_ptr,  # [B, R, L] float32
    out_ptr,  # [B, N] float32
    R,
    L,
    N,
    HAS_LOGSUMEXP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    key = tl.arange(0, BLOCK_L)
    received = tl.zeros([BLOCK_L], tl.float64)
    for start in range(0, R, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        source = scores_ptr + (b * R + tl.minimum(row, R - 1)[:, None]) * L + key[None, :]
        score = tl.load(source, mask=key[None, :] < L, other=float("-inf"))
        if HAS_LOGSUMEXP:
            weight = tl.exp(score)
        else:
            weight = tl.exp(score - tl.max(score, 1, keep_dims=True))
            weight /= tl.sum(weight, 1, keep_dims=True)
        received += tl.sum(tl.where(row[:, None] < R, weight, 0.0).to(tl.float64), 0)
    column = key - (L - N)
    tl.store(out_ptr + b * N + column, (received / R).to(tl.float32), mask=(column >= 0) & (column < N))


def attention_importance(queries, keys, num_prefix_tokens, rows, scale, logsumexp):
    """Q and K (B, H, L, D) per layer, logsumexp (B, H, L) per layer or None -> (B, N) float32."""
    out = _out(queries, keys, num_prefix_tokens, rows, scale, logsumexp)
    if out.numel() == 0:
        return out
    # The lists keep copies of oddly strided inputs alive until the launch.
    queries = [contiguous_rows(layer) for layer in queries]
    keys = [contiguous_rows(layer) for layer in keys]
    batch, heads, length, dim = queries[0].shape
    total = out.shape[1]
    maps = len(queries) * heads
    scale = dim**-0.5 if scale is None else float(scale)
    query_layers = tuple((layer, *layer.stride()[:3]) for layer in queries)
    key_layers = tuple((layer, *layer.stride()[:3]) for layer in keys)
    align = gcd(16, dim, *(stride for layer in query_layers + key_layers for stride in layer[1:]))
    normalisers = query_layers  # not read
    if logsumexp is not None:
        normalisers = tuple((layer, *layer.stride()) for layer in logsumexp)
    with torch.cuda.device_of(out):
        if rows == "cls":
            scores = out.new_empty((batch, maps, length))
            _cls_scores_kernel[(batch * maps * cdiv(length, CLS_BLOCK_K),)](
                query_layers,
                key_layers,
                normalisers,
                scores,
                heads,
                length,
                scale,
                D=dim,
                ALIGN=align,
                HAS_LOGSUMEXP=logsumexp is not None,
                BLOCK_K=CLS_BLOCK_K,
                BLOCK_D=next_power_of_2(dim),
                num_warps=CLS_NUM_WARPS,
            )
            block_l = next_power_of_2(length)
            _cls_mean_kernel[(batch,)](
                scores,
                out,
                maps,
                length,
                total,
                HAS_LOGSUMEXP=logsumexp is not None,
                BLOCK_R=max(CLS_MEAN_TILE // block_l, 1),
                BLOCK_L=block_l,
                num_warps=CLS_MEAN_NUM_WARPS,
            )
            return out

        is_float32 = queries[0].dtype == torch.float32
        step_d = FLOAT32_STEP_D if is_float32 else STEP_D
        last_d = next_power_of_2(max(dim % step_d, MIN_STEP_D)) if dim % step_d else 0
        fits = length <= SINGLE_PASS_MAX and dim <= SINGLE_PASS_MAX_D and not is_float32
        single_pass = fits and logsumexp is None
        block_q, block_k, num_warps = SINGLE_PASS if single_pass else TWO_PASS
        parts = maps * cdiv(length, block_q)
        partial = out.new_empty((batch, parts, total))
        if single_pass:
            _single_pass_kernel[(batch * parts,)](
                query_layers,
                key_layers,
                partial,
                heads,
                length,
                total,
                scale,
                D=dim,
                ALIGN=align,
                KEY_TILES=cdiv(length, block_k),
                BLOCK_Q=block_q,
                BLOCK_K=block_k,
                STEP_D=step_d,
                LAST_D=last_d,
                num_warps=num_warps,
            )
        else:
            _two_pass_kernel[(batch * parts,)](
                query_layers,
                key_layers,
                normalisers,
                partial,
                heads,
                length,
                total,
                scale,
                D=dim,
                ALIGN=align,
                HAS_LOGSUMEXP=logsumexp is not None,
                BLOCK_Q=block_q,
                BLOCK_K=block_k,
                STEP_D=step_d,
                LAST_D=last_d,
                num_warps=num_warps,
            )
        mean_rows(((partial, *partial.stride()[:2]),), out, 0, parts, maps * length)
    return out
