// One bug per case; tests/test_emulation.py shows which tool finds it.
#include "mma.cuh"
#include "selftest.h"

namespace hvp::selftest {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kFull = ~0u;

__global__ void bug_kernel(BugArgs args) {
    HVP_DYNAMIC_SHARED(int, s_values);  // [kThreads]
    const int thread = threadIdx.x, lane = thread % 32;
    int result = 0;
    switch (args.bug) {
        case Bug::kMissingSyncthreads:
            s_values[thread] = thread;
            result = s_values[kThreads - 1 - thread];
            break;
        case Bug::kMissingSyncwarp:
            s_values[thread] = thread;
            __any_sync(kFull, 1);  // a vote orders no memory
            result = s_values[thread ^ 1];
            break;
        case Bug::kRaceBetweenBlocks:
            args.out[thread] = blockIdx.x;
            __syncthreads();  // orders nothing between blocks
            return;
        case Bug::kSharedOutOfBounds:
            s_values[thread + 1] = thread;
            break;
        case Bug::kDivergentBarrier:
            if (thread < 100) __syncthreads();
            if (thread > 250) cluster_sync();
            break;
        case Bug::kLaneNotInMask:
            result = __shfl_sync(0xffffu, thread, 0);
            break;
        case Bug::kEndedLaneInMask:
            if (lane == 0) return;
            result = __shfl_sync(kFull, thread, 1);
            break;
        case Bug::kMixedFunctions:
            result = lane < 16 ? __any_sync(kFull, 1) : __shfl_sync(kFull, thread, 0);
            break;
        case Bug::kUninitialisedShared:
            if (thread > 0) s_values[thread] = 0;
            __syncthreads();
            result = s_values[thread];
            break;
        case Bug::kMissingCopyWait:
            cp_async16(&s_values[thread / 4 * 4], &args.in[thread / 4 * 4]);
            cp_async_commit();
            result = s_values[thread];
            break;
        case Bug::kBlockEndsEarly:
            if (cluster_rank() == 0) return;
            result = *cluster_map(&s_values[thread], 0);
            break;
        case Bug::kMissingExchangeWait: {
            HVP_SHARED(ExchangeBarrier, s_barrier, 1);
            if (thread == 0) exchange_init(s_barrier);
            cluster_sync();
            if (thread == 0) {
                exchange_expect(s_barrier, sizeof(int));
                exchange_send(s_values, 7, s_barrier, cluster_rank() ^ 1);
            }
            result = s_values[0];
            cluster_sync();
            break;
        }
        case Bug::kUnknownRank:
            result = *cluster_map(&s_values[thread], cluster_size());
            break;
        case Bug::kLateProgrammaticWait:
            result = args.out[thread];  // the previous launch may still write it
            programmatic_wait();
            break;
        default:
            break;
    }
    if (blockIdx.x == 0) args.out[thread] = result;
}

}  // namespace

void bug_cuda(const BugArgs& args, cudaStream_t stream) {
    LaunchConfig config{dim3(2), dim3(kThreads), kThreads * sizeof(int), stream};
    config.cluster = args.bug == Bug::kRaceBetweenBlocks ? 1 : 2;
    config.dependent = args.bug == Bug::kMissingProgrammaticWait || args.bug == Bug::kLateProgrammaticWait;
    if (config.dependent) bug_cuda({args.in, args.out, Bug::kNone}, stream);
    if (args.bug == Bug::kTooManyThreads) config.block.x = 2048;
    HVP_LAUNCH("bug", config, bug_kernel, args);
}

}  // namespace hvp::selftest
