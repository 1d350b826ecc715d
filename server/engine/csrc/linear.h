// Weight matrices: packing, rows of an embedding, and x @ weight.T.
#pragma once

#include "micro.h"
#include "thread_pool.h"

namespace gemma::GEMMA_LEVEL {

// --- packing -------------------------------------------------------------------------------------------------

template <class W>
void pack_panels(Team& team, const PackCall& call) {
    const W* source = static_cast<const W*>(call.source);
    const int64_t panel_size = padded_inputs<W>(call.inputs) * kPanel;
    const int64_t num_panels = (call.outputs + kPanel - 1) / kPanel;
    for (int64_t begin, end; team.next(num_panels, 16, begin, end);) {
        for (int64_t panel = begin; panel < end; ++panel) {
            W* packed = static_cast<W*>(call.packed) + panel * panel_size;
            std::memset(static_cast<void*>(packed), 0, size_t(panel_size) * sizeof(W));
            for (int64_t lane = 0; lane < kPanel && panel * kPanel + lane < call.outputs; ++lane) {
                const W* row = source + (panel * kPanel + lane) * call.inputs;
                for (int64_t k = 0; k < call.inputs; ++k) packed[panel_index<W>(lane, k)] = row[k];
            }
        }
    }
}

inline void pack(Team& team, const PackCall& call) {
    call.type == Type::bf16 ? pack_panels<bf16>(team, call) : pack_panels<float>(team, call);
}

// --- embedding -----------------------------------------------------------------------------------------------

template <class W>
void embed_rows(Team& team, const EmbedCall& call) {
    const int64_t panel_size = padded_inputs<W>(call.inputs) * kPanel;
    for (int64_t begin, end; team.next(call.rows, 4, begin, end);) {
        for (int64_t row = begin; row < end; ++row) {
            const int64_t id = call.ids[row];
            const W* panel = static_cast<const W*>(call.packed) + id / kPanel * panel_size;
            W* out = static_cast<W*>(call.out) + row * call.inputs;
            const Vec scale = splat(call.scale);
            for (int64_t k = 0; k < call.inputs; k += Vec::width) {
                W gathered[Vec::width] = {};
                const int64_t count = call.inputs - k < Vec::width ? call.inputs - k : Vec::width;
                for (int64_t i = 0; i < count; ++i) gathered[i] = panel[panel_index<W>(id % kPanel, k + i)];
                store_some(out + k, load(gathered) * scale, count);
            }
        }
    }
}

inline void embed(Team& team, const EmbedCall& call) {
    call.type == Type::bf16 ? embed_rows<bf16>(team, call) : embed_rows<float>(team, call);
}

// --- product -------------------------------------------------------------------------------------------------

// Rows of x that are multiplied by one panel before the next one's turn: in fp32 they fit the second-level cache.
constexpr int64_t kRowBlock = 20 * kMaxRows;
// Inputs that are summed in one chain, whose sum is then added to that of the inputs before. Of a panel, so many
// stay in the first-level cache while many rows are multiplied by them; and short chains round less.
constexpr int64_t kInputBlock = 512;

template <class W>
void convert_rows(Team& team, const LinearCall& call) {
    const int64_t inputs = call.inputs, stride = linear_stride(inputs);
    for (int64_t begin, end; team.next(call.rows, 4, begin, end);) {
        for (int64_t row = begin; row < end; ++row) {
            const W* x = static_cast<const W*>(call.x) + row * inputs;
            float* out = call.x32 + row * stride;
            over(inputs, [&](int64_t i, int64_t n) { store_some(out + i, load_some(x + i, n), n); });
            for (int64_t i = inputs; i < stride; ++i) out[i] = 0.0f;
        }
    }
}

inline void convert(Team& team, const LinearCall& call) {
    call.type == Type::bf16 ? convert_rows<bf16>(team, call) : convert_rows<float>(team, call);
}

template <class W>
void finish_panels(
    const LinearCall& call, const float* sums, int64_t first_row, int64_t rows, int64_t first_panel, int64_t panels
) {
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t p = 0; p < panels; ++p) {
            const int64_t output = (first_panel + p) * kPanel;
            const int64_t at = (first_row + row) * call.outputs + output;
            const float* from = sums + (p * rows + row) * kPanel;
            for (int i = 0; i < kPanel && output + i < call.outputs; i += Vec::width) {
                const int64_t left = call.outputs - output - i;
                const int64_t count = left < Vec::width ? left : Vec::width;
                if (call.logits) {
                    Vec logit = rounded_to<W>(load(from + i));
                    if (call.softcap > 0) {
                        const Vec cap = splat(call.softcap);
                        logit = tanh(logit / cap) * cap;
                    }
                    store_some(static_cast<float*>(call.out) + at + i, logit, count);
                } else {
                    store_some(static_cast<W*>(call.out) + at + i, load(from + i), count);
                }
            }
        }
    }
}

template <class W>
void multiply_rows(Team& team, const LinearCall& call) {
    const int64_t inputs = padded_inputs<W>(call.inputs);
    const int64_t panel_size = inputs * kPanel;
    const int64_t num_panels = (call.outputs + kPanel - 1) / kPanel;
    const int64_t stride = linear_stride(call.inputs);
    const int64_t row_blocks = (call.rows + kRowBlock - 1) / kRowBlock;
    const int64_t row_block = (call.rows + row_blocks - 1) / row_blocks;
    const int64_t step = call.rows <= kMaxRows ? panels_at_once(int(call.rows)) : panels_at_once(kMaxRows);
    // Pieces of work: several for each thread, but not so small that taking one costs.
    const int64_t pieces = 6 * team.size();
    int64_t grain = round_up<int64_t>((num_panels + pieces - 1) / pieces, step);
    const int64_t most = call.rows <= kMaxRows ? 48 : 12;
    if (grain > most) grain = most;

    float* sums = static_cast<float*>(team.scratch(size_t(row_block * grain * kPanel) * sizeof(float)));
    const int64_t groups = (num_panels + grain - 1) / grain;
    for (int64_t begin, end; team.next(row_blocks * groups, 1, begin, end);) {
        const int64_t first_row = begin / groups * row_block, first_panel = begin % groups * grain;
        const int64_t rows = call.rows - first_row < row_block ? call.rows - first_row : row_block;
        const int64_t panels = num_panels - first_panel < grain ? num_panels - first_panel : grain;
        const W* weights = static_cast<const W*>(call.packed) + first_panel * panel_size;
        // Weights that are read once are read in the order in which they lie.
        const int64_t together = rows <= kMaxRows ? panels_at_once(int(rows)) : panels;
        for (int64_t panel = 0; panel < panels; panel += together) {
            for (int64_t k = 0; k < inputs; k += kInputBlock) {
                const W* segment = weights + panel * panel_size + k * kPanel;
                multiply_all<W>(
                    {
                        .x = call.x32 + first_row * stride + k,
                        .x_stride = stride,
                        .segments = &segment,
                        .num_segments = 1,
                        .inputs = inputs - k < kInputBlock ? inputs - k : kInputBlock,
                        .panel_stride = panel_size,
                        .sums = sums + panel * rows * kPanel,
                        .sums_stride = kPanel,
                        .sums_panel_stride = rows * kPanel,
                        .add = k > 0,
                    },
                    rows, panels - panel < together ? panels - panel : together
                );
            }
        }
        finish_panels<W>(call, sums, first_row, rows, first_panel, panels);
    }
}

inline void multiply(Team& team, const LinearCall& call) {
    call.type == Type::bf16 ? multiply_rows<bf16>(team, call) : multiply_rows<float>(team, call);
}

}  // namespace gemma::GEMMA_LEVEL
