// The innermost loop of everything that multiplies: R rows times P panels of packed weights.
//
// Rows are fp32, and each element of the result is one chain of fused multiply-adds over a product's inputs in
// ascending order, whatever R and P are. For int8 weights they are 16-bit integers, and the sums are exact. That is
// why a row's result does not depend on the rows beside it.
#pragma once

#include "int_vec.h"
#include "vec.h"

namespace gemma::GEMMA_LEVEL {

constexpr int kVecs = kPanel / Vec::width;
constexpr int kMaxRows = 6;

// How many panels to multiply R rows by at once: enough independent sums to hide the latency of a multiply-add
// (4 cycles, 2 a cycle), and no more than there are registers for.
constexpr int panels_at_once(int rows) {
    if (Vec::width == 16) return 4;
    return rows == 1 ? 4 : rows == 2 ? 2 : 1;
}

// What weights of type W are multiplied by, and what the products are summed in.
template <class W>
struct Operand {
    using Input = float;
    using Sum = Vec;
};
template <>
struct Operand<int8_t> {
    using Input = int16_t;
    using Sum = IntVec;
};

// Inputs of a packed panel, with padding.
template <class W>
constexpr int64_t padded_inputs(int64_t inputs);
template <>
constexpr int64_t padded_inputs<float>(int64_t inputs) {
    return inputs;
}
template <>
constexpr int64_t padded_inputs<bf16>(int64_t inputs) {
    return round_up<int64_t>(inputs, 2);
}
template <>
constexpr int64_t padded_inputs<int8_t>(int64_t inputs) {
    return round_up<int64_t>(inputs, 4);
}

// Where element (output lane, input) lies in a panel.
template <class W>
constexpr int64_t panel_index(int64_t lane, int64_t input);
template <>
constexpr int64_t panel_index<float>(int64_t lane, int64_t input) {
    return input * kPanel + lane;
}
template <>
constexpr int64_t panel_index<bf16>(int64_t lane, int64_t input) {
    return (input / 2) * 2 * kPanel + 2 * lane + input % 2;
}
template <>
constexpr int64_t panel_index<int8_t>(int64_t lane, int64_t input) {
    return panel_index<bf16>(lane, input);
}

template <class W>
struct Product {
    const typename Operand<W>::Input* x;  // [rows, inputs of all segments]
    int64_t x_stride;
    // The inputs come in segments, each with panels of its own: one for a weight matrix, one for 16 cached values.
    const W* const* segments;
    int num_segments;
    int64_t inputs;        // of one segment, padded
    int64_t panel_stride;  // elements from one panel of a segment to the next
    float* sums;
    int64_t sums_stride;        // from one row to the next
    int64_t sums_panel_stride;  // from one panel to the next
    bool add;                   // the product to what is in sums, or overwrite it
};

// Bytes ahead of the weights that are multiplied by now, in each of four panels at once, and further in fewer: what is
// under way has to last for as long as memory takes to answer. Where a panel ends, the next one begins.
constexpr int kPrefetch = 1024;

// The part of P panels that one segment of the inputs is multiplied by.
template <class W>
struct Part {
    const W* weights;
    int64_t inputs, panel_stride;
    int64_t prefetch;  // so many bytes ahead
};

template <class Sum, int R, int P>
struct Sums {
    Sum v[R][P][kVecs];
};

// Hides from the compiler that two loads read the same, so that it loads again instead of running out of registers.
template <class T>
[[gnu::always_inline]] inline const T* again(const T* p) {
    asm("" : "+r"(p));
    return p;
}

// Adds the product of one input, of which w holds one panel's weights.
template <int R, int P>
[[gnu::always_inline]] inline void multiply_add(
    Sums<Vec, R, P>& sums, int panel, const float* x, int64_t x_stride, const Vec (&w)[kVecs]
) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        const Vec factor = splat(x[r * x_stride]);
#pragma GCC unroll 2
        for (int i = 0; i < kVecs; ++i) sums.v[r][panel][i] = fma(factor, w[i], sums.v[r][panel][i]);
    }
}

template <int R, int P>
[[gnu::always_inline]] inline void multiply_segment(
    Sums<Vec, R, P>& sums, const float* x, int64_t x_stride, const Part<bf16>& part
) {
    const bf16* w = part.weights;
    for (int64_t k = 0; k < part.inputs; k += 2, x += 2, w += 2 * kPanel) {
        Vec loaded[kVecs];
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
            _mm_prefetch(reinterpret_cast<const char*>(w + p * part.panel_stride) + part.prefetch, _MM_HINT_T0);
#pragma GCC unroll 2
            for (int i = 0; i < kVecs; ++i) loaded[i] = load_first(w + p * part.panel_stride + i * 2 * Vec::width);
            multiply_add<R, P>(sums, p, x, x_stride, loaded);
        }
        const bf16* same = again(w);
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
#pragma GCC unroll 2
            for (int i = 0; i < kVecs; ++i) loaded[i] = load_second(same + p * part.panel_stride + i * 2 * Vec::width);
            multiply_add<R, P>(sums, p, x + 1, x_stride, loaded);
        }
    }
}

template <int R, int P>
[[gnu::always_inline]] inline void multiply_segment(
    Sums<Vec, R, P>& sums, const float* x, int64_t x_stride, const Part<float>& part
) {
    const float* w = part.weights;
    for (int64_t k = 0; k < part.inputs; ++k, ++x, w += kPanel) {
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
            Vec loaded[kVecs];
#pragma GCC unroll 2
            for (int i = 0; i < kVecs; ++i) loaded[i] = load(w + p * part.panel_stride + i * Vec::width);
            multiply_add<R, P>(sums, p, x, x_stride, loaded);
        }
    }
}

// A step takes 4 inputs, 64 bytes of a panel: one prefetch.
template <int R, int P>
[[gnu::always_inline]] inline void multiply_segment(
    Sums<IntVec, R, P>& sums, const int16_t* x, int64_t x_stride, const Part<int8_t>& part
) {
    const int8_t* w = part.weights;
    for (int64_t k = 0; k < part.inputs; k += 4, x += 4, w += 4 * kPanel) {
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
            _mm_prefetch(reinterpret_cast<const char*>(w + p * part.panel_stride) + part.prefetch, _MM_HINT_T0);
#pragma GCC unroll 2
            for (int pair = 0; pair < 2; ++pair) {
                IntVec loaded[kVecs];
#pragma GCC unroll 2
                for (int i = 0; i < kVecs; ++i)
                    loaded[i] = load_widened(w + p * part.panel_stride + (pair * kVecs + i) * 2 * IntVec::width);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const IntVec factor = splat_pair(x + r * x_stride + 2 * pair);
#pragma GCC unroll 2
                    for (int i = 0; i < kVecs; ++i)
                        sums.v[r][p][i] = add_pair_products(sums.v[r][p][i], factor, loaded[i]);
                }
            }
        }
    }
}

template <class W, int R, int P>
void multiply(
    const Product<W>& product, const typename Operand<W>::Input* x, int64_t panel, float* out, int64_t prefetch
) {
    using Sum = typename Operand<W>::Sum;
    Sums<Sum, R, P> sums;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
            for (int i = 0; i < kVecs; ++i) sums.v[r][p][i] = Sum{};
    for (int s = 0; s < product.num_segments; ++s) {
        const W* w = product.segments[s] + panel * product.panel_stride;
        multiply_segment<R, P>(
            sums, x, product.x_stride, Part<W>{w, product.inputs, product.panel_stride, prefetch}
        );
        x += product.inputs;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
            for (int i = 0; i < kVecs; ++i) {
                float* to = out + r * product.sums_stride + p * product.sums_panel_stride + i * Vec::width;
                const Vec sum = to_floats(sums.v[r][p][i]);
                store(to, product.add ? load(to) + sum : sum);
            }
}

template <class W>
using Multiply =
    void (*)(const Product<W>&, const typename Operand<W>::Input* x, int64_t panel, float* out, int64_t prefetch);

// For R rows: one panel, or panels_at_once(R) of them.
template <class W>
struct Multipliers {
    static constexpr Multiply<W> one[kMaxRows + 1] = {
        nullptr,           multiply<W, 1, 1>, multiply<W, 2, 1>, multiply<W, 3, 1>,
        multiply<W, 4, 1>, multiply<W, 5, 1>, multiply<W, 6, 1>,
    };
    static constexpr Multiply<W> many[kMaxRows + 1] = {
        nullptr,
        multiply<W, 1, panels_at_once(1)>,
        multiply<W, 2, panels_at_once(2)>,
        multiply<W, 3, panels_at_once(3)>,
        multiply<W, 4, panels_at_once(4)>,
        multiply<W, 5, panels_at_once(5)>,
        multiply<W, 6, panels_at_once(6)>,
    };
};

// sums = x times panels 0 .. num_panels. Rows are cut into equal blocks of at most kMaxRows.
template <class W>
inline void multiply_all(const Product<W>& product, int64_t rows, int64_t num_panels) {
    const int64_t blocks = (rows + kMaxRows - 1) / kMaxRows;
    const int64_t least = rows / blocks, larger = rows % blocks;
    const int64_t step = panels_at_once(int(least + (larger > 0)));
    for (int64_t panel = 0; panel < num_panels;) {
        const bool whole = panel + step <= num_panels && step > 1;
        for (int64_t block = 0, row = 0; block < blocks; ++block) {
            const int64_t count = least + (block < larger);
            // A smaller block may have room for more panels at once than its larger neighbours; it keeps their pace.
            const bool same = panels_at_once(int(count)) == step;
            const Multiply<W> function = whole && same ? Multipliers<W>::many[count] : Multipliers<W>::one[count];
            const auto* x = product.x + row * product.x_stride;
            float* out = product.sums + row * product.sums_stride;
            const int64_t together = whole && same ? step : 1;
            // The first block may have to wait for the weights. Those after it find them in the cache, and have
            // the next panels' fetched meanwhile.
            const int64_t next_panels = step * product.panel_stride * int64_t(sizeof(W));
            const int64_t prefetch = block == 0 ? 4 * kPrefetch / together : next_panels;
            for (int64_t p = panel; p < panel + (whole ? step : 1); p += together)
                function(product, x, p, out + p * product.sums_panel_stride, prefetch);
            row += count;
        }
        panel += whole ? step : 1;
    }
}

}  // namespace gemma::GEMMA_LEVEL
