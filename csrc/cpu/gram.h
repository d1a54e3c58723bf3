// Cosine similarity of the rows of one image: unit rows packed in panels, then the upper triangle of their Gram matrix.
#pragma once

#include "threads.h"
#include "tile.h"

namespace hvprune::HVP_ISA {

constexpr int64_t kDepthBlock = 128;  // one block of a panel, 24 KB with AVX-512, stays in L1

// The rows of one image that take part.
struct FeatureRows {
    const void* features;  // [N, C], last dimension contiguous
    int64_t token_stride;
    DType dtype;
    const int32_t* tokens;  // [n] which rows; nullptr: all of them in order
    int64_t n, C;
};

// Working memory for n rows, shared by the threads that work on one image.
struct GramWorkspace {
    float* panels;  // [ceil(n / kPanelCols)][C][kPanelCols]
    float* first;   // [n] the unit row is (row * first) * second, a product that neither
    float* second;  // [n]   overflows nor vanishes; both 0 for a zero or non-finite row
    bool* finite;   // [n]

    GramWorkspace(Carver& carver, int64_t n, int64_t C)
        : panels(carver.take<float>(round_up(n, kPanelCols) * C)),
          first(carver.take<float>(n)),
          second(carver.take<float>(n)),
          finite(carver.take<bool>(n)) {}
};

template <class T>
HVP_FUNC double squared_norm(const T* row, int64_t C) {
    double sum = 0.0;
    int64_t k = 0;
    for (; k + kWidth <= C; k += kWidth) sum += reduce_squares(load(row + k));
    for (; k < C; ++k) sum += static_cast<double>(to_float(row[k])) * static_cast<double>(to_float(row[k]));
    return sum;
}

// first * second = 1 / norm, first a power of two that brings the row near 1.
HVP_FUNC void split_inverse(double norm, float* first, float* second) {
    int exponent;
    std::frexp(norm, &exponent);
    if (exponent < -126) exponent = -126;  // 2^126 is the largest power whose inverse is normal too
    if (exponent > 126) exponent = 126;
    *first = static_cast<float>(std::ldexp(1.0, -exponent));
    *second = static_cast<float>(std::ldexp(1.0, exponent) / norm);
}

// Fills the panels that hold rows [begin, end) of those taking part; begin a multiple of kPanelCols.
template <class T>
HVP_FUNC void pack_unit_rows(const FeatureRows& rows, int64_t begin, int64_t end, const GramWorkspace& work) {
    const T* features = static_cast<const T*>(rows.features);
    const auto row_of = [&](int64_t i) {
        return features + (rows.tokens == nullptr ? i : rows.tokens[i]) * rows.token_stride;
    };
    for (int64_t i = begin; i < end; ++i) {
        const double squares = squared_norm(row_of(i), rows.C);
        work.finite[i] = squares - squares == 0.0;
        work.first[i] = work.second[i] = 0.0f;
        if (work.finite[i] && squares > 0.0) split_inverse(std::sqrt(squares), work.first + i, work.second + i);
    }
    float block[kPackedRows * kDepthBlock];
    for (int64_t k = 0; k < rows.C; k += kDepthBlock) {
        const int64_t depth = rows.C - k < kDepthBlock ? rows.C - k : kDepthBlock;
        for (int64_t i = begin; i < round_up(end, kPanelCols); i += kPackedRows) {
            for (int64_t j = 0; j < kPackedRows; ++j) {
                float* row = block + j * kDepthBlock;
                if (i + j < end && work.finite[i + j]) {
                    load_row(row_of(i + j) + k, depth, depth, work.first[i + j], row);
                    load_row(row, depth, depth, work.second[i + j], row);
                } else {
                    std::memset(row, 0, depth * sizeof(float));
                }
            }
            float* panel = work.panels + i / kPanelCols * kPanelCols * rows.C + k * kPanelCols;
            pack_columns(block, kDepthBlock, depth, panel, i % kPanelCols);
        }
    }
}

HVP_FUNC void store_cosine(float* p, float value) { *p = value; }
HVP_FUNC void store_cosine(Half* p, float value) { *p = to_half(value); }

// Rows of panel p against columns of panel q >= p, written to both triangles of similarity [n, n] (leading dimension
// ld). `round` is applied to every value before it is stored.
template <class T, class Round>
HVP_FUNC void gram_block(const GramWorkspace& work, int64_t n, int64_t C, int64_t p, int64_t q, T* similarity,
                         int64_t ld, Round round) {
    const int64_t rows_begin = p * kPanelCols, cols_begin = q * kPanelCols;
    const int64_t rows = n - rows_begin < kPanelCols ? n - rows_begin : kPanelCols;
    const int64_t cols = n - cols_begin < kPanelCols ? n - cols_begin : kPanelCols;
    const float* a = work.panels + rows_begin * C;
    const float* b = work.panels + cols_begin * C;
    alignas(kCacheLine) float sums[kPanelCols * kPanelCols];
    std::memset(sums, 0, sizeof sums);
    for (int64_t k = 0; k < C; k += kDepthBlock) {
        const int64_t depth = C - k < kDepthBlock ? C - k : kDepthBlock;
        for (int64_t r = 0; r < rows; r += kTileRows) {
            const int64_t skipped = p == q ? r / kWidth * kWidth : 0;  // below the diagonal
            with_vecs(ceil_div(cols - skipped, kWidth), [&](auto vecs) {
                constexpr int kVecs = decltype(vecs){}();
                Vec tile[kTileRows][kVecs];
                tile_product(a + k * kPanelCols + r, 1, kPanelCols, b + k * kPanelCols + skipped, depth, tile);
                for (int i = 0; i < kTileRows; ++i) {
                    float* sum = sums + (r + i) * kPanelCols + skipped;
                    for (int v = 0; v < kVecs; ++v) {
                        store(sum + v * kWidth, load(sum + v * kWidth) + tile[i][v]);
                    }
                }
            });
        }
    }
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = p == q ? i : 0; j < cols; ++j) {
            const int64_t row = rows_begin + i, col = cols_begin + j;
            const bool finite = work.finite[row] && work.finite[col];
            const float cosine = finite ? round(sums[i * kPanelCols + j]) : -INFINITY;
            store_cosine(similarity + row * ld + col, cosine);
            store_cosine(similarity + col * ld + row, cosine);
        }
    }
}

// similarity[i, j] of all pairs of rows, by `threads` threads.
template <class T, class Round>
HVP_FUNC void gram(const FeatureRows& rows, const GramWorkspace& work, T* similarity, int64_t ld, int threads,
                   Round round) {
    const int64_t panels = ceil_div(rows.n, kPanelCols);
    with_team(threads, [&] {
#pragma omp for schedule(dynamic)
        for (int64_t p = 0; p < panels; ++p) {
            const int64_t end = (p + 1) * kPanelCols < rows.n ? (p + 1) * kPanelCols : rows.n;
            dispatch(rows.dtype, [&](auto tag) { pack_unit_rows<decltype(tag)>(rows, p * kPanelCols, end, work); });
        }
#pragma omp for schedule(dynamic)
        for (int64_t pair = 0; pair < panels * panels; ++pair) {
            const int64_t p = pair / panels, q = pair % panels;
            if (p <= q) gram_block(work, rows.n, rows.C, p, q, similarity, ld, round);
        }
    });
}

}  // namespace hvprune::HVP_ISA
