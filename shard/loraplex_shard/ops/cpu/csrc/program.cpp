// Runs recorded calls of the other kernels, so that a step costs one call from Python.
//
// A call is a row of 64-bit numbers: which kernel, then its arguments; a float lies in the lower half of its number.

#include <tuple>
#include <utility>

#include "common.h"

EXPORT void linear(int, int, long, long, long, const void*, const void*, const void*, void*);
EXPORT void weight_rows(int, int, long, const std::int64_t*, long, const void*, void*);
EXPORT void quantized_linear(int, int, long, long, long, const void*, int, int, const void*, const void*, void*);
EXPORT void quantized_rows(int, int, long, const std::int64_t*, long, int, int, const void*, void*);
EXPORT void add_lora_delta(int, int, int, long, const std::int64_t*, const std::int64_t*, const void*, long,
                           const void*, long, void*, long);
EXPORT void add_rms_norm(int, int, long, long, void*, const void*, const void*, float, void*);
EXPORT void silu_mul(int, int, long, long, const void*, void*);
EXPORT void rotate_and_write(int, int, long, void*, long, long, long, long, const void*, float, const std::int64_t*,
                             const float*, const float*, const std::int64_t*, void*, void*, float*, float*);
EXPORT void paged_attention(int, int, const void*, long, long, long, long, float, float, long, const void*, const void*,
                            const float*, const float*, long, const std::int64_t*, const std::int64_t*,
                            const std::int64_t*, long, void*);
EXPORT long all_reduce(const void*, int, long, void*);

namespace {

template <class T>
T number(std::int64_t bits) {
    if constexpr (std::is_pointer_v<T>)
        return (T)bits;
    else if constexpr (std::is_same_v<T, float>) {
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    } else
        return T(bits);
}

template <class R, class... A, std::size_t... I>
R call(R (*kernel)(A...), const std::int64_t* arguments, std::index_sequence<I...>) {
    return kernel(number<A>(arguments[I])...);
}

template <class R, class... A>
R call(R (*kernel)(A...), const std::int64_t* arguments) {
    return call(kernel, arguments, std::index_sequence_for<A...>());
}

}  // namespace

// The numbers of the kernels are their places in program.py's RECORDED. Stops at the first call whose result is not 0,
// and returns it.
EXPORT long run(const std::int64_t* calls, long count, long width) {
    for (long i = 0; i < count; i++, calls += width) switch (calls[0]) {
            case 0: call(linear, calls + 1); break;
            case 1: call(weight_rows, calls + 1); break;
            case 2: call(quantized_linear, calls + 1); break;
            case 3: call(quantized_rows, calls + 1); break;
            case 4: call(add_lora_delta, calls + 1); break;
            case 5: call(add_rms_norm, calls + 1); break;
            case 6: call(silu_mul, calls + 1); break;
            case 7: call(rotate_and_write, calls + 1); break;
            case 8: call(paged_attention, calls + 1); break;
            case 9:
                if (long lost = call(all_reduce, calls + 1)) return lost;
                break;
        }
    return 0;
}
