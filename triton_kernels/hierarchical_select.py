# Computes  HIVTP's two stages on scores [B, N] of a grid (gh, gw): the floor(keep_ratio * size) highest of
#           each region, then the highest remaining score of each window; in fixed mode the first K of (kept,
#           winners, rest).
# Work      One program per image. Its tile is [REGIONS, WINDOWS, MEMBERS]: a region's tokens, window by
#           window, each padded to a power of two. A top-k is two binary searches by counting: for its lowest
#           key, then for the lowest token index at which the ties at that key are used up.
# Traffic   Reads s * N bytes per image, writes N + 8 * M + 4 and reads the N of the mask again.
# Numerics  Integers only: scores become int32 keys of the same order. Equal scores: lower token index first;
#           NaN below -inf; -0 equals +0.
# Source    HIVTP, arXiv 2509.23663, global and local stage.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..ops.hierarchical_select import _out, resolve_grid
from ._common import NO_KEY, cdiv, contiguous_rows, next_power_of_2, ordered_key, write_selection

TOKENS_PER_WARP = 128
SELECTION_BLOCK = 1024


@triton.jit
def _count(flag, PER_REGION: tl.constexpr):
    count = tl.sum(tl.sum(flag.to(tl.int32), 2, keep_dims=True), 1, keep_dims=True)
    if not PER_REGION:
        count = tl.sum(count, 0, keep_dims=True)
    return count


@triton.jit
def _top(key, token, candidate, quota, TOKEN_BITS: tl.constexpr, PER_REGION: tl.constexpr):
    """The ``quota`` candidates of highest key, lower token first among equals; there are as many at least."""
    key = tl.where(candidate, key, NO_KEY)

    # Find the highest threshold that at least quota keys reach.
    one = tl.full([1, 1, 1], 1, tl.int32)
    threshold = tl.zeros_like(quota) + NO_KEY
    for i in range(32):
        trial = threshold ^ (one << (31 - i))
        threshold = tl.where(_count(key >= trial, PER_REGION) >= quota, trial, threshold)

    # Find the token below which the ties just fill what is left.
    above = key > threshold
    tie = key == threshold
    left = quota - _count(above, PER_REGION)
    bound = tl.zeros_like(quota)
    for i in range(TOKEN_BITS):
        trial = bound | (one << (TOKEN_BITS - 1 - i))
        bound = tl.where(_count(tie & (token < trial), PER_REGION) <= left, trial, bound)
    return above | (tie & (token < bound))


# Specialising on these would compile anew for a budget or a grid that happens to be a multiple of 16.
@triton.jit(
    do_not_specialize=[
        "gh",
        "gw",
        "num_region_rows",
        "num_region_cols",
        "window_height",
        "window_width",
        "windows_across",
        "quota_low_narrow",
        "quota_low_wide",
        "quota_high_narrow",
        "quota_high_wide",
        "num_tokens",
        "M",
    ]
)
def _hierarchical_select_kernel(
    scores_ptr,  # [B, N]
    scores_stride_b,
    indices_ptr,  # [B, M] int64
    counts_ptr,  # [B] int32
    mask_ptr,  # [B, N] bool
    gh,
    gw,
    num_region_rows,
    num_region_cols,
    window_height,  # at most the height of the highest region, likewise the width
    window_width,
    windows_across,  # in the widest region
    quota_low_narrow,  # tokens kept by a region of floor(gh / Rh) rows and floor(gw / Rw) columns
    quota_low_wide,  # ... and one column more
    quota_high_narrow,
    quota_high_wide,
    num_tokens,  # K in fixed mode
    M,
    FIXED: tl.constexpr,
    REGIONS: tl.constexpr,
    WINDOWS: tl.constexpr,
    MEMBERS: tl.constexpr,
    TOKEN_BITS: tl.constexpr,  # N < 2 ** TOKEN_BITS
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    N = gh * gw

    # Lay out the regions.
    region = tl.arange(0, REGIONS)[:, None, None]
    window = tl.arange(0, WINDOWS)[None, :, None]
    member = tl.arange(0, MEMBERS)[None, None, :]
    i = region // num_region_cols
    j = region % num_region_cols
    top = i * gh // num_region_rows
    left = j * gw // num_region_cols
    height = (i + 1) * gh // num_region_rows - top
    width = (j + 1) * gw // num_region_cols - left
    y = (window // windows_across) * window_height + member // window_width
    x = (window % windows_across) * window_width + member % window_width
    valid = (member < window_height * window_width) & (y < height) & (x < width)
    valid = valid & (region < num_region_rows * num_region_cols)
    token = (top + y) * gw + left + x
    score = tl.load(scores_ptr + b * scores_stride_b + token, mask=valid, other=0.0)
    key = tl.where(valid, ordered_key(score.to(tl.float32)), NO_KEY)

    # Keep the best of each region.
    high = height > gh // num_region_rows
    wide = width > gw // num_region_cols
    quota = tl.where(
        high,
        tl.where(wide, quota_high_wide, quota_high_narrow),
        tl.where(wide, quota_low_wide, quota_low_narrow),
    )
    quota = tl.where(region < num_region_rows * num_region_cols, quota, 0)
    kept = _top(key, token, valid, quota, TOKEN_BITS, True)

    # Keep the best remaining token of each window; its members lie in token order.
    remaining = tl.where(kept, NO_KEY, key)
    best = tl.max(remaining, 2, keep_dims=True)
    first = tl.min(tl.where(remaining == best, member, MEMBERS), 2, keep_dims=True)
    winner = (member == first) & (best > NO_KEY)

    # Cut or fill to K: all of the better groups, the best of the group that crosses K.
    keep = kept | winner
    if FIXED:
        num_kept = _count(kept, False)
        num_union = _count(keep, False)
        from_kept = num_tokens <= num_kept
        from_winners = (num_tokens > num_kept) & (num_tokens <= num_union)
        complete = tl.where(from_kept, 0, tl.where(from_winners, num_kept, num_union))
        group = tl.where(kept, 0, tl.where(winner, 1, 2))
        crossing = tl.where(from_kept, 0, tl.where(from_winners, 1, 2))
        candidate = valid & (group == crossing)
        keep = (group < crossing) | _top(key, token, candidate, num_tokens - complete, TOKEN_BITS, False)
    tl.store(mask_ptr + b * N + token, keep, mask=valid)

    # Emit the indices in raster order.
    tl.debug_barrier()  # the mask was written in region order
    write_selection(mask_ptr + b * N, indices_ptr + b * M, counts_ptr + b, N, M, BLOCK)


def hierarchical_select(scores, grid, regions, keep_ratio, window, num_tokens):
    """(B, N) -> indices (B, M) int64, counts (B,) int32, mask (B, N) bool."""
    indices, counts, mask = outputs = _out(scores, grid, regions, keep_ratio, window, num_tokens)
    if counts.numel() == 0:
        return outputs
    scores = contiguous_rows(scores)
    grid = resolve_grid("hierarchical_select", grid, mask.shape[1])
    low, narrow = grid[0] // regions[0], grid[1] // regions[1]
    height, width = cdiv(grid[0], regions[0]), cdiv(grid[1], regions[1])
    window = min(window[0], height), min(window[1], width)
    windows_across = cdiv(width, window[1])
    num_regions = next_power_of_2(regions[0] * regions[1])
    num_windows = next_power_of_2(cdiv(height, window[0]) * windows_across)
    num_members = next_power_of_2(window[0] * window[1])
    tile = num_regions * num_windows * num_members
    num_warps = min(max(tile // TOKENS_PER_WARP, 1), 32)
    with torch.cuda.device_of(scores):
        _hierarchical_select_kernel[(mask.shape[0],)](
            scores,
            scores.stride(0),
            indices,
            counts,
            mask,
            *grid,
            *regions,
            *window,
            windows_across,
            *(int(keep_ratio * (h * w)) for h in (low, low + 1) for w in (narrow, narrow + 1)),
            num_tokens or 0,
            indices.shape[1],
            FIXED=num_tokens is not None,
            REGIONS=num_regions,
            WINDOWS=num_windows,
            MEMBERS=num_members,
            TOKEN_BITS=mask.shape[1].bit_length(),
            BLOCK=min(next_power_of_2(mask.shape[1]), SELECTION_BLOCK),
            num_warps=num_warps,
        )
    return outputs
