// Vectors of floats in the instruction set of this translation unit, and what the kernels need of them.
#pragma once

#include <cmath>
#include <cstring>

#include "isa.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace hvprune::HVP_ISA {

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

HVP_FUNC float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
HVP_FUNC uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

HVP_FUNC float to_float(float value) { return value; }
HVP_FUNC float to_float(BFloat16 value) { return bits_to_float(uint32_t{value.bits} << 16); }

#if defined(__AVX512F__)

constexpr int kWidth = 16;    // floats per vector
constexpr int kTileRows = 8;  // 8 x 3 accumulators fill the 32 registers
constexpr int kTileVecs = 3;

struct Vec {
    __m512 v;
};
HVP_FUNC Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
HVP_FUNC Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
HVP_FUNC void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
HVP_FUNC Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
HVP_FUNC Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
HVP_FUNC Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
HVP_FUNC Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The second operand where either is NaN.
HVP_FUNC Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
HVP_FUNC float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
HVP_FUNC float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
// p * 2^floor(x); 0 or inf where that leaves the range.
HVP_FUNC Vec scale_by_power(Vec p, Vec x) { return {_mm512_scalef_ps(p.v, x.v)}; }
// x - floor(x); 0 for an infinite x.
HVP_FUNC Vec fraction(Vec x) { return {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
// max(a, row[j...]) in the lanes whose bit is set, bit j for row[j]; a NaN in memory is passed over.
HVP_FUNC Vec max_where(Vec a, const uint8_t* bits, const float* row, int64_t j) {
    uint16_t lanes;
    std::memcpy(&lanes, bits + j / 8, sizeof lanes);
    return {_mm512_mask_max_ps(a.v, lanes, _mm512_loadu_ps(row + j), a.v)};
}
// sums[0..15] += a
HVP_FUNC void add_to(double* sums, Vec a) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a.v));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1));
    _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), low));
    _mm512_storeu_pd(sums + 8, _mm512_add_pd(_mm512_loadu_pd(sums + 8), high));
}
// Sum of squares in double, which no float overflows.
HVP_FUNC double reduce_squares(Vec a) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a.v));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1));
    return _mm512_reduce_add_pd(_mm512_fmadd_pd(low, low, _mm512_mul_pd(high, high)));
}
HVP_FUNC Vec load(const Half* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
HVP_FUNC Vec load(const BFloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}

#elif defined(__AVX2__)

constexpr int kWidth = 8;
constexpr int kTileRows = 4;  // 4 x 3 accumulators of 16 registers
constexpr int kTileVecs = 3;

struct Vec {
    __m256 v;
};
HVP_FUNC Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
HVP_FUNC Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
HVP_FUNC void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
HVP_FUNC Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
HVP_FUNC Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
HVP_FUNC Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
HVP_FUNC Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
HVP_FUNC Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
HVP_FUNC float reduce_add(Vec a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
HVP_FUNC float reduce_max(Vec a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
HVP_FUNC Vec floor(Vec x) { return {_mm256_floor_ps(x.v)}; }
// p * 2^floor(x), which must be a normal number.
HVP_FUNC Vec scale_by_power(Vec p, Vec x) {
    const __m256i shifted = _mm256_slli_epi32(_mm256_cvtps_epi32(floor(x).v), 23);
    return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p.v), shifted))};
}
HVP_FUNC Vec fraction(Vec x) { return x - floor(x); }
// b where x < limit, else a
HVP_FUNC Vec where_below(Vec x, float limit, Vec b, Vec a) {
    return {_mm256_blendv_ps(a.v, b.v, _mm256_cmp_ps(x.v, _mm256_set1_ps(limit), _CMP_LT_OQ))};
}
HVP_FUNC Vec where_nan(Vec x, Vec a) { return {_mm256_blendv_ps(a.v, x.v, _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q))}; }
HVP_FUNC Vec max_where(Vec a, const uint8_t* bits, const float* row, int64_t j) {
    const __m256i lane_bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(bits[j / 8]), lane_bits);
    const __m256 lanes = _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane_bits));
    return {_mm256_blendv_ps(a.v, _mm256_max_ps(_mm256_loadu_ps(row + j), a.v), lanes)};
}
HVP_FUNC void add_to(double* sums, Vec a) {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(a.v));
    const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1));
    _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), low));
    _mm256_storeu_pd(sums + 4, _mm256_add_pd(_mm256_loadu_pd(sums + 4), high));
}
HVP_FUNC double reduce_squares(Vec a) {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(a.v));
    const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1));
    const __m256d sum = _mm256_fmadd_pd(low, low, _mm256_mul_pd(high, high));
    const __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(sum), _mm256_extractf128_pd(sum, 1));
    return _mm_cvtsd_f64(_mm_add_sd(pair, _mm_unpackhi_pd(pair, pair)));
}
HVP_FUNC Vec load(const Half* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
HVP_FUNC Vec load(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}

#else  // any processor, by the compiler's own vectors of 16 bytes

constexpr int kWidth = 4;
constexpr int kTileRows = 4;
constexpr int kTileVecs = 3;

typedef float FloatVector __attribute__((vector_size(16)));
typedef int32_t IntVector __attribute__((vector_size(16)));

struct Vec {
    FloatVector v;
};
HVP_FUNC Vec broadcast(float x) { return {FloatVector{x, x, x, x}}; }
HVP_FUNC Vec load(const float* p) {
    Vec a;
    std::memcpy(&a, p, sizeof a);
    return a;
}
HVP_FUNC void store(float* p, Vec a) { std::memcpy(p, &a, sizeof a); }
HVP_FUNC Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
HVP_FUNC Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
HVP_FUNC Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
HVP_FUNC Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
HVP_FUNC Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
HVP_FUNC float reduce_add(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
HVP_FUNC float reduce_max(Vec a) {
    const float even = a.v[0] > a.v[2] ? a.v[0] : a.v[2];
    const float odd = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
    return even > odd ? even : odd;
}
// For |x| < 2^22, wider than what exp2 cares for.
HVP_FUNC Vec floor(Vec x) {
    const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23
    const Vec nearest = (x + magic) - magic;
    return {nearest.v > x.v ? nearest.v - 1.0f : nearest.v};
}
HVP_FUNC Vec scale_by_power(Vec p, Vec x) {
    IntVector bits;
    std::memcpy(&bits, &p, sizeof bits);
    bits += __builtin_convertvector(floor(x).v, IntVector) << 23;
    Vec scaled;
    std::memcpy(&scaled, &bits, sizeof bits);
    return scaled;
}
HVP_FUNC Vec fraction(Vec x) { return x - floor(x); }
HVP_FUNC Vec where_below(Vec x, float limit, Vec b, Vec a) { return {x.v < limit ? b.v : a.v}; }
HVP_FUNC Vec where_nan(Vec x, Vec a) { return {x.v == x.v ? a.v : x.v}; }
HVP_FUNC Vec max_where(Vec a, const uint8_t* bits, const float* row, int64_t j) {
    const int32_t nibble = bits[j / 8] >> j % 8;
    const IntVector lane_bits = {1, 2, 4, 8};
    const IntVector set = IntVector{nibble, nibble, nibble, nibble} & lane_bits;
    return {set != 0 ? max(load(row + j), a).v : a.v};
}
HVP_FUNC void add_to(double* sums, Vec a) {
    for (int i = 0; i < kWidth; ++i) sums[i] += static_cast<double>(a.v[i]);
}
HVP_FUNC double reduce_squares(Vec a) {
    double sum = 0.0;
    for (int i = 0; i < kWidth; ++i) sum += static_cast<double>(a.v[i]) * static_cast<double>(a.v[i]);
    return sum;
}

#endif

#if defined(__F16C__)
HVP_FUNC float to_float(Half value) { return _cvtsh_ss(value.bits); }
HVP_FUNC Half to_half(float value) { return {static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))}; }
#else
HVP_FUNC float to_float(Half value) {
    const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
    const uint32_t magnitude = value.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude << 13));
    // 2^112 moves the exponent's bias from 15 to 127, and makes subnormals normal.
    const float scaled = bits_to_float(magnitude << 13) * 5.192296858534828e33f;
    return bits_to_float(sign | float_to_bits(scaled));
}
HVP_FUNC Half to_half(float value) {
    const uint32_t bits = float_to_bits(value);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 rounds to inf
    if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 rounds at 2^-24
        const uint32_t rounded = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
        return {static_cast<uint16_t>(sign | rounded)};
    }
    const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u);  // ties to even
    return {static_cast<uint16_t>(sign | rounded >> 13)};
}
#endif

#if !defined(__AVX512F__) && !defined(__AVX2__)
template <class T>
HVP_FUNC Vec load(const T* p) {
    Vec a;
    for (int i = 0; i < kWidth; ++i) a.v[i] = to_float(p[i]);
    return a;
}
#endif

// 2^x to about one unit in the last place; exact limits at -inf, +inf and NaN.
HVP_FUNC Vec exp2(Vec x) {
    // The polynomial of least relative error for 2^r on [0, 1): 2e-9.
    const Vec r = fraction(x);
    Vec p = broadcast(2.1702256e-4f);
    p = fma(p, r, broadcast(1.2439687e-3f));
    p = fma(p, r, broadcast(9.6788406e-3f));
    p = fma(p, r, broadcast(5.5483341e-2f));
    p = fma(p, r, broadcast(2.4022983e-1f));
    p = fma(p, r, broadcast(6.9314700e-1f));
    p = fma(p, r, broadcast(1.0f));
    Vec y = scale_by_power(p, x);
#if !defined(__AVX512F__)
    // Without scalef the power must be a normal number: 0 below, inf above.
    y = where_below(x, -126.0f, broadcast(0.0f), y);
    y = where_nan(x, where_below(x, 128.0f, y, broadcast(INFINITY)));
#endif
    return y;
}

// Calls f with a value of the dtype's type: dispatch(dtype, [&](auto tag) { using T = decltype(tag); ... }).
template <class F>
HVP_FUNC void dispatch(DType dtype, F f) {
    switch (dtype) {
        case DType::kFloat32:
            return f(float{});
        case DType::kFloat16:
            return f(Half{});
        case DType::kBFloat16:
            return f(BFloat16{});
    }
}

// dst[0, n) = factor * src[0, n) as floats; dst[n, padded) = 0.
template <class T>
HVP_FUNC void load_row(const T* src, int64_t n, int64_t padded, float factor, float* dst) {
    const Vec factors = broadcast(factor);
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) store(dst + i, load(src + i) * factors);
    for (; i < n; ++i) dst[i] = to_float(src[i]) * factor;
    for (; i < padded; ++i) dst[i] = 0.0f;
}

}  // namespace hvprune::HVP_ISA
