// What crosses the border between api.cpp and the kernels: plain structs, and one table of functions a level.
//
// Laws:
// - A kernel takes pieces of its work until there are none, on one thread or on several. What needs the results of
//   other pieces is another kernel, run after it.
// - What is computed for a row is bit for bit a function of that row (and of the keys and values it sees): not of
//   the rows beside it, their number, the number of threads, or how a prompt was cut into chunks.
// - Fields marked "step" are filled from the step when a program runs; a program is recorded once (see program.h).
// - This header is read at every instruction set level, so it holds no functions but constexpr arithmetic: the linker
//   would keep one level's copy of a function for all of them.
#pragma once

#include <cstdint>

#include "sampling_calls.h"

namespace gemma {

class Team;

struct bf16 {
    uint16_t bits;
};

enum class Type : int32_t { f32 = 0, bf16 = 1, int8 = 2 };  // int8: of weights only

// A weight matrix [outputs, inputs] is packed into panels of 16 outputs. A panel holds, input after input, the 16
// outputs' weights; in bf16 and int8 two inputs are interleaved, so that each lane has inputs (2i, 2i + 1) of one
// output. That is what AVX-512's vdpbf16ps and AMX's tdpbf16ps read, and one shift and one mask split it for AVX2;
// and int8, widened to 16 bits, is what vpmaddwd reads. A panel of int8 begins with its outputs' 16 scales in fp32:
// a weight is its integer times its output's scale. Missing outputs and missing last inputs are zero.
constexpr int kPanel = 16;

struct PackCall {
    Type type;
    const void* source;   // [outputs, inputs]
    const float* scales;  // [outputs]; of int8 alone
    void* packed;
    int64_t outputs, inputs;
};

// Floats from one row of a LinearCall's x32 to the next. Not a power of two, so that the rows of a block do not
// fall into the same set of the first-level cache.
constexpr int64_t linear_stride(int64_t inputs) { return (inputs + 15) / 16 * 16 + 16; }

struct EmbedCall {
    Type type, weight_type;
    const void* packed;
    int64_t inputs;
    const int64_t* ids;  // step: [rows]
    int64_t rows;        // step
    float scale;
    void* out;  // [rows, inputs]
};

struct LinearCall {
    Type type, weight_type;
    const void* x;  // [rows, inputs]
    int64_t rows;   // step
    const void* packed;
    int64_t outputs, inputs;
    void* out;       // [rows, outputs] in `type`, or in fp32 if logits
    int32_t logits;  // rounded as `type` is, then soft-capped and stored in fp32
    float softcap;   // 0: none
    // Scratch [rows, linear_stride(inputs)], zeros behind each row: x in fp32, or for int8 weights as 16-bit integers
    // from the row's beginning on, whose scale is the row's last float.
    float* x32;
};

struct NormCall {
    Type type;
    const void* x;  // [rows, width]; with residual, what is added to it
    void* residual;  // [rows, width] or null; overwritten with the sum
    const float* weight;  // [width], one added
    float eps;
    int64_t rows;  // step
    int64_t width;
    void* out;
};

struct GegluCall {
    Type type;
    const void* gate_up;  // [rows, 2 * width]
    int64_t rows;         // step
    int64_t width;
    void* out;
};

// One sequence's new rows of one KV head, cut so that the parts occupy the threads.
struct AttentionItem {
    int32_t sequence, kv_head;
    int32_t first_row, num_rows;    // tokens of the step
    int32_t first_span, end_span;   // of keys
    int64_t partial;                // index of the first span's partial result, or -1: all spans are here
};

// Keys and values are packed as weights are, 16 slots to a panel: the scores are a product with the keys
// [16 slots, head_dim], the weighted sum one with the values [head_dim, 16 slots].
struct AttentionCall {
    Type type;
    const void* qkv;  // [tokens, (heads + 2 * kv_heads) * head_dim]
    int32_t heads, kv_heads, head_dim, window;  // window 0: none
    float scale, softcap;                       // softcap 0: none
    const float* q_norm;                        // [head_dim], one added; null: none
    const float* k_norm;
    float eps;
    void* keys;
    void* values;
    int32_t group;  // of layers, see AttentionGroup
    int32_t rope;   // index of its angles
    void* out;      // [tokens, heads * head_dim]
    // The rest is the step's.
    int64_t tokens;
    const float* cos;  // [tokens, head_dim / 2]
    const float* sin;
    int64_t sequences;
    const int32_t* query_start;  // [sequences + 1]
    const int32_t* seq_lens;     // [sequences]
    const int32_t* block_table;  // [sequences, table_width]
    int64_t table_width;
    const int64_t* slots;  // [tokens]
    int32_t block_size;
    float* q;         // scratch [kv_heads, tokens, heads / kv_heads, head_dim padded]
    float* partials;  // of split items, partial_stride floats each: sums, maxima, totals; see attention.h
    int64_t partial_stride;
    const AttentionItem* items;
    int64_t num_items;
    const AttentionItem* split;  // one for each item whose spans were shared out, to be merged
    int64_t num_split;
};

// Keys that one softmax covers before it is merged into the running one. Absolute positions, so that it does not
// depend on the chunk or the batch which keys come together.
constexpr int kSpan = 128;
constexpr int kTileRows = 48;  // query rows (tokens times heads of a group) of an item at most, roughly

struct Kernels {
    void (*pack)(Team&, const PackCall&);
    void (*embed)(Team&, const EmbedCall&);
    void (*norm)(Team&, const NormCall&);
    void (*geglu)(Team&, const GegluCall&);
    // A linear layer.
    void (*convert)(Team&, const LinearCall&);  // x to x32
    void (*multiply)(Team&, const LinearCall&);
    // Attention.
    void (*rotate)(Team&, const AttentionCall&);  // queries to q, keys and values into the cache
    void (*attend)(Team&, const AttentionCall&);  // the items
    void (*merge)(Team&, const AttentionCall&);   // the split ones
    RowKernels rows;                              // the sampler's
};

}  // namespace gemma
