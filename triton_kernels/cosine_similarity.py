# Computes  similarity[b, i, j] = x_i . x_j / (|x_i| |x_j|): features [B, N, C] -> [B, N, N], float32 for
#           float32 features, float16 for half ones.
# Work      One program scales BLOCK_ROWS rows by a power of two and takes their norms; then one program
#           computes a square tile on or above the diagonal and stores it twice; grid B * tiles * tiles,
#           those below do nothing.
# Traffic   Reads and writes s * B * N * C bytes, s the size of an element; reads tiles * s * B * N * C,
#           mostly from L2, and writes s * B * N * N.
# Numerics  The power of two brings the largest magnitude of a row to [1, 2), so that no norm and no product
#           overflows or vanishes, and rounds nothing that matters. Norms in float64, products accumulated in
#           float32 (no TF32), in an order fixed by C. Mirrored, hence symmetric bit for bit. A zero row has
#           cosine 0, a row that holds NaN or inf has -inf with every token.
# Source    VisPruner, arXiv 2412.01818 (similarity of the diverse tokens).

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..ops.cosine_similarity import _out
from ._common import cdiv, contiguous_rows, dot

SCALE_BLOCK_ROWS, SCALE_BLOCK_C, SCALE_NUM_WARPS = 4, 1024, 4
# Tile side, channels per step, warps, pipeline stages.
FLOAT32_TILE = (32, 32, 4, 3)
HALF_TILE = (64, 64, 8, 3)


@triton.jit
def _scale_rows_kernel(
    features_ptr,  # [B, N, C]
    stride_b,
    stride_n,
    scaled_ptr,  # [B, N, C] of the features' dtype
    factor_ptr,  # [B, N] float32: scaled row * factor has norm 1; NaN for a row that is not finite
    N,
    C,
    UNIT: tl.constexpr,  # whether the scaled rows themselves get norm 1
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles = tl.cdiv(N, BLOCK_ROWS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    row = ((tl.program_id(0) % tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    offset = tl.arange(0, BLOCK_C)[None, :]
    source = features_ptr + b * stride_b + row[:, None] * stride_n
    target = scaled_ptr + (b * N + row[:, None]) * C

    # Find the largest magnitude; as integers, NaN and inf exceed every finite number.
    largest = tl.zeros([BLOCK_ROWS], tl.int32)
    for start in range(0, C, BLOCK_C):
        mask = (row[:, None] < N) & (start + offset < C)
        x = tl.load(source + start + offset, mask=mask, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1))
    finite = largest < 0x7F800000
    magnitude = tl.where(finite, largest, 0).to(tl.float32, bitcast=True)

    # Take the norm of the row times a power of two, in two steps because one may be out of range.
    first = tl.where(magnitude > 2.0**64, 2.0**-64, tl.where(magnitude < 2.0**-32, 2.0**64, 1.0))
    exponent = (magnitude * first).to(tl.int32, bitcast=True) >> 23
    second = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    square = tl.zeros([BLOCK_ROWS], tl.float64)
    for start in range(0, C, BLOCK_C):
        mask = (row[:, None] < N) & (start + offset < C) & finite[:, None]
        x = tl.load(source + start + offset, mask=mask, other=0.0).to(tl.float32)
        x = (x * first[:, None] * second[:, None]).to(tl.float64)
        square += tl.sum(x * x, 1)
    inverse_norm = tl.rsqrt(tl.where(square > 0.0, square, 1.0))

    # Scale.
    for start in range(0, C, BLOCK_C):
        mask = (row[:, None] < N) & (start + offset < C)
        x = tl.load(source + start + offset, mask=mask & finite[:, None], other=0.0).to(tl.float32)
        x = x * first[:, None] * second[:, None]
        if UNIT:
            x = x.to(tl.float64) * inverse_norm[:, None]
        tl.store(target + start + offset, x.to(scaled_ptr.dtype.element_ty), mask=mask)
    factor = tl.full([BLOCK_ROWS], 1.0, tl.float32) if UNIT else inverse_norm.to(tl.float32)
    tl.store(factor_ptr + b * N + row, tl.where(finite, factor, float("nan")), mask=row < N)


@triton.jit
def _similarity_kernel(
    scaled_ptr,  # [B, N, C]
    factor_ptr,  # [B, N]
    similarity_ptr,  # [B, N, N]
    N,
    C,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles = tl.cdiv(N, BLOCK)
    tile_i = tl.program_id(0) // tiles % tiles
    tile_j = tl.program_id(0) % tiles
    if tile_j < tile_i:
        return
    b = (tl.program_id(0) // (tiles * tiles)).to(tl.int64)
    i = (tile_i * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    j = (tile_j * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    c = tl.arange(0, BLOCK_C)

    # Multiply; rows past the end repeat the last one and are not stored.
    row_ptr = scaled_ptr + (b * N + tl.minimum(i, N - 1)[:, None]) * C + c[None, :]
    column_ptr = scaled_ptr + (b * N + tl.minimum(j, N - 1)[None, :]) * C + c[:, None]
    product = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, C, BLOCK_C):
        x = tl.load(row_ptr + start, mask=start + c[None, :] < C, other=0.0)
        y = tl.load(column_ptr + start, mask=start + c[:, None] < C, other=0.0)
        product = dot(x, y, product)

    # Divide by the norms; only rows that are not finite make a NaN.
    factor_i = tl.load(factor_ptr + b * N + i, mask=i < N, other=0.0)
    factor_j = tl.load(factor_ptr + b * N + j, mask=j < N, other=0.0)
    similarity = product * (factor_i[:, None] * factor_j[None, :])
    similarity = tl.where(similarity != similarity, float("-inf"), similarity)
    similarity = similarity.to(similarity_ptr.dtype.element_ty)

    # Store the tile, of one on the diagonal the upper triangle, and its mirror image.
    target = similarity_ptr + b * N * N + i[:, None] * N + j[None, :]
    mirrored = similarity_ptr + b * N * N + j[:, None] * N + i[None, :]
    if tile_i == tile_j:
        tl.store(target, similarity, mask=(i[:, None] <= j[None, :]) & (j[None, :] < N))
        tl.store(mirrored, tl.trans(similarity), mask=(i[None, :] < j[:, None]) & (j[:, None] < N))
    else:
        tl.store(target, similarity, mask=j[None, :] < N)  # i < j
        tl.store(mirrored, tl.trans(similarity), mask=j[:, None] < N)


def cosine_similarity(features):
    """(B, N, C) -> (B, N, N)."""
    similarity = _out(features)
    if similarity.numel() == 0:
        return similarity
    features = contiguous_rows(features)
    batch, total, channels = features.shape
    scaled = features.new_empty(features.shape)
    factor = features.new_empty((batch, total), dtype=torch.float32)
    block, block_c, num_warps, num_stages = FLOAT32_TILE if features.dtype == torch.float32 else HALF_TILE
    with torch.cuda.device_of(features):
        _scale_rows_kernel[(batch * cdiv(total, SCALE_BLOCK_ROWS),)](
            features,
            *features.stride()[:2],
            scaled,
            factor,
            total,
            channels,
            UNIT=features.dtype == torch.float32,
            BLOCK_ROWS=SCALE_BLOCK_ROWS,
            BLOCK_C=SCALE_BLOCK_C,
            num_warps=SCALE_NUM_WARPS,
        )
        _similarity_kernel[(batch * cdiv(total, block) ** 2,)](
            scaled,
            factor,
            similarity,
            total,
            channels,
            BLOCK=block,
            BLOCK_C=block_c,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return similarity
