# Computes  out[b, m] = features[b, indices[b, m]], or pad_value where indices[b, m] = -1: features [B, N,
#           C], indices [B, M] -> out [B, M, C].
# Work      One program copies BLOCK_M rows times BLOCK_C channels of one image; grid (B * row tiles, channel
#           tiles).
# Traffic   Reads 8 * B * M + s * B * M * C bytes, writes s * B * M * C, s the size of an element.
# Numerics  A copy, bit for bit. Indices outside [-1, N) are undefined on a GPU; they are never followed.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..ops.gather_tokens import _out
from ._common import cdiv, contiguous_rows, next_power_of_2

BLOCK_M = 4
MAX_BLOCK_C = 1024
NUM_WARPS = 4


@triton.jit(do_not_specialize=["N", "M"])
def _gather_tokens_kernel(
    features_ptr,  # [B, N, C]
    features_stride_b,
    features_stride_n,
    indices_ptr,  # [B, M] int64
    indices_stride_b,
    out_ptr,  # [B, M, C]
    N,
    M,
    C,
    pad_value,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles = tl.cdiv(M, BLOCK_M)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    m = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)

    # Read the indices.
    token = tl.load(indices_ptr + b * indices_stride_b + m, mask=m < M, other=-1)
    present = (token >= 0) & (token < N)

    # Copy the rows.
    inside = c[None, :] < C
    source = features_ptr + b * features_stride_b + token[:, None] * features_stride_n + c[None, :]
    row = tl.load(source, mask=present[:, None] & inside, other=pad_value)
    target = out_ptr + (b * M + m[:, None]) * C + c[None, :]
    tl.store(target, row, mask=(m[:, None] < M) & inside)


def gather_tokens(features, indices, pad_value):
    """(B, N, C) and (B, M) int64 -> (B, M, C)."""
    batch, total, channels = features.shape
    width = indices.shape[1]
    if features.is_cpu:
        outside = indices[(indices < -1) | (indices >= total)]
        if len(outside):
            raise ValueError(f"gather_tokens: indices must be in [-1, N) with N={total}, got {outside[0].item()}")
        # The interpreter truncates when it converts to bfloat16.
        pad_value = torch.tensor(pad_value, dtype=torch.float32).to(features.dtype).item()
    out = _out(features, indices, pad_value)
    if out.numel() == 0:
        return out
    features, indices = contiguous_rows(features), contiguous_rows(indices)
    block_c = min(next_power_of_2(channels), MAX_BLOCK_C)
    grid = (batch * cdiv(width, BLOCK_M), cdiv(channels, block_c))
    with torch.cuda.device_of(features):
        _gather_tokens_kernel[grid](
            features,
            *features.stride()[:2],
            indices,
            indices.stride(0),
            out,
            total,
            width,
            channels,
            float(pad_value),
            BLOCK_M=BLOCK_M,
            BLOCK_C=block_c,
            num_warps=NUM_WARPS,
        )
    return out
