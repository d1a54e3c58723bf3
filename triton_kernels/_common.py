"""What the Triton kernels and their launchers share."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# The interpreter's dot multiplies the bit patterns of bfloat16; there operands go to float32 first.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Keys of a NaN, which ranks below -inf, and of an element that does not take part at all.
NAN_KEY = tl.constexpr(-(2**31) + 1)
NO_KEY = tl.constexpr(-(2**31))


def contiguous_rows(x: Tensor) -> Tensor:
    """``x`` itself if its last dimension is contiguous, else a copy."""
    return x if x.stride()[-1] == 1 or x.shape[-1] <= 1 else x.contiguous()


# Triton's own functions of these names take microseconds, because they serve kernels too.
def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The lowest power of two that is at least n, which is at least 1."""
    return 1 << (n - 1).bit_length()


@triton.jit
def ordered_key(x):
    """float32 -> int32 of the same order: NaN below -inf, -0 equal to +0."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits == NO_KEY, 0, bits)  # -0
    key = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    return tl.where(x != x, NAN_KEY, key)


@triton.jit
def dot(a, b, total):
    """total + a @ b in float32, without TF32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def pick_layer(layers, layer, ALIGN: tl.constexpr = 1):
    """Entry ``layer`` of a tuple of (pointer, stride, stride, stride), ``layer`` known at run time only.

    Every stride is a multiple of ALIGN; Triton itself finds out about multiples of 16 alone.
    """
    pointer = layers[0][0]
    stride_0 = tl.full([], layers[0][1], tl.int64)
    stride_1 = tl.full([], layers[0][2], tl.int64)
    stride_2 = tl.full([], layers[0][3], tl.int64)
    for i in tl.static_range(1, len(layers)):
        here = layer == i
        pointer = tl.where(here, layers[i][0], pointer)
        stride_0 = tl.where(here, layers[i][1], stride_0)
        stride_1 = tl.where(here, layers[i][2], stride_1)
        stride_2 = tl.where(here, layers[i][3], stride_2)
    stride_0 = tl.multiple_of(stride_0, ALIGN)
    stride_1 = tl.multiple_of(stride_1, ALIGN)
    stride_2 = tl.multiple_of(stride_2, ALIGN)
    return pointer, stride_0, stride_1, stride_2


@triton.jit
def write_selection(
    mask_ptr,  # [N] of one image, complete: the caller has passed a barrier since it was written
    indices_ptr,  # [M] of one image
    count_ptr,  # one element
    N,
    M,
    BLOCK: tl.constexpr,
):
    """Turn a mask into ascending indices, padded with -1, and their count."""
    offset = tl.arange(0, BLOCK)
    count = 0
    for start in range(0, N, BLOCK):
        token = start + offset
        kept = tl.load(mask_ptr + token, mask=token < N, other=0).to(tl.int32)
        slot = count + tl.cumsum(kept, 0) - kept
        tl.store(indices_ptr + slot, token.to(tl.int64), mask=(kept != 0) & (slot < M))
        count += tl.sum(kept, 0)
    for start in range(0, M, BLOCK):
        slot = start + offset
        tl.store(indices_ptr + slot, tl.full([BLOCK], -1, tl.int64), mask=(slot >= count) & (slot < M))
    tl.store(count_ptr, count)
