// The list of all functions that Python calls: KERNEL(result, name, (parameters)). What a function computes is said at
// its definition. The list is used for
//   - the declarations below, against which the compiler checks each definition;
//   - the numbers by which program.cpp runs recorded calls;
//   - the text from which kernels/library.py learns each function's parameters, their types and their order.
#pragma once

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

// clang-format off
#define KERNELS(KERNEL)                                                                                                \
    KERNEL(void, linear,                                                                                               \
           (int threads, int kind, long m, long n, long k, const void* x, const void* weight, const void* bias,        \
            void* out))                                                                                                \
    KERNEL(void, pack_weight, (int kind, long n, long k, const void* weight, void* packed))                            \
    KERNEL(void, weight_rows,                                                                                          \
           (int threads, int kind, long count, const std::int64_t* ids, long n, long k, const void* packed,            \
            float scale, void* out))                                                                                   \
    KERNEL(void, quantized_linear,                                                                                     \
           (int threads, int kind, long m, long n, long k, const void* x, int bits, int group, const void* weight,     \
            const void* bias, void* out))                                                                              \
    KERNEL(long, quantized_bytes, (long n, long k, int bits, int group))                                               \
    KERNEL(void, pack_quantized,                                                                                       \
           (long n, long k, int bits, int group, const void* values, const void* scales, const void* offsets,          \
            void* packed))                                                                                             \
    KERNEL(void, quantized_rows,                                                                                       \
           (int threads, int kind, long count, const std::int64_t* ids, long n, long k, int bits, int group,           \
            const void* packed, float scale, void* out))                                                               \
    KERNEL(void, own_embeddings,                                                                                       \
           (int threads, int kind, long count, const std::int64_t* ids, long k, const std::int64_t* own, void* out))   \
    KERNEL(void, add_lora_delta,                                                                                       \
           (int threads, int kind, int int8_weights, long segments, const std::int64_t* starts,                        \
            const std::int64_t* stops, const void* tables, long layer, const void* x, long k, void* out, long n))      \
    KERNEL(void, add_norm,                                                                                             \
           (int threads, int kind, long rows, long n, void* hidden, const void* delta, float scale,                    \
            const float* weight, const float* bias, float eps, int centered, const std::int64_t* own, long index,      \
            void* out))                                                                                                \
    KERNEL(void, add, (int threads, int kind, long rows, long n, void* hidden, const void* delta, float scale))        \
    KERNEL(void, activate,                                                                                             \
           (int threads, int kind, int function, int gated, long rows, long n, const void* x, void* out))              \
    KERNEL(void, upcast,                                                                                               \
           (int threads, int kind, long rows, long n, const void* x, float scale, float soft_cap, long width,          \
            float* out, std::uint8_t* finite))                                                                                     \
    KERNEL(void, head_squares,                                                                                         \
           (int threads, int kind, long tokens, const void* qkv, long stride, long queries, long keys,                 \
            float query_scale, float key_scale, float* out))                                                           \
    KERNEL(void, rotate_and_write,                                                                                     \
           (int threads, int kind, long tokens, void* qkv, long heads, long kv_heads, long head_dim, long value_dim,   \
            const float* norm, const float* squares, float eps, const std::int64_t* own, long index,                   \
            const std::int64_t* positions, const float* cos, const float* sin, long rotary_dim, int interleaved,       \
            const float* query_scale, const std::int64_t* indices, void* keys, void* values, float* key_scales,        \
            float* value_scales))                                                                                      \
    KERNEL(void, paged_attention,                                                                                      \
           (int threads, int kind, const void* query, long query_stride, long heads, long kv_heads, long head_dim,     \
            long value_dim, float scale, float soft_cap, long window, const float* sinks, const void* keys,            \
            const void* values, const float* key_scales, const float* value_scales, long chunks,                       \
            const std::int64_t* starts, const std::int64_t* contexts, const std::int64_t* rows,                        \
            const std::int32_t* tables, long table_width, void* out))                                                  \
    KERNEL(void, route,                                                                                                \
           (int kind, long tokens, long experts, long chosen, int normalized, const void* logits, float* weights,      \
            std::int64_t* order, std::int64_t* places, std::int64_t* starts))                                          \
    KERNEL(void, dispatch,                                                                                             \
           (int threads, int kind, long pairs, long chosen, const std::int64_t* places, long n, const void* x,         \
            void* out))                                                                                                \
    KERNEL(void, expert_linear,                                                                                        \
           (int threads, int kind, long count, const std::int64_t* starts, long n, long k, const void* x,              \
            const void* experts, void* out))                                                                           \
    KERNEL(void, add_expert_lora_delta,                                                                                \
           (int threads, int kind, int int8_weights, long segments, const std::int64_t* starts,                        \
            const std::int64_t* stops, const std::int64_t* tables, const std::int64_t* table_rows,                     \
            long layer, long count, const std::int64_t* expert_starts, const std::int64_t* order, long chosen,         \
            const void* x, long k, void* out, long n))                                                                 \
    KERNEL(void, combine,                                                                                              \
           (int threads, int kind, long tokens, long chosen, const float* weights, const std::int64_t* places, long n, \
            const void* x, const void* shared, const void* gate, void* out))                                           \
    KERNEL(long, shared_bytes, (long size, long slot_bytes))                                                           \
    KERNEL(long, all_reduce,                                                                                           \
           (char* memory, long rank, long size, long slot_bytes, long fd, float patience, int kind, long count,        \
            void* data))                                                                                               \
    KERNEL(long, broadcast,                                                                                            \
           (char* memory, long rank, long size, long slot_bytes, long fd, float patience, long bytes, char* data))     \
    KERNEL(long, gather,                                                                                               \
           (char* memory, long rank, long size, long slot_bytes, long fd, float patience, long rows,                   \
            const long* widths, const char* data, char* out))                                                          \
    KERNEL(void, leave_group, (char* memory, long rank))                                                               \
    KERNEL(long, run, (const std::int64_t* calls, long count, long width))
// clang-format on

#define DECLARE(result, name, parameters) EXPORT result name parameters;
KERNELS(DECLARE)
#undef DECLARE
