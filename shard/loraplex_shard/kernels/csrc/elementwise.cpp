// Normalization and activation. There is little arithmetic: each value is read and written once.

#include "own_weights.h"
#include "team.h"

#include <algorithm>
#include <cmath>

namespace loraplex {
namespace {

constexpr long SMALL = 8192;  // for fewer numbers, a second thread costs more than it saves

inline int lanes_at(long i, long n) { return int(n - i < LANES ? n - i : LANES); }

// hidden += scale * delta, rounded to T, for one row.
template <class T>
Floats add_at(T* hidden, const T* delta, float scale, int count) {
    store_first(hidden, fma(load_first(delta, count), splat(scale), load_first(hidden, count)), count);
    return load_first(hidden, count);
}

template <class T>
float mean(const T* x, long n) {
    Floats sums = zeros();
    for (long i = 0; i < n; i += LANES) sums = sums + load_first(x + i, lanes_at(i, n));
    return sum(sums) / float(n);
}

// hidden += scale * delta if there is a delta, then out = hidden / root mean square * weight + bias. If CENTERED, the
// mean is subtracted from hidden first.
template <bool CENTERED, class T>
void add_norm(int threads, long rows, long n, T* hidden, const T* delta, float scale, const float* base_weight,
              const float* base_bias, float eps, const std::int64_t* own, long index, T* out) {
    parallel_for(rows * n > SMALL ? threads : 1, rows, [&](long row) {
        const float *weight = own_or(base_weight, own, index * rows + row),
                    *bias = own_or(base_bias, own, (index + 1) * rows + row);
        T *x = hidden + row * n, *y = out + row * n;
        Floats squares = zeros(), center = zeros();
        for (long i = 0; i < n; i += LANES) {
            int count = lanes_at(i, n);
            Floats v = delta ? add_at(x + i, delta + row * n + i, scale, count) : load_first(x + i, count);
            squares = fma(v, v, squares);
        }
        if constexpr (CENTERED) {
            center = splat(mean(x, n));
            squares = zeros();
            for (long i = 0; i < n; i += LANES) {
                float distances[LANES];
                store(distances, load_first(x + i, lanes_at(i, n)) - center);
                Floats v = load_first(distances, lanes_at(i, n));
                squares = fma(v, v, squares);
            }
        }
        Floats factor = splat(1 / std::sqrt(sum(squares) / float(n) + eps));
        for (long i = 0; i < n; i += LANES) {
            int count = lanes_at(i, n);
            Floats v = load_first(x + i, count);
            if constexpr (CENTERED) v = v - center;
            v = v * factor * load_first(weight + i, count);
            store_first(y + i, bias ? v + load_first(bias + i, count) : v, count);
        }
    });
}

inline Floats sigmoid(Floats x) { return splat(1.0f) / (splat(1.0f) + exp(min(zeros() - x, splat(80.0f)))); }

struct Silu {
    static Floats of(Floats x) { return x / (splat(1.0f) + exp(min(zeros() - x, splat(80.0f)))); }
};

struct Gelu {  // x / 2 * (1 + erf(x / sqrt 2)); the error of erf is below 2e-7 (Abramowitz and Stegun, 7.1.26)
    static Floats of(Floats x) {
        Floats z = abs(x) * splat(0.70710678f);
        Floats t = splat(1.0f) / fma(z, splat(0.3275911f), splat(1.0f));
        Floats p = splat(1.061405429f);
        p = fma(p, t, splat(-1.453152027f));
        p = fma(p, t, splat(1.421413741f));
        p = fma(p, t, splat(-0.284496736f));
        p = fma(p, t, splat(0.254829592f));
        Floats tail = p * t * exp(zeros() - z * z);  // 1 - erf(z)
        return splat(0.5f) * (x + abs(x) * (splat(1.0f) - tail));
    }
};

struct GeluTanh {  // x / 2 * (1 + tanh(u)), which is x * sigmoid(2 u)
    static Floats of(Floats x) { return x * sigmoid(splat(1.59576912f) * fma(splat(0.044715f) * x * x, x, x)); }
};

struct Relu {
    static Floats of(Floats x) { return max(zeros(), x); }
};

struct Relu2 {
    static Floats of(Floats x) { return Relu::of(x) * Relu::of(x); }
};

struct QuickGelu {
    static Floats of(Floats x) { return x * sigmoid(splat(1.702f) * x); }
};

struct ClampedSwiglu {  // of GPT-OSS: the ups are clamped as well, and 1 is added to them
    static constexpr float LIMIT = 7;
    static Floats of(Floats x) { return QuickGelu::of(min(splat(LIMIT), x)); }
    static Floats up(Floats x) { return max(splat(-LIMIT), min(splat(LIMIT), x)) + splat(1.0f); }
};

// The functions in the order of ops/base.py's Activation.
template <class F>
void with_function(int function, F f) {
    switch (function) {
        case 0: return f(Silu{});
        case 1: return f(Gelu{});
        case 2: return f(GeluTanh{});
        case 3: return f(Relu{});
        case 4: return f(Relu2{});
        case 5: return f(QuickGelu{});
        case 6: return f(ClampedSwiglu{});
    }
}

template <class Function>
Floats up_of(Floats x) {
    if constexpr (requires { Function::up(x); })
        return Function::up(x);
    else
        return x;
}

// The activation is multiplied by `up`, unless that is null.
template <class Function, class T>
void activate_row(const T* x, const T* up, long n, T* out) {
    auto at = [&](long i, int count) {
        Floats active = Function::of(load_first(x + i, count));
        if (up) active = active * up_of<Function>(load_first(up + i, count));
        store_first(out + i, active, count);
    };
    long whole = n / LANES * LANES;
    for (long i = 0; i < whole; i += LANES) at(i, LANES);
    if (whole < n) at(whole, int(n - whole));
}

template <class T>
void upcast(int threads, long rows, long n, const T* x, float scale, float soft_cap, long width, float* out,
            std::uint8_t* finite) {
    std::memset(finite, 1, rows);
    long parts = (n + SMALL - 1) / SMALL;  // parts per row, since there may be a single row as long as the vocabulary
    parallel_for(rows * n > SMALL ? threads : 1, rows * parts, [&](long i) {
        long row = i / parts;
        Range part(n, parts, i % parts);
        Floats nothing = zeros();  // 0 times an infinity or NaN is NaN
        for (long j = part.begin; j < part.end; j += LANES) {
            int count = lanes_at(j, part.end);
            Floats v = load_first(x + row * n + j, count) * splat(scale);
            nothing = fma(v, zeros(), nothing);
            store_first(out + row * width + j, soft_cap > 0 ? soft_capped(v, soft_cap) : v, count);
        }
        if (part.end == n) std::fill(out + row * width + n, out + (row + 1) * width, -INFINITY);
        if (sum(nothing) != 0) std::atomic_ref(finite[row]).store(0, std::memory_order_relaxed);
    });
}

template <class T>
float sum_of_squares(const T* x, long n) {
    Floats squares = zeros();
    for (long i = 0; i < n; i += LANES) {
        Floats v = load_first(x + i, lanes_at(i, n));
        squares = fma(v, v, squares);
    }
    return sum(squares);
}

}  // namespace
}  // namespace loraplex

using namespace loraplex;

// hidden and out [rows, n] are of the same kind; delta is like hidden, or null; weight [n]; bias [n] or null.
//
// own [parameters, rows] has the addresses of parameters of the rows' adapters. Parameter `index` replaces the weight,
// and the next one replaces the bias. An address is 0 if the adapter has no parameter of its own; own is null if none
// has.
EXPORT void add_norm(int threads, int kind, long rows, long n, void* hidden, const void* delta, float scale,
                     const float* weight, const float* bias, float eps, int centered, const std::int64_t* own,
                     long index, void* out) {
    with_type(kind, [&](auto* t) {
        using T = decltype(t);
        auto run = centered ? loraplex::add_norm<true, std::remove_pointer_t<T>>
                            : loraplex::add_norm<false, std::remove_pointer_t<T>>;
        run(threads, rows, n, (T)hidden, (T)delta, scale, weight, bias, eps, own, index, (T)out);
    });
}

// hidden [rows, n] += scale * delta.
EXPORT void add(int threads, int kind, long rows, long n, void* hidden, const void* delta, float scale) {
    with_type(kind, [&](auto* t) {
        using T = decltype(t);
        parallel_for(rows * n > SMALL ? threads : 1, rows, [&](long row) {
            for (long i = 0; i < n; i += LANES)
                add_at((T)hidden + row * n + i, (T)delta + row * n + i, scale, lanes_at(i, n));
        });
    });
}

// x [rows, n] -> out [rows, n]. If gated, x is [rows, 2 n].
EXPORT void activate(int threads, int kind, int function, int gated, long rows, long n, const void* x, void* out) {
    with_type(kind, [&](auto* t) {
        using T = decltype(t);
        with_function(function, [&]<class Function>(Function) {
            parallel_for(rows * n > SMALL ? threads : 1, rows, [&](long row) {
                T first = (T)x + row * n * (gated ? 2 : 1);
                activate_row<Function>(first, gated ? first + n : nullptr, n, (T)out + row * n);
            });
        });
    });
}

// x [rows, n] times scale -> out [rows, width] float32. If soft_cap is not 0, out becomes soft_cap * tanh(out /
// soft_cap). Columns from n on are -inf. finite [rows] is 1 if all numbers of a row of x are finite, else 0.
EXPORT void upcast(int threads, int kind, long rows, long n, const void* x, float scale, float soft_cap, long width,
                   float* out, std::uint8_t* finite) {
    with_type(kind, [&](auto* t) {
        loraplex::upcast(threads, rows, n, (decltype(t))x, scale, soft_cap, width, out, finite);
    });
}

// For each token, the scaled sums of the squares of its first `queries` numbers and of the next `keys` numbers:
// out [tokens, 2].
EXPORT void head_squares(int threads, int kind, long tokens, const void* qkv, long stride, long queries, long keys,
                         float query_scale, float key_scale, float* out) {
    with_type(kind, [&](auto* t) {
        parallel_for(tokens * (queries + keys) > SMALL ? threads : 1, tokens, [&](long i) {
            auto* token = (decltype(t))qkv + i * stride;
            out[2 * i] = sum_of_squares(token, queries) * query_scale;
            out[2 * i + 1] = sum_of_squares(token + queries, keys) * key_scale;
        });
    });
}
