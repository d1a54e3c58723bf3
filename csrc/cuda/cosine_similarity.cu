// Computes  similarity[b, i, j] = x_i . x_j / (|x_i| |x_j|)
// Work      a block per square tile of the upper triangle of an image, mirrored; a warp takes 32 rows by 32 or 64
//           columns of it. Norms come from the tile's own rows, multiplied with themselves on the way: one launch.
// Traffic   features once from memory and once per tile from L2; the result once.
// Numerics  half inputs by tensor cores, float32 by FMA in blocks of 32 along C; float32 sums. Rows whose norm is out
//           of the range of such sums are scaled by a power of two in a second run of the tile, so that nothing
//           overflows or vanishes. A zero row gives 0, a row with NaN or inf -inf. A value depends on its two rows
//           alone, in one order of sums: symmetric and batch-invariant bit for bit.
// Source    VisPruner, arXiv 2412.01818
#include <algorithm>
#include <cmath>

#include "common.cuh"
#include "mma.cuh"
#include "ops.h"

namespace hvprune {
namespace {

constexpr const char* kOp = "cosine_similarity";
constexpr int kStages = 3;
constexpr int kStepBytes = 128;             // of a row, per stage
constexpr int kRowBytes = kStepBytes + 16;  // an odd number of 16-byte pieces, which spreads the rows over the banks
constexpr int kWarpRows = 32;
// Squared norms within which products and their sums neither overflow nor lose what counts.
constexpr float kSmallest = 0x1p-60f, kLargest = 0x1p100f;

struct Params {
    const void* features;  // [B, N, C]
    int64_t batch_stride, token_stride;
    void* similarity;  // [B, N, N]
    int N, C, tiles;   // tiles per side
    bool aligned;      // rows are aligned to 16 bytes
};

// kColumns of a warp; two warps side by side and tile / kWarpRows one below the other make a tile.
template <int kColumns>
struct Tile {
    static constexpr int kSide = 2 * kColumns;
    static constexpr int kThreads = 32 * 2 * (kSide / kWarpRows);
    static constexpr int kStageBytes = 2 * kSide * kRowBytes;  // the tile's rows, then its columns
};

// A warp's products in the registers of mma.m16n8k16: with g = lane / 4 and t = lane % 4, dots[r][c] is that of row
// 8r + g and column 8(c / 2) + 2t + c % 2. Squares of 16 rows and 16 columns per warp (of 32 and 32 for float32), on
// the diagonals of products with themselves (one per lane).
template <class T, int kColumns>
struct Products {
    float dots[4][kColumns / 4];
    float squares[2][2][sizeof(T) == 2 ? 4 : 1];  // [rows or columns][their halves]
};

// self += rows times themselves; a holds 16 rows by 16 elements as the left operand of an mma.
template <class T>
__device__ void multiply_self(float (&self)[2][4], const uint32_t (&a)[4]) {
    hvp::mma_m16n8k16<T>(self[0], a, {a[0], a[2]});
    hvp::mma_m16n8k16<T>(self[1], a, {a[1], a[3]});
}

// Adds one stage to the products of the warp in row `wr` and column `wc` of the tile.
template <class T, int kColumns>
__device__ void multiply_stage(const char* s_rows, const char* s_columns, int wr, int wc,
                               Products<T, kColumns>& products) {
    const int lane = threadIdx.x % 32;
    s_rows += wr * kWarpRows * kRowBytes;
    s_columns += wc * kColumns * kRowBytes;
    if constexpr (sizeof(T) == 2) {
        const char* a_row = s_rows + lane % 16 * kRowBytes + lane / 16 * 16;
        const char* b_row = s_columns + (lane % 8 + lane / 16 * 8) * kRowBytes + lane / 8 % 2 * 16;
#pragma unroll
        for (int k = 0; k < kStepBytes; k += 32) {
            uint32_t a[2][4], b[4];
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                hvp::ldmatrix_x4(a[m], a_row + 16 * m * kRowBytes + k);
                if (m == wc) multiply_self<T>(products.squares[0], a[m]);
            }
#pragma unroll
            for (int pair = 0; pair < kColumns / 16; ++pair) {
                hvp::ldmatrix_x4(b, b_row + 16 * pair * kRowBytes + k);
                if (pair == wr) multiply_self<T>(products.squares[1], {b[0], b[2], b[1], b[3]});
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int r = i / 2 * 2, c = 4 * pair + i % 2 * 2;
                    auto& dots = products.dots;
                    float acc[4] = {dots[r][c], dots[r][c + 1], dots[r + 1][c], dots[r + 1][c + 1]};
                    hvp::mma_m16n8k16<T>(acc, a[i / 2], {b[i % 2 * 2], b[i % 2 * 2 + 1]});
                    dots[r][c] = acc[0], dots[r][c + 1] = acc[1];
                    dots[r + 1][c] = acc[2], dots[r + 1][c + 1] = acc[3];
                }
            }
        }
    } else {
        // NOTE: a block of its own per stage: errors grow with the root of its length, not with that of C.
        const auto add = [](float sum, float4 x, float4 y) {
            return __fmaf_rn(x.w, y.w, __fmaf_rn(x.z, y.z, __fmaf_rn(x.y, y.y, __fmaf_rn(x.x, y.x, sum))));
        };
        const auto load = [](const char* s_from, int row, int k) {
            return *reinterpret_cast<const float4*>(s_from + row * kRowBytes + k);
        };
        float dots[4][kColumns / 4] = {}, squares[2] = {};
#pragma unroll 1
        for (int k = 0; k < kStepBytes; k += 16) {
            float4 rows[4];
#pragma unroll
            for (int r = 0; r < 4; ++r) rows[r] = load(s_rows, 8 * r + lane / 4, k);
#pragma unroll
            for (int c = 0; c < kColumns / 4; ++c) {
                const float4 column = load(s_columns, c / 2 * 8 + lane % 4 * 2 + c % 2, k);
#pragma unroll
                for (int r = 0; r < 4; ++r) dots[r][c] = add(dots[r][c], rows[r], column);
            }
            const float4 row = load(s_rows, lane, k), column = load(s_columns, lane, k);
            squares[0] = add(squares[0], row, row);
            squares[1] = add(squares[1], column, column);
        }
#pragma unroll
        for (int i = 0; i < kColumns; ++i) products.dots[i % 4][i / 4] += dots[i % 4][i / 4];
        for (int side = 0; side < 2; ++side) products.squares[side][0][0] += squares[side];
    }
}

// s_squares[side * kSide + i] = squared norm of the tile's row or column i, by the warp that has it.
template <class T, int kColumns>
__device__ void store_squares(const Products<T, kColumns>& products, int wr, int wc, float* s_squares) {
    constexpr int kSide = Tile<kColumns>::kSide;
    const int lane = threadIdx.x % 32, g = lane / 4, on_diagonal = g - lane % 4 * 2;
    if constexpr (sizeof(T) == 2) {
        float* s_rows = s_squares + wr * kWarpRows + wc * 16 + g;
        float* s_columns = s_squares + kSide + wc * kColumns + wr * 16 + g;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (on_diagonal != i) continue;
            s_rows[0] = products.squares[0][0][i];
            s_rows[8] = products.squares[0][1][2 + i];
            s_columns[0] = products.squares[1][0][i];
            s_columns[8] = products.squares[1][1][2 + i];
        }
    } else {
        static_assert(kColumns == kWarpRows, "a lane per row and per column");
        if (wc == 0) s_squares[wr * kWarpRows + lane] = products.squares[0][0][0];
        if (wr == 0) s_squares[kSide + wc * kColumns + lane] = products.squares[1][0][0];
    }
}

// What a row brings to normalise: 1 / norm where float16 is the result, else the norm, for two roundings less. A zero
// row's products are 0.
template <class T>
__device__ float norm_factor(float squares) {
    const float norm = squares > 0.0f ? sqrtf(squares) : 1.0f;
    return sizeof(T) == 2 ? 1.0f / norm : norm;
}
template <class T>
__device__ float normalise(float dot, float row, float column) {
    return sizeof(T) == 2 ? dot * row * column : dot / row / column;
}

__device__ inline void store_cosine(float* p, float x) { *p = x; }
__device__ inline void store_cosine(__half* p, float x) { *p = __float2half_rn(x); }

template <class T, int kColumns>
__global__ void __launch_bounds__(Tile<kColumns>::kThreads, 1)
    cosine_similarity_kernel(const __grid_constant__ Params params) {
    using Out = std::conditional_t<sizeof(T) == 2, __half, float>;
    constexpr int kSide = Tile<kColumns>::kSide, kThreads = Tile<kColumns>::kThreads, kPiece = 16 / sizeof(T);
    constexpr int kStageBytes = Tile<kColumns>::kStageBytes, kStepElements = kStepBytes / sizeof(T);
    hvp::programmatic_trigger();
    HVP_DYNAMIC_SHARED(char, s_stages);     // [kStages, kStageBytes]
    HVP_SHARED(float, s_scale, 2 * kSide);  // 1 but where norms need it; 0 for a row with NaN or inf
    HVP_SHARED(float, s_norm, 2 * kSide);   // squared, then as normalise takes it; NaN for a row with NaN or inf
    const int N = params.N, C = params.C, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int wr = warp / 2, wc = warp % 2;

    // Find the block's tile.
    const int pairs = params.tiles * (params.tiles + 1) / 2;
    const int64_t b = blockIdx.x / pairs;
    int tile_row = 0, tile_column = blockIdx.x % pairs;
    while (tile_column >= params.tiles - tile_row) tile_column -= params.tiles - tile_row++;
    tile_column += tile_row;
    const T* features = static_cast<const T*>(params.features) + b * params.batch_stride;
    const auto token_of = [&](int i) { return i < kSide ? tile_row * kSide + i : tile_column * kSide + i - kSide; };

    // Copies a step of the tile's rows and columns to its stage; what lies outside becomes zero.
    const auto load_stage = [&](int step, bool scaled) {
        char* s_stage = s_stages + step % kStages * kStageBytes;
        const int column = step * kStepElements + threadIdx.x % 8 * kPiece;
        for (int i = threadIdx.x / 8; i < 2 * kSide; i += kThreads / 8) {
            const int token = token_of(i), valid = token < N ? max(0, min(kPiece, C - column)) : 0;
            const T* from = valid > 0 ? features + token * params.token_stride + column : features;
            T* to = reinterpret_cast<T*>(s_stage + i * kRowBytes) + threadIdx.x % 8 * kPiece;
            if (params.aligned && !scaled) {
                hvp::cp_async16(to, from, valid * sizeof(T));
            } else {
                const float scale = scaled ? s_scale[i] : 1.0f;
                for (int k = 0; k < kPiece; ++k)
                    to[k] = T(k < valid && scale != 0.0f ? to_float(from[k]) * scale : 0.0f);
            }
        }
        hvp::cp_async_commit();
    };

    // Multiply, and once more if a norm asks for it.
    Products<T, kColumns> products;
    for (int run = 0; run < 2; ++run) {
        products = {};
        const int num_steps = (C + kStepElements - 1) / kStepElements;
        for (int step = 0; step < kStages - 1; ++step) load_stage(step, run > 0);
#pragma unroll 1
        for (int step = 0; step < num_steps; ++step) {
            hvp::cp_async_wait<kStages - 2>();
            __syncthreads();  // the stage is there, and the one to be loaded is read
            load_stage(step + kStages - 1, run > 0);
            const char* s_stage = s_stages + step % kStages * kStageBytes;
            multiply_stage<T, kColumns>(s_stage, s_stage + kSide * kRowBytes, wr, wc, products);
        }
        hvp::cp_async_wait<0>();
        store_squares<T, kColumns>(products, wr, wc, s_norm);
        __syncthreads();  // s_norm is written, the stages are read
        if (run > 0) break;
        bool good = true;
        for (int i = threadIdx.x; i < 2 * kSide; i += kThreads) {
            good &= token_of(i) >= N || (s_norm[i] >= kSmallest && s_norm[i] <= kLargest);
        }
        if (__syncthreads_and(good)) {
            for (int i = threadIdx.x; i < 2 * kSide; i += kThreads) s_scale[i] = 1.0f;
            break;
        }
        // Scale rows out of range by a power of two that brings their largest element near 1.
        for (int i = warp; i < 2 * kSide; i += kThreads / 32) {
            unsigned largest = 0;  // bits of the absolute value
            const bool outside = !(s_norm[i] >= kSmallest && s_norm[i] <= kLargest) && token_of(i) < N;
            for (int k = lane; outside && k < C; k += 32) {
                const float x = to_float(features[token_of(i) * params.token_stride + k]);
                largest = max(largest, __float_as_uint(x) & 0x7fffffffu);
            }
            largest = __reduce_max_sync(kAllLanes, largest);
            const int exponent = static_cast<int>(largest >> 23);  // biased; 2^-exponent stays normal
            const float scale = __uint_as_float(static_cast<unsigned>(254 - max(1, min(253, exponent))) << 23);
            if (lane == 0) s_scale[i] = !outside ? 1.0f : exponent == 255 ? 0.0f : scale;
        }
        __syncthreads();  // s_scale is written, s_norm is read
    }
    for (int i = threadIdx.x; i < 2 * kSide; i += kThreads) {
        const float squares = s_norm[i];
        s_norm[i] = s_scale[i] == 0.0f ? NAN : norm_factor<T>(squares);
    }
    __syncthreads();  // s_norm is complete

    // Normalise, round and mirror.
    Out* similarity = static_cast<Out*>(params.similarity) + b * N * N;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const int i = wr * kWarpRows + 8 * r + lane / 4, row = tile_row * kSide + i;
#pragma unroll
        for (int c = 0; c < kColumns / 4; ++c) {
            const int j = wc * kColumns + c / 2 * 8 + lane % 4 * 2 + c % 2, column = tile_column * kSide + j;
            if (row >= N || column >= N || row > column) continue;
            const float norm_row = s_norm[i], norm_column = s_norm[kSide + j];
            const bool finite = norm_row == norm_row && norm_column == norm_column;
            const float cosine = finite ? normalise<T>(products.dots[r][c], norm_row, norm_column) : -INFINITY;
            store_cosine(similarity + static_cast<int64_t>(row) * N + column, cosine);
            store_cosine(similarity + static_cast<int64_t>(column) * N + row, cosine);
        }
    }
}

template <class T, int kColumns>
void launch_tiles(Params params, int64_t B, hvp::LaunchConfig config) {
    using Shape = Tile<kColumns>;
    params.tiles = static_cast<int>(ceil_div(params.N, Shape::kSide));
    config.grid = grid_of(kOp, B * params.tiles * (params.tiles + 1) / 2);
    config.block = dim3(Shape::kThreads);
    config.dynamic_shared_bytes = kStages * Shape::kStageBytes;
    HVP_LAUNCH(kOp, config, cosine_similarity_kernel<T, kColumns>, params);
}

}  // namespace

void cosine_similarity_cuda(const CosineSimilarityArgs& args, cudaStream_t stream) {
    if (args.B * args.N == 0) return;
    const int64_t size = args.dtype == DType::kFloat32 ? 4 : 2;
    Params params = {};
    params.features = args.features;
    params.batch_stride = args.batch_stride;
    params.token_stride = args.token_stride;
    params.similarity = args.similarity;
    params.N = static_cast<int>(args.N);
    params.C = static_cast<int>(args.C);
    const auto address = reinterpret_cast<uintptr_t>(args.features);
    params.aligned = (address | (args.batch_stride | args.token_stride) * size) % 16 == 0;
    hvp::LaunchConfig config;
    config.stream = stream;
    dispatch(args.dtype, [&](auto tag) {
        using T = decltype(tag);
        // Large tiles read less from L2, small ones fill a GPU with a few images.
        constexpr int64_t kManyTokens = 4096;
        if constexpr (sizeof(T) == 2) {
            const int64_t norms = 4 * Tile<64>::kSide * sizeof(float);
            const bool fits = kStages * Tile<64>::kStageBytes <= hvp::max_shared_bytes(kOp, norms);
            if (fits && args.B * args.N >= kManyTokens) return launch_tiles<T, 64>(params, args.B, config);
        }
        launch_tiles<T, 32>(params, args.B, config);
    });
}

}  // namespace hvprune
