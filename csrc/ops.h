// The whole native interface. No torch header: addresses, sizes, and strides in elements. The caller allocates every
// output. Letters: B images, H heads, L = P + N tokens of the encoder, N patches on a gh x gw grid, D head dimension,
// C feature dimension, K tokens kept, M columns of a result.
#pragma once

#include <cstdint>

#include "common.h"

struct CUstream_st;  // as CUDA's own headers declare it: this one compiles without them
using cudaStream_t = CUstream_st*;

namespace hvprune {

struct AttentionMap {  // one layer
    const void* map;   // [B, H, L, L], last dimension contiguous
    int64_t batch_stride, head_stride, row_stride;
};

struct AggregateAttentionArgs {
    const AttentionMap* layers;  // [num_layers]
    int64_t num_layers;
    float* importance;  // [B, N], contiguous
    DType dtype;
    int64_t B, H, L, P;
    bool cls_row;  // row 0 alone instead of the mean of all rows
    int num_threads;
};

struct AttentionLayer {
    const void* query;  // [B, H, L, D], last dimension contiguous
    int64_t query_batch_stride, query_head_stride, query_row_stride;
    const void* key;  // [B, H, L, D], last dimension contiguous
    int64_t key_batch_stride, key_head_stride, key_row_stride;
    const float* logsumexp;  // [B, H, L], last dimension contiguous; nullptr: computed here
    int64_t logsumexp_batch_stride, logsumexp_head_stride;
};

struct AttentionImportanceArgs {
    const AttentionLayer* layers;  // [num_layers]
    int64_t num_layers;
    float* importance;  // [B, N], contiguous
    DType dtype;        // of queries and keys
    int64_t B, H, L, D, P;
    bool cls_row;
    float scale;
    int num_threads;
    void* scratch = nullptr;  // CUDA only: B * (12 * N + 4) bytes aligned to 8, in any state
};

struct HierarchicalSelectArgs {
    const void* scores;  // [B, N]
    int64_t batch_stride;
    int64_t* indices;  // [B, M], contiguous
    int32_t* counts;   // [B]
    bool* mask;        // [B, N], contiguous
    DType dtype;
    int64_t B, gh, gw;
    int64_t region_rows, region_cols;     // regions per side
    int64_t window_height, window_width;  // tokens per window
    double keep_ratio;
    int64_t M;
    bool fixed;  // exactly M tokens; otherwise at most M
    int num_threads;
    bool after_scores = false;  // CUDA only: the previous launch of the stream writes the scores
};

struct CosineSimilarityArgs {
    const void* features;  // [B, N, C], last dimension contiguous
    int64_t batch_stride, token_stride;
    void* similarity;  // [B, N, N], contiguous; float32 for float32 features, else float16
    DType dtype;       // of the features
    int64_t B, N, C;
    int num_threads;
};

struct DiverseSelectArgs {
    const void* similarity;  // [B, N, N], last dimension contiguous
    int64_t similarity_batch_stride, similarity_row_stride;
    DType similarity_dtype;
    const void* importance;  // [B, N]
    int64_t importance_batch_stride;
    DType importance_dtype;
    int64_t* indices;  // [B, K], contiguous
    int32_t* counts;   // [B]
    bool* mask;        // [B, N], contiguous
    int64_t* trace;    // [B, trace_lists, N - num_important], contiguous; nullptr: not wanted
    int64_t trace_lists;
    int64_t B, N, K, num_important, removals_per_round;
    int num_threads;
    // CUDA only: the previous launch of the stream writes similarity, and nothing else that this one reads.
    bool after_similarity = false;
};

struct GatherTokensArgs {
    const void* features;  // [B, N, C], last dimension contiguous
    int64_t batch_stride, token_stride;
    const int64_t* indices;  // [B, M], last dimension contiguous; -1: padding
    int64_t indices_batch_stride;
    void* output;  // [B, M, C], contiguous
    DType dtype;
    int64_t B, N, C, M;
    float pad_value;
    int num_threads;
};

struct HivtpSelectArgs {
    AttentionImportanceArgs attention;  // without importance, cls_row and num_threads
    HierarchicalSelectArgs selection;   // of that importance: without scores and num_threads
    int num_threads;
    void* scratch = nullptr;  // CUDA only: B * (16 * N + 4) bytes aligned to 8, in any state
};

struct VisprunerSelectArgs {
    const void* features;  // [B, N, C], last dimension contiguous
    int64_t batch_stride, token_stride;
    DType features_dtype;
    const void* importance;  // [B, N]
    int64_t importance_batch_stride;
    DType importance_dtype;
    int64_t* indices;  // [B, K], contiguous
    int32_t* counts;   // [B]
    bool* mask;        // [B, N], contiguous
    int64_t B, N, C, K, num_important, removals_per_round;
    int num_threads;
    void* similarity = nullptr;  // CUDA only: scratch, as cosine_similarity writes it
};

// The CPU kernels, in the best instruction set of this machine. They throw std::invalid_argument for contents that
// cannot be checked before (gather_tokens: an index out of range) and std::bad_alloc for want of scratch memory.
void aggregate_attention_cpu(const AggregateAttentionArgs& args);
void attention_importance_cpu(const AttentionImportanceArgs& args);
void cosine_similarity_cpu(const CosineSimilarityArgs& args);
void diverse_select_cpu(const DiverseSelectArgs& args);
void gather_tokens_cpu(const GatherTokensArgs& args);
void hierarchical_select_cpu(const HierarchicalSelectArgs& args);
void hivtp_select_cpu(const HivtpSelectArgs& args);
void vispruner_select_cpu(const VisprunerSelectArgs& args);

// The CUDA kernels, started on a stream of the current device; addresses are of its memory, but for the arrays of
// layers. They throw std::runtime_error for an error of CUDA, naming op, error and line, and std::invalid_argument for
// a size that no launch can take. num_threads is not used.
void aggregate_attention_cuda(const AggregateAttentionArgs& args, cudaStream_t stream);
void attention_importance_cuda(const AttentionImportanceArgs& args, cudaStream_t stream);
void cosine_similarity_cuda(const CosineSimilarityArgs& args, cudaStream_t stream);
void diverse_select_cuda(const DiverseSelectArgs& args, cudaStream_t stream);
void gather_tokens_cuda(const GatherTokensArgs& args, cudaStream_t stream);
void hierarchical_select_cuda(const HierarchicalSelectArgs& args, cudaStream_t stream);
void hivtp_select_cuda(const HivtpSelectArgs& args, cudaStream_t stream);
void vispruner_select_cuda(const VisprunerSelectArgs& args, cudaStream_t stream);

// Instruction sets, narrowest first: "baseline", "avx2", "avx512". Setting one is for tests; it throws
// std::invalid_argument if this machine lacks it.
int num_cpu_isas();
const char* cpu_isa_name(int isa);
int cpu_isa();
void set_cpu_isa(int isa);

}  // namespace hvprune
