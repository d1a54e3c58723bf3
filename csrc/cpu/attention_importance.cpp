// Computes  importance[b, j] = mean over layers, heads and query rows i of softmax(scale * Q K^T)[i, P + j]
// Work      one (image, layer, head) at a time per thread: K packed in panels, kTileRows query rows against all keys
//           into a buffer that stays in L1, exponentials there, column sums in double. No L x L map exists.
// Traffic   Q and K once; 8 bytes of partial sums per (image, layer, head, key).
// Numerics  float32 products, each exponential computed once; sums over rows and heads in double and in a fixed order:
//           independent of threads and batch. NaN and inf as a softmax has them.
#include "mean.h"
#include "threads.h"
#include "tile.h"

namespace hvprune::HVP_ISA {
namespace {

constexpr float kLog2E = 1.44269504f;

// Per-thread working memory.
struct Workspace {
    float* panels;   // [ceil(L / kPanelCols)][D][kPanelCols] packed keys
    float* scores;   // [kTileRows][padded L]
    float* queries;  // [kTileRows][D], or one row padded
    float* rows;     // [kPackedRows][padded D]
    double* sums;    // [padded L]

    Workspace(Carver& carver, int64_t L, int64_t D)
        : panels(carver.take<float>(round_up(L, kPanelCols) * D)),
          scores(carver.take<float>(kTileRows * round_up(L, kWidth))),
          queries(carver.take<float>(kTileRows * round_up(D, kWidth))),
          rows(carver.take<float>(kPackedRows * round_up(D, kWidth))),
          sums(carver.take<double>(round_up(L, kWidth))) {}
};

template <class T>
void pack_keys(const T* key, int64_t row_stride, int64_t L, int64_t D, const Workspace& work) {
    const int64_t padded_dim = round_up(D, kWidth);
    for (int64_t j = 0; j < round_up(L, kWidth); j += kPackedRows) {
        for (int64_t i = 0; i < kPackedRows; ++i) {
            float* row = work.rows + i * padded_dim;
            if (j + i < L) {
                load_row(key + (j + i) * row_stride, D, D, 1.0f, row);
            } else {  // so that no tile reads what was never written
                std::memset(row, 0, D * sizeof(float));
            }
        }
        pack_columns(work.rows, padded_dim, D, work.panels + j / kPanelCols * kPanelCols * D, j % kPanelCols);
    }
}

// scores[r][j] = q_r . k_j for r < Rows and every key j, -inf in the padding; shift[r] = max over j.
template <int Rows>
void score_rows(const Workspace& work, int64_t L, int64_t D, float* shift) {
    const int64_t padded = round_up(L, kWidth), whole = L / kWidth * kWidth;
    Vec most[Rows];
    for (Vec& m : most) m = broadcast(-INFINITY);
    for (int64_t begin = 0; begin < L; begin += kPanelCols) {
        const int64_t cols = padded - begin < kPanelCols ? padded - begin : kPanelCols;
        with_vecs(cols / kWidth, [&](auto vecs) {
            constexpr int kVecs = decltype(vecs){}();
            Vec sums[Rows][kVecs];
            tile_product(work.queries, D, 1, work.panels + begin * D, D, sums);
#pragma GCC unroll 8  // or the tile leaves its registers
            for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 3
                for (int v = 0; v < kVecs; ++v) {
                    store(work.scores + r * padded + begin + v * kWidth, sums[r][v]);
                    if (begin + v * kWidth < whole) most[r] = max(sums[r][v], most[r]);
                }
            }
        });
    }
    for (int r = 0; r < Rows; ++r) {
        float* scores = work.scores + r * padded;
        for (int64_t j = L; j < padded; ++j) scores[j] = -INFINITY;
        if (whole < padded) most[r] = max(load(scores + whole), most[r]);
        shift[r] = reduce_max(most[r]);
    }
}

// scores[r][j] = exp(scores[r][j] - shift[r]); total[r] = sum over j.
template <int Rows>
void exponentiate(const Workspace& work, int64_t padded, const float* shift, float* total) {
    Vec shifts[Rows], totals[Rows];
    for (int r = 0; r < Rows; ++r) {
        shifts[r] = broadcast(shift[r]);
        totals[r] = broadcast(0.0f);
    }
    for (int64_t j = 0; j < padded; j += kWidth) {
        for (int r = 0; r < Rows; ++r) {
            float* scores = work.scores + r * padded + j;
            const Vec p = exp2((load(scores) - shifts[r]) * broadcast(kLog2E));
            store(scores, p);
            totals[r] = totals[r] + p;
        }
    }
    for (int r = 0; r < Rows; ++r) total[r] = reduce_add(totals[r]);
}

// sums[j] += sum over r of weight[r] * scores[r][j]
template <int Rows>
void accumulate(const Workspace& work, int64_t padded, const float* weight) {
    for (int64_t j = 0; j < padded; j += kWidth) {
        Vec sum = load(work.scores + j) * broadcast(weight[0]);
        for (int r = 1; r < Rows; ++r) sum = fma(load(work.scores + r * padded + j), broadcast(weight[r]), sum);
        add_to(work.sums + j, sum);
    }
}

// Adds rows [i, i + Rows) of the softmaxed map of one head to work.sums; `query` and `logsumexp` are the head's.
template <int Rows, class T>
void add_rows(const AttentionImportanceArgs& args, const T* query, int64_t row_stride, const float* logsumexp,
              int64_t i, const Workspace& work) {
    const int64_t L = args.L, D = args.D, padded = round_up(L, kWidth);
    for (int r = 0; r < Rows; ++r) load_row(query + (i + r) * row_stride, D, D, args.scale, work.queries + r * D);
    float shift[Rows], total[Rows], weight[Rows];
    score_rows<Rows>(work, L, D, shift);
    if (logsumexp != nullptr) std::memcpy(shift, logsumexp + i, sizeof shift);
    exponentiate<Rows>(work, padded, shift, total);
    for (int r = 0; r < Rows; ++r) weight[r] = logsumexp != nullptr ? 1.0f : 1.0f / total[r];
    accumulate<Rows>(work, padded, weight);
}

// work.sums[j] = sum over query rows of the softmaxed map of one head.
template <class T>
void sum_all_rows(const AttentionImportanceArgs& args, const AttentionLayer& layer, int64_t b, int64_t h,
                  const Workspace& work) {
    const int64_t L = args.L;
    const T* query = static_cast<const T*>(layer.query) + b * layer.query_batch_stride + h * layer.query_head_stride;
    const T* key = static_cast<const T*>(layer.key) + b * layer.key_batch_stride + h * layer.key_head_stride;
    const float* logsumexp = layer.logsumexp;
    if (logsumexp != nullptr) logsumexp += b * layer.logsumexp_batch_stride + h * layer.logsumexp_head_stride;
    pack_keys(key, layer.key_row_stride, L, args.D, work);
    for (int64_t j = 0; j < round_up(L, kWidth); ++j) work.sums[j] = 0.0;
    int64_t i = 0;
    for (; i + kTileRows <= L; i += kTileRows) {
        add_rows<kTileRows>(args, query, layer.query_row_stride, logsumexp, i, work);
    }
    for (; i < L; ++i) add_rows<1>(args, query, layer.query_row_stride, logsumexp, i, work);  // CLS makes L odd
}

// work.sums[j] = the softmaxed first row of one head; each key is read once.
template <class T>
void softmax_cls_row(const AttentionImportanceArgs& args, const AttentionLayer& layer, int64_t b, int64_t h,
                     const Workspace& work) {
    const int64_t L = args.L, D = args.D, padded_dim = round_up(D, kWidth);
    const T* query = static_cast<const T*>(layer.query) + b * layer.query_batch_stride + h * layer.query_head_stride;
    const T* key = static_cast<const T*>(layer.key) + b * layer.key_batch_stride + h * layer.key_head_stride;
    load_row(query, D, padded_dim, args.scale, work.queries);
    float shift = -INFINITY;
    for (int64_t j = 0; j < L; ++j) {
        load_row(key + j * layer.key_row_stride, D, padded_dim, 1.0f, work.rows);
        Vec sum = broadcast(0.0f);
        for (int64_t k = 0; k < padded_dim; k += kWidth) {
            sum = fma(load(work.queries + k), load(work.rows + k), sum);
        }
        const float score = reduce_add(sum);
        work.scores[j] = score;
        shift = score > shift ? score : shift;
    }
    if (layer.logsumexp != nullptr) {
        shift = layer.logsumexp[b * layer.logsumexp_batch_stride + h * layer.logsumexp_head_stride];
    }
    for (int64_t j = L; j < round_up(L, kWidth); ++j) work.scores[j] = -INFINITY;
    Vec totals = broadcast(0.0f);
    for (int64_t j = 0; j < L; j += kWidth) {
        const Vec p = exp2((load(work.scores + j) - broadcast(shift)) * broadcast(kLog2E));
        store(work.scores + j, p);
        totals = totals + p;
    }
    const float weight = layer.logsumexp != nullptr ? 1.0f : 1.0f / reduce_add(totals);
    for (int64_t j = 0; j < L; ++j) work.sums[j] = static_cast<double>(work.scores[j] * weight);
}

}  // namespace

void attention_importance(const AttentionImportanceArgs& args) {
    const int64_t N = args.L - args.P, layers = args.num_layers;
    const int64_t items = args.B * layers * args.H;  // in the order of their contribution
    if (items == 0) return;
    const int threads = threads_for(items, (args.cls_row ? 1 : args.L) * args.L * args.D, args.num_threads);
    Carver sizes(nullptr);
    Workspace{sizes, args.L, args.D};
    const Scratch scratch(threads * sizes.used() + items * N * static_cast<int64_t>(sizeof(double)));
    double* partials = reinterpret_cast<double*>(scratch.data() + threads * sizes.used());  // [B][layers][H][N]

    with_team(threads, [&] {
        Carver carver(scratch.data() + omp_get_thread_num() * sizes.used());
        const Workspace work(carver, args.L, args.D);
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < items; ++item) {
            const int64_t h = item % args.H, l = item / args.H % layers, b = item / args.H / layers;
            dispatch(args.dtype, [&](auto tag) {
                using T = decltype(tag);
                if (args.cls_row) {
                    softmax_cls_row<T>(args, args.layers[l], b, h, work);
                } else {
                    sum_all_rows<T>(args, args.layers[l], b, h, work);
                }
            });
            std::memcpy(partials + item * N, work.sums + args.P, N * sizeof(double));
        }
        const double count = static_cast<double>(layers * args.H * (args.cls_row ? 1 : args.L));
        mean_of_parts(partials, args.B, layers * args.H, N, count, args.importance);
    });
}

}  // namespace hvprune::HVP_ISA
