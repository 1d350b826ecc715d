// Paged attention of decodes and prefill chunks alike.
//
// Laws:
// - Keys are taken in spans of kSpan absolute positions. Inside a span the softmax is plain; spans are merged in
//   ascending order. A row's result is therefore the same in a decode, in a chunk, and with the spans shared out
//   among threads.
// - Scores, softmax and weighted sum are fp32.
// - What lies in slots that hold no token of the sequence is never multiplied by, not even by zero: it may be NaN.
#pragma once

#include "rope.h"

namespace gemma::GEMMA_LEVEL {

constexpr int kSpanPanels = kSpan / kPanel;

// The softmax-weighted sum of some rows over some keys, not divided yet.
struct Weighted {
    float* sums;    // [rows, padded head_dim]
    float* maxima;  // [rows], minus infinity for rows that have seen nothing
    float* totals;  // [rows]: the summed weights

    static int64_t size(int64_t rows, int64_t padded) { return rows * (padded + 2); }

    static Weighted at(float* memory, int64_t rows, int64_t padded) {
        return {memory, memory + rows * padded, memory + rows * (padded + 1)};
    }

    void clear(int64_t rows, int64_t padded) {
        for (int64_t i = 0; i < rows * (padded + 2); ++i) sums[i] = 0.0f;
        for (int64_t row = 0; row < rows; ++row) maxima[row] = kMinusInfinity;
    }
};

template <class W>
class Attention {
public:
    Attention(Team& team, const AttentionCall& call) : call_(call), shape_(head_shape<W>(call)) {
        const int64_t rows = round_up<int64_t>(kTileRows + shape_.group, 16);
        const int64_t weighted = round_up<int64_t>(Weighted::size(rows, shape_.padded), 16);
        const int64_t copies = kSpanPanels * (shape_.key_size + shape_.value_size);
        float* memory = static_cast<float*>(
            team.scratch(size_t(rows * kSpan + 2 * weighted) * sizeof(float) + size_t(copies) * sizeof(W))
        );
        scores_ = memory;
        one_ = memory + rows * kSpan;
        all_ = one_ + weighted;
        copies_ = reinterpret_cast<W*>(all_ + weighted);
    }

    void run(const AttentionItem& item) {
        const int64_t rows = item.num_rows * shape_.group;
        if (item.partial >= 0) {
            for (int64_t span = item.first_span; span < item.end_span; ++span)
                attend(item, span, partial(item, span - item.first_span));
            return;
        }
        const Weighted one = Weighted::at(one_, rows, shape_.padded);
        Weighted all = Weighted::at(all_, rows, shape_.padded);
        all.clear(rows, shape_.padded);
        for (int64_t span = item.first_span; span < item.end_span; ++span) {
            attend(item, span, one);
            merge(all, one, rows);
        }
        write(item, all);
    }

    // item: of call.split, all of whose spans have been attended.
    void finish(const AttentionItem& item) {
        const int64_t rows = item.num_rows * shape_.group;
        Weighted all = Weighted::at(all_, rows, shape_.padded);
        all.clear(rows, shape_.padded);
        for (int64_t span = 0; span < item.end_span - item.first_span; ++span) merge(all, partial(item, span), rows);
        write(item, all);
    }

private:
    struct Visible {
        int64_t first, last;
    };

    Weighted partial(const AttentionItem& item, int64_t span) const {
        float* memory = call_.partials + (item.partial + span) * call_.partial_stride;
        return Weighted::at(memory, item.num_rows * shape_.group, shape_.padded);
    }

    // Positions that a token sees.
    Visible visible(const AttentionItem& item, int64_t token) const {
        const int64_t end_row = call_.query_start[item.sequence + 1];
        const int64_t position = call_.seq_lens[item.sequence] - (end_row - token);
        const int64_t first = call_.window > 0 ? position - call_.window + 1 : 0;
        return {first > 0 ? first : 0, position};
    }

    // Rows of an item against the keys of a span.
    void attend(const AttentionItem& item, int64_t span, Weighted out) {
        const int64_t rows = item.num_rows * shape_.group;
        const int64_t start = span * kSpan;
        const Visible oldest = visible(item, item.first_row);
        const Visible newest = visible(item, item.first_row + item.num_rows - 1);
        const int64_t first = (oldest.first > start ? oldest.first - start : 0) / kPanel * kPanel;
        const int64_t last = newest.last - start < kSpan - 1 ? newest.last - start : kSpan - 1;
        const int64_t num_panels = (last - first) / kPanel + 1;

        const W* keys[kSpanPanels];
        const W* values[kSpanPanels];
        for (int64_t p = 0; p < num_panels; ++p) find_panels(item, start + first + p * kPanel, p, keys[p], values[p]);

        const float* q =
            call_.q + (item.kv_head * call_.tokens + item.first_row) * shape_.group * shape_.padded;
        for (int64_t p = 0; p < num_panels; ++p) {
            multiply_all<W>(
                {
                    .x = q,
                    .x_stride = shape_.padded,
                    .segments = &keys[p],
                    .num_segments = 1,
                    .inputs = padded_inputs<W>(shape_.dim),
                    .panel_stride = 0,
                    .sums = scores_ + first + p * kPanel,
                    .sums_stride = kSpan,
                    .sums_panel_stride = 0,
                    .add = false,
                },
                rows, 1
            );
        }
        for (int64_t row = 0; row < rows; ++row) {
            const Visible seen = visible(item, item.first_row + row / shape_.group);
            softmax(
                scores_ + row * kSpan, first, first + num_panels * kPanel, seen.first - start, seen.last - start,
                out.maxima[row], out.totals[row]
            );
        }
        multiply_all<W>(
            {
                .x = scores_ + first,
                .x_stride = kSpan,
                .segments = values,
                .num_segments = int(num_panels),
                .inputs = kPanel,
                .panel_stride = kValuePanel,
                .sums = out.sums,
                .sums_stride = shape_.padded,
                .sums_panel_stride = kPanel,
                .add = false,
            },
            rows, shape_.padded / kPanel
        );
    }

    // Keys and values of the 16 positions from `position` on: where they lie, or copied together if a block's slots
    // are not whole panels or some of them hold no token of the sequence.
    void find_panels(const AttentionItem& item, int64_t position, int64_t index, const W*& keys, const W*& values) {
        const int32_t* table = call_.block_table + item.sequence * call_.table_width;
        const int64_t valid = call_.seq_lens[item.sequence] - position;
        const auto slot_of = [&](int64_t at) {
            return int64_t(table[at / call_.block_size]) * call_.block_size + at % call_.block_size;
        };
        const auto keys_of = [&](int64_t slot) {
            const int64_t panel = slot / kPanel * call_.kv_heads + item.kv_head;
            return static_cast<const W*>(call_.keys) + panel * shape_.key_size;
        };
        const auto values_of = [&](int64_t slot) {
            const int64_t panel = slot / kPanel * call_.kv_heads + item.kv_head;
            return static_cast<const W*>(call_.values) + panel * shape_.value_size;
        };
        const bool whole = call_.block_size % kPanel == 0;
        if (whole && valid >= kPanel) {
            keys = keys_of(slot_of(position));
            values = values_of(slot_of(position));
            return;
        }
        W* key_copy = copies_ + index * (shape_.key_size + shape_.value_size);
        W* value_copy = key_copy + shape_.key_size;
        keys = key_copy;
        values = value_copy;
        std::memset(static_cast<void*>(key_copy), 0, size_t(shape_.key_size + shape_.value_size) * sizeof(W));
        for (int64_t lane = 0; lane < kPanel && lane < valid; ++lane) {
            const int64_t slot = slot_of(position + lane);
            const W* from_keys = keys_of(slot);
            const W* from_values = values_of(slot);
            for (int64_t i = 0; i < shape_.dim; ++i) {
                const int64_t panel = i / kPanel * kValuePanel;
                key_copy[panel_index<W>(lane, i)] = from_keys[panel_index<W>(slot % kPanel, i)];
                value_copy[panel + panel_index<W>(i % kPanel, lane)] =
                    from_values[panel + panel_index<W>(i % kPanel, slot % kPanel)];
            }
        }
    }

    // Turns scores[begin, end) into weights, 0 outside of [first, last]. begin and end are multiples of a panel.
    void softmax(
        float* scores, int64_t begin, int64_t end, int64_t first, int64_t last, float& maximum, float& total
    ) const {
        alignas(64) float numbers[Vec::width];
        for (int i = 0; i < Vec::width; ++i) numbers[i] = float(i);
        const Vec lanes = load(numbers), infinity = splat(kMinusInfinity);
        const Vec first_lane = splat(float(first)), last_lane = splat(float(last));
        Vec maxima = infinity;
        for (int64_t i = begin; i < end; i += Vec::width) {
            Vec score = load(scores + i);
            if (call_.softcap > 0) {
                const Vec cap = splat(call_.softcap);
                score = tanh(score / cap) * cap;
            }
            const Vec column = splat(float(i)) + lanes;
            score = if_less(column, first_lane, infinity, score);
            score = if_less(last_lane, column, infinity, score);
            store(scores + i, score);
            maxima = max(score, maxima);
        }
        maximum = largest(maxima);
        // Where all is masked, minus infinity less itself would be NaN.
        const Vec subtract = splat(maximum == kMinusInfinity ? 0.0f : maximum);
        Vec totals = splat(0.0f);
        for (int64_t i = begin; i < end; i += Vec::width) {
            const Vec weight = exp(load(scores + i) - subtract);
            store(scores + i, weight);
            totals = totals + weight;
        }
        total = sum(totals);
    }

    void merge(Weighted& all, const Weighted& one, int64_t rows) const {
        for (int64_t row = 0; row < rows; ++row) {
            const float larger = all.maxima[row] > one.maxima[row] ? all.maxima[row] : one.maxima[row];
            const float subtract = larger == kMinusInfinity ? 0.0f : larger;
            alignas(64) float factors[Vec::width] = {all.maxima[row] - subtract, one.maxima[row] - subtract};
            store(factors, exp(load(factors)));
            const Vec old_factor = splat(factors[0]), new_factor = splat(factors[1]);
            all.maxima[row] = larger;
            all.totals[row] = all.totals[row] * factors[0] + one.totals[row] * factors[1];
            float* to = all.sums + row * shape_.padded;
            const float* from = one.sums + row * shape_.padded;
            for (int64_t i = 0; i < shape_.padded; i += Vec::width)
                store(to + i, fma(load(from + i), new_factor, load(to + i) * old_factor));
        }
    }

    void write(const AttentionItem& item, const Weighted& all) const {
        for (int64_t row = 0; row < item.num_rows * shape_.group; ++row) {
            const int64_t token = item.first_row + row / shape_.group;
            const int64_t head = item.kv_head * shape_.group + row % shape_.group;
            W* out = static_cast<W*>(call_.out) + (token * call_.heads + head) * shape_.dim;
            const float* sums = all.sums + row * shape_.padded;
            const Vec total = splat(all.totals[row]);
            over(shape_.dim, [&](int64_t i, int64_t n) { store_some(out + i, load(sums + i) / total, n); });
        }
    }

    const AttentionCall& call_;
    const HeadShape shape_;
    float* scores_;  // [rows, kSpan]
    float* one_;     // the Weighted of one span
    float* all_;     // the Weighted of the spans so far
    W* copies_;      // keys and values of up to a span's panels
};

template <class W>
void attend_items(Team& team, const AttentionCall& call) {
    Attention<W> attention(team, call);
    for (int64_t begin, end; team.next(call.num_items, 1, begin, end);) attention.run(call.items[begin]);
}

template <class W>
void merge_items(Team& team, const AttentionCall& call) {
    Attention<W> attention(team, call);
    for (int64_t begin, end; team.next(call.num_split, 1, begin, end);) attention.finish(call.split[begin]);
}

inline void attend(Team& team, const AttentionCall& call) {
    call.type == Type::bf16 ? attend_items<bf16>(team, call) : attend_items<float>(team, call);
}

inline void merge(Team& team, const AttentionCall& call) {
    call.type == Type::bf16 ? merge_items<bf16>(team, call) : merge_items<float>(team, call);
}

}  // namespace gemma::GEMMA_LEVEL
