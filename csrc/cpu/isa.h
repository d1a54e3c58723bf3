// Declares the CPU kernels once per instruction set. Each kernel file is compiled once per set, with HVP_ISA naming it,
// into namespace hvprune::HVP_ISA; dispatch.cpp picks at run time.
//
// Kernel files include no C++ standard library beyond <cstdint>, <cstring>, <cmath> and <new>, and all they define is
// internal or in their own namespace: a template of the standard library compiled with AVX-512 may be the copy that the
// linker keeps for everyone.
#pragma once

#include "../ops.h"

#define HVP_DECLARE_CPU_KERNELS(isa)                                \
    namespace hvprune::isa {                                        \
    void aggregate_attention(const AggregateAttentionArgs& args);   \
    void attention_importance(const AttentionImportanceArgs& args); \
    void cosine_similarity(const CosineSimilarityArgs& args);       \
    void diverse_select(const DiverseSelectArgs& args);             \
    void gather_tokens(const GatherTokensArgs& args);               \
    void hierarchical_select(const HierarchicalSelectArgs& args);   \
    void hivtp_select(const HivtpSelectArgs& args);                 \
    void vispruner_select(const VisprunerSelectArgs& args);         \
    }

HVP_DECLARE_CPU_KERNELS(baseline)
HVP_DECLARE_CPU_KERNELS(avx2)
HVP_DECLARE_CPU_KERNELS(avx512)

#undef HVP_DECLARE_CPU_KERNELS
