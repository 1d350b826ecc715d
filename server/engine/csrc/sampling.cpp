// Chooses a token for each row of logits, and lists log-probabilities.
//
// Laws, beside those of calls.h:
// - A row is one thread's. What is sampled of it is a function of the row and its SampleRow, on every level.
// - No row is sorted. The largest logit of each block leads to the few candidates that a peaked row needs; where
//   more are needed, they are tallied in parts of neighbouring logits, and only the part where a sum is reached is
//   opened.
// - A cumulative weight never falls, and what is drawn has a weight above zero: where a sum passes a threshold that
//   it had not passed before, something was added.

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>

#include "sampling_calls.h"
#include "thread_pool.h"

namespace gemma {
namespace {

constexpr double kFloor = -9999.0;  // LOGPROB_FLOOR in server/engine/sampling/types.py
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr double kLargestUniform = 1.0 - 0x1p-53;

int64_t num_blocks(int64_t count) { return (count + kBlock - 1) / kBlock; }

// --- scratch -------------------------------------------------------------------------------------------------

// One thread's arrays for rows of `columns` logits. Most of it is never touched, and so takes no memory.
struct Scratch {
    Scratch(Team& team, int64_t columns) {
        const size_t blocks = size_t(num_blocks(columns) + 7) / 8 * 8, list = size_t(columns) + 16;
        const size_t doubles = 2 * size_t(kParts) * sizeof(double) + list * sizeof(uint64_t);
        const size_t floats = 3 * blocks + 6 * list, ids = 3 * list;
        const size_t bytes = doubles + floats * sizeof(float) + ids * sizeof(int32_t) + blocks;
        char* at = static_cast<char*>(team.scratch(bytes));
        const auto take = [&at]<class T>(T*& array, size_t count) {
            array = reinterpret_cast<T*>(at);
            at += count * sizeof(T);
        };
        take(tally, size_t(kParts));
        take(part_tally, size_t(kParts));
        take(keys, list);
        take(this->blocks.maxima, blocks);
        take(this->blocks.masses, blocks);
        take(shares, blocks);
        for (List& each : lists) {
            take(each.values, list);
            take(each.ids, list);
        }
        take(weights, list);
        take(before, 2 * list);
        take(marks, blocks);
    }

    double *tally, *part_tally;
    uint64_t* keys;
    Blocks blocks;
    float *shares, *weights, *before;
    List lists[3];
    uint8_t* marks;
};

// --- order ---------------------------------------------------------------------------------------------------

// Numbers in the order of the logits. -0 is 0.
uint32_t rank_of(float logit) {
    const uint32_t bits = std::bit_cast<uint32_t>(logit + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

float logit_of_rank(uint32_t rank) {
    return std::bit_cast<float>(rank & 0x80000000u ? rank & 0x7fffffffu : ~rank);
}

// Ascending keys are descending logits, and ascending ids where they are equal.
uint64_t key_of(float logit, int32_t id) { return uint64_t(~rank_of(logit)) << 32 | uint32_t(id); }

float logit_of(uint64_t key) { return logit_of_rank(~uint32_t(key >> 32)); }

int32_t id_of(uint64_t key) { return int32_t(uint32_t(key)); }

// --- one row -------------------------------------------------------------------------------------------------

struct Best {
    int64_t id;
    float logit;  // NaN if one is
};

Scale scale_of(double temperature) {
    const double factor = 1.4426950408889634 / temperature;
    const float high = float(factor);
    return {high, float(factor - double(high)), float(-125.0 / factor)};
}

struct Row {
    const RowKernels& kernels;
    Scratch& scratch;
    const float* logits;
    int64_t count;

    // Learns of the blocks, their masses only with a scale.
    void look(const Scale* scale) const { kernels.blocks(logits, count, scale, scratch.blocks); }
    void look_again(const Scale* scale) const {
        kernels.marked_blocks(logits, count, scale, scratch.marks, scratch.blocks);
    }

    Best best() const {
        const int64_t block = kernels.first_largest(scratch.blocks.maxima, num_blocks(count));
        if (block < 0) return {-1, std::numeric_limits<float>::quiet_NaN()};
        const int64_t first = block * kBlock;
        const int64_t inside = kernels.first_largest(logits + first, std::min(kBlock, count - first));
        return {first + inside, logits[first + inside]};
    }

    // A bound that at least `rank` logits reach: the rank-th largest of the largest logits of groups of blocks.
    // Minus infinity if there are fewer blocks.
    float bound_of_rank(int64_t rank) const {
        const int64_t blocks = num_blocks(count);
        if (rank > blocks) return kMinusInfinity;
        const int64_t groups = std::min<int64_t>(blocks, std::max<int64_t>(256, 4 * rank));
        const float* maxima = scratch.blocks.maxima;
        float* largest = scratch.weights;
        std::copy_n(maxima, groups, largest);
        for (int64_t first = groups; first < blocks; first += groups) {
            const int64_t width = std::min(groups, blocks - first);
            for (int64_t i = 0; i < width; ++i) largest[i] = std::max(largest[i], maxima[first + i]);
        }
        std::nth_element(largest, largest + rank - 1, largest + groups, std::greater<>());
        return largest[rank - 1];
    }
};

float rounded_down(double x) {
    const float rounded = float(x);
    return double(rounded) > x ? std::nextafter(rounded, kMinusInfinity) : rounded;
}

// --- log-probabilities ---------------------------------------------------------------------------------------

// The log-softmax of a row.
struct LogSoftmax {
    double largest, log_mass;  // NaN for a row without a finite maximum

    double of(float logit) const {
        const double logprob = (double(logit) - largest) - log_mass;
        return logprob > kFloor ? logprob : kFloor;  // also for NaN
    }
};

// Lists the `num_top` likeliest, too. The row has been looked at with the scale of temperature 1.
LogSoftmax log_softmax(
    const Row& row, const Scale& scale, int64_t num_top, SampleResult& result, int32_t* top_ids, double* top_logprobs
) {
    Scratch& scratch = row.scratch;
    const float largest = row.best().logit;
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    if (!std::isfinite(largest)) return {nan, nan};
    const double mass =
        row.kernels.shares(scratch.blocks, num_blocks(row.count), largest, scale, scratch.shares);
    const LogSoftmax softmax{largest, std::log(mass)};
    if (num_top <= 0) return softmax;

    num_top = std::min(num_top, row.count);
    const List list = scratch.lists[0];
    float lowest;
    const int64_t found = row.kernels.gather(
        row.logits, row.count, scratch.blocks.maxima, row.bound_of_rank(num_top), list, lowest
    );
    uint64_t* keys = scratch.keys;
    for (int64_t i = 0; i < found; ++i) keys[i] = key_of(list.values[i], list.ids[i]);
    std::partial_sort(keys, keys + num_top, keys + found);
    for (int64_t i = 0; i < num_top; ++i) {
        top_ids[i] = id_of(keys[i]);
        top_logprobs[i] = softmax.of(logit_of(keys[i]));
    }
    result.num_top = num_top;
    return softmax;
}

// --- changes before the choice -------------------------------------------------------------------------------

// Changes a row as its parameters ask, in the order of server/engine/sampling/penalties.py, and marks the blocks.
// Keeps the logits that have a bias, then those of the seen tokens, in the scratch's `before`.
void adjust(float* logits, const SampleCall& call, const SampleRow& params, const Row& row) {
    Scratch& scratch = row.scratch;
    float* before = scratch.before;
    std::fill_n(scratch.marks, (num_blocks(row.count) + 7) / 8 * 8, uint8_t(0));
    const auto change = [&](int64_t id) -> float& {
        scratch.marks[id / kBlock] = 1;
        return logits[id];
    };
    for (int64_t i = 0; i < params.num_bias; ++i) *before++ = logits[params.bias_ids[i]];
    for (int64_t i = 0; i < params.num_seen; ++i) *before++ = logits[params.seen_ids[i]];
    for (int64_t i = 0; i < call.num_suppressed; ++i) change(call.suppressed[i]) = kMinusInfinity;
    if (params.allowed) row.kernels.mask(logits, row.count, params.allowed, scratch.marks);
    for (int64_t i = 0; i < params.num_bias; ++i) change(params.bias_ids[i]) += params.bias[i];
    for (int64_t i = 0; i < params.num_banned; ++i) change(params.banned_ids[i]) = kMinusInfinity;
    const float repetition = float(params.repetition_penalty);
    for (int64_t i = 0; i < params.num_seen; ++i) {
        if (repetition == 1.0f && params.seen_counts[i] == 0) continue;
        float& logit = change(params.seen_ids[i]);
        if (repetition != 1.0f) logit = logit > 0 ? logit / repetition : logit * repetition;
        if (const int32_t count = params.seen_counts[i])
            logit -= float(params.presence_penalty + params.frequency_penalty * double(count));
    }
}

// The chosen token's logit before `adjust`.
float raw_logit(const float* logits, const SampleRow& params, int64_t id, const float* before) {
    for (int64_t i = 0; i < params.num_bias; ++i)
        if (params.bias_ids[i] == id) return before[i];
    for (int64_t i = 0; i < params.num_seen; ++i)
        if (params.seen_ids[i] == id) return before[params.num_bias + i];
    return logits[id];
}

// --- drawing without cuts ------------------------------------------------------------------------------------

// Inverts the distribution in vocabulary order, first over blocks and then inside one.
int64_t draw_from_all(const Row& row, const SampleRow& params, double mass_of_all) {
    const float* shares = row.scratch.shares;
    const double target = params.uniform * mass_of_all;
    int64_t block = 0;
    double cumulative = shares[0];
    while (cumulative <= target) cumulative += shares[++block];
    const double mass = shares[block];
    const double rest = std::clamp((target - (cumulative - mass)) / mass, 0.0, kLargestUniform);

    const int64_t first = block * kBlock, width = std::min(kBlock, row.count - first);
    const double largest = row.scratch.blocks.maxima[block];
    double weights[kBlock], total = 0;
    for (int64_t i = 0; i < width; ++i) {
        weights[i] = std::exp((double(row.logits[first + i]) - largest) / params.temperature);
        total += weights[i];
    }
    int64_t inside = 0;
    for (cumulative = weights[0]; cumulative <= rest * total;) cumulative += weights[++inside];
    return first + inside;
}

// --- drawing from what cuts leave ----------------------------------------------------------------------------

// The smallest logit that min_p leaves.
float smallest_of_min_p(float largest, double temperature, double min_p) {
    const auto left = [&](float logit) {
        return std::exp((double(logit) - double(largest)) / temperature) >= min_p;
    };
    uint32_t below = rank_of(kMinusInfinity), upto = rank_of(largest);
    while (upto - below > 1) {
        const uint32_t middle = below + (upto - below) / 2;
        (left(logit_of_rank(middle)) ? upto : below) = middle;
    }
    return logit_of_rank(upto);
}

// A bound below all logits that top_p alone can need. With M = mass: the tokens that weigh less than
// (1 - top_p) * M / count have together less than (1 - top_p) * M, so the others reach top_p without them.
double smallest_of_top_p(float largest, double temperature, double top_p, double mass, int64_t count) {
    constexpr double slack = 1e-3;  // above any rounding of the sums and of the logits
    return double(largest) + temperature * (std::log((1.0 - top_p) * mass / double(count)) - slack);
}

struct Token {
    float logit;
    int32_t id;
    double cumulative;  // with it
};

// The tokens of a scratch's first list in descending order, without sorting more of them than `few`, if that can be.
// Their weights are those beside `largest`.
class Descent {
public:
    Descent(const Row& row, float largest, const Scale& scale, int64_t few, int64_t count, Range range)
        : kernels_(row.kernels), scratch_(row.scratch), largest_(largest), scale_(scale), few_(few), count_(count) {
        partition_ = partition_of(range);
    }

    // The first `rank` remain.
    void keep(int64_t rank) {
        if (rank >= count_) return;
        const List list = scratch_.lists[0];
        tally(nullptr, list, count_, partition_, scratch_.tally);
        const Token last = find(nullptr, double(rank), false);
        int64_t kept = 0;
        for (int64_t i = 0; i < count_; ++i) {
            if (list.values[i] < last.logit || (list.values[i] == last.logit && list.ids[i] > last.id)) continue;
            list.values[kept] = list.values[i];
            list.ids[kept++] = list.ids[i];
        }
        count_ = kept;
        partition_ = partition_of(kernels_.range(list.values, count_));
    }

    // Their summed weights.
    double weigh() {
        tally(&scale_, scratch_.lists[0], count_, partition_, scratch_.tally);
        double sum = 0;
        for (int64_t part = 0; part < kParts; ++part) sum += scratch_.tally[part];
        return sum;
    }

    // After `weigh`: the first token whose cumulative weight reaches the threshold; else the last.
    Token reaching(double threshold) const { return find(&scale_, threshold, false); }
    // The first one whose cumulative weight exceeds it.
    Token exceeding(double threshold) const { return find(&scale_, threshold, true); }

private:
    // Scale 0: all are in one part.
    static Partition partition_of(Range range) {
        const float scale = float(kParts - 1) / (range.highest - range.lowest);
        return {range.highest, std::isnormal(scale) ? scale : 0.0f};
    }

    void tally(const Scale* scale, List list, int64_t count, Partition partition, double* sums) const {
        kernels_.tally(list.values, count, partition, largest_, scale, sums);
    }

    // By weight, or without a scale by number.
    Token find(const Scale* scale, double threshold, bool exceed) const {
        const auto passes = [&](double sum) { return exceed ? sum > threshold : sum >= threshold; };
        List list = scratch_.lists[0];
        int64_t count = count_;
        Partition partition = partition_;
        const double* sums = scratch_.tally;
        double before = 0;
        for (int level = 1; partition.scale != 0; ++level) {
            int64_t found = 0;
            double sum = before;
            for (int64_t part = 0; part < kParts; ++part) {
                if (sums[part] == 0) continue;
                found = part;
                before = sum;
                sum += sums[part];
                if (passes(sum)) break;
            }
            const List inside = scratch_.lists[1 + level % 2];
            count = kernels_.part(list, count, partition, found, inside);
            list = inside;
            if (count <= few_) break;
            partition = partition_of(kernels_.range(list.values, count));
            if (partition.scale == 0) break;
            tally(scale, list, count, partition, scratch_.part_tally);
            sums = scratch_.part_tally;
        }

        uint64_t* keys = scratch_.keys;
        for (int64_t i = 0; i < count; ++i) keys[i] = key_of(list.values[i], list.ids[i]);
        if (!std::is_sorted(keys, keys + count)) std::sort(keys, keys + count);
        float* weights = scratch_.weights;
        for (int64_t i = 0; i < count; ++i) weights[i] = scale ? logit_of(keys[i]) : 1.0f;
        if (scale) kernels_.weights(weights, count, largest_, *scale, weights);
        Token last{};
        double sum = before;
        for (int64_t i = 0; i < count; ++i) {
            if (weights[i] == 0) continue;
            sum += double(weights[i]);
            last = {logit_of(keys[i]), id_of(keys[i]), sum};
            if (passes(sum)) break;
        }
        return last;
    }

    const RowKernels& kernels_;
    Scratch& scratch_;
    const float largest_;
    const Scale scale_;
    const int64_t few_;
    int64_t count_;
    Partition partition_;
};

// Draws from a list short enough to be sorted. `mass` is the whole row's, or NaN for the list's.
int64_t draw_from_few(
    const Row& row, const SampleRow& params, float largest, int64_t count, int64_t top_k, double mass
) {
    const List list = row.scratch.lists[0];
    uint64_t* keys = row.scratch.keys;
    for (int64_t i = 0; i < count; ++i) keys[i] = key_of(list.values[i], list.ids[i]);
    std::sort(keys, keys + count);
    double* cumulative = row.scratch.tally;
    int64_t kept = 0;
    double sum = 0;
    for (; kept < std::min(count, top_k); ++kept) {
        const double weight = std::exp((double(logit_of(keys[kept])) - double(largest)) / params.temperature);
        if (weight < params.min_p) break;
        cumulative[kept] = sum += weight;
    }
    const double threshold = std::min(sum, params.top_p * (std::isnan(mass) ? sum : mass));
    const double nucleus = *std::lower_bound(cumulative, cumulative + kept, threshold);
    return id_of(keys[std::upper_bound(cumulative, cumulative + kept, params.uniform * nucleus) - cumulative]);
}

// Inverts the truncated distribution in descending order.
class Cut {
public:
    Cut(const Row& row, const SampleRow& params, float largest, const Scale& scale, int64_t few)
        : row_(row), params_(params), largest_(largest), scale_(scale), few_(few) {}

    // mass: the whole row's if top_p is the only cut, else NaN.
    int64_t draw(double mass) const {
        const bool by_rank = params_.top_k > 0 && params_.top_k < row_.count;
        const int64_t top_k = by_rank ? params_.top_k : row_.count;
        float bound = rounded_down(double(largest_) + double(scale_.lowest));  // below, weights are 0
        if (by_rank) bound = std::max(bound, row_.bound_of_rank(top_k));
        if (params_.min_p > 0)
            bound = std::max(bound, smallest_of_min_p(largest_, params_.temperature, params_.min_p));
        if (row_.count <= few_)
            mass = std::numeric_limits<double>::quiet_NaN();  // all is listed, and summed in float64
        else if (!std::isnan(mass))
            bound = std::max(bound, bound_of_mass(bound, mass));

        Range range{0, largest_};
        const int64_t listed = row_.kernels.gather(
            row_.logits, row_.count, row_.scratch.blocks.maxima, bound, row_.scratch.lists[0], range.lowest
        );
        if (listed <= few_) return draw_from_few(row_, params_, largest_, listed, top_k, mass);
        Descent descent(row_, largest_, scale_, few_, listed, range);
        descent.keep(top_k);
        double nucleus = descent.weigh();
        if (params_.top_p < 1)
            nucleus = descent.reaching(params_.top_p * (std::isnan(mass) ? nucleus : mass)).cumulative;
        return descent.exceeding(params_.uniform * nucleus).id;
    }

private:
    // A bound whose tokens have at least top_p of `mass`. Most of the likeliest tokens are their blocks' maxima, so
    // that these may well reach top_p alone.
    float bound_of_mass(float least, double mass) const {
        const List list = row_.scratch.lists[0];
        const float* maxima = row_.scratch.blocks.maxima;
        int64_t count = 0;
        float lowest = largest_;
        for (int64_t block = 0; block < num_blocks(row_.count); ++block) {
            if (maxima[block] < least) continue;
            list.values[count] = maxima[block];
            list.ids[count++] = int32_t(block);
            lowest = std::min(lowest, maxima[block]);
        }
        Descent descent(row_, largest_, scale_, few_, count, {lowest, largest_});
        const double enough = params_.top_p * mass * (1 + 1e-5);  // above any rounding of the sums
        if (descent.weigh() >= enough) return descent.reaching(enough).logit;
        return rounded_down(
            smallest_of_top_p(largest_, params_.temperature, params_.top_p, mass, row_.count)
        );
    }

    const Row& row_;
    const SampleRow& params_;
    const float largest_;
    const Scale& scale_;
    const int64_t few_;
};

void sample_row(const SampleCall& call, int64_t index, Scratch& scratch) {
    const SampleRow& params = call.params[index];
    float* logits = call.logits + index * call.columns;
    SampleResult& result = call.results[index];
    result = {.token = -1, .fault = Fault::none, .logprob = kFloor, .num_top = 0, .rank = 0};

    const bool random = params.temperature > 0, report = params.num_top >= 0;
    const bool by_rank = params.top_k > 0 && params.top_k < call.vocab_size;
    const bool cut = by_rank || params.min_p > 0 || params.top_p < 1;
    const Scale scale = scale_of(random ? params.temperature : 1.0), scale_of_one = scale_of(1.0);
    const Scale* masses = random && !by_rank && params.min_p == 0 ? &scale : nullptr;

    LogSoftmax softmax{};
    if (report) {
        const Row whole{*call.kernels, scratch, logits, call.columns};
        whole.look(&scale_of_one);
        const int64_t top = index * call.top_width;
        softmax =
            log_softmax(whole, scale_of_one, params.num_top, result, call.top_ids + top, call.top_logprobs + top);
        for (int64_t i = 0; i < params.num_listed; ++i) {
            call.top_ids[top + result.num_top] = params.listed_ids[i];
            call.top_logprobs[top + result.num_top++] = softmax.of(logits[params.listed_ids[i]]);
        }
    }
    const Row row{*call.kernels, scratch, logits, call.vocab_size};
    const bool known = report && call.columns == call.vocab_size && (!masses || params.temperature == 1);
    if (!known) row.look(masses);
    adjust(logits, call, params, row);
    row.look_again(masses);

    const Best best = row.best();
    if (!std::isfinite(best.logit)) {
        result.fault = best.logit == kMinusInfinity ? Fault::nothing_left : Fault::not_finite;
        return;
    }
    result.token = best.id;
    if (random) {
        double mass = std::numeric_limits<double>::quiet_NaN();
        if (masses)
            mass = call.kernels->shares(scratch.blocks, num_blocks(row.count), best.logit, scale, scratch.shares);
        result.token = cut ? Cut(row, params, best.logit, scale, call.few).draw(mass)
                           : draw_from_all(row, params, mass);
    }
    if (report) result.logprob = softmax.of(raw_logit(logits, params, result.token, scratch.before));
}

}  // namespace

void sample(Team& team, const SampleCall& call) {
    Scratch scratch(team, call.columns);
    for (int64_t begin, end; team.next(call.rows, 1, begin, end);) sample_row(call, begin, scratch);
}

void logprobs(Team& team, const LogprobsCall& call) {
    Scratch scratch(team, call.columns);
    const Scale scale = scale_of(1.0);
    for (int64_t index, end; team.next(call.rows, 1, index, end);) {
        const float* logits = call.logits + index * call.columns;
        const Row row{*call.kernels, scratch, logits, call.columns};
        row.look(&scale);
        const int64_t top = index * call.top_width;
        SampleResult& result = call.results[index];
        const int64_t chosen = call.chosen[index];
        result = {.token = chosen, .fault = Fault::none, .logprob = kFloor, .num_top = 0, .rank = 0};
        const LogSoftmax softmax =
            log_softmax(row, scale, call.num_top[index], result, call.top_ids + top, call.top_logprobs + top);
        result.logprob = softmax.of(logits[chosen]);
        if (!std::isnan(softmax.largest))
            result.rank = 1 + call.kernels->before(logits, call.columns, scratch.blocks.maxima, chosen);
    }
}

}  // namespace gemma
