// A decoder step in one call: the operations are recorded once, and run for each step's tokens.
#pragma once

#include "engine.h"

namespace gemma {

enum class Kind : int32_t { embed = 0, linear = 1, norm = 2, geglu = 3, attention = 4 };

struct Operation {
    Kind kind;
    void* call;  // EmbedCall, LinearCall, NormCall, GegluCall or AttentionCall
};

// A rotary embedding. Layers that share it share its angles.
struct Rope {
    const float* frequencies;  // [half], radians per position
    int64_t half;
};

struct Program {
    const Operation* operations;
    int64_t num_operations;
    const Rope* ropes;
    int64_t num_ropes;
    int64_t num_groups;
};

// Where the layers of one KV group find and put the keys and values of a step; see AttentionCall.
struct AttentionGroup {
    int64_t sequences;
    const int32_t* query_start;
    const int32_t* seq_lens;
    const int32_t* block_table;
    int64_t table_width;
    const int64_t* slots;
    int32_t block_size;
};

struct StepCall {
    int64_t tokens;
    const int64_t* ids;        // [tokens]
    const int64_t* positions;  // [tokens]
    const AttentionGroup* groups;
};

void run_program(Engine& engine, const Program& program, const StepCall& step);

void run_linear(Engine& engine, LinearCall call);

}  // namespace gemma
