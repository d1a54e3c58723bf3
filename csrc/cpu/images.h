// How a batch is spread over threads when an image has parallel work of its own.
#pragma once

#include <omp.h>

#include "scratch.h"

namespace hvprune::HVP_ISA {

// Calls f(b, scratch, threads) for every image: images side by side when they are enough for all threads, else one after
// the other with all threads inside. `scratch_bytes` of memory for each image in work.
template <class F>
HVP_FUNC void for_each_image(int64_t B, int num_threads, int64_t scratch_bytes, F f) {
    const int outer = B >= num_threads ? num_threads : 1;
    const int inner = outer > 1 ? 1 : num_threads;
    const Scratch scratch(B > 0 ? outer * scratch_bytes : 0);
#pragma omp parallel for schedule(dynamic) num_threads(outer) if (outer > 1)
    for (int64_t b = 0; b < B; ++b) f(b, scratch.data() + (outer > 1 ? omp_get_thread_num() : 0) * scratch_bytes, inner);
}

}  // namespace hvprune::HVP_ISA
