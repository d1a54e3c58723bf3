// Computes  diverse_select of the cosine_similarity of the features
// Work      the launches of these two ops; the second begins while the first still runs and orders the tokens by
//           importance before it waits for the similarity.
// Traffic   theirs; the similarity is written to scratch memory and read from it.
// Source    VisPruner, arXiv 2412.01818
#include "../ops.h"

namespace hvprune {

void vispruner_select_cuda(const VisprunerSelectArgs& args, cudaStream_t stream) {
    CosineSimilarityArgs cosine = {};
    cosine.features = args.features;
    cosine.batch_stride = args.batch_stride;
    cosine.token_stride = args.token_stride;
    cosine.similarity = args.similarity;
    cosine.dtype = args.features_dtype;
    cosine.B = args.B;
    cosine.N = args.N;
    cosine.C = args.C;
    cosine_similarity_cuda(cosine, stream);

    DiverseSelectArgs diverse = {};
    diverse.similarity = args.similarity;
    diverse.similarity_batch_stride = args.N * args.N;
    diverse.similarity_row_stride = args.N;
    diverse.similarity_dtype = args.features_dtype == DType::kFloat32 ? DType::kFloat32 : DType::kFloat16;
    diverse.importance = args.importance;
    diverse.importance_batch_stride = args.importance_batch_stride;
    diverse.importance_dtype = args.importance_dtype;
    diverse.indices = args.indices;
    diverse.counts = args.counts;
    diverse.mask = args.mask;
    diverse.B = args.B;
    diverse.N = args.N;
    diverse.K = args.K;
    diverse.num_important = args.num_important;
    diverse.removals_per_round = args.removals_per_round;
    diverse.after_similarity = true;
    diverse_select_cuda(diverse, stream);
}

}  // namespace hvprune
