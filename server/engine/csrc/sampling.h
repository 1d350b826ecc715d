// The sampler's passes over a row of logits; see sampling_calls.h.
#pragma once

#include "vec.h"

namespace gemma::GEMMA_LEVEL {

// --- what these passes need beside vec.h ---------------------------------------------------------------------

#if defined(__AVX512F__)

using Flags = __mmask16;  // one for each lane
inline Flags less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
inline Flags at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
inline Flags equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
inline Flags either_nan(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q); }
inline Flags both(Flags a, Flags b) { return Flags(a & b); }
inline Flags either(Flags a, Flags b) { return Flags(a | b); }
inline uint32_t bits(Flags a) { return a; }
inline Flags flags(uint32_t bits) { return Flags(bits); }
inline Vec zero_where(Flags f, Vec a) { return {_mm512_mask_mov_ps(a.v, f, _mm512_setzero_ps())}; }
inline Vec choose(Flags f, Vec yes, Vec no) { return {_mm512_mask_blend_ps(f, no.v, yes.v)}; }
// a * 2^n, n being in the lowest bits of b's lanes
inline Vec times_power(Vec a, Vec b) {
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(b.v), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), exponent))};
}
inline void store_whole(uint32_t* p, Vec a) { _mm512_storeu_si512(p, _mm512_cvttps_epi32(a.v)); }
using Ids = __m512i;
inline Ids ids_from(int32_t first) {
    const Ids lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_add_epi32(_mm512_set1_epi32(first), lanes);
}
inline Ids load_ids(const int32_t* p) { return _mm512_loadu_si512(p); }
// Writes the lanes with a flag one after the other, and something behind them. Returns their number.
inline int64_t append(List out, int64_t at, Flags f, Vec values, Ids ids) {
    store(out.values + at, {_mm512_maskz_compress_ps(f, values.v)});
    _mm512_storeu_si512(out.ids + at, _mm512_maskz_compress_epi32(f, ids));
    return __builtin_popcount(uint32_t(f));
}

inline float largest_lane(Vec a) {
    __m512 v = _mm512_max_ps(a.v, _mm512_shuffle_f32x4(a.v, a.v, 0x4e));
    v = _mm512_max_ps(v, _mm512_shuffle_f32x4(v, v, 0xb1));
    v = _mm512_max_ps(v, _mm512_permute_ps(v, 0x4e));
    return _mm512_cvtss_f32(_mm512_max_ps(v, _mm512_permute_ps(v, 0xb1)));
}
// Sums of eight lanes of a block's 64, lane i of which is lane i of 16 and lane i + 8.
inline __m256 eight_sums(const Vec* w) {
    const __m512 lanes = ((w[0] + w[1]) + (w[2] + w[3])).v;
    return _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
}

#else

using Flags = __m256;  // all bits of a lane, or none
inline Flags less(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ); }
inline Flags at_least(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ); }
inline Flags equal(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ); }
inline Flags either_nan(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_UNORD_Q); }
inline Flags both(Flags a, Flags b) { return _mm256_and_ps(a, b); }
inline Flags either(Flags a, Flags b) { return _mm256_or_ps(a, b); }
inline uint32_t bits(Flags a) { return uint32_t(_mm256_movemask_ps(a)); }
inline Flags flags(uint32_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(int(bits)), lane);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane));
}
inline Vec zero_where(Flags f, Vec a) { return {_mm256_andnot_ps(f, a.v)}; }
inline Vec choose(Flags f, Vec yes, Vec no) { return {_mm256_blendv_ps(no.v, yes.v, f)}; }
// a * 2^n, n being in the lowest bits of b's lanes
inline Vec times_power(Vec a, Vec b) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(b.v), 23);
    return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v), exponent))};
}
inline void store_whole(uint32_t* p, Vec a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_cvttps_epi32(a.v));
}
using Ids = __m256i;
inline Ids ids_from(int32_t first) {
    return _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Ids load_ids(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

struct LanesOf {
    uint64_t bytes[256];  // for eight flags: the numbers of the lanes that have one, a byte each
};
constexpr LanesOf lanes_of_flags() {
    LanesOf table{};
    for (int flags = 0; flags < 256; ++flags) {
        int found = 0;
        for (int lane = 0; lane < 8; ++lane)
            if (flags >> lane & 1) table.bytes[flags] |= uint64_t(lane) << (8 * found++);
    }
    return table;
}
constexpr LanesOf kLanesOf = lanes_of_flags();

// Writes the lanes with a flag one after the other, and something behind them. Returns their number.
inline int64_t append(List out, int64_t at, Flags f, Vec values, Ids ids) {
    const uint32_t set = bits(f);
    const __m256i lanes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(kLanesOf.bytes[set])));
    store(out.values + at, {_mm256_permutevar8x32_ps(values.v, lanes)});
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(out.ids + at), _mm256_permutevar8x32_epi32(ids, lanes)
    );
    return __builtin_popcount(set);
}

inline float largest_lane(Vec a) {
    __m256 v = _mm256_max_ps(a.v, _mm256_permute2f128_ps(a.v, a.v, 1));
    v = _mm256_max_ps(v, _mm256_permute_ps(v, 0x4e));
    return _mm256_cvtss_f32(_mm256_max_ps(v, _mm256_permute_ps(v, 0xb1)));
}
// Sums of eight lanes of a block's 64, lane i of which is lane i of 16 and lane i + 8.
inline __m256 eight_sums(const Vec* w) {
    return (((w[0] + w[2]) + (w[4] + w[6])) + ((w[1] + w[3]) + (w[5] + w[7]))).v;
}

#endif

// --- a block -------------------------------------------------------------------------------------------------

constexpr int kBlockVecs = int(kBlock) / Vec::width;

inline Vec weight(Vec x, Vec larger, const Scale& scale) {
    const Vec d = x - larger;
    const Vec y = fma(d, splat(scale.high), d * splat(scale.low));
    // Adding 1.5 * 2^23 rounds to a whole number, which is then in the lowest bits.
    const Vec shifted = y + splat(12582912.0f);
    const Vec r = y - (shifted - splat(12582912.0f));
    // 2^r for r in [-1/2, 1/2], exactly 1 at 0: least maximum error, 1e-7.
    Vec p = splat(1.326472731e-3f);
    p = fma(p, r, splat(9.671512991e-3f));
    p = fma(p, r, splat(5.550733581e-2f));
    p = fma(p, r, splat(2.402224243e-1f));
    p = fma(p, r, splat(6.931470037e-1f));
    p = fma(p, r, splat(1.0f));
    return zero_where(less(d, splat(scale.lowest)), times_power(p, shifted));
}

// The sum of 64 weights: in 16 lanes, then lane i with lane i + 8, i + 4, i + 2, i + 1.
inline float sum_of_block(const Vec* w) {
    const __m256 eight = eight_sums(w);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline float block_maximum(const float* p) {
    Vec lanes = load(p);
    Flags nan = either_nan(lanes, lanes);
    for (int i = 1; i < kBlockVecs; ++i) {
        const Vec x = load(p + i * Vec::width);
        lanes = max(lanes, x);
        nan = either(nan, either_nan(x, x));
    }
    const float maximum = largest_lane(lanes);
    return bits(nan) ? std::numeric_limits<float>::quiet_NaN() : maximum;
}

inline float block_mass(const float* p, float maximum, const Scale& scale) {
    if (!__builtin_isfinite(maximum)) return 0.0f;
    Vec w[kBlockVecs];
    for (int i = 0; i < kBlockVecs; ++i) w[i] = weight(load(p + i * Vec::width), splat(maximum), scale);
    return sum_of_block(w);
}

// --- passes over a row ---------------------------------------------------------------------------------------

// Calls f with a pointer to the block's logits, behind which `padding` lies if it is short.
template <class F>
[[gnu::always_inline]] inline void with_block(const float* row, int64_t count, int64_t block, float padding, F f) {
    const float* p = row + block * kBlock;
    const int64_t left = count - block * kBlock;
    if (left >= kBlock) return f(p);
    float padded[kBlock];
    for (float& x : padded) x = padding;
    std::memcpy(padded, p, size_t(left) * sizeof(float));
    f(padded);
}

// Blocks whose maxima are found before their masses are: while one's are being reduced, the next one's can be loaded.
constexpr int64_t kBlocksAtOnce = 8;

inline void look_at_blocks(const float* row, int64_t count, const Scale* scale, Blocks out) {
    const int64_t num_blocks = (count + kBlock - 1) / kBlock;
    for (int64_t first = 0; first < num_blocks; first += kBlocksAtOnce) {
        const int64_t end = first + kBlocksAtOnce < num_blocks ? first + kBlocksAtOnce : num_blocks;
        for (int64_t block = first; block < end; ++block)
            with_block(row, count, block, kMinusInfinity, [&](const float* p) {
                out.maxima[block] = block_maximum(p);
            });
        if (!scale) continue;
        for (int64_t block = first; block < end; ++block)
            with_block(row, count, block, kMinusInfinity, [&](const float* p) {
                out.masses[block] = block_mass(p, out.maxima[block], *scale);
            });
    }
}

inline void look_at_marked(const float* row, int64_t count, const Scale* scale, const uint8_t* marks, Blocks out) {
    for (int64_t first = 0; first * kBlock < count; first += 8) {
        uint64_t eight;
        std::memcpy(&eight, marks + first, 8);
        for (; eight; eight &= eight - 1) {
            const int64_t block = first + __builtin_ctzll(eight) / 8;  // marks are 0 or 1
            with_block(row, count, block, kMinusInfinity, [&](const float* p) {
                out.maxima[block] = block_maximum(p);
                if (scale) out.masses[block] = block_mass(p, out.maxima[block], *scale);
            });
        }
    }
}

inline double shares(Blocks blocks, int64_t num_blocks, float largest, const Scale& scale, float* shares) {
    over(num_blocks, [&](int64_t i, int64_t n) {
        const Vec factor = weight(load_some(blocks.maxima + i, n), splat(largest), scale);
        store_some(shares + i, factor * load_some(blocks.masses + i, n), n);
    });
    double total = 0;
    for (int64_t i = 0; i < num_blocks; ++i) total += double(shares[i]);
    return total;
}

inline void mask(float* row, int64_t count, const uint32_t* allowed, uint8_t* marks) {
    for (int64_t word = 0; word * 32 < count; ++word) {
        if (allowed[word] == UINT32_MAX) continue;
        marks[word * 32 / kBlock] = 1;
        const int64_t left = count - word * 32 < 32 ? count - word * 32 : 32;
        float* p = row + word * 32;
        over(left, [&](int64_t i, int64_t n) {
            store_some(p + i, choose(flags(allowed[word] >> i), load_some(p + i, n), splat(kMinusInfinity)), n);
        });
    }
}

inline int64_t first_largest(const float* x, int64_t count) {
    Vec lanes = splat(kMinusInfinity);
    bool nan = false;
    over(count, [&](int64_t i, int64_t n) {
        float padded[Vec::width];
        const float* p = x + i;
        if (n < Vec::width) {
            for (int lane = 0; lane < Vec::width; ++lane) padded[lane] = x[i + (lane < n ? lane : 0)];
            p = padded;
        }
        const Vec v = load(p);
        nan |= bits(either_nan(v, v)) != 0;
        lanes = max(lanes, v);
    });
    if (nan) return -1;
    const float largest_of_all = largest(lanes);
    int64_t i = 0;
    for (; i + Vec::width <= count; i += Vec::width)
        if (const uint32_t found = bits(equal(load(x + i), splat(largest_of_all))))
            return i + __builtin_ctz(found);
    while (x[i] != largest_of_all) ++i;
    return i;
}

inline int64_t gather(
    const float* row, int64_t count, const float* maxima, float bound, List out, float& lowest
) {
    int64_t found = 0;
    const Vec least = splat(bound);
    Vec low = splat(std::numeric_limits<float>::infinity());
    for (int64_t block = 0; block * kBlock < count; ++block) {
        if (!(maxima[block] >= bound)) continue;
        with_block(row, count, block, std::numeric_limits<float>::quiet_NaN(), [&](const float* p) {
            for (int64_t i = 0; i < kBlock; i += Vec::width) {
                const Vec x = load(p + i);
                const Flags wanted = at_least(x, least);
                low = choose(wanted, min(low, x), low);
                found += append(out, found, wanted, x, ids_from(int32_t(block * kBlock + i)));
            }
        });
    }
    lowest = -largest(splat(0.0f) - low);
    return found;
}

inline int64_t before(const float* row, int64_t count, const float* maxima, int64_t id) {
    const float own = row[id];
    const Vec x = splat(own);
    int64_t found = 0;
    for (int64_t block = 0; block * kBlock < count; ++block) {
        if (!(maxima[block] >= own)) continue;
        with_block(row, count, block, std::numeric_limits<float>::quiet_NaN(), [&](const float* p) {
            for (int64_t i = 0; i < kBlock; i += Vec::width) {
                const int64_t lower_ids = id - (block * kBlock + i);  // so many lanes have one
                const uint32_t lower = lower_ids <= 0 ? 0 : lower_ids >= Vec::width ? 0xffffu : (1u << lower_ids) - 1;
                const Vec v = load(p + i);
                found += __builtin_popcount(bits(less(x, v)) | (bits(equal(x, v)) & lower));
            }
        });
    }
    return found;
}

// --- passes over a list --------------------------------------------------------------------------------------

inline void list_weights(const float* x, int64_t count, float largest, const Scale& scale, float* weights) {
    over(count, [&](int64_t i, int64_t n) {
        store_some(weights + i, weight(load_some(x + i, n), splat(largest), scale), n);
    });
}

inline Range list_range(const float* x, int64_t count) {
    Vec low = splat(x[0]), high = low;
    int64_t i = 0;
    for (; i + Vec::width <= count; i += Vec::width) {
        low = min(low, load(x + i));
        high = max(high, load(x + i));
    }
    Range range{-largest(splat(0.0f) - low), largest(high)};
    for (; i < count; ++i) {
        if (x[i] < range.lowest) range.lowest = x[i];
        if (x[i] > range.highest) range.highest = x[i];
    }
    return range;
}

inline Vec place(Vec x, Partition partition) { return (splat(partition.highest) - x) * splat(partition.scale); }

constexpr int64_t kTalliedAtOnce = 256;

inline void list_tally(
    const float* x, int64_t count, Partition partition, float largest, const Scale* scale, double* sums
) {
    std::memset(sums, 0, size_t(kParts) * sizeof(double));
    float weights[kTalliedAtOnce];
    uint32_t parts[kTalliedAtOnce];
    for (float& one : weights) one = 1.0f;
    for (int64_t first = 0; first < count; first += kTalliedAtOnce) {
        const int64_t n = count - first < kTalliedAtOnce ? count - first : kTalliedAtOnce;
        if (scale) list_weights(x + first, n, largest, *scale, weights);
        over(n, [&](int64_t i, int64_t some) {
            store_whole(parts + i, place(load_some(x + first + i, some), partition));
        });
        for (int64_t i = 0; i < n; ++i) sums[parts[i]] += double(weights[i]);
    }
}

inline int64_t list_part(List list, int64_t count, Partition partition, int64_t part, List out) {
    int64_t found = 0;
    const Vec first = splat(float(part)), end = splat(float(part + 1));
    over(count, [&](int64_t i, int64_t n) {
        const Vec x = load_some(list.values + i, n);
        const Vec at = place(x, partition);
        const Flags wanted = both(both(at_least(at, first), less(at, end)), flags(0xffffu >> (16 - n)));
        if (bits(wanted)) found += append(out, found, wanted, x, load_ids(list.ids + i));
    });
    return found;
}

constexpr RowKernels row_kernels = {
    look_at_blocks, look_at_marked, mask,       first_largest, shares,
    gather,         list_weights,   list_range, list_tally,    before,        list_part,
};

}  // namespace gemma::GEMMA_LEVEL
