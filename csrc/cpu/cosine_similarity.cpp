// Computes  similarity[b, i, j] = x_i . x_j / (|x_i| |x_j|)
// Work      blocks of kPanelCols x kPanelCols of the upper triangle, mirrored.
// Traffic   features twice, 4 * N * C bytes of packed rows, the result once.
// Numerics  norms in double; float32 products in blocks of kDepthBlock along C. A zero row gives 0, a row with NaN or
// inf
//           -inf. Symmetric bit for bit, independent of threads and batch.
// Source    VisPruner, arXiv 2412.01818
#include "gram.h"
#include "threads.h"

namespace hvprune::HVP_ISA {

void cosine_similarity(const CosineSimilarityArgs& args) {
    const int64_t N = args.N, C = args.C;
    Carver sizes(nullptr);
    GramWorkspace{sizes, N, C};
    for_each_image(args.B, N * N * C / 2, args.num_threads, sizes.used(), [&](int64_t b, char* scratch, int threads) {
        Carver carver(scratch);
        const GramWorkspace work(carver, N, C);
        dispatch(args.dtype, [&](auto tag) {
            using T = decltype(tag);
            const T* features = static_cast<const T*>(args.features) + b * args.batch_stride;
            const FeatureRows rows{features, args.token_stride, args.dtype, nullptr, N, C};
            const auto unchanged = [](float cosine) { return cosine; };
            if (args.dtype == DType::kFloat32) {
                gram(rows, work, static_cast<float*>(args.similarity) + b * N * N, N, threads, unchanged);
            } else {
                gram(rows, work, static_cast<Half*>(args.similarity) + b * N * N, N, threads, unchanged);
            }
        });
    });
}

}  // namespace hvprune::HVP_ISA
