// bf16 products by vdpbf16ps: R rows times P panels in registers, 16 outputs each.
//
// The instruction adds the products of a pair of inputs to a sum one after the other, the second input's first, and
// rounds to the nearest each time. A block's sum is one chain over its pairs in ascending order.
#pragma once

#include "bf16.h"

namespace gemma::GEMMA_LEVEL {

inline __m512bh load_pairs(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }

// One row's inputs (2i, 2i + 1) in every lane.
inline __m512bh splat_pair(const bf16* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

template <int R, int P>
void multiply_dots(const Bf16Product& product, int64_t row, int64_t panel) {
    const bf16* x = product.x + row * product.x_stride;
    const bf16* w = product.weights + panel * product.panel_stride;
    __m512 sums[R][P];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) sums[r][p] = _mm512_set1_ps(0.0f);
    for (int64_t k = 0; k < product.inputs; k += 2, x += 2, w += 2 * kPanel) {
        __m512bh weights[P];
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
            const bf16* at = w + p * product.panel_stride;
            _mm_prefetch(reinterpret_cast<const char*>(at) + kPrefetch, _MM_HINT_T0);
            weights[p] = load_pairs(at);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const __m512bh pair = splat_pair(x + r * product.x_stride);
#pragma GCC unroll 8
            for (int p = 0; p < P; ++p) sums[r][p] = _mm512_dpbf16_ps(sums[r][p], weights[p], pair);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
            float* to = product.sums + ((panel + p) * product.rows + row + r) * kPanel;
            const Vec sum = {sums[r][p]};
            store(to, product.add ? load(to) + sum : sum);
        }
}

class DotMultiplier {
public:
    static constexpr int64_t kRows = kMaxRows, kPanels = 4;

    void operator()(const Bf16Product& product) const {
        for (int64_t panel = 0; panel < product.panels;) {
            const bool whole = panel + kPanels <= product.panels;
            for (int64_t row = 0; row < product.rows; row += kRows) {
                const int64_t rows = product.rows - row < kRows ? product.rows - row : kRows;
                (whole ? for_rows<kPanels> : for_rows<1>)[rows](product, row, panel);
            }
            panel += whole ? kPanels : 1;
        }
    }

private:
    using Multiply = void (*)(const Bf16Product&, int64_t row, int64_t panel);

    // For P panels, by the number of rows.
    template <int P>
    static constexpr Multiply for_rows[kRows + 1] = {
        nullptr,
        multiply_dots<1, P>,
        multiply_dots<2, P>,
        multiply_dots<3, P>,
        multiply_dots<4, P>,
        multiply_dots<5, P>,
        multiply_dots<6, P>,
    };
};

}  // namespace gemma::GEMMA_LEVEL
