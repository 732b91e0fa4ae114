// What is done to a token's heads before attention: queries and keys are normalized and rotated, and keys and values
// are written to the cache, whose blocks attention.cpp describes.

#include "own_weights.h"
#include "team.h"

namespace loraplex {
namespace {

constexpr long MOST = 1024;  // the largest number of dimensions of a head

inline float number(float x) { return x; }
inline float number(bf16 x) { return from_bf16(x); }
inline void assign(float& to, float x) { to = x; }
inline void assign(bf16& to, float x) { to = to_bf16(x); }

struct Rotary {        // the rotary embedding of one layer
    const float* cos;  // [positions][dim]
    const float* sin;
    long dim;  // the first dimensions of a head, which are rotated; 0 if none are
    bool interleaved;
    const float* query_scale;  // [positions], or null
};

// Writes one token's key. Its dimensions are sixteen positions apart.
template <class T>
void write_key(const T* key, long dim, T* block, int offset, float*) {
    for (long d = 0; d < dim; d++) block[d * LANES + offset] = key[d];
}

template <class T>
void write_value(const T* value, long dim, T* block, int offset, float*) {
    std::memcpy(block + offset * dim, value, dim * sizeof(T));
}

// The factor that quantizes a head to bytes.
template <class T>
float inverse_scale(const T* head, long dim, float* scale) {
    float peak = 0;
    for (long d = 0; d < dim; d++) peak = std::fmax(peak, std::fabs(number(head[d])));
    *scale = peak / 127;
    return peak > 0 ? 127 / peak : 0;
}

inline std::int8_t rounded(float x) { return std::int8_t(std::nearbyint(x)); }

template <class T>
void write_key(const T* key, long dim, std::int8_t* block, int offset, float* scale) {
    float inverse = inverse_scale(key, dim, scale);
    for (long d = 0; d < dim; d++) block[d * LANES + offset] = rounded(number(key[d]) * inverse);
}

template <class T>
void write_value(const T* value, long dim, std::int8_t* block, int offset, float* scale) {
    float inverse = inverse_scale(value, dim, scale);
    for (long d = 0; d < dim; d++) block[offset * dim + d] = rounded(number(value[d]) * inverse);
}

// RMS norm (if norm is not null) and rotation of one head, in place. If `square` is not null, it is the mean square to
// use instead of the head's own.
template <class T>
void turn(T* head, long dim, const float* norm, const float* square, float eps, const Rotary& rotary, const float* cos,
          const float* sin) {
    float floats[MOST];
    float squares = 0;
    for (long d = 0; d < dim; d++) {
        floats[d] = number(head[d]);
        squares += floats[d] * floats[d];
    }
    if (norm) {
        float factor = 1 / std::sqrt((square ? *square : squares / dim) + eps);
        for (long d = 0; d < dim; d++) {
            T normed;  // rounded to the model's dtype
            assign(normed, floats[d] * factor * norm[d]);
            floats[d] = number(normed);
            if (d >= rotary.dim) head[d] = normed;
        }
    }
    if (rotary.interleaved)
        for (long d = 0; d < rotary.dim; d += 2) {
            assign(head[d], floats[d] * cos[d] + floats[d + 1] * sin[d]);
            assign(head[d + 1], floats[d + 1] * cos[d + 1] + floats[d] * sin[d + 1]);
        }
    else
        for (long d = 0, half = rotary.dim / 2; d < half; d++) {
            assign(head[d], floats[d] * cos[d] + floats[d + half] * sin[d]);
            assign(head[d + half], floats[d + half] * cos[d + half] + floats[d] * sin[d + half]);
        }
}

template <class T, class C>
void rotate_write(int threads, long tokens, T* qkv, long heads, long kv_heads, long head_dim, long value_dim,
                  const float* base_norm, const float* squares, float eps, const std::int64_t* own, long index,
                  const std::int64_t* positions, const Rotary& rotary, const std::int64_t* indices, C* keys, C* values,
                  float* key_scales, float* value_scales) {
    long width = (heads + kv_heads) * head_dim + kv_heads * value_dim;
    parallel_for(tokens > 1 ? threads : 1, tokens, [&](long i) {
        T* token = qkv + i * width;
        const float* norm = base_norm ? own_or(base_norm, own, index * tokens + i) : nullptr;
        const float* cos = rotary.cos + positions[i] * rotary.dim;
        const float* sin = rotary.sin + positions[i] * rotary.dim;
        if (norm || rotary.dim)
            for (long h = 0; h < heads + kv_heads; h++)
                turn(token + h * head_dim, head_dim, norm ? norm + h * head_dim : nullptr,
                     squares ? squares + 2 * i + (h >= heads) : nullptr, eps, rotary, cos, sin);
        if (rotary.query_scale) multiply(token, heads * head_dim, rotary.query_scale[positions[i]]);
        int offset = int(indices[i] % LANES);
        for (long h = 0; h < kv_heads; h++) {
            long place = indices[i] / LANES * kv_heads + h, scale = place * LANES + offset;
            const T* key = token + (heads + h) * head_dim;
            const T* value = token + (heads + kv_heads) * head_dim + h * value_dim;
            write_key(key, head_dim, keys + place * LANES * head_dim, offset, key_scales + scale);
            write_value(value, value_dim, values + place * LANES * value_dim, offset, value_scales + scale);
        }
    });
}

}  // namespace
}  // namespace loraplex

using namespace loraplex;

// Normalizes and rotates queries and keys in place, and writes keys and values to cache position indices[token].
//
// qkv has each token's query, key and value heads side by side. norm is [heads + kv_heads, head_dim] or null. It uses
// each head's mean square or, if squares [tokens, 2] is not null, that of all queries and that of all keys. cos and sin
// are [positions, rotary_dim] float32; sin is negated for the first dimension of each pair. rotary_dim 0 means no
// rotation. Queries are multiplied by query_scale [positions], if that is not null. Keys and values are of qkv's kind
// or, if there are scales, int8. head_dim and value_dim are at most 1024. own is as in add_norm, of the norm.
EXPORT void rotate_and_write(int threads, int kind, long tokens, void* qkv, long heads, long kv_heads, long head_dim,
                             long value_dim, const float* norm, const float* squares, float eps,
                             const std::int64_t* own, long index, const std::int64_t* positions, const float* cos,
                             const float* sin, long rotary_dim, int interleaved, const float* query_scale,
                             const std::int64_t* indices, void* keys, void* values, float* key_scales,
                             float* value_scales) {
    Rotary rotary{cos, sin, rotary_dim, bool(interleaved), query_scale};
    with_type(kind, [&](auto* t) {
        using T = decltype(t);
        auto write = [&](auto* k, auto* v) {
            rotate_write(threads, tokens, (T)qkv, heads, kv_heads, head_dim, value_dim, norm, squares, eps, own, index,
                         positions, rotary, indices, k, v, key_scales, value_scales);
        };
        if (key_scales)
            write((std::int8_t*)keys, (std::int8_t*)values);
        else
            write((T)keys, (T)values);
    });
}
