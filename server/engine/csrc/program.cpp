#include "program.h"

#include <cmath>

#include "attention_plan.h"

namespace gemma {

namespace {

struct Angles {
    float* cos;
    float* sin;
};

struct AnglesCall {
    const Rope& rope;
    const StepCall& step;
    Angles out;
};

void compute_angles(Team& team, const AnglesCall& call) {
    const int64_t half = call.rope.half;
    for (int64_t begin, end; team.next(call.step.tokens, 4, begin, end);) {
        for (int64_t token = begin; token < end; ++token) {
            const float position = float(call.step.positions[token]);
            for (int64_t i = 0; i < half; ++i) {
                const float angle = position * call.rope.frequencies[i];
                call.out.cos[token * half + i] = std::cos(angle);
                call.out.sin[token * half + i] = std::sin(angle);
            }
        }
    }
}

// One step of one program.
class Run {
public:
    Run(Engine& engine, const Program& program, const StepCall& step) : engine_(engine), step_(step) {
        int64_t width = 0;
        for (int64_t i = 0; i < program.num_ropes; ++i) width += 2 * program.ropes[i].half;
        float* memory = engine.angles.floats(size_t(step.tokens * width));
        for (int64_t i = 0; i < program.num_ropes; ++i) {
            const int64_t size = step.tokens * program.ropes[i].half;
            angles_.push_back({memory, memory + size});
            memory += 2 * size;
            // A sine takes as long as reading many numbers.
            engine.run<AnglesCall>(compute_angles, {program.ropes[i], step, angles_.back()}, 64 * size);
        }
        planned_.resize(size_t(program.num_groups));
        engine.plans.resize(size_t(program.num_groups));
    }

    void embed(EmbedCall call) {
        call.ids = step_.ids;
        call.rows = step_.tokens;
        engine_.run(engine_.kernels.embed, call, call.rows * call.inputs);
    }

    void linear(LinearCall call) {
        call.rows = step_.tokens;
        run_linear(engine_, call);
    }

    void norm(NormCall call) {
        call.rows = step_.tokens;
        engine_.run(engine_.kernels.norm, call, call.rows * call.width);
    }

    void geglu(GegluCall call) {
        call.rows = step_.tokens;
        engine_.run(engine_.kernels.geglu, call, 2 * call.rows * call.width);
    }

    void attention(AttentionCall call) {
        const AttentionGroup& group = step_.groups[call.group];
        call.tokens = step_.tokens;
        call.cos = angles_[size_t(call.rope)].cos;
        call.sin = angles_[size_t(call.rope)].sin;
        call.sequences = group.sequences;
        call.query_start = group.query_start;
        call.seq_lens = group.seq_lens;
        call.block_table = group.block_table;
        call.table_width = group.table_width;
        call.slots = group.slots;
        call.block_size = group.block_size;

        AttentionPlan& plan = engine_.plans[size_t(call.group)];
        if (!planned_[size_t(call.group)]) {
            plan_attention(call, engine_.pool.size(), plan);
            planned_[size_t(call.group)] = true;
        }
        const int64_t padded = (call.head_dim + kPanel - 1) / kPanel * kPanel;
        call.q = engine_.rows.floats(size_t(call.tokens * call.heads * padded));
        call.partial_stride = plan.most_split_rows * (padded + 2);
        call.partials = engine_.partials.floats(size_t(plan.num_partials * call.partial_stride));
        call.items = plan.items.data();
        call.num_items = int64_t(plan.items.size());
        call.split = plan.split.data();
        call.num_split = int64_t(plan.split.size());

        const int64_t width = call.head_dim * (call.heads + 2 * call.kv_heads);
        engine_.run(engine_.kernels.rotate, call, call.tokens * width);
        engine_.run(engine_.kernels.attend, call, plan.spans * kSpan * 2 * call.head_dim);
        if (call.num_split > 0) engine_.run(engine_.kernels.merge, call, plan.spans * call.head_dim);
    }

private:
    Engine& engine_;
    const StepCall& step_;
    std::vector<Angles> angles_;  // by rope
    std::vector<bool> planned_;   // by group
};

template <class Call>
const Call& as(const Operation& operation) {
    return *static_cast<const Call*>(operation.call);
}

}  // namespace

void run_program(Engine& engine, const Program& program, const StepCall& step) {
    Run run(engine, program, step);
    for (int64_t i = 0; i < program.num_operations; ++i) {
        const Operation& operation = program.operations[i];
        switch (operation.kind) {
            case Kind::embed: run.embed(as<EmbedCall>(operation)); break;
            case Kind::linear: run.linear(as<LinearCall>(operation)); break;
            case Kind::norm: run.norm(as<NormCall>(operation)); break;
            case Kind::geglu: run.geglu(as<GegluCall>(operation)); break;
            case Kind::attention: run.attention(as<AttentionCall>(operation)); break;
        }
    }
}

void run_linear(Engine& engine, LinearCall call) {
    call.x32 = engine.rows.floats(size_t(call.rows * linear_stride(call.inputs)));
    engine.run(engine.kernels.convert, call, call.rows * call.inputs);
    engine.run(engine.kernels.multiply, call, call.outputs * call.inputs);
}

}  // namespace gemma
