// Linear layers in bf16 for the levels whose processors multiply pairs of bf16 and add the products in fp32.
//
// Laws:
// - Activations stay bf16: the instructions read both factors as they are stored.
// - For any number of rows the inputs are summed in the same blocks, and a block by the same instructions.
// - The instructions take denormals for zeros, of which bf16 weights and activations of this size have none.
// - fp32 weights are multiplied as at the AVX-512 level, and int8 weights by the same code with AVX512_VNNI, which all
//   processors of these levels have: sums of integers are exact.
#pragma once

#include "linear.h"

namespace gemma::avx512 {
extern const Kernels kernels;
}

namespace gemma::GEMMA_LEVEL {

// Inputs that AMX multiplies at once. kInputBlock is a whole number of them, so that only the last can be cut short.
constexpr int64_t kTileInputs = 32;
static_assert(kInputBlock % kTileInputs == 0);

// x in a LinearCall's scratch: rows of whole tiles, and some more for the reason at linear_stride.
constexpr int64_t bf16_stride(int64_t inputs) { return round_up(inputs, kTileInputs) + kTileInputs; }
static_assert(bf16_stride(1) * sizeof(bf16) <= linear_stride(1) * sizeof(float));
static_assert(bf16_stride(33) * sizeof(bf16) <= linear_stride(33) * sizeof(float));

struct Bf16Product {
    const bf16* x;  // [rows, inputs], zeros up to a whole tile
    int64_t x_stride, rows;
    const bf16* weights;  // [panels, inputs]
    int64_t panel_stride, panels;
    int64_t inputs;  // even
    float* sums;     // [panels, rows, kPanel]
    bool add;        // the product to what is in sums, or overwrite it
};

inline void convert_bf16(Team& team, const LinearCall& call) {
    if (call.weight_type != Type::bf16) return avx512::kernels.convert(team, call);
    const int64_t inputs = call.inputs, stride = bf16_stride(inputs);
    for (int64_t begin, end; team.next(call.rows, 4, begin, end);) {
        for (int64_t row = begin; row < end; ++row) {
            const bf16* x = static_cast<const bf16*>(call.x) + row * inputs;
            bf16* out = reinterpret_cast<bf16*>(call.x32) + row * stride;
            std::memcpy(out, x, size_t(inputs) * sizeof(bf16));
            std::memset(out + inputs, 0, size_t(stride - inputs) * sizeof(bf16));
        }
    }
}

// Multiplier: computes a Bf16Product, and reads each weight once if that has at most kRows rows, from kPanels panels
// in turn.
template <class Multiplier>
void multiply_bf16(Team& team, const LinearCall& call) {
    if (call.weight_type == Type::f32) return avx512::kernels.multiply(team, call);
    if (call.weight_type == Type::int8)
        return call.type == Type::bf16 ? multiply_rows<int8_t, bf16>(team, call)
                                       : multiply_rows<int8_t, float>(team, call);
    const int64_t inputs = padded_inputs<bf16>(call.inputs), stride = bf16_stride(call.inputs);
    const int64_t size = panel_size<bf16>(call.inputs);
    const int64_t num_panels = (call.outputs + kPanel - 1) / kPanel;
    // Equal blocks of rows that fit the second-level cache, all but the last a whole number of the multiplier's.
    constexpr int64_t most_rows = 192;
    static_assert(most_rows % Multiplier::kRows == 0);
    const int64_t row_blocks = (call.rows + most_rows - 1) / most_rows;
    const int64_t row_block = round_up((call.rows + row_blocks - 1) / row_blocks, Multiplier::kRows);
    // Pieces of work: several for each thread, but not so small that taking one costs.
    const int64_t pieces = 6 * team.size();
    int64_t grain = round_up((num_panels + pieces - 1) / pieces, Multiplier::kPanels);
    const int64_t most = call.rows <= Multiplier::kRows ? 48 : 12;
    if (grain > most) grain = most;

    Multiplier multiplier;
    float* sums = static_cast<float*>(team.scratch(size_t(row_block * grain * kPanel) * sizeof(float)));
    const int64_t groups = (num_panels + grain - 1) / grain;
    for (int64_t begin, end; team.next(row_blocks * groups, 1, begin, end);) {
        const int64_t first_row = begin / groups * row_block, first_panel = begin % groups * grain;
        const int64_t rows = call.rows - first_row < row_block ? call.rows - first_row : row_block;
        const int64_t panels = num_panels - first_panel < grain ? num_panels - first_panel : grain;
        const bf16* x = reinterpret_cast<const bf16*>(call.x32) + first_row * stride;
        const bf16* weights = static_cast<const bf16*>(call.packed) + first_panel * size;
        // Weights that are read once are read in the order in which they lie.
        const int64_t together = rows <= Multiplier::kRows ? Multiplier::kPanels : panels;
        for (int64_t panel = 0; panel < panels; panel += together) {
            for (int64_t k = 0; k < inputs; k += kInputBlock) {
                multiplier({
                    .x = x + k,
                    .x_stride = stride,
                    .rows = rows,
                    .weights = weights + panel * size + k * kPanel,
                    .panel_stride = size,
                    .panels = panels - panel < together ? panels - panel : together,
                    .inputs = inputs - k < kInputBlock ? inputs - k : kInputBlock,
                    .sums = sums + panel * rows * kPanel,
                    .add = k > 0,
                });
            }
        }
        finish_panels<bf16, bf16>(call, sums, first_row, rows, first_panel, panels);
    }
}

}  // namespace gemma::GEMMA_LEVEL
