// A vector of floats as wide as the level has them, and the few functions that the kernels need of it.
//
// Included by a level's translation unit, inside nothing, with GEMMA_LEVEL set to the level's namespace.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstring>
#include <limits>
#include <type_traits>

#include "calls.h"

namespace gemma::GEMMA_LEVEL {

#if defined(__AVX512F__)

struct Vec {
    static constexpr int width = 16;
    __m512 v;
};

inline Vec splat(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// Both give the second argument if one is NaN.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec if_less(Vec a, Vec b, Vec yes, Vec no) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
// 2^n for whole n in -126..127
inline Vec power_of_two(Vec n) {
    const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23))};
}
inline Vec load(const bf16* p) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))};
}
// The bits of a rounded to bf16 (to nearest, ties to even), as the upper halves of the lanes.
inline __m512i rounded_bits(Vec a) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i lowest = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(bits, _mm512_add_epi32(lowest, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    return _mm512_mask_blend_epi32(is_nan, rounded, _mm512_set1_epi32(0x7fc00000));
}
inline void store(bf16* p, Vec a) {
    const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_bits(a), 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
}
inline Vec rounded_to_bf16(Vec a) {
    return {_mm512_castsi512_ps(_mm512_and_si512(rounded_bits(a), _mm512_set1_epi32(-65536)))};
}
// Of lanes of two bf16: the first ones and the second ones.
inline Vec load_first(const bf16* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))};
}
inline Vec load_second(const bf16* p) {
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(-65536)))};
}

#else

struct Vec {
    static constexpr int width = 8;
    __m256 v;
};

inline Vec splat(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
// Both give the second argument if one is NaN.
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec if_less(Vec a, Vec b, Vec yes, Vec no) {
    return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
inline Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
// 2^n for whole n in -126..127
inline Vec power_of_two(Vec n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23))};
}
inline Vec load(const bf16* p) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))};
}
// The bits of a rounded to bf16 (to nearest, ties to even), as the upper halves of the lanes.
inline __m256i rounded_bits(Vec a) {
    const __m256i bits = _mm256_castps_si256(a.v);
    const __m256i lowest = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(lowest, _mm256_set1_epi32(0x7fff)));
    const __m256 is_nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
    const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
    return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), nan, is_nan));
}
inline void store(bf16* p, Vec a) {
    const __m256i halves = _mm256_srli_epi32(rounded_bits(a), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline Vec rounded_to_bf16(Vec a) {
    return {_mm256_castsi256_ps(_mm256_and_si256(rounded_bits(a), _mm256_set1_epi32(-65536)))};
}
// Of lanes of two bf16: the first ones and the second ones.
inline Vec load_first(const bf16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))};
}
alignas(32) constexpr uint32_t kUpperHalves[8] = {0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000,
                                                 0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000};
// With the mask in memory, whatever the compiler thinks: the inner loop has no register left for it.
inline Vec load_second(const bf16* p) {
    __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    asm("vpand %1, %0, %0" : "+x"(bits) : "m"(kUpperHalves));
    return {_mm256_castsi256_ps(bits)};
}

#endif

// --- independent of the width --------------------------------------------------------------------------------

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

template <class T>
constexpr T round_up(T n, T multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

template <class T>
Vec rounded_to(Vec a);
template <>
inline Vec rounded_to<float>(Vec a) {
    return a;
}
template <>
inline Vec rounded_to<bf16>(Vec a) {
    return rounded_to_bf16(a);
}

// The first n <= width elements, zeros behind them.
template <class T>
inline Vec load_some(const T* p, int64_t n) {
    if (n == Vec::width) return load(p);
    T padded[Vec::width] = {};
    std::memcpy(padded, p, size_t(n) * sizeof(T));
    return load(padded);
}

template <class T>
inline void store_some(T* p, Vec a, int64_t n) {
    if (n == Vec::width) return store(p, a);
    T padded[Vec::width];
    store(padded, a);
    std::memcpy(p, padded, size_t(n) * sizeof(T));
}

// Calls f(index, count) over [0, n) a vector at a time, the last of which may be cut short.
template <class F>
[[gnu::always_inline]] inline void over(int64_t n, F f) {
    int64_t i = 0;
    for (; i + Vec::width <= n; i += Vec::width) f(i, int64_t(Vec::width));
    if (i < n) f(i, n - i);
}

inline float sum(Vec a) {
    float lanes[Vec::width];
    store(lanes, a);
    for (int half = Vec::width / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

inline float largest(Vec a) {
    float lanes[Vec::width];
    store(lanes, a);
    float result = lanes[0];
    for (int i = 1; i < Vec::width; ++i) result = lanes[i] > result ? lanes[i] : result;
    return result;
}

// e^x to about one unit in the last place; exactly 0 below -87.3, NaN for NaN. Polynomial: Cephes, expf.c.
inline Vec exp(Vec x) {
    const Vec lowest = splat(-87.33654f);
    const Vec clamped = min(splat(88.02969f), max(lowest, x));
    const Vec n = round(clamped * splat(1.44269504088896341f));
    // ln 2 in two parts, the first of which n multiplies exactly.
    const Vec r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), clamped));
    Vec p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r + splat(1.0f));
    return if_less(x, lowest, splat(0.0f), p * power_of_two(n));
}

// Polynomial near 0, where 1 - 2 / (e^2x + 1) cancels: Cephes, tanhf.c.
inline Vec tanh(Vec x) {
    const Vec z = x * x;
    Vec p = splat(-5.70498872745e-3f);
    p = fma(p, z, splat(2.06390887954e-2f));
    p = fma(p, z, splat(-5.37397155531e-2f));
    p = fma(p, z, splat(1.33314422036e-1f));
    p = fma(p, z, splat(-3.33332819422e-1f));
    const Vec near = fma(p * z, x, x);
    const Vec far = splat(1.0f) - splat(2.0f) / (exp(x + x) + splat(1.0f));
    return if_less(abs(x), splat(0.625f), near, far);
}

}  // namespace gemma::GEMMA_LEVEL
