// The one ordering rule of hvprune, shared by CPU and CUDA: higher value first, NaN below -inf, -0 equal to +0,
// ties by lower index (or earlier position).
#pragma once

#include <cstring>

#include "common.h"

namespace hvprune {

constexpr int32_t kNotACandidate = INT32_MIN;  // below every key, NaN's included
constexpr int32_t kNanKey = INT32_MIN + 1;

// A signed integer that orders as the value does.
HVP_FUNC int32_t order_key(float value) {
    value += 0.0f;  // -0 becomes +0
    if (value != value) return kNanKey;
#ifdef __CUDA_ARCH__
    const int32_t bits = __float_as_int(value);
#else
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
#endif
    return bits >= 0 ? bits : bits ^ 0x7fffffff;
}

// The highest key that at least k of n keys reach (1 <= k <= n), by bisection over its bits; count(key) tells how many
// keys are not below it. Stops early at a lower key that exactly k keys reach. k minus the number of keys above the
// result is then the number of those equal to it that are among the best k, the first in order. Where all keys are
// known to agree above their lowest `bits` bits, `start` is any of them with those bits cleared.
template <class Count>
HVP_FUNC int32_t kth_best_key(int64_t n, int64_t k, Count count, int32_t start = INT32_MIN, int bits = 32) {
    uint32_t threshold = static_cast<uint32_t>(start) ^ 0x80000000u;  // counted from INT32_MIN
    int64_t reached = n;
    for (int bit = bits - 1; bit >= 0 && reached != k; --bit) {
        const uint32_t trial = threshold | uint32_t{1} << bit;
        const int64_t reach_trial = count(static_cast<int32_t>(trial ^ 0x80000000u));
        if (reach_trial >= k) {
            threshold = trial;
            reached = reach_trial;
        }
    }
    return static_cast<int32_t>(threshold ^ 0x80000000u);
}

// First row or column of part i when a side of `size` tokens is cut in `parts`.
HVP_FUNC constexpr int64_t region_begin(int64_t i, int64_t size, int64_t parts) { return i * size / parts; }

// Tokens of a region that HIVTP's global stage keeps.
HVP_FUNC int64_t region_quota(double keep_ratio, int64_t region_size) {
    return static_cast<int64_t>(keep_ratio * static_cast<double>(region_size));
}

}  // namespace hvprune
