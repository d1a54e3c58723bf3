# Computes  importance[b, j] = mean over layers, heads and rows i of A_l[b, h, i, P + j]: maps [B, H, L, L]
#           per layer -> [B, N] float32; the rows are all L or row 0 alone.
# Work      All rows: one program sums BLOCK_ROWS rows of BLOCK_COLS columns of one map into scratch; grid (B
#           * layers * H * row tiles, column tiles). Then, and for row 0 at once: one program averages
#           BLOCK_COLS columns of one image over all it has; grid (B, column tiles).
# Traffic   Reads s * B * layers * H * L * N bytes, s the size of an element (row 0: that over L), writes 4 *
#           B * N; all rows also write and read 4 * B * layers * H * ceil(L / BLOCK_ROWS) * N bytes of
#           scratch.
# Numerics  Sums of at most BLOCK_ROWS terms in float32, of those in float64, in an order fixed by the shape
#           of one image. NaN in a map is NaN in its column.
# Source    HIVTP, arXiv 2509.23663 (mid-layer attention); VisPruner, arXiv 2412.01818 (CLS attention).

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..ops.aggregate_attention import _out
from ._common import cdiv, contiguous_rows, pick_layer

SUM_BLOCK_ROWS, SUM_BLOCK_COLS, SUM_NUM_WARPS = 64, 128, 4
MEAN_BLOCK_ROWS, MEAN_BLOCK_COLS, MEAN_NUM_WARPS = 128, 16, 8


@triton.jit
def _sum_rows_kernel(
    layers,  # per layer: pointer to [B, H, L, L], strides of b, h, i
    partial_ptr,  # [B, layers, H, row tiles, N] float32
    H,
    L,
    N,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(L, BLOCK_ROWS)
    row = (part % tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    h = part // tiles % H
    layer = part // (tiles * H) % len(layers)
    b = part // (tiles * H * len(layers))
    map_ptr, stride_b, stride_h, stride_i = pick_layer(layers, layer)
    source = map_ptr + b * stride_b + h * stride_h + row[:, None] * stride_i + (L - N) + column[None, :]
    attention = tl.load(source, mask=(row[:, None] < L) & (column[None, :] < N), other=0.0)
    tl.store(partial_ptr + part * N + column, tl.sum(attention.to(tl.float32), 0), mask=column < N)


@triton.jit
def _mean_rows_kernel(
    layers,  # per layer: pointer to [B, R, first column + N], strides of b and of a row
    out_ptr,  # [B, N] float32
    first_column,
    R,
    N,
    divisor,  # how many rows of attention the layers * R rows stand for
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float64)
    for layer in tl.static_range(len(layers)):
        source = layers[layer][0] + b * layers[layer][1] + first_column + column[None, :]
        for start in range(0, R, BLOCK_ROWS):
            row = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
            mask = (row < R) & (column[None, :] < N)
            value = tl.load(source + row * layers[layer][2], mask=mask, other=0.0)
            total += value.to(tl.float32).to(tl.float64)
    mean = tl.sum(total, 0) / divisor
    tl.store(out_ptr + b * N + column, mean.to(tl.float32), mask=column < N)


def mean_rows(layers, out, first_column, num_rows, divisor):
    """Average rows of equal weight into ``out`` (B, N); ``layers`` holds (tensor, stride of b, stride of a row)."""
    batch, total = out.shape
    _mean_rows_kernel[(batch, cdiv(total, MEAN_BLOCK_COLS))](
        layers,
        out,
        first_column,
        num_rows,
        total,
        divisor,
        BLOCK_ROWS=MEAN_BLOCK_ROWS,
        BLOCK_COLS=MEAN_BLOCK_COLS,
        num_warps=MEAN_NUM_WARPS,
    )


def aggregate_attention(attentions, num_prefix_tokens, rows):
    """(B, H, L, L) per layer -> (B, N) float32."""
    out = _out(attentions, num_prefix_tokens, rows)
    if out.numel() == 0:
        return out
    attentions = [contiguous_rows(layer) for layer in attentions]
    batch, heads, length, _ = attentions[0].shape
    total = out.shape[1]
    maps = len(attentions) * heads
    with torch.cuda.device_of(out):
        if rows == "cls":
            layers = tuple((layer, *layer.stride()[:2]) for layer in attentions)
            mean_rows(layers, out, num_prefix_tokens, heads, maps)
        else:
            parts = maps * cdiv(length, SUM_BLOCK_ROWS)
            partial = out.new_empty((batch, parts, total))
            _sum_rows_kernel[(batch * parts, cdiv(total, SUM_BLOCK_COLS))](
                tuple((layer, *layer.stride()[:3]) for layer in attentions),
                partial,
                heads,
                length,
                total,
                BLOCK_ROWS=SUM_BLOCK_ROWS,
                BLOCK_COLS=SUM_BLOCK_COLS,
                num_warps=SUM_NUM_WARPS,
            )
            mean_rows(((partial, *partial.stride()[:2]),), out, 0, parts, maps * length)
    return out
