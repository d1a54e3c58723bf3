// Picks the instruction set of the CPU kernels at run time: one binary runs everywhere.
#include <stdexcept>
#include <string>

#include "isa.h"

namespace hvprune {
namespace {

enum Isa { kBaseline, kAvx2, kAvx512, kNumIsas };
constexpr const char* kNames[kNumIsas] = {"baseline", "avx2", "avx512"};

int best_isa() {
#ifdef HVP_X86
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) {
        return kBaseline;
    }
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return wide ? kAvx512 : kAvx2;
#else
    return kBaseline;
#endif
}

int chosen_isa = best_isa();

template <class Args>
void run(const Args& args, void (*baseline)(const Args&), void (*avx2)(const Args&), void (*avx512)(const Args&)) {
    void (*const kernels[kNumIsas])(const Args&) = {baseline, avx2, avx512};
    kernels[chosen_isa](args);
}

}  // namespace

int num_cpu_isas() { return best_isa() + 1; }
const char* cpu_isa_name(int isa) { return kNames[isa]; }
int cpu_isa() { return chosen_isa; }

void set_cpu_isa(int isa) {
    if (isa < 0 || isa > best_isa()) throw std::invalid_argument("this machine lacks the instruction set");
    chosen_isa = isa;
}

#ifdef HVP_X86
#define HVP_RUN(op, args) run(args, baseline::op, avx2::op, avx512::op)
#else
#define HVP_RUN(op, args) baseline::op(args)
#endif

void aggregate_attention_cpu(const AggregateAttentionArgs& args) { HVP_RUN(aggregate_attention, args); }
void attention_importance_cpu(const AttentionImportanceArgs& args) { HVP_RUN(attention_importance, args); }
void cosine_similarity_cpu(const CosineSimilarityArgs& args) { HVP_RUN(cosine_similarity, args); }
void diverse_select_cpu(const DiverseSelectArgs& args) { HVP_RUN(diverse_select, args); }
void hierarchical_select_cpu(const HierarchicalSelectArgs& args) { HVP_RUN(hierarchical_select, args); }
void hivtp_select_cpu(const HivtpSelectArgs& args) { HVP_RUN(hivtp_select, args); }
void vispruner_select_cpu(const VisprunerSelectArgs& args) { HVP_RUN(vispruner_select, args); }

void gather_tokens_cpu(const GatherTokensArgs& args) {
    for (int64_t b = 0; b < args.B; ++b) {
        for (int64_t m = 0; m < args.M; ++m) {
            const int64_t token = args.indices[b * args.indices_batch_stride + m];
            if (token < -1 || token >= args.N) {
                throw std::invalid_argument("gather_tokens: indices must be in [-1, N) with N=" +
                                            std::to_string(args.N) + ", got " + std::to_string(token));
            }
        }
    }
    HVP_RUN(gather_tokens, args);
}

}  // namespace hvprune
