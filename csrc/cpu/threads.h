// How many threads a call is worth, and how a batch is spread over them.
#pragma once

#include <omp.h>

#include "scratch.h"

namespace hvprune::HVP_ISA {

constexpr int64_t kWorkPerThread = 1 << 18;  // multiply-adds or bytes: about what waking a thread costs

// At most one thread per item and one per kWorkPerThread, at least one.
HVP_FUNC int threads_for(int64_t items, int64_t work_per_item, int num_threads) {
    int64_t threads = items * work_per_item / kWorkPerThread;
    if (threads > items) threads = items;
    if (threads > num_threads) threads = num_threads;
    return threads < 1 ? 1 : static_cast<int>(threads);
}

// Runs body on every thread of a team, to share loops by `omp for`. A team of one does without the parallel region,
// which would cost 0.3 us, unless one is around it already, whose threads would then share the loops.
template <class F>
HVP_FUNC void with_team(int threads, F body) {
    if (threads == 1 && !omp_in_parallel()) return body();
#pragma omp parallel num_threads(threads)
    body();
}

// Calls f(b, scratch, threads) for every image, for kernels with parallel work inside an image: images side by side
// when they are enough for all threads, else one after the other with all threads inside. `scratch_bytes` of memory for
// each image in work.
template <class F>
HVP_FUNC void for_each_image(int64_t B, int64_t work_per_image, int num_threads, int64_t scratch_bytes, F f) {
    const int outer = B >= num_threads ? threads_for(B, work_per_image, num_threads) : 1;
    const int inner = outer > 1 ? 1 : threads_for(work_per_image / kWorkPerThread, kWorkPerThread, num_threads);
    const Scratch scratch(B > 0 ? outer * scratch_bytes : 0);
    if (outer == 1) {
        for (int64_t b = 0; b < B; ++b) f(b, scratch.data(), inner);
        return;
    }
#pragma omp parallel for schedule(dynamic) num_threads(outer)
    for (int64_t b = 0; b < B; ++b) f(b, scratch.data() + omp_get_thread_num() * scratch_bytes, inner);
}

}  // namespace hvprune::HVP_ISA
