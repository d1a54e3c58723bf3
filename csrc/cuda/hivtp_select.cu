// Computes  hierarchical_select of the attention_importance of queries and keys
// Work      the launches of these two ops; the second is set up while the first still runs.
// Traffic   theirs; the importance is written to scratch memory and read from it.
// Numerics  theirs.
// Source    HIVTP, arXiv 2509.23663
#include "../ops.h"

namespace hvprune {

void hivtp_select_cuda(const HivtpSelectArgs& args, cudaStream_t stream) {
    const int64_t N = args.attention.L - args.attention.P;

    AttentionImportanceArgs attention = args.attention;
    attention.scratch = args.scratch;
    attention.importance = static_cast<float*>(args.scratch) + args.attention.B * (3 * N + 1);
    attention_importance_cuda(attention, stream);

    HierarchicalSelectArgs selection = args.selection;
    selection.scores = attention.importance;
    selection.batch_stride = N;
    selection.dtype = DType::kFloat32;
    selection.after_scores = true;
    hierarchical_select_cuda(selection, stream);
}

}  // namespace hvprune
