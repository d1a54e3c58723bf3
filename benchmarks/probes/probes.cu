// What the kernels' designs assume of the GPU, measured on the one at hand: the exchange between the blocks of a
// cluster, resident clusters, exponential and maximum rates, L2 bandwidth, graph nodes, copy bandwidth. sm_90 or later.
//     nvcc -std=c++17 -O3 -gencode=arch=compute_90,code=sm_90 -o probes benchmarks/probes/probes.cu && ./probes
// prints name,value,unit,device,date. Cycles are those of one SM, counted by clock64; every value is the median of
// kRepeats launches.
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <string>
#include <type_traits>

#include "../../csrc/cuda/device.cuh"
#include "../../csrc/cuda/mma.cuh"

namespace {

constexpr int kRepeats = 11;
constexpr int kBlock = 1024;             // threads of most probes, and of the selection kernels
constexpr size_t kWholeSm = 200 * 1024;  // dynamic shared memory that leaves room for no second block on an SM
constexpr int kMagic = 0x5eed5eed;       // no result equals it: a store behind it keeps the work alive

void check(cudaError_t error, int line) {
    if (error == cudaSuccess) return;
    fprintf(stderr, "probes: %s: %s (line %d)\n", cudaGetErrorName(error), cudaGetErrorString(error), line);
    exit(1);
}
#define CHECK(call) check((call), __LINE__)

void report(const std::string& name, double value, const char* unit) {
    static const std::string tail = [] {
        cudaDeviceProp properties;
        CHECK(cudaGetDeviceProperties(&properties, 0));
        char date[16];
        const time_t now = time(nullptr);
        strftime(date, sizeof date, "%Y-%m-%d", gmtime(&now));
        return std::string(properties.name) + "," + date;
    }();
    printf("%s,%.5g,%s,%s\n", name.c_str(), value, unit, tail.c_str());
    fflush(stdout);
}

template <class F>
double median(F measure) {
    double values[kRepeats];
    measure();  // warm-up
    for (double& value : values) value = measure();
    std::sort(values, values + kRepeats);
    return values[kRepeats / 2];
}

// Milliseconds of what `run` puts on the stream.
template <class F>
double elapsed_ms(cudaStream_t stream, F run) {
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    CHECK(cudaEventRecord(begin, stream));
    run();
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    return ms;
}

// Memory in which kernels leave cycles per block, and what they computed.
long long* cycles_of_blocks;
constexpr int kMaxBlocks = 1024;

// Most cycles of any block of a launch.
template <class... Params, class... Args>
double cycles_of(const hvp::LaunchConfig& config, void (*kernel)(Params...), Args... args) {
    CHECK(hvp::launch(config, kernel, args...));
    CHECK(cudaStreamSynchronize(config.stream));
    static long long host[kMaxBlocks];
    CHECK(cudaMemcpy(host, cycles_of_blocks, config.grid.x * sizeof(long long), cudaMemcpyDeviceToHost));
    return static_cast<double>(*std::max_element(host, host + config.grid.x));
}

hvp::LaunchConfig config_of(unsigned grid, unsigned block, size_t shared = 0, unsigned cluster = 1) {
    hvp::LaunchConfig config;
    config.grid = dim3(grid);
    config.block = dim3(block);
    config.dynamic_shared_bytes = shared;
    config.cluster = cluster;
    return config;
}

// Clock: cycles of one SM while wall time passes.

__global__ void spin_kernel(long long* cycles, long long count) {
    const long long begin = clock64();
    while (clock64() - begin < count) {
    }
    cycles[0] = clock64() - begin;
}

void probe_clock() {
    const double short_ms =
        median([] { return elapsed_ms(nullptr, [] { spin_kernel<<<1, 1>>>(cycles_of_blocks, 1'000'000); }); });
    const double long_ms =
        median([] { return elapsed_ms(nullptr, [] { spin_kernel<<<1, 1>>>(cycles_of_blocks, 11'000'000); }); });
    CHECK(cudaGetLastError());
    report("sm_clock", 10'000'000 / (long_ms - short_ms) / 1000, "MHz");
}

// Exchange between the blocks of a cluster.

enum class Exchange { kBlockBarrier, kRelaxedBarrier, kReleaseBarrier, kAsyncStore };

// One cluster. In a round, every block tells every block something and waits for all of it: by barriers of the
// cluster, or by the exchange that diverse_select uses, a key per block and, with more than one warp, a barrier of the
// block before the next round.
template <Exchange kExchange>
__global__ void exchange_kernel(long long* cycles, int rounds) {
    __shared__ hvp::ExchangeBarrier s_barriers[2];
    __shared__ int s_keys[2][8];
    const int blocks = hvp::cluster_size();
    if (kExchange == Exchange::kAsyncStore && threadIdx.x < 2) hvp::exchange_init(&s_barriers[threadIdx.x]);
    hvp::cluster_sync();
    int key = threadIdx.x;
    const long long begin = clock64();
    for (int round = 0; round < rounds; ++round) {
        if constexpr (kExchange == Exchange::kBlockBarrier) {
            __syncthreads();
        } else if constexpr (kExchange == Exchange::kRelaxedBarrier) {
            __cluster_barrier_arrive_relaxed();
            __cluster_barrier_wait();
        } else if constexpr (kExchange == Exchange::kReleaseBarrier) {
            hvp::cluster_sync();
        } else {
            hvp::ExchangeBarrier* barrier = &s_barriers[round % 2];
            int* s_now = s_keys[round % 2];
            if (threadIdx.x == 0) hvp::exchange_expect(barrier, blocks * sizeof(int));
            __syncwarp();
            if (threadIdx.x < blocks) hvp::exchange_send(&s_now[hvp::cluster_rank()], key, barrier, threadIdx.x);
            hvp::exchange_wait(barrier, round / 2 % 2);
            key += s_now[threadIdx.x & (blocks - 1)];  // the next round's key depends on this one's
            if (blockDim.x > 32) __syncthreads();
        }
    }
    const long long end = clock64();
    hvp::cluster_sync();
    if (threadIdx.x == 0) cycles[blockIdx.x] = key == kMagic ? 0 : end - begin;
}

template <Exchange kExchange>
void probe_exchange(const char* name, int blocks, int threads) {
    const auto cycles = [&](int rounds) {
        return median([&] {
            return cycles_of(config_of(blocks, threads, 0, blocks), exchange_kernel<kExchange>, cycles_of_blocks,
                             rounds);
        });
    };
    const std::string shape = std::to_string(blocks) + " blocks of " + std::to_string(threads);
    report(std::string(name) + " " + shape, (cycles(3000) - cycles(1000)) / 2000, "cycles");
}

void probe_exchanges() {
    for (int threads : {32, 512, kBlock}) {
        probe_exchange<Exchange::kBlockBarrier>("block barrier", 1, threads);
        for (int blocks : {4, 8}) {
            probe_exchange<Exchange::kRelaxedBarrier>("cluster barrier relaxed", blocks, threads);
            probe_exchange<Exchange::kReleaseBarrier>("cluster barrier release", blocks, threads);
            probe_exchange<Exchange::kAsyncStore>("st.async and mbarrier", blocks, threads);
        }
    }
}

// Clusters of blocks that have an SM each.
void probe_residency() {
    const auto kernel = exchange_kernel<Exchange::kReleaseBarrier>;
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kWholeSm));
    for (unsigned cluster : {2u, 4u, 8u}) {
        cudaLaunchAttribute attribute;
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = cluster;
        attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(cluster * 128);
        config.blockDim = dim3(kBlock);
        config.dynamicSmemBytes = kWholeSm;
        config.attrs = &attribute;
        config.numAttrs = 1;
        int clusters;
        CHECK(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
        report("resident clusters of " + std::to_string(cluster), clusters, "clusters");
    }
}

// Instruction rates: kChains independent values per thread, a block of full occupancy on one SM.

constexpr int kChains = 8;

struct Exp2 {
    static constexpr const char* kName = "ex2.approx.ftz.f32";
    using Value = float;
    static constexpr int kPerValue = 1;
    static __device__ void step(Value (&x)[kChains]) {
#pragma unroll
        for (int i = 0; i < kChains; ++i) x[i] = hvp::exp2_approx(x[i]);
    }
};
struct Exp2Half {
    static constexpr const char* kName = "ex2.approx.f16x2";
    using Value = uint32_t;
    static constexpr int kPerValue = 2;
    static __device__ void step(Value (&x)[kChains]) {
#pragma unroll
        for (int i = 0; i < kChains; ++i) asm("ex2.approx.f16x2 %0, %0;" : "+r"(x[i]));
    }
};
struct Fma {
    static constexpr const char* kName = "fma.f32";
    using Value = float;
    static constexpr int kPerValue = 1;
    static __device__ void step(Value (&x)[kChains]) {
#pragma unroll
        for (int i = 0; i < kChains; ++i) x[i] = __fmaf_rn(x[i], x[(i + 1) % kChains], x[i]);
    }
};
// NOTE: maxima of neighbours in a ring: no value stays equal to what it was made of, so none can be left out.
struct Max {
    static constexpr const char* kName = "max.f32";
    using Value = float;
    static constexpr int kPerValue = 1;
    static __device__ void step(Value (&x)[kChains]) {
#pragma unroll
        for (int i = 0; i < kChains; ++i) x[i] = fmaxf(x[i], x[(i + 1) % kChains]);
    }
};
struct MaxHalf {
    static constexpr const char* kName = "max.f16x2";
    using Value = __half2;
    static constexpr int kPerValue = 2;
    static __device__ void step(Value (&x)[kChains]) {
#pragma unroll
        for (int i = 0; i < kChains; ++i) x[i] = __hmax2(x[i], x[(i + 1) % kChains]);
    }
};
struct MaxOfWarp {
    static constexpr const char* kName = "redux.sync.max.s32";
    using Value = int;
    static constexpr int kPerValue = 1;
    static __device__ void step(Value (&x)[kChains]) {
#pragma unroll
        for (int i = 0; i < kChains; ++i) x[i] = __reduce_max_sync(~0u, x[i] ^ static_cast<int>(threadIdx.x));
    }
};

template <class Value>
__device__ Value value_of(int i) {
    if constexpr (std::is_same_v<Value, __half2>) {
        return __floats2half2_rn(0.001f * i, 0.002f * i);
    } else {
        return static_cast<Value>(i * 0.001f);
    }
}

template <class Rate>
__global__ void rate_kernel(long long* cycles, int steps) {
    typename Rate::Value x[kChains];
#pragma unroll
    for (int i = 0; i < kChains; ++i) x[i] = value_of<typename Rate::Value>(threadIdx.x + i * steps);
    __syncthreads();
    const long long begin = clock64();
#pragma unroll 16
    for (int step = 0; step < steps; ++step) Rate::step(x);
    __syncthreads();
    const long long end = clock64();
    int bits = 0;
#pragma unroll
    for (int i = 0; i < kChains; ++i) {
        int of_one;
        memcpy(&of_one, &x[i], sizeof of_one);
        bits ^= of_one;
    }
    if (threadIdx.x == 0) cycles[0] = end - begin;
    if (bits == kMagic) cycles[1] = bits;
}

// Results per cycle of one SM.
template <class Rate>
void probe_rate() {
    const auto cycles = [](int steps) {
        return median([&] { return cycles_of(config_of(1, kBlock), rate_kernel<Rate>, cycles_of_blocks, steps); });
    };
    const double results = 2048.0 * kChains * kBlock * Rate::kPerValue;
    report(Rate::kName, results / (cycles(4096) - cycles(2048)), "per cycle and SM");
}

void probe_rates() {
    probe_rate<Exp2>();
    probe_rate<Exp2Half>();
    probe_rate<Fma>();
    probe_rate<Max>();
    probe_rate<MaxHalf>();
    probe_rate<MaxOfWarp>();
}

// L2: every block reads the same buffer, several times, each from another place on; past L1.

constexpr int kInFlight = 8;  // loads per thread

__global__ void l2_kernel(long long* cycles, const uint4* buffer, int size, int loads) {
    uint4 sum = {};
    int at = (blockIdx.x * 977 * kBlock + threadIdx.x) % size;
    const long long begin = clock64();
    for (int i = 0; i < loads; i += kInFlight) {
        uint4 values[kInFlight];
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
            values[k] = __ldcg(buffer + at);
            at = at + kBlock < size ? at + kBlock : at + kBlock - size;
        }
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
            sum.x ^= values[k].x, sum.y ^= values[k].y, sum.z ^= values[k].z, sum.w ^= values[k].w;
        }
    }
    __syncthreads();
    const long long end = clock64();
    if (threadIdx.x == 0) cycles[blockIdx.x] = end - begin;
    if ((sum.x ^ sum.y ^ sum.z ^ sum.w) == kMagic) cycles[0] = sum.x;
}

void probe_l2(int num_sms) {
    const int size = 8 * 1024 * 1024 / sizeof(uint4), loads = 4096;  // stays in L2; 64 MB per block
    uint4* buffer;
    CHECK(cudaMalloc(&buffer, size * sizeof(uint4)));
    CHECK(cudaMemset(buffer, 1, size * sizeof(uint4)));
    for (int active : {1, 8, 64, num_sms}) {
        const double cycles = median([&] {
            return cycles_of(config_of(active, kBlock, kWholeSm), l2_kernel, cycles_of_blocks,
                             static_cast<const uint4*>(buffer), size, loads);
        });
        const double bytes = static_cast<double>(loads) * kBlock * sizeof(uint4);
        report("L2 read with " + std::to_string(active) + " SMs", bytes / cycles, "bytes per cycle and SM");
    }
    CHECK(cudaFree(buffer));
}

// Graph nodes: a chain of kernels that each need the previous one's result.

__global__ void node_kernel(int* values) {
    hvp::programmatic_trigger();
    hvp::programmatic_wait();
    if (threadIdx.x == 0) values[blockIdx.x] += 1;
}

// Microseconds of a graph of so many nodes.
double graph_us(int nodes, int blocks, bool dependent, int* values) {
    cudaStream_t stream;
    CHECK(cudaStreamCreate(&stream));
    hvp::LaunchConfig config = config_of(blocks, 128);
    config.stream = stream;
    config.dependent = dependent;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < nodes; ++i) CHECK(hvp::launch(config, node_kernel, values));
    cudaGraph_t graph;
    CHECK(cudaStreamEndCapture(stream, &graph));
    cudaGraphExec_t executable;
    CHECK(cudaGraphInstantiate(&executable, graph, 0));
    CHECK(cudaGraphUpload(executable, stream));
    const double ms = median([&] { return elapsed_ms(stream, [&] { CHECK(cudaGraphLaunch(executable, stream)); }); });
    CHECK(cudaGraphExecDestroy(executable));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaStreamDestroy(stream));
    return ms * 1000;
}

void probe_graph_nodes(int num_sms) {
    int* values;
    CHECK(cudaMalloc(&values, kMaxBlocks * sizeof(int)));
    CHECK(cudaMemset(values, 0, kMaxBlocks * sizeof(int)));
    for (bool dependent : {false, true}) {
        for (int blocks : {1, 32, num_sms}) {
            const double us =
                (graph_us(600, blocks, dependent, values) - graph_us(200, blocks, dependent, values)) / 400;
            const std::string name = dependent ? "graph node, programmatic, " : "graph node, ";
            report(name + std::to_string(blocks) + " blocks", us, "us");
        }
    }
    CHECK(cudaFree(values));
}

// Device memory: copies of 1 GiB, bytes read and written.
void probe_copy() {
    const size_t bytes = size_t{1} << 30;
    char *from, *to;
    CHECK(cudaMalloc(&from, bytes));
    CHECK(cudaMalloc(&to, bytes));
    CHECK(cudaMemset(from, 1, bytes));
    const double ms = median([&] {
        return elapsed_ms(nullptr, [&] { CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice)); });
    });
    report("copy", 2.0 * bytes / ms * 1e-6, "GB/s");
    CHECK(cudaFree(from));
    CHECK(cudaFree(to));
}

}  // namespace

int main() {
    int major, num_sms;
    CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, 0));
    if (major < 9) {
        fprintf(stderr, "probes: clusters need compute capability 9.0, this device has %d\n", major);
        return 1;
    }
    CHECK(cudaMalloc(&cycles_of_blocks, kMaxBlocks * sizeof(long long)));
    puts("name,value,unit,device,date");
    probe_clock();
    probe_exchanges();
    probe_residency();
    probe_rates();
    probe_l2(num_sms);
    probe_graph_nodes(num_sms);
    probe_copy();
    return 0;
}
