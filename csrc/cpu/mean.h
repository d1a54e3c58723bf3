// The last step of both attention ops: the mean of per-head partial sums, in a fixed order.
#pragma once

#include "isa.h"

namespace hvprune::HVP_ISA {

// mean[b * N + j] = (sum over i < parts of partials[(b * parts + i) * N + j]) / count. Inside a parallel region.
HVP_FUNC void mean_of_parts(const double* partials, int64_t B, int64_t parts, int64_t N, double count, float* mean) {
    constexpr int64_t kChunk = 64;  // columns a thread takes at a time
    const int64_t chunks = ceil_div(N, kChunk);
#pragma omp for
    for (int64_t item = 0; item < B * chunks; ++item) {
        const int64_t b = item / chunks, begin = item % chunks * kChunk;
        const int64_t cols = N - begin < kChunk ? N - begin : kChunk;
        double sums[kChunk] = {};
        for (int64_t i = 0; i < parts; ++i) {
            const double* part = partials + (b * parts + i) * N + begin;
            for (int64_t j = 0; j < cols; ++j) sums[j] += part[j];
        }
        for (int64_t j = 0; j < cols; ++j) mean[b * N + begin + j] = static_cast<float>(sums[j] / count);
    }
}

}  // namespace hvprune::HVP_ISA
