// Selection of the best by order key, and results in raster order.
#pragma once

#include "../order.h"
#include "vec.h"

namespace hvprune::HVP_ISA {

// What a selection op returns for one image.
struct SelectionRow {
    int64_t* indices;  // [M]
    int32_t* count;
    bool* mask;  // [N]; filled by the kernel before write_indices
};

// Indices of the kept tokens ascending, -1 in the rest of the row, and their count.
HVP_FUNC void write_indices(const SelectionRow& row, int64_t N, int64_t M) {
    int64_t count = 0;
    for (int64_t j = 0; j < N && count < M; ++j) {  // no branch on the mask, which is as good as random
        row.indices[count] = j;
        count += row.mask[j];
    }
    *row.count = static_cast<int32_t>(count);
    for (; count < M; ++count) row.indices[count] = -1;
}

// Order keys of a row of scores.
template <class T>
HVP_FUNC void load_keys(const T* values, int64_t n, int32_t* keys) {
    for (int64_t j = 0; j < n; ++j) keys[j] = order_key(to_float(values[j]));
}

// The best of a row of keys: those above `key` and the first `ties` equal to it.
struct Cut {
    int32_t key;
    int64_t ties;
};

// The cut that keeps the k best of n keys (all if k > n), ties by lower index. No sort: bisection over the bits of the
// k-th best key, at most 32 counts.
HVP_FUNC Cut cut_at(const int32_t* keys, int64_t n, int64_t k) {
    if (k <= 0) return {INT32_MAX, 0};
    if (k >= n) return {kNotACandidate, 0};
    int32_t all = keys[0], any = keys[0];  // bits that are set in all keys, in any key
    for (int64_t i = 0; i < n; ++i) {
        all &= keys[i];
        any |= keys[i];
    }
    const int bits = all == any ? 0 : 32 - __builtin_clz(static_cast<uint32_t>(all ^ any));
    const int32_t start = bits == 32 ? INT32_MIN : static_cast<int32_t>(static_cast<uint32_t>(all) >> bits << bits);
    const auto count_from = [&](int32_t key) {
        int32_t count = 0;
        for (int64_t i = 0; i < n; ++i) count += keys[i] >= key;
        return count;
    };
    const int32_t threshold = kth_best_key(n, k, count_from, start, bits);
    int32_t above = 0, equal = 0;
    for (int64_t i = 0; i < n; ++i) {
        above += keys[i] > threshold;
        equal += keys[i] == threshold;
    }
    if (above + equal == k) return {threshold - 1, 0};
    return {threshold, k - above};
}

// Calls set(i, whether the cut keeps keys[i]) for i < n, and takes the ties used from the cut.
template <class Set>
HVP_FUNC void mark_kept(const int32_t* keys, int64_t n, Cut& cut, Set set) {
    if (cut.ties == 0) {
        for (int64_t i = 0; i < n; ++i) set(i, keys[i] > cut.key);
        return;
    }
    for (int64_t i = 0; i < n; ++i) {
        const bool tie = keys[i] == cut.key;
        set(i, (keys[i] > cut.key) | (tie & (cut.ties > 0)));
        cut.ties -= tie & (cut.ties > 0);
    }
}

}  // namespace hvprune::HVP_ISA
