// RMSNorm, alone or after an addition, and GeGLU.
#pragma once

#include "thread_pool.h"
#include "vec.h"

namespace gemma::GEMMA_LEVEL {

constexpr int64_t kRowsAtOnce = 2;

// 1 / sqrt(mean(x^2) + eps)
inline float inverse_rms(Vec squares, int64_t width, float eps) {
    return 1.0f / __builtin_sqrtf(sum(squares) / float(width) + eps);
}

template <class T>
void norm_rows(Team& team, const NormCall& call) {
    const int64_t width = call.width;
    float* row32 = static_cast<float*>(team.scratch(size_t(round_up<int64_t>(width, Vec::width)) * sizeof(float)));
    for (int64_t begin, end; team.next(call.rows, kRowsAtOnce, begin, end);) {
        for (int64_t row = begin; row < end; ++row) {
            const T* x = static_cast<const T*>(call.x) + row * width;
            T* residual = call.residual ? static_cast<T*>(call.residual) + row * width : nullptr;
            T* out = static_cast<T*>(call.out) + row * width;
            Vec squares = splat(0.0f);
            over(width, [&](int64_t i, int64_t n) {
                Vec value = load_some(x + i, n);
                if (residual) {
                    value = rounded_to<T>(value + load_some(residual + i, n));
                    store_some(residual + i, value, n);
                }
                store(row32 + i, value);
                squares = fma(value, value, squares);
            });
            const Vec factor = splat(inverse_rms(squares, width, call.eps));
            over(width, [&](int64_t i, int64_t n) {
                store_some(out + i, load(row32 + i) * factor * load_some(call.weight + i, n), n);
            });
        }
    }
}

inline void norm(Team& team, const NormCall& call) {
    call.type == Type::bf16 ? norm_rows<bf16>(team, call) : norm_rows<float>(team, call);
}

// x / (1 + e^-2u) is x * (1 + tanh u) / 2 without the cancellation. Hendrycks and Gimpel, arXiv 1606.08415.
inline Vec gelu_tanh(Vec x) {
    const Vec u = x * fma(x * x, splat(0.0356774081f), splat(0.7978845608f));
    return x / (splat(1.0f) + exp(u * splat(-2.0f)));
}

template <class T>
void geglu_rows(Team& team, const GegluCall& call) {
    for (int64_t begin, end; team.next(call.rows, kRowsAtOnce, begin, end);) {
        for (int64_t row = begin; row < end; ++row) {
            const T* gate = static_cast<const T*>(call.gate_up) + row * 2 * call.width;
            const T* up = gate + call.width;
            T* out = static_cast<T*>(call.out) + row * call.width;
            over(call.width, [&](int64_t i, int64_t n) {
                const Vec activated = rounded_to<T>(gelu_tanh(load_some(gate + i, n)));
                store_some(out + i, activated * load_some(up + i, n), n);
            });
        }
    }
}

inline void geglu(Team& team, const GegluCall& call) {
    call.type == Type::bf16 ? geglu_rows<bf16>(team, call) : geglu_rows<float>(team, call);
}

}  // namespace gemma::GEMMA_LEVEL
