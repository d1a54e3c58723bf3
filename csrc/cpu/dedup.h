// VisPruner's removal of duplicates from a residual list, given the similarity of every pair.
#pragma once

#include "scratch.h"
#include "select.h"

namespace hvprune::HVP_ISA {

// A token (or a column of a compact matrix) with its order key in the upper half.
struct Keyed {
    uint32_t key;
    int32_t token;
};

// Sorts by key descending, equal keys in the order given: four counting passes of eight bits, passes that would move
// nothing left out. The result is in items; other is as large.
HVP_FUNC void sort_descending(Keyed* items, Keyed* other, int64_t n) {
    constexpr int kPasses = 4, kBuckets = 256;
    int32_t counts[kPasses][kBuckets] = {};
    for (int64_t i = 0; i < n; ++i) {
        for (int pass = 0; pass < kPasses; ++pass) ++counts[pass][items[i].key >> 8 * pass & 255];
    }
    Keyed* from = items;
    for (int pass = 0; pass < kPasses; ++pass) {
        int32_t* count = counts[pass];
        if (n == 0 || count[from[0].key >> 8 * pass & 255] == n) continue;
        int32_t begin = 0;
        for (int bucket = kBuckets - 1; bucket >= 0; --bucket) {
            const int32_t size = count[bucket];
            count[bucket] = begin;
            begin += size;
        }
        for (int64_t i = 0; i < n; ++i) other[count[from[i].key >> 8 * pass & 255]++] = from[i];
        Keyed* const sorted = other;
        other = from;
        from = sorted;
    }
    if (from != items) std::memcpy(items, from, n * sizeof(Keyed));
}

// A key that sort_descending orders as the value does.
HVP_FUNC uint32_t descending_key(float value) { return static_cast<uint32_t>(order_key(value)) ^ 0x80000000u; }

// Tokens by importance descending.
template <class T>
HVP_FUNC void order_by_importance(const T* importance, int64_t n, Keyed* order, Keyed* other) {
    for (int64_t j = 0; j < n; ++j) {
        order[j] = {descending_key(to_float(importance[j])), static_cast<int32_t>(j)};
    }
    sort_descending(order, other, n);
}

// Working memory for lists over n columns.
struct DedupWorkspace {
    int32_t* list;  // [n] the residual list
    Keyed* scored;  // [n] its even positions with their scores
    Keyed* other;   // [n]
    uint8_t* bits;  // [n / 8, padded] set for columns at odd positions

    DedupWorkspace(Carver& carver, int64_t n)
        : list(carver.take<int32_t>(n)),
          scored(carver.take<Keyed>(n)),
          other(carver.take<Keyed>(n)),
          bits(carver.take<uint8_t>(round_up(n, 8 * kCacheLine) / 8)) {}
};

// max over the columns whose bit is set of row[column]; -inf if there is none. NaN is passed over.
HVP_FUNC float max_of_columns(const float* row, const uint8_t* bits, int64_t padded) {
    Vec even = broadcast(-INFINITY), odd = even;  // two chains of maxima in flight
    int64_t j = 0;
    for (; j + 2 * kWidth <= padded; j += 2 * kWidth) {
        even = max_where(even, bits, row, j);
        odd = max_where(odd, bits, row, j + kWidth);
    }
    if (j < padded) even = max_where(even, bits, row, j);
    return reduce_max(max(even, odd));
}

// Shortens work.list from `residual` to `num_diverse` columns. similarity is [columns, ld] with ld a multiple of
// kWidth. Calls after_round(list, length) once per round.
template <class AfterRound>
HVP_FUNC void remove_duplicates(const float* similarity, int64_t ld, int64_t residual, int64_t num_diverse,
                                int64_t removals_per_round, const DedupWorkspace& work, AfterRound after_round) {
    while (residual > num_diverse) {
        const int64_t a = (residual + 1) / 2, b = residual / 2;
        int64_t removals = residual - num_diverse;
        if (removals > removals_per_round) removals = removals_per_round;
        if (removals > a) removals = a;
        // Mark b.
        std::memset(work.bits, 0, round_up(ld, 8) / 8);
        for (int64_t i = 0; i < b; ++i) {
            const int32_t column = work.list[2 * i + 1];
            work.bits[column / 8] = static_cast<uint8_t>(work.bits[column / 8] | 1u << column % 8);
        }
        // Score a.
        for (int64_t i = 0; i < a; ++i) {
            const int32_t column = work.list[2 * i];
            const float score = max_of_columns(similarity + column * ld, work.bits, ld);
            work.scored[i] = {descending_key(score), column};
        }
        sort_descending(work.scored, work.other, a);
        // New list: what is left of a by score, then b.
        for (int64_t i = 0; i < b; ++i) work.other[i].token = work.list[2 * i + 1];
        for (int64_t i = removals; i < a; ++i) work.list[i - removals] = work.scored[i].token;
        for (int64_t i = 0; i < b; ++i) work.list[a - removals + i] = work.other[i].token;
        residual -= removals;
        after_round(work.list, residual);
    }
}

}  // namespace hvprune::HVP_ISA
