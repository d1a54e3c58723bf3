// Picks the instruction set of the CPU kernels at run time: one binary runs everywhere.
#include <stdexcept>

#include "isa.h"

namespace hvprune {
namespace {

enum Isa { kBaseline, kAvx2, kAvx512, kNumIsas };
constexpr const char* kNames[kNumIsas] = {"baseline", "avx2", "avx512"};

int best_isa() {
#ifdef HVP_X86
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
        !__builtin_cpu_supports("f16c")) {
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
void run(const Args& args, void (*baseline)(const Args&), void (*avx2)(const Args&),
         void (*avx512)(const Args&)) {
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
#define HVP_DISPATCH(op, Args)                          \
    void op##_cpu(const Args& args) {                   \
        run<Args>(args, baseline::op, avx2::op, avx512::op); \
    }
#else
#define HVP_DISPATCH(op, Args) \
    void op##_cpu(const Args& args) { baseline::op(args); }
#endif

HVP_DISPATCH(aggregate_attention, AggregateAttentionArgs)
HVP_DISPATCH(attention_importance, AttentionImportanceArgs)
HVP_DISPATCH(cosine_similarity, CosineSimilarityArgs)
HVP_DISPATCH(diverse_select, DiverseSelectArgs)
HVP_DISPATCH(gather_tokens, GatherTokensArgs)
HVP_DISPATCH(hierarchical_select, HierarchicalSelectArgs)
HVP_DISPATCH(vispruner_select, VisprunerSelectArgs)

}  // namespace hvprune
