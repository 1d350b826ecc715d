#include "attention_plan.h"

#include <algorithm>

namespace gemma {

namespace {

// One item for each tile of rows and KV head.
void add_tiles(const AttentionCall& call, std::vector<AttentionItem>& items) {
    const int64_t group = call.heads / call.kv_heads;
    const int64_t tile = std::max<int64_t>(1, kTileRows / group);
    for (int32_t sequence = 0; sequence < call.sequences; ++sequence) {
        const int32_t begin = call.query_start[sequence], end = call.query_start[sequence + 1];
        const int32_t computed = call.seq_lens[sequence] - (end - begin);
        for (int32_t row = begin; row < end; row += int32_t(tile)) {
            const int32_t rows = std::min<int32_t>(int32_t(tile), end - row);
            const int32_t first = computed + row - begin, last = first + rows - 1;
            const int32_t oldest = call.window > 0 ? std::max(0, first - call.window + 1) : 0;
            for (int32_t head = 0; head < call.kv_heads; ++head)
                items.push_back({sequence, head, row, rows, oldest / kSpan, last / kSpan + 1, -1});
        }
    }
}

// Shares out the spans of each item.
void split_spans(const AttentionCall& call, int64_t pieces, AttentionPlan& plan) {
    std::vector<AttentionItem> whole;
    whole.swap(plan.items);
    for (AttentionItem item : whole) {
        const int32_t spans = item.end_span - item.first_span;
        if (spans == 1) {
            plan.items.push_back(item);
            continue;
        }
        item.partial = plan.num_partials;
        plan.split.push_back(item);
        plan.num_partials += spans;
        plan.most_split_rows =
            std::max<int64_t>(plan.most_split_rows, item.num_rows * (call.heads / call.kv_heads));
        const int32_t each = int32_t((spans + pieces - 1) / pieces);
        for (int32_t span = item.first_span; span < item.end_span; span += each) {
            AttentionItem piece = item;
            piece.first_span = span;
            piece.end_span = std::min(span + each, item.end_span);
            piece.partial = item.partial + span - item.first_span;
            plan.items.push_back(piece);
        }
    }
}

}  // namespace

void plan_attention(const AttentionCall& call, int threads, AttentionPlan& plan) {
    plan.items.clear();
    plan.split.clear();
    plan.num_partials = plan.most_split_rows = plan.spans = 0;
    add_tiles(call, plan.items);
    const int64_t wanted = 4 * threads, count = std::max<int64_t>(1, int64_t(plan.items.size()));
    const int64_t pieces = (wanted + count - 1) / count;
    if (pieces > 1 && threads > 1) split_spans(call, pieces, plan);
    // The largest first, so that the threads end together.
    std::stable_sort(plan.items.begin(), plan.items.end(), [](const AttentionItem& a, const AttentionItem& b) {
        return a.num_rows * (a.end_span - a.first_span) > b.num_rows * (b.end_span - b.first_span);
    });
    for (const AttentionItem& item : plan.items) plan.spans += item.end_span - item.first_span;
}

}  // namespace gemma
