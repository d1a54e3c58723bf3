// Tiles of queries and keys in shared memory, and the scores that a warp makes of them.
#pragma once

#include "attention_importance.cuh"

namespace hvprune::attention {

constexpr int kTileRows = 32;  // query rows scored at a time
constexpr int kPairKeys = 16;  // keys of two mma tiles

// Rows are cut in steps of two 16-byte pieces, and a step of all rows lies together: offsets between rows are
// constants, and eight rows cover all banks (see piece_at).

// Elements from a step to the next; one row more than there are, for the banks when a row is written.
template <class T>
HVP_FUNC constexpr int step_stride(int rows) {
    return (rows + 1) * 2 * (16 / static_cast<int>(sizeof(T)));
}

// Where piece 0 or 1 of a row begins in its step.
template <class T>
HVP_FUNC constexpr int piece_at(int row, int piece) {
    return (row * 2 + (piece ^ (row >> 2 & 1))) * (16 / static_cast<int>(sizeof(T)));
}

// x, opaque to the compiler: what depends on it is computed anew in every turn of a loop and takes no register between.
__device__ inline int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Starts the copy of rows [begin, begin + count) of source [L, D] to s_rows; what lies outside becomes zero.
template <class T>
__device__ void load_rows(T* s_rows, const T* source, int64_t row_stride, int begin, int count, const Params& params) {
    constexpr int kPiece = 16 / sizeof(T);
    const int pieces = params.layout.num_steps * 2, rows_at_once = kThreads / pieces;
    const int thread = opaque(threadIdx.x), first = thread / pieces, piece = thread % pieces;
    if (first >= rows_at_once) return;
    const int in_row = max(0, min(kPiece, params.D - piece * kPiece));
    T* s_step = s_rows + piece / 2 * step_stride<T>(count);
    for (int row = first; row < count; row += rows_at_once) {
        const int valid = begin + row < params.L ? in_row : 0;
        const T* from = valid > 0 ? source + (begin + row) * row_stride + piece * kPiece : source;
        T* to = s_step + piece_at<T>(row, piece % 2);
        if (params.aligned) {
            hvp::cp_async16(to, from, valid * sizeof(T));
        } else {
            for (int i = 0; i < kPiece; ++i) to[i] = i < valid ? from[i] : T(0.0f);
        }
    }
}

// A warp's scores of a tile in the registers of mma.m16n8k16: with g = lane / 4 and t = lane % 4, s[r][c] is that of
// row 8r + g and key 8(c / 2) + 2t + c % 2. Keys from 16 * num_pairs on stay 0.
template <class T, int kPairs>
__device__ void score_tile(const T* s_query, const T* s_key, int key_step, int num_steps, int num_pairs,
                           float (&s)[4][4 * kPairs]) {
    constexpr int kQueryStep = step_stride<T>(kUnitRows);
    const int lane = opaque(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < 16 * kPairs; ++i) s[i % 4][i / 4] = 0.0f;
    if constexpr (sizeof(T) == 2) {
        const T* a_row = s_query + piece_at<T>(lane % 16, lane / 16);
        const T* b_row = s_key + piece_at<T>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll 1
        for (int step = 0; step < num_steps; ++step) {
            uint32_t a[2][4], b[4];
            hvp::ldmatrix_x4(a[0], a_row);
            hvp::ldmatrix_x4(a[1], a_row + piece_at<T>(16, 0));
#pragma unroll
            for (int pair = 0; pair < kPairs; ++pair) {
                if (pair >= num_pairs) break;
                hvp::ldmatrix_x4(b, b_row + piece_at<T>(kPairKeys * pair, 0));
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int r = i / 2 * 2, c = 4 * pair + i % 2 * 2;
                    float acc[4] = {s[r][c], s[r][c + 1], s[r + 1][c], s[r + 1][c + 1]};
                    hvp::mma_m16n8k16<T>(acc, a[i / 2], {b[i % 2 * 2], b[i % 2 * 2 + 1]});
                    s[r][c] = acc[0], s[r][c + 1] = acc[1], s[r + 1][c] = acc[2], s[r + 1][c + 1] = acc[3];
                }
            }
            a_row += kQueryStep;
            b_row += key_step;
        }
    } else {
#pragma unroll 1
        for (int i = 0; i < 2 * num_steps; ++i) {
            const float* rows = s_query + i / 2 * kQueryStep + piece_at<T>(lane / 4, i % 2);
            const float* keys = s_key + i / 2 * key_step + piece_at<T>(lane % 4 * 2, i % 2);
            float4 q[4];
#pragma unroll
            for (int r = 0; r < 4; ++r) q[r] = *reinterpret_cast<const float4*>(rows + piece_at<T>(8 * r, 0));
#pragma unroll
            for (int c = 0; c < 4 * kPairs; ++c) {
                if (c / 4 >= num_pairs) break;
                const float4 x = *reinterpret_cast<const float4*>(keys + piece_at<T>(c / 2 * 8 + c % 2, 0));
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    const float low = __fmaf_rn(q[r].y, x.y, __fmaf_rn(q[r].x, x.x, s[r][c]));
                    s[r][c] = __fmaf_rn(q[r].w, x.w, __fmaf_rn(q[r].z, x.z, low));
                }
            }
        }
    }
}

}  // namespace hvprune::attention
