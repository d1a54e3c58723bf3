// Computes  output[b, m] = features[b, indices[b, m]], or pad_value where the index is -1
// Work      rows in contiguous runs per thread.
// Traffic   kept rows once in, once out.
// Numerics  rows are copied bit for bit.
#include "threads.h"
#include "vec.h"

namespace hvprune::HVP_ISA {
namespace {

HVP_FUNC void set_value(float value, float* p) { *p = value; }
HVP_FUNC void set_value(float value, Half* p) { *p = to_half(value); }
HVP_FUNC void set_value(float value, BFloat16* p) {
    const uint32_t bits = float_to_bits(value);
    const bool nan = value != value;
    p->bits = static_cast<uint16_t>(nan ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);  // ties to even
}

template <class T>
void gather(const GatherTokensArgs& args) {
    const int64_t rows = args.B * args.M, C = args.C;
    const int threads = threads_for(rows, C * static_cast<int64_t>(sizeof(T)), args.num_threads);
    T padding;
    set_value(args.pad_value, &padding);
    with_team(threads, [&] {
#pragma omp for
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t b = row / args.M, m = row % args.M;
            const int64_t token = args.indices[b * args.indices_batch_stride + m];
            T* output = static_cast<T*>(args.output) + row * C;
            if (token < 0) {
                for (int64_t c = 0; c < C; ++c) output[c] = padding;
            } else {
                const T* features = static_cast<const T*>(args.features);
                std::memcpy(output, features + b * args.batch_stride + token * args.token_stride, C * sizeof(T));
            }
        }
    });
}

}  // namespace

void gather_tokens(const GatherTokensArgs& args) {
    if (args.B * args.M * args.C == 0) return;
    dispatch(args.dtype, [&](auto tag) { gather<decltype(tag)>(args); });
}

}  // namespace hvprune::HVP_ISA
