// Computes  output[b, m] = features[b, indices[b, m]], or pad_value where the index is -1
// Work      one block per row at a time, grid-stride; each thread copies one unit per step: 16 bytes where addresses
//           and strides allow, else the largest power of two that they share.
// Traffic   kept rows once in, once out.
// Numerics  rows are copied bit for bit; pad_value is rounded to the dtype of the features.
#include <algorithm>
#include <cstring>

#include "../ops.h"
#include "common.cuh"

namespace hvprune {
namespace {

constexpr int kThreads = 128;            // a row of 2 KB (C = 1024 half values) in one step
constexpr int64_t kMaxBlocks = 1 << 20;  // beyond that, blocks take several rows

// Strides and C in units of type Unit.
template <class Unit>
__global__ void __launch_bounds__(kThreads)
    gather_tokens_kernel(const Unit* features,  // [B, N, C]
                         int64_t batch_stride, int64_t token_stride,
                         const int64_t* indices,  // [B, M]
                         int64_t indices_batch_stride,
                         Unit* output,  // [B, M, C]
                         int64_t B, int64_t N, int64_t C, int64_t M, Unit padding) {
    for (int64_t row = blockIdx.x; row < B * M; row += gridDim.x) {
        const int64_t b = row / M, m = row % M;
        const int64_t token = indices[b * indices_batch_stride + m];
        // NOTE: an index out of range is the caller's error, but it must not read other memory.
        const bool valid = token >= 0 && token < N;
        const Unit* source = features + (valid ? b * batch_stride + token * token_stride : 0);
        for (int64_t c = threadIdx.x; c < C; c += kThreads) output[row * C + c] = valid ? source[c] : padding;
    }
}

// pad_value in the dtype of the features, repeated over 16 bytes.
uint4 padding_unit(DType dtype, float pad_value) {
    uint32_t bits = 0;
    dispatch(dtype, [&](auto tag) {
        using T = decltype(tag);
        const T value = static_cast<T>(pad_value);
        std::memcpy(&bits, &value, sizeof value);
        if (sizeof value == 2) bits |= bits << 16;
    });
    return {bits, bits, bits, bits};
}

template <class Unit>
void launch(const GatherTokensArgs& args, int64_t element_size, cudaStream_t stream) {
    const auto units = [&](int64_t elements) { return elements * element_size / static_cast<int64_t>(sizeof(Unit)); };
    const uint4 padding = padding_unit(args.dtype, args.pad_value);
    Unit unit;
    std::memcpy(&unit, &padding, sizeof unit);
    hvp::LaunchConfig config;
    config.grid = grid_of("gather_tokens", std::min(args.B * args.M, kMaxBlocks));
    config.block = dim3(kThreads);
    config.stream = stream;
    HVP_LAUNCH("gather_tokens", config, gather_tokens_kernel<Unit>, static_cast<const Unit*>(args.features),
               units(args.batch_stride), units(args.token_stride), args.indices, args.indices_batch_stride,
               static_cast<Unit*>(args.output), args.B, args.N, units(args.C), args.M, unit);
}

}  // namespace

void gather_tokens_cuda(const GatherTokensArgs& args, cudaStream_t stream) {
    if (args.B * args.M * args.C == 0) return;
    const int64_t element_size = args.dtype == DType::kFloat32 ? 4 : 2;
    const uint64_t addresses = reinterpret_cast<uintptr_t>(args.features) | reinterpret_cast<uintptr_t>(args.output);
    const uint64_t offsets = static_cast<uint64_t>((args.batch_stride | args.token_stride | args.C) * element_size);
    const auto aligned = [&](uint64_t bytes) { return (addresses | offsets) % bytes == 0; };
    if (aligned(16)) return launch<uint4>(args, element_size, stream);
    if (aligned(8)) return launch<uint2>(args, element_size, stream);
    if (aligned(4)) return launch<uint32_t>(args, element_size, stream);
    launch<uint16_t>(args, element_size, stream);
}

}  // namespace hvprune
