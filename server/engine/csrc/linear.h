// Weight matrices: packing, rows of an embedding, and x @ weight.T.
#pragma once

#include "micro.h"
#include "thread_pool.h"

namespace gemma::GEMMA_LEVEL {

// --- panels --------------------------------------------------------------------------------------------------

// Elements of a panel before its weights.
template <class W>
constexpr int64_t kPanelHeader = 0;
template <>
inline constexpr int64_t kPanelHeader<int8_t> = kPanel * sizeof(float);  // the scales

// Elements of a packed panel.
template <class W>
constexpr int64_t panel_size(int64_t inputs) {
    return kPanelHeader<W> + padded_inputs<W>(inputs) * kPanel;
}

inline float* panel_scales(int8_t* panel) { return reinterpret_cast<float*>(panel); }
inline const float* panel_scales(const int8_t* panel) { return reinterpret_cast<const float*>(panel); }

template <class W>
void pack_panels(Team& team, const PackCall& call) {
    const W* source = static_cast<const W*>(call.source);
    const int64_t size = panel_size<W>(call.inputs);
    const int64_t num_panels = (call.outputs + kPanel - 1) / kPanel;
    for (int64_t begin, end; team.next(num_panels, 16, begin, end);) {
        for (int64_t index = begin; index < end; ++index) {
            W* panel = static_cast<W*>(call.packed) + index * size;
            std::memset(static_cast<void*>(panel), 0, size_t(size) * sizeof(W));
            for (int64_t lane = 0; lane < kPanel && index * kPanel + lane < call.outputs; ++lane) {
                const int64_t output = index * kPanel + lane;
                if constexpr (std::is_same_v<W, int8_t>) panel_scales(panel)[lane] = call.scales[output];
                W* weights = panel + kPanelHeader<W>;
                const W* row = source + output * call.inputs;
                for (int64_t k = 0; k < call.inputs; ++k) weights[panel_index<W>(lane, k)] = row[k];
            }
        }
    }
}

inline void pack(Team& team, const PackCall& call) {
    switch (call.type) {
        case Type::f32: return pack_panels<float>(team, call);
        case Type::bf16: return pack_panels<bf16>(team, call);
        case Type::int8: return pack_panels<int8_t>(team, call);
    }
}

// --- embedding -----------------------------------------------------------------------------------------------

template <class W, class T>
void embed_rows(Team& team, const EmbedCall& call) {
    const int64_t size = panel_size<W>(call.inputs);
    for (int64_t begin, end; team.next(call.rows, 4, begin, end);) {
        for (int64_t row = begin; row < end; ++row) {
            const int64_t lane = call.ids[row] % kPanel;
            const W* panel = static_cast<const W*>(call.packed) + call.ids[row] / kPanel * size;
            const W* weights = panel + kPanelHeader<W>;
            T* out = static_cast<T*>(call.out) + row * call.inputs;
            over(call.inputs, [&](int64_t k, int64_t n) {
                W gathered[Vec::width] = {};
                for (int64_t i = 0; i < n; ++i) gathered[i] = weights[panel_index<W>(lane, k + i)];
                Vec value = load(gathered);
                if constexpr (std::is_same_v<W, int8_t>) value = value * splat(panel_scales(panel)[lane]);
                store_some(out + k, value * splat(call.scale), n);
            });
        }
    }
}

inline void embed(Team& team, const EmbedCall& call) {
    const bool bf16_rows = call.type == Type::bf16;
    if (call.weight_type == Type::int8)
        bf16_rows ? embed_rows<int8_t, bf16>(team, call) : embed_rows<int8_t, float>(team, call);
    else
        bf16_rows ? embed_rows<bf16, bf16>(team, call) : embed_rows<float, float>(team, call);
}

// --- product -------------------------------------------------------------------------------------------------

// Rows of x that are multiplied by one panel before the next one's turn: in fp32 they fit the second-level cache.
constexpr int64_t kRowBlock = 20 * kMaxRows;
// Inputs that are summed in one chain, whose sum is then added to that of the inputs before. Of a panel, so many
// stay in the first-level cache while many rows are multiplied by them; and short chains round less.
constexpr int64_t kInputBlock = 512;
// A row of x for int8 weights is scaled to integers of this size at most, so that no sum over a block overflows.
constexpr int64_t kLargest = 32767;
static_assert(kInputBlock * kLargest * 127 < std::numeric_limits<int32_t>::max());

// A row of x32 as what weights of type W are multiplied by.
template <class W>
typename Operand<W>::Input* converted_row(const LinearCall& call, int64_t row) {
    return reinterpret_cast<typename Operand<W>::Input*>(call.x32 + row * linear_stride(call.inputs));
}
inline float& row_scale(const LinearCall& call, int64_t row) {
    return call.x32[(row + 1) * linear_stride(call.inputs) - 1];
}

// Rows below this have no integers: the factor to scale them by would overflow, and the results round to zero.
constexpr float kSmallestRow = 1e-30f;

template <class T>
void quantize_rows(Team& team, const LinearCall& call) {
    const int64_t inputs = call.inputs;
    for (int64_t begin, end; team.next(call.rows, 4, begin, end);) {
        for (int64_t row = begin; row < end; ++row) {
            const T* x = static_cast<const T*>(call.x) + row * inputs;
            Vec maxima = splat(0.0f), poison = splat(0.0f);
            over(inputs, [&](int64_t i, int64_t n) {
                const Vec value = load_some(x + i, n);
                maxima = max(abs(value), maxima);
                poison = fma(value, splat(0.0f), poison);
            });
            const float maximum = largest(maxima);
            const Vec factor = splat(maximum > kSmallestRow ? float(kLargest) / maximum : 0.0f);
            int16_t* integers = converted_row<int8_t>(call, row);
            over(inputs, [&](int64_t i, int64_t n) { store_some(integers + i, load_some(x + i, n) * factor, n); });
            for (int64_t i = inputs; i < padded_inputs<int8_t>(inputs); ++i) integers[i] = 0;
            // Integers hold no NaN and no infinity; of a row that has any, the scale is NaN.
            row_scale(call, row) = maximum / float(kLargest) + sum(poison);
        }
    }
}

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
    const bool bf16_rows = call.type == Type::bf16;
    if (call.weight_type == Type::int8)
        bf16_rows ? quantize_rows<bf16>(team, call) : quantize_rows<float>(team, call);
    else
        bf16_rows ? convert_rows<bf16>(team, call) : convert_rows<float>(team, call);
}

template <class W, class T>
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
                Vec value = load(from + i);
                if constexpr (std::is_same_v<W, int8_t>) {
                    const W* panel = static_cast<const W*>(call.packed) + (first_panel + p) * panel_size<W>(call.inputs);
                    value = value * splat(row_scale(call, first_row + row)) * load(panel_scales(panel) + i);
                }
                if (call.logits) {
                    Vec logit = rounded_to<T>(value);
                    if (call.softcap > 0) {
                        const Vec cap = splat(call.softcap);
                        logit = tanh(logit / cap) * cap;
                    }
                    store_some(static_cast<float*>(call.out) + at + i, logit, count);
                } else {
                    store_some(static_cast<T*>(call.out) + at + i, value, count);
                }
            }
        }
    }
}

template <class W, class T>
void multiply_rows(Team& team, const LinearCall& call) {
    const int64_t inputs = padded_inputs<W>(call.inputs);
    const int64_t size = panel_size<W>(call.inputs);
    const int64_t num_panels = (call.outputs + kPanel - 1) / kPanel;
    const int64_t stride = converted_row<W>(call, 1) - converted_row<W>(call, 0);
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
        const W* weights = static_cast<const W*>(call.packed) + first_panel * size + kPanelHeader<W>;
        // Weights that are read once are read in the order in which they lie.
        const int64_t together = rows <= kMaxRows ? panels_at_once(int(rows)) : panels;
        for (int64_t panel = 0; panel < panels; panel += together) {
            for (int64_t k = 0; k < inputs; k += kInputBlock) {
                const W* segment = weights + panel * size + k * kPanel;
                multiply_all<W>(
                    {
                        .x = converted_row<W>(call, first_row) + k,
                        .x_stride = stride,
                        .segments = &segment,
                        .num_segments = 1,
                        .inputs = inputs - k < kInputBlock ? inputs - k : kInputBlock,
                        .panel_stride = size,
                        .sums = sums + panel * rows * kPanel,
                        .sums_stride = kPanel,
                        .sums_panel_stride = rows * kPanel,
                        .add = k > 0,
                    },
                    rows, panels - panel < together ? panels - panel : together
                );
            }
        }
        finish_panels<W, T>(call, sums, first_row, rows, first_panel, panels);
    }
}

inline void multiply(Team& team, const LinearCall& call) {
    const bool bf16_rows = call.type == Type::bf16;
    if (call.weight_type == Type::int8)
        bf16_rows ? multiply_rows<int8_t, bf16>(team, call) : multiply_rows<int8_t, float>(team, call);
    else
        bf16_rows ? multiply_rows<bf16, bf16>(team, call) : multiply_rows<float, float>(team, call);
}

}  // namespace gemma::GEMMA_LEVEL
