// From the fused projection to rotated queries and to the cache: optional norms, rotation, packing.
#pragma once

#include "elementwise.h"
#include "micro.h"

namespace gemma::GEMMA_LEVEL {

// Sizes that follow from an attention call.
struct HeadShape {
    int64_t dim;        // of a head
    int64_t padded;     // a whole number of panels
    int64_t group;      // query heads that share a KV head
    int64_t key_size;   // elements of 16 slots' keys of one head
    int64_t value_size;
};

template <class W>
HeadShape head_shape(const AttentionCall& call) {
    const int64_t padded = round_up<int64_t>(call.head_dim, kPanel);
    const int64_t key_size = padded_inputs<W>(call.head_dim) * kPanel;
    return {call.head_dim, padded, call.heads / call.kv_heads, key_size, padded * kPanel};
}

// Elements of a value panel: 16 dimensions of 16 slots.
constexpr int64_t kValuePanel = kPanel * kPanel;

// One head, normalised if there is a norm, rotated ("NeoX" pairs: i with i + dim / 2) and scaled, in fp32.
template <class T>
void rotate_head(
    const T* head, int64_t dim, const float* norm, float eps, const float* cos, const float* sin, float scale, float* out
) {
    Vec squares = splat(0.0f);
    over(dim, [&](int64_t i, int64_t n) {
        const Vec x = load_some(head + i, n);
        store_some(out + i, x, n);
        squares = fma(x, x, squares);
    });
    if (norm) {
        const Vec factor = splat(inverse_rms(squares, dim, eps));
        over(dim, [&](int64_t i, int64_t n) {
            store_some(out + i, load_some(out + i, n) * factor * load_some(norm + i, n), n);
        });
    }
    const int64_t half = dim / 2;
    float* second = out + half;
    over(half, [&](int64_t i, int64_t n) {
        const Vec a = load_some(out + i, n), b = load_some(second + i, n);
        const Vec c = load_some(cos + i, n), s = load_some(sin + i, n);
        store_some(out + i, (a * c - b * s) * splat(scale), n);
        store_some(second + i, (b * c + a * s) * splat(scale), n);
    });
}

// Queries of all tokens into call.q, their keys and values into the cache.
template <class T>
void rotate_and_store(Team& team, const AttentionCall& call) {
    const HeadShape shape = head_shape<T>(call);
    const int64_t dim = shape.dim, half = dim / 2;
    float* key32 = static_cast<float*>(team.scratch(size_t(shape.padded) * (sizeof(float) + sizeof(T))));
    T* key = reinterpret_cast<T*>(key32 + shape.padded);
    for (int64_t begin, end; team.next(call.tokens, 2, begin, end);) {
        for (int64_t token = begin; token < end; ++token) {
            const T* heads = static_cast<const T*>(call.qkv) + token * (call.heads + 2 * call.kv_heads) * dim;
            const float* cos = call.cos + token * half;
            const float* sin = call.sin + token * half;
            for (int64_t head = 0; head < call.heads; ++head) {
                const int64_t kv_head = head / shape.group, member = head % shape.group;
                float* q = call.q + ((kv_head * call.tokens + token) * shape.group + member) * shape.padded;
                rotate_head(heads + head * dim, dim, call.q_norm, call.eps, cos, sin, call.scale, q);
                for (int64_t i = dim; i < shape.padded; ++i) q[i] = 0.0f;
            }
            const int64_t panel = call.slots[token] / kPanel, lane = call.slots[token] % kPanel;
            for (int64_t head = 0; head < call.kv_heads; ++head) {
                const T* k = heads + (call.heads + head) * dim;
                const T* v = heads + (call.heads + call.kv_heads + head) * dim;
                rotate_head(k, dim, call.k_norm, call.eps, cos, sin, 1.0f, key32);
                over(dim, [&](int64_t i, int64_t n) { store_some(key + i, load_some(key32 + i, n), n); });
                T* keys = static_cast<T*>(call.keys) + (panel * call.kv_heads + head) * shape.key_size;
                T* values = static_cast<T*>(call.values) + (panel * call.kv_heads + head) * shape.value_size;
                for (int64_t i = 0; i < dim; ++i) {
                    keys[panel_index<T>(lane, i)] = key[i];
                    values[i / kPanel * kValuePanel + panel_index<T>(i % kPanel, lane)] = v[i];
                }
            }
        }
    }
}

inline void rotate(Team& team, const AttentionCall& call) {
    call.type == Type::bf16 ? rotate_and_store<bf16>(team, call) : rotate_and_store<float>(team, call);
}

}  // namespace gemma::GEMMA_LEVEL
