// The emulation's runtime: scheduler, barriers, shared memory. Compiled without sanitizers, so that its own
// bookkeeping is invisible to them; what CUDA orders, and no more, is told to TSan by acquire and release.
#include "emulation.h"

#include <deque>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "fiber.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {

Config config;
uint64_t num_kernels, num_memsets;
const char* const fibers_are_from = HVP_EMULATION_BOOST ? "boost" : "ucontext";

namespace {

constexpr int kWarp = 32;
constexpr size_t kMaxTsanThreads = 3072;  // of a kind of launch; well below what TSan can tell apart

// An address that stands for a new event in TSan's eyes: were it used again, a barrier would order its threads with
// those of an earlier one. Nothing is stored there.
const void* new_token() {
    static char space[64 << 20];
    static size_t next = 0;
    next = (next + 8) % sizeof space;
    return &space[next];
}

struct Barrier {
    int expected = 0, arrived = 0, in_favour = 0;
    uint64_t phase = 0;
    const char* op = nullptr;
    Votes votes = {};
    // By phase: a fast thread's next arrival must not order a slow one's departure.
    const void* tokens[2] = {new_token(), new_token()};
};

// Lanes of one warp that call a *_sync function with the same mask.
struct WarpGroup {
    unsigned mask = 0;
    int unread = 0;  // lanes that still have to read the last exchange
    Barrier barrier;
    Lane lanes[2][kWarp];  // by phase: a fast lane may be one exchange ahead
};

struct Warp {
    unsigned alive = 0;
    WarpGroup groups[kWarp];  // groups in use are disjoint, so there are at most 32
};

struct SharedObject {
    const void* tag;
    char* data;
    size_t bytes;
};

// The transaction barrier of PTX with one expected arrival per phase.
struct Mbarrier {
    bool arrived = false;
    int64_t pending_bytes = 0;
    uint64_t phase = 0;
    const void* tokens[2] = {new_token(), new_token()};
};

struct Block;

// First in, first out, in storage that is made before a launch and kept: to TSan, memory that one fiber frees and
// another got is a race.
template <class T>
class Queue {
 public:
    Queue() { items_.reserve(kReserved); }
    size_t size() const { return items_.size() - head_; }
    T& front() { return items_[head_]; }
    void pop_front() { ++head_; }
    void push_back(const T& item) {
        if (items_.size() == items_.capacity()) {
            items_.erase(items_.begin(), items_.begin() + static_cast<std::ptrdiff_t>(head_));
            head_ = 0;
        }
        items_.push_back(item);
    }

 private:
    static constexpr size_t kReserved = 256;
    std::vector<T> items_;
    size_t head_ = 0;
};

struct Thread {
    Block* block = nullptr;
    Fiber* fiber = nullptr;
    uint3 index = {};
    unsigned linear = 0;
    bool done = false;
    const uint64_t* awaited = nullptr;  // blocked while *awaited == seen
    uint64_t seen = 0;
    const char* op = nullptr;  // where it is blocked
    int line = 0;
    bool fenced = false;
    std::set<const void*> atomics;  // since the last fence
    Queue<AsyncCopy> copies;
    Queue<size_t> groups;  // sizes of the committed groups in flight
    size_t uncommitted = 0;
};

struct Block {
    uint3 index = {};
    unsigned rank = 0;
    int alive = 0;
    Thread* threads = nullptr;
    Warp* warps = nullptr;
    Barrier barrier;
    std::deque<SharedObject> shared;
    std::map<const void*, Mbarrier> mbarriers;
};

// Everything of the cluster that runs now. It only grows, before the launch's release.
struct Cluster {
    std::vector<Block> blocks;
    std::vector<Thread> threads;
    std::unique_ptr<Warp[]> warps;
    size_t num_warps = 0;
    Barrier barrier;
} cluster;

std::deque<Fiber> fibers[2];  // of ordinary and of dependent launches: these must not know what those did
const std::function<void()>* body;
const Launch* launched;
Thread* running;
bool waited_for_previous;
std::string failure;

// Events in TSan's eyes, by their addresses.
char launch_begins[2], launch_ends;  // by parity of the launch

std::string position(const Thread& thread) {
    const auto xyz = [](uint3 v) {
        return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
    };
    return "block " + xyz(thread.block->index) + " thread " + xyz(thread.index);
}

void check(bool condition, const char* message) {
    if (!condition) fail(message);
}

void block_on(const uint64_t* counter, const char* op, int line) {
    running->awaited = counter;
    running->seen = *counter;
    running->op = op;
    running->line = line;
    Fiber::suspend();
}

void complete(Barrier& barrier) {
    barrier.votes = {barrier.in_favour, barrier.arrived};
    barrier.arrived = barrier.in_favour = 0;
    ++barrier.phase;
}

Votes arrive_and_wait(Barrier& barrier, const char* op, int line, bool vote, bool orders_memory) {
    if (barrier.arrived > 0 && std::string(barrier.op) != op) {
        fail(std::string(op) + " at line " + std::to_string(line) + " meets " + barrier.op + " of other threads");
    }
    barrier.op = op;
    barrier.in_favour += vote;
    const void* token = barrier.tokens[barrier.phase & 1];
    if (orders_memory) release(token);
    if (++barrier.arrived == barrier.expected) {
        complete(barrier);
    } else {
        block_on(&barrier.phase, op, line);
    }
    if (orders_memory) acquire(token);
    return barrier.votes;
}

// A thread that has ended no longer counts at barriers.
void withdraw(Barrier& barrier) {
    if (--barrier.expected > 0 && barrier.arrived == barrier.expected) complete(barrier);
}

void poison(const SharedObject& object) {
    std::fill_n(const_cast<volatile char*>(object.data), object.bytes, static_cast<char>(config.fill));
}

void thread_main() {
    // A dependent launch may run beside the previous one: until it waits, it knows what that one knew at its begin.
    acquire(&launch_begins[(num_kernels - launched->dependent) % 2]);
    ignore_accesses(true);  // the arguments, which the host has written since
    (*body)();
    release(&launch_ends);
    Thread& thread = *running;
    Block& block = *thread.block;
    thread.done = true;
    block.warps[thread.linear / kWarp].alive &= ~(1u << thread.linear % kWarp);
    withdraw(block.barrier);
    withdraw(cluster.barrier);
    if (--block.alive == 0) {  // its shared memory is gone: others that still read it see poison
        for (const SharedObject& object : block.shared) poison(object);
    }
    Fiber::finish();
}

void* find_or_create(Block& block, const void* tag, size_t bytes) {
    for (const SharedObject& object : block.shared) {
        if (object.tag != tag) continue;
        acquire(object.data);
        return object.data;
    }
    // Created under an identity of its own: allocation must not order the threads that share it.
    size_t all_bytes = bytes;
    for (const SharedObject& object : block.shared) all_bytes += object.bytes;
    check(all_bytes <= max_shared_bytes(), "more shared memory than a block can have");
    static const TsanThread allocator = TsanThread::create();
    const TsanThread caller = TsanThread::current();
    allocator.become();
    void* data = nullptr;
    const int error = posix_memalign(&data, 128, std::max<size_t>(bytes, 1));
    release(data);
    caller.become();
    check(error == 0, "out of memory");
    acquire(data);
    block.shared.push_back({tag, static_cast<char*>(data), bytes});
    poison(block.shared.back());
    return data;
}

Mbarrier& mbarrier(Block& block, const void* address) {
    const auto found = block.mbarriers.find(address);
    check(found != block.mbarriers.end(), "exchange barrier is not initialised");
    return found->second;
}

void complete_phase(Mbarrier& barrier) {
    if (!barrier.arrived || barrier.pending_bytes != 0) return;
    barrier.arrived = false;
    ++barrier.phase;
}

// The blocked threads of the cluster, those at one place together.
std::string list_blocked() {
    std::map<std::tuple<unsigned, std::string, int>, std::vector<unsigned>> places;
    for (const Thread& thread : cluster.threads) {
        const unsigned rank = thread.block->rank;
        if (thread.done) {
            places[{rank, "have ended", 0}].push_back(thread.linear);
        } else {
            places[{rank, std::string("wait at ") + thread.op, thread.line}].push_back(thread.linear);
        }
    }
    std::string list;
    for (const auto& [place, threads] : places) {
        const auto& [rank, what, line] = place;
        const uint3 block = cluster.blocks[rank].index;
        list += "\n  block (" + std::to_string(block.x) + "," + std::to_string(block.y) + "," +
                std::to_string(block.z) + "): threads";
        for (size_t i = 0, j; i < threads.size(); i = j) {
            for (j = i + 1; j < threads.size() && threads[j] == threads[j - 1] + 1;) ++j;
            list += " " + std::to_string(threads[i]);
            if (j > i + 1) list += "-" + std::to_string(threads[j - 1]);
        }
        list += " " + what + (line ? " (line " + std::to_string(line) + ")" : "");
    }
    return list;
}

void prepare_cluster(uint3 origin, size_t first_fiber) {
    const unsigned num_threads = blockDim.x * blockDim.y * blockDim.z;
    const unsigned warps_per_block = (num_threads + kWarp - 1) / kWarp;
    for (size_t w = 0; w < cluster.num_warps; ++w) {
        cluster.warps[w].alive = 0;
        for (WarpGroup& group : cluster.warps[w].groups) group.mask = group.unread = 0;
    }
    cluster.barrier = Barrier{};
    cluster.barrier.expected = static_cast<int>(cluster.threads.size());
    for (unsigned rank = 0; rank < cluster.blocks.size(); ++rank) {
        Block& block = cluster.blocks[rank] = Block{};
        block.index = {origin.x + rank, origin.y, origin.z};
        block.rank = rank;
        block.alive = block.barrier.expected = static_cast<int>(num_threads);
        block.threads = &cluster.threads[rank * num_threads];
        block.warps = &cluster.warps[rank * warps_per_block];
        for (unsigned t = 0; t < num_threads; ++t) {
            Thread& thread = block.threads[t] = Thread{};
            thread.block = &block;
            thread.linear = t;
            thread.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
            auto& pool = fibers[launched->dependent];
            thread.fiber = &pool[(first_fiber + rank * num_threads + t) % pool.size()];
            thread.fiber->start(thread_main);
            block.warps[t / kWarp].alive |= 1u << t % kWarp;
        }
    }
}

void run_cluster(std::mt19937_64& random) {
    std::vector<Thread*> order;
    for (Thread& thread : cluster.threads) order.push_back(&thread);
    if (config.order == Order::kReversed) std::reverse(order.begin(), order.end());
    if (config.order == Order::kRandom) std::shuffle(order.begin(), order.end(), random);
    // In random order, only some blocks and warps run for a while, so that they drift apart.
    uint64_t favoured = config.order == Order::kRandom ? random() : ~0ull;  // a bit per block, then per warp
    const auto is_favoured = [&](const Thread& thread) {
        return favoured >> thread.block->rank & favoured >> (32 + thread.linear / kWarp) & 1;
    };
    for (size_t left = order.size(); left > 0;) {
        bool any_ready = false, any_ran = false;
        for (Thread* thread : order) {
            if (thread->done || (thread->awaited && *thread->awaited == thread->seen)) continue;
            any_ready = true;
            if (!is_favoured(*thread)) continue;
            any_ran = true;
            thread->awaited = nullptr;
            running = thread;
            threadIdx = thread->index;
            blockIdx = thread->block->index;
            thread->fiber->resume();
            if (!failure.empty()) return;
            left -= thread->done;
        }
        if (!any_ready) {
            failure = "deadlock" + list_blocked();
            return;
        }
        if (config.order == Order::kRandom) {
            std::shuffle(order.begin(), order.end(), random);
            if (!any_ran || random() % 8 == 0) favoured = random();
        }
    }
}

}  // namespace

void fail(const std::string& message) {
    failure = message + " (" + position(*running) + ")";
    Fiber::suspend();
    abort();  // the launch has ended; nothing resumes this thread
}

size_t max_shared_bytes() {
    const int capability = config.compute_capability;
    if (capability == 80 || capability == 87) return 163 * 1024;
    return (capability < 90 || capability >= 120 ? 99 : 227) * 1024;
}

cudaError_t launch(const Launch& config_of_launch, const std::function<void()>& kernel) {
    const auto [grid, block, cluster_dim, dynamic_shared_bytes, dependent] = config_of_launch;
    const unsigned num_threads = block.x * block.y * block.z, num_blocks = cluster_dim.x;
    if (num_threads == 0 || num_threads > 1024 || block.z > 64) return cudaErrorInvalidConfiguration;
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaErrorInvalidConfiguration;
    if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
    if (num_blocks == 0 || num_blocks > 16 || grid.x % num_blocks) return cudaErrorInvalidClusterSize;
    if (num_blocks > 1 && config.compute_capability < 90) return cudaErrorNotSupported;
    if (dynamic_shared_bytes > max_shared_bytes()) return cudaErrorInvalidValue;

    gridDim = grid;
    blockDim = block;
    body = &kernel;
    launched = &config_of_launch;
    waited_for_previous = false;
    failure.clear();
    cluster.blocks.resize(num_blocks);
    cluster.threads.resize(num_blocks * num_threads);
    const size_t num_warps = num_blocks * ((num_threads + kWarp - 1) / kWarp);
    if (num_warps > cluster.num_warps) {
        cluster.warps = std::make_unique<Warp[]>(num_warps);
        cluster.num_warps = num_warps;
    }
    // Twice as many as run at once: threads of consecutive clusters are then different ones in TSan's eyes.
    const size_t at_once = cluster.threads.size();
    const size_t num_fibers = std::max(at_once, std::min(2 * at_once, kMaxTsanThreads));
    while (fibers[dependent].size() < num_fibers) fibers[dependent].emplace_back();

    std::vector<uint3> origins;
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; x += num_blocks) origins.push_back({x, y, z});
        }
    }
    std::mt19937_64 random(config.seed);
    if (config.order == Order::kReversed) std::reverse(origins.begin(), origins.end());
    if (config.order == Order::kRandom) std::shuffle(origins.begin(), origins.end(), random);

    release(&launch_begins[++num_kernels % 2]);
    for (size_t i = 0; i < origins.size(); ++i) {
        prepare_cluster(origins[i], i * at_once);
        run_cluster(random);
        if (!failure.empty()) break;  // what its threads share stays: nothing orders them before a free
        acquire(&launch_ends);
        for (Block& block : cluster.blocks) {
            for (const SharedObject& object : block.shared) free(object.data);
        }
    }
    if (!failure.empty()) {
        fibers[dependent].clear();  // those that never ended cannot be used again
        throw std::runtime_error("emulation: " + failure);
    }
    if (dependent && !waited_for_previous) {
        throw std::runtime_error("emulation: a dependent launch never called programmatic_wait");
    }
    return cudaSuccess;
}

bool left_out(const char* file, int line) {
    return line == config.left_out_line && std::string(file) == config.left_out_file;
}

Votes block_barrier(const char* op, bool vote, const char* file, int line) {
    if (left_out(file, line)) return {vote, 1};
    return arrive_and_wait(running->block->barrier, op, line, vote, true);
}

void cluster_barrier(const char* file, int line) {
    if (!left_out(file, line)) arrive_and_wait(cluster.barrier, "cluster_sync", line, false, true);
}

// A fence and a later atomic publish what came before; an atomic and a later fence receive it.
void fence(const char* file, int line) {
    if (left_out(file, line)) return;
    for (const void* address : running->atomics) acquire(address);
    running->atomics.clear();
    running->fenced = true;
}

void atomic_access(const void* address) {
    running->atomics.insert(address);
    if (running->fenced) release(address);
}

void programmatic_wait(const char* file, int line) {
    if (left_out(file, line)) return;
    waited_for_previous = true;
    acquire(&launch_begins[num_kernels % 2]);
}

void arguments_are_read() { ignore_accesses(false); }

unsigned lane() { return running->linear % kWarp; }

Exchanged exchange(unsigned mask, const Lane& value, const char* op, int line, bool orders_memory) {
    const auto context = [&] { return std::string(op) + " at line " + std::to_string(line); };
    const unsigned num_threads = blockDim.x * blockDim.y * blockDim.z;
    const unsigned in_warp = std::min<unsigned>(kWarp, num_threads - running->linear / kWarp * kWarp);
    if (mask == ~0u) mask >>= kWarp - in_warp;  // a last warp that is not full
    Warp& warp = running->block->warps[running->linear / kWarp];
    if (!(mask >> lane() & 1)) fail(context() + ": the calling lane is not in its own mask");
    if (mask & ~warp.alive) fail(context() + ": the mask names a lane that has ended");

    WarpGroup* group = nullptr;
    for (WarpGroup& candidate : warp.groups) {
        if (candidate.mask == mask) {
            group = &candidate;
            break;
        }
        const bool idle = candidate.barrier.arrived == 0 && candidate.unread == 0;
        if (!group && (candidate.mask == 0 || idle)) group = &candidate;
        if (candidate.mask == 0) break;
    }
    check(group, "warp functions with overlapping masks");
    if (group->mask != mask) {
        group->mask = mask;
        group->barrier = Barrier{};
        group->barrier.expected = __builtin_popcount(mask);
    }
    Lane* lanes = group->lanes[group->barrier.phase & 1];
    lanes[lane()] = value;
    ++group->unread;
    arrive_and_wait(group->barrier, op, line, false, orders_memory);
    --group->unread;
    return {lanes, mask};
}

void* shared_memory(const void* tag, size_t bytes) { return find_or_create(*running->block, tag, bytes); }

void* dynamic_shared_memory() { return shared_memory(&launched, launched->dynamic_shared_bytes); }

unsigned cluster_rank() { return running->block->rank; }

unsigned cluster_size() { return static_cast<unsigned>(cluster.blocks.size()); }

void* map_shared(const void* shared, unsigned rank) {
    check(rank < cluster_size(), "cluster_map: rank is not in the cluster");
    Block& other = cluster.blocks[rank];
    check(other.alive > 0, "cluster_map: shared memory of a block that has ended");
    const char* address = static_cast<const char*>(shared);
    for (const SharedObject& object : running->block->shared) {
        if (address < object.data || address >= object.data + object.bytes) continue;
        return static_cast<char*>(find_or_create(other, object.tag, object.bytes)) + (address - object.data);
    }
    fail("cluster_map: not an address in shared memory");
}

void mbarrier_init(const void* barrier) { running->block->mbarriers[barrier] = Mbarrier{}; }

void mbarrier_expect(const void* address, unsigned bytes) {
    Mbarrier& barrier = mbarrier(*running->block, address);
    check(!barrier.arrived, "exchange_expect: twice in one phase");
    release(barrier.tokens[barrier.phase & 1]);
    barrier.arrived = true;
    barrier.pending_bytes += bytes;
    complete_phase(barrier);
}

void mbarrier_complete(const void* remote_barrier, unsigned bytes) {
    for (Block& block : cluster.blocks) {
        if (block.mbarriers.count(remote_barrier) == 0) continue;
        Mbarrier& barrier = mbarrier(block, remote_barrier);
        release(barrier.tokens[barrier.phase & 1]);
        barrier.pending_bytes -= bytes;
        return complete_phase(barrier);
    }
    fail("exchange_send: the barrier of the other block is not initialised");
}

void mbarrier_wait(const void* address, unsigned parity, const char* file, int line) {
    if (left_out(file, line)) return;
    Mbarrier& barrier = mbarrier(*running->block, address);
    while ((barrier.phase & 1) == parity) block_on(&barrier.phase, "exchange_wait", line);
    acquire(barrier.tokens[parity]);
}

void async_copy(const AsyncCopy& copy) {
    running->copies.push_back(copy);
    ++running->uncommitted;
}

void async_commit() {
    running->groups.push_back(running->uncommitted);
    running->uncommitted = 0;
}

bool async_land(int pending, AsyncCopy* copy) {
    Queue<size_t>& groups = running->groups;
    while (groups.size() > static_cast<size_t>(pending) && groups.front() == 0) groups.pop_front();
    if (groups.size() <= static_cast<size_t>(pending)) return false;
    --groups.front();
    *copy = running->copies.front();
    running->copies.pop_front();
    return true;
}

}  // namespace emulation

cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
    ++emulation::num_memsets;
    std::memset(target, value, bytes);
    return cudaSuccess;
}

const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaErrorInvalidConfiguration:
            return "cudaErrorInvalidConfiguration";
        case cudaErrorInvalidClusterSize:
            return "cudaErrorInvalidClusterSize";
        case cudaErrorNotSupported:
            return "cudaErrorNotSupported";
        case cudaErrorInvalidValue:
            return "cudaErrorInvalidValue";
        default:
            return "cudaError";
    }
}

const char* cudaGetErrorString(cudaError_t) { return "rejected by the emulation"; }
