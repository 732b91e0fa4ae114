// What becomes of a token's heads before attention: queries and keys are normalized and rotated, keys and values are
// written to the cache, whose blocks attention.cpp describes.

#include "team.h"

namespace loraplex {
namespace {

// Writes sixteen-position blocks: one token's head, at `offset` of its block.
template <class T, class C>
void write_head(const T* key, const T* value, long head_dim, C* keys, C* values, int offset) {
    for (long d = 0; d < head_dim; d++) keys[d * LANES + offset] = key[d];
    std::memcpy(values + offset * head_dim, value, head_dim * sizeof(T));
}

inline void write_head(const float* key, const float* value, long head_dim, std::int8_t* keys, std::int8_t* values,
                       int offset, float* key_scale, float* value_scale) {
    float key_peak = 0, value_peak = 0;
    for (long d = 0; d < head_dim; d++) {
        key_peak = std::fmax(key_peak, std::fabs(key[d]));
        value_peak = std::fmax(value_peak, std::fabs(value[d]));
    }
    float key_inverse = key_peak > 0 ? 127 / key_peak : 0, value_inverse = value_peak > 0 ? 127 / value_peak : 0;
    for (long d = 0; d < head_dim; d++) {
        keys[d * LANES + offset] = std::int8_t(std::nearbyint(key[d] * key_inverse));
        values[offset * head_dim + d] = std::int8_t(std::nearbyint(value[d] * value_inverse));
    }
    *key_scale = key_peak / 127;
    *value_scale = value_peak / 127;
}

inline float number(float x) { return x; }
inline float number(bf16 x) { return from_bf16(x); }
inline void assign(float& to, float x) { to = x; }
inline void assign(bf16& to, float x) { to = to_bf16(x); }

// RMS norm (weight may be null) and rotation of one head, in place.
template <class T, class W>
void rotate(T* head, long head_dim, const W* norm, float eps, const float* cos, const float* sin) {
    float floats[1024];
    float squares = 0;
    for (long d = 0; d < head_dim; d++) {
        floats[d] = number(head[d]);
        squares += floats[d] * floats[d];
    }
    if (norm) {
        float factor = 1 / std::sqrt(squares / head_dim + eps);
        for (long d = 0; d < head_dim; d++) {
            T normed;  // rounded as the model's own dtype would
            assign(normed, floats[d] * factor * number(norm[d]));
            floats[d] = number(normed);
        }
    }
    long half = head_dim / 2;
    for (long d = 0; d < half; d++) {
        assign(head[d], floats[d] * cos[d] + floats[d + half] * sin[d]);
        assign(head[d + half], floats[d + half] * cos[d + half] + floats[d] * sin[d + half]);
    }
}

template <class T>
void rotate_write(int threads, long tokens, T* qkv, long stride, long heads, long kv_heads, long head_dim,
                  const T* norm, float eps, const std::int64_t* positions, const float* cos, const float* sin,
                  const std::int64_t* indices, void* keys, void* values, float* key_scales, float* value_scales) {
    parallel_for(tokens > 1 ? threads : 1, tokens, [&](long i) {
        T* token = qkv + i * stride;
        const float* c = cos + positions[i] * head_dim;
        const float* s = sin + positions[i] * head_dim;
        for (long h = 0; h < heads + kv_heads; h++)
            rotate(token + h * head_dim, head_dim, norm ? norm + h * head_dim : nullptr, eps, c, s);
        int offset = int(indices[i] % LANES);
        for (long h = 0; h < kv_heads; h++) {
            long place = indices[i] / LANES * kv_heads + h, size = LANES * head_dim;
            const T* key = token + (heads + h) * head_dim;
            const T* value = token + (heads + kv_heads + h) * head_dim;
            if (key_scales) {
                float floats[2048];
                for (long d = 0; d < head_dim; d++) {
                    floats[d] = number(key[d]);
                    floats[1024 + d] = number(value[d]);
                }
                write_head(floats, floats + 1024, head_dim, (std::int8_t*)keys + place * size,
                           (std::int8_t*)values + place * size, offset, key_scales + place * LANES + offset,
                           value_scales + place * LANES + offset);
            } else {
                write_head(key, value, head_dim, (T*)keys + place * size, (T*)values + place * size, offset);
            }
        }
    });
}

}  // namespace
}  // namespace loraplex

using namespace loraplex;

// qkv: each token's query, key and value heads side by side. Normalizes (norm [heads + kv_heads, head_dim] or null) and
// rotates queries and keys in place, and writes keys and values to cache position indices[token]. cos and sin
// [positions, head_dim] float32. head_dim is at most 1024.
EXPORT void rotate_and_write(int threads, int kind, long tokens, void* qkv, long stride, long heads, long kv_heads,
                             long head_dim, const void* norm, float eps, const std::int64_t* positions,
                             const float* cos, const float* sin, const std::int64_t* indices, void* keys, void* values,
                             float* key_scales, float* value_scales) {
    with_type(kind, [&](auto* t) {
        using T = decltype(t);
        rotate_write(threads, tokens, (T)qkv, stride, heads, kv_heads, head_dim, (T)norm, eps, positions, cos, sin,
                     indices, keys, values, key_scales, value_scales);
    });
}
