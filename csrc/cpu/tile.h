// The register tile of every matrix product on a CPU: kTileRows x (1..kTileVecs vectors) of A B^T.
//
// Each element is one chain of fused multiply-adds over k in ascending order, whatever the tile it falls in: results do
// not depend on position, batch or threads, and x.y equals y.x bit for bit.
#pragma once

#include "vec.h"

namespace hvprune::HVP_ISA {

constexpr int kPanelCols = kTileVecs * kWidth;  // columns of a packed panel of B

// sums[r][c] = sum over k < depth of a[r * row_stride + k * k_stride] * panel[k * kPanelCols + c], c < Vecs * kWidth
template <int Vecs>
HVP_FUNC void tile_product(const float* a, int64_t row_stride, int64_t k_stride, const float* panel, int64_t depth,
                           Vec (&sums)[kTileRows][Vecs]) {
    for (int r = 0; r < kTileRows; ++r) {
        for (int v = 0; v < Vecs; ++v) sums[r][v] = broadcast(0.0f);
    }
    for (int64_t k = 0; k < depth; ++k) {
        Vec b[Vecs];
        for (int v = 0; v < Vecs; ++v) b[v] = load(panel + k * kPanelCols + v * kWidth);
        for (int r = 0; r < kTileRows; ++r) {
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

// panel[k][column] = row[k] for k < depth: one row of B becomes one column of its panel.
HVP_FUNC void pack_column(const float* row, int64_t depth, float* panel, int64_t column) {
    for (int64_t k = 0; k < depth; ++k) panel[k * kPanelCols + column] = row[k];
}

}  // namespace hvprune::HVP_ISA
