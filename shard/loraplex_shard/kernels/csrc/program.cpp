// Runs recorded calls of the other kernels, so that a step costs one call from Python.
//
// A call is a row of 64-bit numbers: the kernel's number, then its arguments. A float is in the lower half of its
// number.

#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels.h"

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

// Calls the kernel and returns its result, or 0 if it has none.
template <class R, class... A, std::size_t... I>
long call(R (*kernel)(A...), const std::int64_t* arguments, std::index_sequence<I...>) {
    if constexpr (std::is_void_v<R>) {
        kernel(number<A>(arguments[I])...);
        return 0;
    } else
        return kernel(number<A>(arguments[I])...);
}

template <class R, class... A>
long call(R (*kernel)(A...), const std::int64_t* arguments) {
    return call(kernel, arguments, std::index_sequence_for<A...>());
}

#define NUMBER(result, name, parameters) NUMBER_OF_##name,
enum Number : std::int64_t { KERNELS(NUMBER) };
#undef NUMBER

}  // namespace

// Makes the calls, each of `width` numbers. Stops at the first call whose result is not 0, and returns the result.
EXPORT long run(const std::int64_t* calls, long count, long width) {
    for (const std::int64_t* end = calls + count * width; calls < end; calls += width) {
        long result = 0;
        switch (calls[0]) {
#define CALL(_, name, parameters) \
    case NUMBER_OF_##name: result = call(name, calls + 1); break;
            KERNELS(CALL)
#undef CALL
        }
        if (result) return result;
    }
    return 0;
}

// A line for each kernel, in the order of their numbers: its result, its name and its parameters.
EXPORT const char* kernels() {
#define LINE(result, name, parameters) #result " " #name #parameters "\n"
    return KERNELS(LINE);
#undef LINE
}
