// What crosses the border between sampling.cpp and its callers, and between it and the passes over a row.
//
// Like calls.h, this is read at every instruction set level and so holds no functions.
#pragma once

#include <cstdint>

namespace gemma {

class Team;

// Logits that are looked at together. A row's last block may be shorter.
constexpr int64_t kBlock = 64;
// Parts into which a range of logits is cut; see tally.
constexpr int64_t kParts = 1024;

// The weight of a logit beside a larger one is 2^((logit - larger) * (high + low)), and 0 if logit - larger < lowest.
struct Scale {
    float high, low, lowest;
};

// What is known of a row's blocks.
struct Blocks {
    float* maxima;  // NaN where a logit is
    float* masses;  // summed weights beside the block's maximum; 0 where that is not finite
};

// Part p holds the logits for which (highest - logit) * scale, rounded down, is p.
struct Partition {
    float highest, scale;
};

struct Range {
    float lowest, highest;
};

// A list of logits in the order of their ids, with room for 16 more.
struct List {
    float* values;
    int32_t* ids;
};

// The passes over a row or a list that are worth vectors. All sums run in one order, whatever the level.
struct RowKernels {
    // The maxima, and the masses if `scale` is not null.
    void (*blocks)(const float* row, int64_t count, const Scale* scale, Blocks out);
    // As blocks, for those whose mark is not 0. `marks` is as long as if their number were a multiple of 8.
    void (*marked_blocks)(const float* row, int64_t count, const Scale* scale, const uint8_t* marks, Blocks out);
    // Minus infinity for ids whose bit is 0; marks the blocks that changed.
    void (*mask)(float* row, int64_t count, const uint32_t* allowed, uint8_t* marks);
    // The index of the first of the largest; -1 if one is NaN. count > 0.
    int64_t (*first_largest)(const float* x, int64_t count);
    // The masses of all blocks beside `largest`; returns their sum.
    double (*shares)(Blocks blocks, int64_t num_blocks, float largest, const Scale& scale, float* shares);
    // Lists what is at least `bound`. Returns its number; `lowest` is the smallest of it.
    int64_t (*gather)(const float* row, int64_t count, const float* maxima, float bound, List out, float& lowest);
    // Beside `largest`.
    void (*weights)(const float* x, int64_t count, float largest, const Scale& scale, float* weights);
    // count > 0
    Range (*range)(const float* x, int64_t count);
    // The sum of the weights beside `largest` of each part; or, if scale is null, how many are in it.
    void (*tally)(
        const float* x, int64_t count, Partition partition, float largest, const Scale* scale, double* sums
    );
    // How many logits come before logits[id], in descending order and then by id.
    int64_t (*before)(const float* row, int64_t count, const float* maxima, int64_t id);
    // Lists what is in a part. Returns its number.
    int64_t (*part)(List list, int64_t count, Partition partition, int64_t part, List out);
};

// --- calls ---------------------------------------------------------------------------------------------------

struct SampleRow {
    double temperature;  // 0: greedy
    double top_p;        // 1: off
    double min_p;        // 0: off
    int64_t top_k;       // 0: off
    double uniform;      // in [0, 1 - 2^-53]
    int64_t num_top;     // logprobs of so many likeliest tokens; -1: none, nor of the chosen one
    const int32_t* bias_ids;
    const float* bias;
    int64_t num_bias;
    const int32_t* banned_ids;
    int64_t num_banned;
    const int32_t* seen_ids;     // each once
    const int32_t* seen_counts;  // how often each was generated
    int64_t num_seen;
    double repetition_penalty;  // 1: off
    double presence_penalty, frequency_penalty;
    const uint32_t* allowed;  // a bit for each id, the lowest first; null: all are
    const int32_t* listed_ids;  // logprobs of these, too, if num_top >= 0
    int64_t num_listed;
};

enum class Fault : int64_t { none = 0, not_finite = 1, nothing_left = 2 };

struct SampleResult {
    int64_t token;
    Fault fault;
    double logprob;   // of the token
    int64_t num_top;  // listed in top_ids and top_logprobs: the likeliest, then those of listed_ids
    int64_t rank;     // of the token, counted from 1; 0: not asked for, or not finite
};

struct SampleCall {
    float* logits;  // [rows, columns]; changed
    int64_t rows, columns;
    int64_t vocab_size;  // what lies behind is padding
    const int32_t* suppressed;
    int64_t num_suppressed;
    const SampleRow* params;  // [rows]
    int64_t few;              // so many candidates are sorted without more ado; at most kParts
    SampleResult* results;    // [rows]
    int64_t top_width;
    int32_t* top_ids;      // [rows, top_width]
    double* top_logprobs;  // [rows, top_width]
    const RowKernels* kernels;  // filled by api.cpp
};

struct LogprobsCall {
    const float* logits;  // [rows, columns]
    int64_t rows, columns;
    const int64_t* chosen;   // [rows]
    const int64_t* num_top;  // [rows]
    SampleResult* results;   // [rows]; no faults
    int64_t top_width;
    int32_t* top_ids;
    double* top_logprobs;
    const RowKernels* kernels;  // filled by api.cpp
};

// In sampling.cpp.
void sample(Team& team, const SampleCall& call);
void logprobs(Team& team, const LogprobsCall& call);

}  // namespace gemma
