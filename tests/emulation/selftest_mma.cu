// A matrix product by ldmatrix, mma and double-buffered cp.async: one warp per tile of 16 x 8.
#include "mma.cuh"
#include "selftest.h"

namespace hvp::selftest {
namespace {

constexpr int kRowBytes = 32;  // of k per step: 16 half-width elements or 8 float32
constexpr int kPieceBytes = 16;
constexpr int kRows = 16, kColumns = 8;
constexpr int kStageBytes = (kRows + kColumns) * kRowBytes;

// Starts the copies of one step of k into s_a and s_b; what lies outside a and b becomes zero.
__device__ void load_step(const MatmulArgs& args, int row0, int column0, int64_t k_bytes, int step, char* s_a,
                          char* s_b) {
    const int lane = threadIdx.x;
    const int64_t offset = static_cast<int64_t>(step) * kRowBytes + lane % 2 * kPieceBytes;
    const int row = lane / 2, column = lane / 2;
    const bool inside_a = row0 + row < args.m && offset < k_bytes;
    const char* a = static_cast<const char*>(args.a);
    cp_async16(s_a + lane * kPieceBytes, inside_a ? a + (row0 + row) * k_bytes + offset : a, inside_a ? 16 : 0);
    const char* b = static_cast<const char*>(args.b);
    if (lane < 16 && args.b_is_kn) {
        const int64_t k = static_cast<int64_t>(step) * 16 + lane;
        const bool inside_b = k < args.k;
        cp_async16(s_b + lane * kPieceBytes, inside_b ? b + (k * args.n + column0) * 2 : b, inside_b ? 16 : 0);
    } else if (lane < 16) {
        const bool inside_b = offset < k_bytes;
        cp_async16(s_b + lane * kPieceBytes, inside_b ? b + (column0 + column) * k_bytes + offset : b,
                   inside_b ? 16 : 0);
    }
    cp_async_commit();
}

template <class T>
__device__ void multiply_half(float (&acc)[4], const char* s_a, const char* s_b, bool b_is_kn) {
    const int lane = threadIdx.x;
    uint32_t a[4], b[4];
    ldmatrix_x4(a, s_a + lane % 16 * kRowBytes + lane / 16 * kPieceBytes);
    if (b_is_kn) {
        ldmatrix_x4_trans(b, s_b + lane % 16 * kPieceBytes);
    } else {
        ldmatrix_x4(b, s_b + lane % 8 * kRowBytes + lane / 8 % 2 * kPieceBytes);
    }
    mma_m16n8k16<T>(acc, a, {b[0], b[1]});
}

__device__ void multiply_tf32(float (&acc)[4], const char* s_a, const char* s_b) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    const float* a = reinterpret_cast<const float*>(s_a);
    const float* b = reinterpret_cast<const float*>(s_b);
    mma_m16n8k8_tf32(acc,
                     {to_tf32(a[g * 8 + t]), to_tf32(a[(g + 8) * 8 + t]), to_tf32(a[g * 8 + t + 4]),
                      to_tf32(a[(g + 8) * 8 + t + 4])},
                     {to_tf32(b[g * 8 + t]), to_tf32(b[g * 8 + t + 4])});
}

__global__ void matmul_kernel(MatmulArgs args) {
    HVP_DYNAMIC_SHARED(char, s_stages);  // [2, kStageBytes]
    const int row0 = blockIdx.y * kRows, column0 = blockIdx.x * kColumns;
    const int64_t k_bytes = static_cast<int64_t>(args.k) * (args.operand == Operand::kTf32 ? 4 : 2);
    const int num_steps = static_cast<int>((k_bytes + kRowBytes - 1) / kRowBytes);
    float acc[4] = {};
    const auto load = [&](int step) {
        char* stage = s_stages + step % 2 * kStageBytes;
        load_step(args, row0, column0, k_bytes, step, stage, stage + kRows * kRowBytes);
    };
    load(0);
    for (int step = 0; step < num_steps; ++step) {
        if (step + 1 < num_steps) {
            load(step + 1);
            cp_async_wait<1>();
        } else {
            cp_async_wait<0>();
        }
        __syncwarp();  // the other lanes' copies of this step have landed
        const char* s_a = s_stages + step % 2 * kStageBytes;
        const char* s_b = s_a + kRows * kRowBytes;
        if (args.operand == Operand::kTf32) {
            multiply_tf32(acc, s_a, s_b);
        } else if (args.operand == Operand::kHalf) {
            multiply_half<__half>(acc, s_a, s_b, args.b_is_kn);
        } else {
            multiply_half<__nv_bfloat16>(acc, s_a, s_b, args.b_is_kn);
        }
        __syncwarp();  // this stage is read before the next copies overwrite it
    }
    for (int i = 0; i < 4; ++i) {
        const int row = row0 + threadIdx.x / 4 + 8 * (i / 2);
        const int column = column0 + threadIdx.x % 4 * 2 + i % 2;
        if (row < args.m) args.c[static_cast<int64_t>(row) * args.n + column] = acc[i];
    }
}

}  // namespace

void matmul_cuda(const MatmulArgs& args, cudaStream_t stream) {
    const LaunchConfig config{dim3(args.n / kColumns, (args.m + kRows - 1) / kRows), dim3(32), 2 * kStageBytes, stream};
    HVP_LAUNCH("matmul", config, matmul_kernel, args);
}

}  // namespace hvp::selftest
