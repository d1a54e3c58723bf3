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

// Calls set(i, whether i is among the k best) for all of n candidates (all are if k > n), ties by lower index. The k-th
// best key is found by bisection over its bits: at most 32 counts, no sort.
template <class Set>
HVP_FUNC void mark_best(const int32_t* keys, int64_t n, int64_t k, Set set) {
    if (k > n) k = n;
    if (k <= 0) {
        for (int64_t i = 0; i < n; ++i) set(i, false);
        return;
    }
    const int32_t threshold_key = kth_best_key(n, k, [&](int32_t key) {
        int32_t count = 0;
        for (int64_t i = 0; i < n; ++i) count += keys[i] >= key;
        return count;
    });
    int64_t ties = k;  // places left for keys equal to the threshold
    for (int64_t i = 0; i < n; ++i) ties -= keys[i] > threshold_key;
    for (int64_t i = 0; i < n; ++i) {
        const bool tie = keys[i] == threshold_key;
        set(i, (keys[i] > threshold_key) | (tie & (ties > 0)));
        ties -= tie;
    }
}

}  // namespace hvprune::HVP_ISA
