// In place of <immintrin.h>, for a processor with AVX2 and FMA: the wider intrinsics that the kernels use, in plain
// C++ and AVX2. Names declared here inside namespace gemma hide the compiler's.
//
// After the operation sections of Intel's Software Developer's Manual. What differs from hardware:
// - bf16 products are chains of exactly fused multiply-adds, rounded to nearest even, with denormals taken for zeros
//   before and after each, as the manual has it. Processors are known to deviate in the last bits of a sum, so that
//   bits here may be others than there; sums of n products differ by at most about n * 2^-24 of the sum of magnitudes.
// - Of several NaNs, another may survive.
// - What hardware answers with an exception (tiles that do not fit, or are not configured) ends the process.
#pragma once

#include_next <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define __AVX512F__ 1
#if defined(GEMMA_EMULATED_VNNI)
#define __AVX512VNNI__ 1
#endif

// Macros in some compilers, or without optimisation.
#undef _mm512_cmp_ps_mask
#undef _mm512_extractf32x8_ps
#undef _mm512_permute_ps
#undef _mm512_roundscale_ps
#undef _mm512_shuffle_f32x4
#undef _mm512_slli_epi32
#undef _mm512_srli_epi32
#undef _tile_dpbf16ps
#undef _tile_loadd
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_stored
#undef _tile_zero

namespace gemma {

// --- AVX-512: two halves -------------------------------------------------------------------------------------

struct __m512 {
    __m256 low, high;
};

struct __m512i {
    __m256i low, high;
};

struct __m512bh {
    __m256i low, high;
    explicit __m512bh(__m512i bits) : low(bits.low), high(bits.high) {}
    __m512bh() = default;
};

using __mmask16 = uint16_t;

inline __m512 _mm512_set1_ps(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline __m512i _mm512_set1_epi32(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }

inline __m512 _mm512_loadu_ps(const void* p) {
    const float* floats = static_cast<const float*>(p);
    return {_mm256_loadu_ps(floats), _mm256_loadu_ps(floats + 8)};
}
inline void _mm512_storeu_ps(void* p, __m512 a) {
    float* floats = static_cast<float*>(p);
    _mm256_storeu_ps(floats, a.low);
    _mm256_storeu_ps(floats + 8, a.high);
}
inline __m512i _mm512_loadu_si512(const void* p) {
    const __m256i* halves = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}

inline void _mm512_storeu_si512(void* p, __m512i a) {
    __m256i* halves = static_cast<__m256i*>(p);
    _mm256_storeu_si256(halves, a.low);
    _mm256_storeu_si256(halves + 1, a.high);
}
inline __m512 _mm512_setzero_ps() { return _mm512_set1_ps(0.0f); }
inline __m512i _mm512_setr_epi32(
    int a, int b, int c, int d, int e, int f, int g, int h, int i, int j, int k, int l, int m, int n, int o, int p
) {
    return {_mm256_setr_epi32(a, b, c, d, e, f, g, h), _mm256_setr_epi32(i, j, k, l, m, n, o, p)};
}

inline __m256 _mm512_castps512_ps256(__m512 a) { return a.low; }
inline __m256 _mm512_extractf32x8_ps(__m512 a, int half) { return half & 1 ? a.high : a.low; }
inline float _mm512_cvtss_f32(__m512 a) { return _mm256_cvtss_f32(a.low); }
// Lanes within each group of four, by two bits of `order` for each.
inline __m512 _mm512_permute_ps(__m512 a, int order) {
    float lanes[16], chosen[16];
    _mm512_storeu_ps(lanes, a);
    for (int i = 0; i < 16; ++i) chosen[i] = lanes[i / 4 * 4 + (order >> i % 4 * 2 & 3)];
    return _mm512_loadu_ps(chosen);
}
// Groups of four lanes: two of a, two of b, by two bits of `order` for each.
inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int order) {
    float from[2][16], chosen[16];
    _mm512_storeu_ps(from[0], a);
    _mm512_storeu_ps(from[1], b);
    for (int i = 0; i < 16; ++i) chosen[i] = from[i / 8][(order >> i / 4 * 2 & 3) * 4 + i % 4];
    return _mm512_loadu_ps(chosen);
}

inline __m512i _mm512_castps_si512(__m512 a) { return {_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }
inline __m512 _mm512_castsi512_ps(__m512i a) { return {_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)}; }

// An operation that AVX2 has for each half.
#define GEMMA_HALVES_2(type, name, half) \
    inline type name(type a, type b) { return {half(a.low, b.low), half(a.high, b.high)}; }
GEMMA_HALVES_2(__m512, _mm512_add_ps, _mm256_add_ps)
GEMMA_HALVES_2(__m512, _mm512_sub_ps, _mm256_sub_ps)
GEMMA_HALVES_2(__m512, _mm512_mul_ps, _mm256_mul_ps)
GEMMA_HALVES_2(__m512, _mm512_div_ps, _mm256_div_ps)
GEMMA_HALVES_2(__m512, _mm512_max_ps, _mm256_max_ps)
GEMMA_HALVES_2(__m512, _mm512_min_ps, _mm256_min_ps)
GEMMA_HALVES_2(__m512i, _mm512_add_epi32, _mm256_add_epi32)
GEMMA_HALVES_2(__m512i, _mm512_and_si512, _mm256_and_si256)
GEMMA_HALVES_2(__m512i, _mm512_madd_epi16, _mm256_madd_epi16)
#undef GEMMA_HALVES_2

inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline __m512 _mm512_abs_ps(__m512 a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
// To whole numbers, which is all that the kernels ask for: the upper half of `how` is a number of fraction bits.
inline __m512 _mm512_roundscale_ps(__m512 a, int how) {
    if (how != (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) std::abort();
    return {_mm256_round_ps(a.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(a.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline __m512i _mm512_cvtps_epi32(__m512 a) { return {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)}; }
inline __m512i _mm512_cvttps_epi32(__m512 a) { return {_mm256_cvttps_epi32(a.low), _mm256_cvttps_epi32(a.high)}; }
inline __m512i _mm512_slli_epi32(__m512i a, unsigned n) {
    return {_mm256_slli_epi32(a.low, int(n)), _mm256_slli_epi32(a.high, int(n))};
}
inline __m512i _mm512_srli_epi32(__m512i a, unsigned n) {
    return {_mm256_srli_epi32(a.low, int(n)), _mm256_srli_epi32(a.high, int(n))};
}
inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
    return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1))};
}
inline __m512 _mm512_cvtepi32_ps(__m512i a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
inline __m512i _mm512_cvtepi8_epi16(__m256i a) {
    return {_mm256_cvtepi8_epi16(_mm256_castsi256_si128(a)), _mm256_cvtepi8_epi16(_mm256_extracti128_si256(a, 1))};
}
inline __m512i _mm512_cvtepi8_epi32(__m128i a) {
    return {_mm256_cvtepi8_epi32(a), _mm256_cvtepi8_epi32(_mm_srli_si128(a, 8))};
}
// AVX512_VNNI: what madd gives, added. Neither saturates.
inline __m512i _mm512_dpwssd_epi32(__m512i sum, __m512i a, __m512i b) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
}
// The lower 16 bits of each lane.
inline __m256i _mm512_cvtepi32_epi16(__m512i a) {
    alignas(32) uint32_t lanes[16];
    alignas(32) uint16_t lower[16];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), a.low);
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes + 8), a.high);
    for (int i = 0; i < 16; ++i) lower[i] = uint16_t(lanes[i]);
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(lower));
}

// --- masks ---------------------------------------------------------------------------------------------------

inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
    alignas(32) float x[16], y[16];
    _mm512_storeu_ps(x, a);
    _mm512_storeu_ps(y, b);
    unsigned mask = 0;
    for (int i = 0; i < 16; ++i) {
        bool holds;
        switch (predicate) {
            case _CMP_LT_OQ: holds = x[i] < y[i]; break;
            case _CMP_GE_OQ: holds = x[i] >= y[i]; break;
            case _CMP_EQ_OQ: holds = x[i] == y[i]; break;
            case _CMP_UNORD_Q: holds = x[i] != x[i] || y[i] != y[i]; break;
            default: std::abort();
        }
        mask |= unsigned(holds) << i;
    }
    return __mmask16(mask);
}
// Where the mask is set b, else a.
inline __m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 a, __m512 b) {
    alignas(32) float x[16], y[16];
    _mm512_storeu_ps(x, a);
    _mm512_storeu_ps(y, b);
    for (int i = 0; i < 16; ++i) x[i] = mask >> i & 1 ? y[i] : x[i];
    return _mm512_loadu_ps(x);
}
inline __m512i _mm512_mask_blend_epi32(__mmask16 mask, __m512i a, __m512i b) {
    return _mm512_castps_si512(_mm512_mask_blend_ps(mask, _mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
}

// Where the mask is set b, else a.
inline __m512 _mm512_mask_mov_ps(__m512 a, __mmask16 mask, __m512 b) { return _mm512_mask_blend_ps(mask, a, b); }
// The lanes whose bit is set, one after the other; zeros behind them.
inline __m512i _mm512_maskz_compress_epi32(__mmask16 mask, __m512i a) {
    uint32_t lanes[16], kept[16] = {};
    _mm512_storeu_si512(lanes, a);
    for (int i = 0, count = 0; i < 16; ++i)
        if (mask >> i & 1) kept[count++] = lanes[i];
    return _mm512_loadu_si512(kept);
}
inline __m512 _mm512_maskz_compress_ps(__mmask16 mask, __m512 a) {
    return _mm512_castsi512_ps(_mm512_maskz_compress_epi32(mask, _mm512_castps_si512(a)));
}

// --- AVX512_BF16 ---------------------------------------------------------------------------------------------

inline __m256 emulated_flush(__m256 a) {
    const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a);
    const __m256 denormal = _mm256_cmp_ps(magnitude, _mm256_set1_ps(1.17549435e-38f), _CMP_LT_OQ);
    return _mm256_andnot_ps(denormal, a);
}
// sum + a * b of the first or the second bf16 of each lane, rounded once.
inline __m256 emulated_multiply_add(__m256 sum, __m256i a, __m256i b, bool second) {
    const auto factor = [second](__m256i pairs) {
        const __m256i bits = second ? _mm256_and_si256(pairs, _mm256_set1_epi32(-65536)) : _mm256_slli_epi32(pairs, 16);
        return emulated_flush(_mm256_castsi256_ps(bits));
    };
    return emulated_flush(_mm256_fmadd_ps(factor(a), factor(b), emulated_flush(sum)));
}
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
    sum.low = emulated_multiply_add(sum.low, a.low, b.low, true);
    sum.high = emulated_multiply_add(sum.high, a.high, b.high, true);
    return {emulated_multiply_add(sum.low, a.low, b.low, false), emulated_multiply_add(sum.high, a.high, b.high, false)};
}

// --- AMX -----------------------------------------------------------------------------------------------------

struct EmulatedTile {
    int rows = 0, row_bytes = 0;
    alignas(64) unsigned char data[16][64];
};

struct EmulatedTiles {
    bool configured = false;
    EmulatedTile tile[8];
};
inline thread_local EmulatedTiles emulated_tiles;

inline void emulated_check(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "AMX: %s\n", what);
    std::abort();
}
inline EmulatedTile& emulated_tile(int index) {
    emulated_check(emulated_tiles.configured, "no tiles are configured");
    EmulatedTile& tile = emulated_tiles.tile[index];
    emulated_check(tile.rows > 0, "this tile has no size");
    return tile;
}

inline void _tile_loadconfig(const void* config) {
    const unsigned char* bytes = static_cast<const unsigned char*>(config);
    emulated_check(bytes[0] == 1, "there is no palette but 1");
    for (int i = 1; i < 16; ++i) emulated_check(bytes[i] == 0, "a reserved byte of the configuration is set");
    for (int i = 0; i < 16; ++i) {
        uint16_t row_bytes;
        std::memcpy(&row_bytes, bytes + 16 + 2 * i, 2);
        const int rows = bytes[48 + i];
        emulated_check(rows <= 16 && row_bytes <= 64 && (rows == 0) == (row_bytes == 0), "a tile of no legal size");
        emulated_check(i < 8 || rows == 0, "there are 8 tiles");
        if (i < 8) emulated_tiles.tile[i] = {.rows = rows, .row_bytes = row_bytes, .data = {}};
    }
    emulated_tiles.configured = true;
}
inline void _tile_release() { emulated_tiles = {}; }
inline void _tile_zero(int to) {
    EmulatedTile& tile = emulated_tile(to);
    std::memset(tile.data, 0, sizeof tile.data);
}
inline void _tile_loadd(int to, const void* base, int64_t stride) {
    EmulatedTile& tile = emulated_tile(to);
    std::memset(tile.data, 0, sizeof tile.data);
    for (int row = 0; row < tile.rows; ++row)
        std::memcpy(tile.data[row], static_cast<const char*>(base) + row * stride, size_t(tile.row_bytes));
}
inline void _tile_stored(int from, void* base, int64_t stride) {
    const EmulatedTile& tile = emulated_tile(from);
    for (int row = 0; row < tile.rows; ++row)
        std::memcpy(static_cast<char*>(base) + row * stride, tile.data[row], size_t(tile.row_bytes));
}
inline void _tile_dpbf16ps(int to, int left, int right) {
    EmulatedTile& sums = emulated_tile(to);
    const EmulatedTile &a = emulated_tile(left), &b = emulated_tile(right);
    emulated_check(to != left && to != right && left != right, "a tile is used twice");
    emulated_check(
        sums.rows == a.rows && sums.row_bytes == b.row_bytes && a.row_bytes == 4 * b.rows, "tiles that do not fit"
    );
    const __m256 zero = _mm256_setzero_ps();
    for (int row = 0; row < sums.rows; ++row) {
        for (int column = 0; column < sums.row_bytes; column += 32) {  // behind the last are zeros
            __m256 even = zero, odd = zero;
            for (int k = 0; k < b.rows; ++k) {
                int pair;
                std::memcpy(&pair, a.data[row] + 4 * k, 4);
                const __m256i x = _mm256_set1_epi32(pair);
                const __m256i w = _mm256_load_si256(reinterpret_cast<const __m256i*>(b.data[k] + column));
                even = emulated_multiply_add(even, x, w, false);
                odd = emulated_multiply_add(odd, x, w, true);
            }
            float* sum = reinterpret_cast<float*>(sums.data[row] + column);
            const __m256 both = emulated_flush(_mm256_add_ps(even, odd));
            _mm256_store_ps(sum, emulated_flush(_mm256_add_ps(emulated_flush(_mm256_load_ps(sum)), both)));
        }
    }
}

}  // namespace gemma
