// Computes  hierarchical_select(attention_importance(queries, keys)), bit for bit
// Work      theirs, one after the other.
// Traffic   theirs; the importance stays in cache.
// Numerics  theirs.
// Source    HIVTP, arXiv 2509.23663
#include "scratch.h"

namespace hvprune::HVP_ISA {

void hivtp_select(const HivtpSelectArgs& args) {
    const int64_t N = args.attention.L - args.attention.P;
    const Scratch importance(args.attention.B * N * static_cast<int64_t>(sizeof(float)));

    AttentionImportanceArgs attention = args.attention;
    attention.importance = reinterpret_cast<float*>(importance.data());
    attention.num_threads = args.num_threads;
    attention_importance(attention);

    HierarchicalSelectArgs selection = args.selection;
    selection.scores = attention.importance;
    selection.batch_stride = N;
    selection.dtype = DType::kFloat32;
    selection.num_threads = args.num_threads;
    hierarchical_select(selection);
}

}  // namespace hvprune::HVP_ISA
