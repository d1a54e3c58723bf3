// The register tile of every matrix product on a CPU: up to kTileRows rows x (1..kTileVecs vectors) of A B^T.
//
// Each element is one chain of fused multiply-adds over k in ascending order, whatever the tile it falls in: results do
// not depend on position, batch or threads, and x.y equals y.x bit for bit.
#pragma once

#include "vec.h"

namespace hvprune::HVP_ISA {

constexpr int kPanelCols = kTileVecs * kWidth;  // columns of a packed panel of B

// sums[r][c] = sum over k < depth of a[r * row_stride + k * k_stride] * panel[k * kPanelCols + c], c < Vecs * kWidth
template <int Vecs, int Rows>
HVP_FUNC void tile_product(const float* a, int64_t row_stride, int64_t k_stride, const float* panel, int64_t depth,
                           Vec (&sums)[Rows][Vecs]) {
    for (int r = 0; r < Rows; ++r) {
        for (int v = 0; v < Vecs; ++v) sums[r][v] = broadcast(0.0f);
    }
    for (int64_t k = 0; k < depth; ++k) {
        Vec b[Vecs];
        for (int v = 0; v < Vecs; ++v) b[v] = load(panel + k * kPanelCols + v * kWidth);
        for (int r = 0; r < Rows; ++r) {
            const Vec x = broadcast(a[r * row_stride + k * k_stride]);
            for (int v = 0; v < Vecs; ++v) sums[r][v] = fma(x, b[v], sums[r][v]);
        }
    }
}

// Calls f with an integral constant of 1..kTileVecs: with_vecs(n, [&](auto vecs) { constexpr int Vecs = vecs(); ... }).
template <int N>
struct Constant {
    constexpr int operator()() const { return N; }
};
template <class F>
HVP_FUNC void with_vecs(int64_t vecs, F f) {
    if (vecs == 1) return f(Constant<1>{});
    if (vecs == 2 && kTileVecs >= 2) return f(Constant<kTileVecs >= 2 ? 2 : 1>{});
    f(Constant<kTileVecs>{});
}

constexpr int kPackedRows = 4;  // rows that pack_columns takes

// panel[k][column + i] = rows[i * stride + k] for k < depth: four rows of B become columns of their panel.
HVP_FUNC void pack_columns(const float* rows, int64_t stride, int64_t depth, float* panel, int64_t column) {
    typedef float Quad __attribute__((vector_size(16)));
    const auto at = [&](int64_t k) { return panel + k * kPanelCols + column; };
    int64_t k = 0;
    for (; k + 4 <= depth; k += 4) {
        Quad r[kPackedRows];
        for (int i = 0; i < kPackedRows; ++i) std::memcpy(&r[i], rows + i * stride + k, sizeof(Quad));
        const Quad low01 = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5);
        const Quad low23 = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
        const Quad high01 = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
        const Quad high23 = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
        const Quad columns[] = {
            __builtin_shufflevector(low01, low23, 0, 1, 4, 5), __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
            __builtin_shufflevector(high01, high23, 0, 1, 4, 5), __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
        for (int i = 0; i < 4; ++i) std::memcpy(at(k + i), &columns[i], sizeof(Quad));
    }
    for (; k < depth; ++k) {
        for (int i = 0; i < kPackedRows; ++i) at(k)[i] = rows[i * stride + k];
    }
}

}  // namespace hvprune::HVP_ISA
