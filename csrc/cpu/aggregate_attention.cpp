// Computes  importance[b, j] = mean over layers, heads and rows i of map[b, h, i, P + j]
// Work      one (image, layer, head) at a time per thread, rows in groups of eight.
// Traffic   every map once (row 0 alone for cls_row); 8 bytes of partial sums per (image, layer, head, key).
// Numerics  groups in float32, their sums in double and in a fixed order: independent of threads and batch.
#include "mean.h"
#include "threads.h"
#include "vec.h"

namespace hvprune::HVP_ISA {
namespace {

constexpr int64_t kGroup = 8;  // rows summed in float32 before they go to double

// sums[j] = sum over rows of map[i, j], j < N
template <class T>
void sum_rows(const T* map, int64_t row_stride, int64_t rows, int64_t N, double* sums) {
    for (int64_t j = 0; j < N; ++j) sums[j] = 0.0;
    for (int64_t i = 0; i < rows; i += kGroup) {
        const int64_t end = i + kGroup < rows ? i + kGroup : rows;
        int64_t j = 0;
        for (; j + kWidth <= N; j += kWidth) {
            Vec sum = load(map + i * row_stride + j);
            for (int64_t row = i + 1; row < end; ++row) sum = sum + load(map + row * row_stride + j);
            add_to(sums + j, sum);
        }
        for (; j < N; ++j) {
            for (int64_t row = i; row < end; ++row) sums[j] += to_float(map[row * row_stride + j]);
        }
    }
}

}  // namespace

void aggregate_attention(const AggregateAttentionArgs& args) {
    const int64_t N = args.L - args.P, layers = args.num_layers;
    const int64_t items = args.B * layers * args.H;
    const int64_t rows = args.cls_row ? 1 : args.L;
    if (items == 0) return;
    const Scratch scratch(items * N * static_cast<int64_t>(sizeof(double)));
    double* partials = reinterpret_cast<double*>(scratch.data());  // [B][layers][H][N]
    const int threads = threads_for(items, rows * args.L, args.num_threads);

    with_team(threads, [&] {
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < items; ++item) {
            const int64_t h = item % args.H, l = item / args.H % layers, b = item / args.H / layers;
            const AttentionMap& layer = args.layers[l];
            dispatch(args.dtype, [&](auto tag) {
                using T = decltype(tag);
                const T* map = static_cast<const T*>(layer.map) + b * layer.batch_stride + h * layer.head_stride;
                sum_rows(map + args.P, layer.row_stride, rows, N, partials + item * N);
            });
        }
        mean_of_parts(partials, args.B, layers * args.H, N, static_cast<double>(layers * args.H * rows),
                      args.importance);
    });
}

}  // namespace hvprune::HVP_ISA
