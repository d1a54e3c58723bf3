// Warp-wide tensor core products and asynchronous copies (sm_80+): inline PTX on the device, the semantics
// of the PTX ISA in plain C++ under HVP_EMULATE. All 32 lanes call together.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "device.cuh"

namespace hvp {

#ifdef HVP_EMULATE

// The values of all 32 lanes.
template <class T>
const ::emulation::Lane* gather_warp(const T& value, const char* op, int line) {
    const auto all = ::emulation::exchange(~0u, ::emulation::pack(value), op, line);
    if (all.mask != ~0u) ::emulation::fail(std::string(op) + ": the warp is not full");
    return all.lanes;
}

// acc (16 x 8) += A (16 x K) B (K x 8) with K = 8 * kPerRegister; value(register, part) gives an operand.
// NOTE: sums run along k one by one in float32; the hardware's order and rounding differ.
template <int kPerRegister, class Value>
void emulate_mma(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Value value, const char* op,
                 int line) {
    struct Fragments {
        uint32_t a[4], b[2];
    } own = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    const auto* lanes = gather_warp(own, op, line);
    const int lane = ::emulation::lane();
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 8 * kPerRegister; ++k) {
            const int quad_lane = k / kPerRegister % 4, high_k = k >= 4 * kPerRegister;
            const auto from_a = ::emulation::unpack<Fragments>(lanes[row % 8 * 4 + quad_lane]);
            const auto from_b = ::emulation::unpack<Fragments>(lanes[column * 4 + quad_lane]);
            acc[i] +=
                value(from_a.a[row / 8 + 2 * high_k], k % kPerRegister) * value(from_b.b[high_k], k % kPerRegister);
        }
    }
}

// Register i of lane l receives two elements of the 8 x 8 matrix whose rows lanes 8i to 8i + 7 point to.
inline void emulate_ldmatrix(uint32_t (&registers)[4], const void* row, bool transposed, int line) {
    if (reinterpret_cast<uintptr_t>(row) % 16) ::emulation::fail("ldmatrix: row is not aligned to 16 bytes");
    const auto* lanes = gather_warp(row, "ldmatrix", line);
    const int major = ::emulation::lane() / 4, minor = ::emulation::lane() % 4 * 2;
    for (int i = 0; i < 4; ++i) {
        uint16_t pair[2];
        for (int j = 0; j < 2; ++j) {
            const int matrix_row = transposed ? minor + j : major;
            const int matrix_column = transposed ? major : minor + j;
            const auto* elements = ::emulation::unpack<const uint16_t*>(lanes[8 * i + matrix_row]);
            pair[j] = elements[matrix_column];
        }
        memcpy(&registers[i], pair, sizeof pair);
    }
}

#define HVP_LINE_ARGUMENT , int line = __builtin_LINE()
#else
#define HVP_LINE_ARGUMENT
#endif

// acc += A B, mma.m16n8k16 with float32 accumulation; T is __half or __nv_bfloat16. With g = lane / 4 and
// t = lane % 4, two consecutive k per register (the lower one in the lower half):
//     a[0] row g, k 2t;  a[1] row g + 8, k 2t;  a[2] row g, k 2t + 8;  a[3] row g + 8, k 2t + 8
//     b[0] k 2t, column g;  b[1] k 2t + 8, column g
//     acc[0], acc[1] row g, columns 2t and 2t + 1;  acc[2], acc[3] row g + 8
template <class T>
__device__ inline void mma_m16n8k16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] HVP_LINE_ARGUMENT) {
    constexpr bool kIsHalf = std::is_same_v<T, __half>;
    static_assert(kIsHalf || std::is_same_v<T, __nv_bfloat16>, "float16 or bfloat16 operands");
#ifdef HVP_EMULATE
    const auto value = [](uint32_t bits, int part) -> float {
        const auto raw = static_cast<uint16_t>(part ? bits >> 16 : bits);
        if constexpr (kIsHalf) return __half2float(::emulation::bit_cast<__half>(raw));
        return ::emulation::bit_cast<float>(static_cast<uint32_t>(raw) << 16);
    };
    emulate_mma<2>(acc, a, b, value, "mma_m16n8k16", line);
#else
    if constexpr (kIsHalf) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
#endif
}

// acc += A B, mma.m16n8k8 on tf32 operands: float32 bits of which the low 13 are ignored.
//     a[0] row g, k t;  a[1] row g + 8, k t;  a[2] row g, k t + 4;  a[3] row g + 8, k t + 4
//     b[0] k t, column g;  b[1] k t + 4, column g;  acc as above
__device__ inline void mma_m16n8k8_tf32(float (&acc)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2] HVP_LINE_ARGUMENT) {
#ifdef HVP_EMULATE
    const auto value = [](uint32_t bits, int) { return __uint_as_float(bits & ~0x1fffu); };
    emulate_mma<1>(acc, a, b, value, "mma_m16n8k8_tf32", line);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// 2^x to two last places (of exp2f, too); results below 2^-126 are zero.
__device__ inline float exp2_approx(float x) {
#ifdef HVP_EMULATE
    const float result = std::exp2(x);
    return result < 0x1p-126f ? 0.0f : result;
#else
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#endif
}

// The nearest tf32 value (10 bits of mantissa), ties away from zero.
__device__ inline uint32_t to_tf32(float x) {
#ifdef HVP_EMULATE
    const uint32_t bits = __float_as_uint(x);
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    return finite ? (bits + 0x1000u) & ~0x1fffu : bits;
#else
    uint32_t result;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(x));
    return result;
#endif
}

// Loads four 8 x 8 matrices of 16-bit elements from shared memory: lane l points to row l % 8 of matrix
// l / 8, 16 bytes, aligned; registers[i] receives row lane / 4, columns lane % 4 * 2 and + 1 of matrix i.
__device__ inline void ldmatrix_x4(uint32_t (&registers)[4], const void* row HVP_LINE_ARGUMENT) {
#ifdef HVP_EMULATE
    emulate_ldmatrix(registers, row, false, line);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

// The same with every matrix transposed.
__device__ inline void ldmatrix_x4_trans(uint32_t (&registers)[4], const void* row HVP_LINE_ARGUMENT) {
#ifdef HVP_EMULATE
    emulate_ldmatrix(registers, row, true, line);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

// Copies `bytes` (at most 16) from global to shared memory and fills the rest of the 16 bytes with zeros;
// lands at the wait of its group. Both addresses are aligned to 16; source is not read if bytes is 0.
__device__ inline void cp_async16(void* shared, const void* source, unsigned bytes = 16) {
#ifdef HVP_EMULATE
    const auto misaligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 != 0; };
    if (misaligned(shared) || misaligned(source)) ::emulation::fail("cp_async16: not aligned to 16 bytes");
    memset(shared, 0xEE, 16);  // until the wait, nobody can count on the old or the new content
    ::emulation::async_copy({shared, source, bytes});
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(source)), "r"(bytes)
                 : "memory");
#endif
}

// Closes the group of the copies this thread has issued since the last commit.
__device__ inline void cp_async_commit() {
#ifdef HVP_EMULATE
    ::emulation::async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kPending of this thread's groups are in flight. Other threads' copies need a barrier.
#ifdef HVP_EMULATE
template <int kPending>
void cp_async_wait(HVP_PLACE) {
    if (::emulation::left_out(file, line)) return;
    for (::emulation::AsyncCopy copy; ::emulation::async_land(kPending, &copy);) {
        auto* target = static_cast<char*>(copy.target);
        memcpy(target, copy.source, copy.bytes);
        memset(target + copy.bytes, 0, 16 - copy.bytes);
    }
}
#else
template <int kPending>
__device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
#endif

#undef HVP_LINE_ARGUMENT

}  // namespace hvp
