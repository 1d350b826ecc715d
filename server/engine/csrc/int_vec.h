// A vector of 32-bit sums of products of 16-bit integers, for int8 weights.
#pragma once

#include "vec.h"

namespace gemma::GEMMA_LEVEL {

#if defined(__AVX512F__)

struct IntVec {
    static constexpr int width = 16;
    __m512i v;
};

// Pairs of 8-bit integers as pairs of 16-bit ones.
inline IntVec load_widened(const int8_t* p) {
    return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
// One pair in all lanes.
inline IntVec splat_pair(const int16_t* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return {_mm512_set1_epi32(pair)};
}
// To each lane's sum, the products of its pairs.
inline IntVec add_pair_products(IntVec sum, IntVec a, IntVec b) {
#if defined(__AVX512VNNI__)
    return {_mm512_dpwssd_epi32(sum.v, a.v, b.v)};
#else
    return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(a.v, b.v))};
#endif
}
inline Vec to_floats(IntVec a) { return {_mm512_cvtepi32_ps(a.v)}; }

inline Vec load(const int8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
}
// Rounds to nearest, ties to even.
inline void store(int16_t* p, Vec a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(a.v)));
}

#else

struct IntVec {
    static constexpr int width = 8;
    __m256i v;
};

// Pairs of 8-bit integers as pairs of 16-bit ones.
inline IntVec load_widened(const int8_t* p) {
    return {_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
// One pair in all lanes.
inline IntVec splat_pair(const int16_t* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return {_mm256_set1_epi32(pair)};
}
// To each lane's sum, the products of its pairs. In assembly, because GCC would let all products of a step wait for
// their additions, and run out of registers (two thirds of the speed).
inline IntVec add_pair_products(IntVec sum, IntVec a, IntVec b) {
    __m256i products;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum.v), "=&x"(products) : "x"(a.v), "x"(b.v));
    return sum;
}
inline Vec to_floats(IntVec a) { return {_mm256_cvtepi32_ps(a.v)}; }

inline Vec load(const int8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))};
}
// Rounds to nearest, ties to even.
inline void store(int16_t* p, Vec a) {
    const __m256i whole = _mm256_cvtps_epi32(a.v);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(whole, whole), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

#endif

inline Vec to_floats(Vec a) { return a; }

}  // namespace gemma::GEMMA_LEVEL
