// Normalization and activation: little arithmetic, each value read and written once.

#include "team.h"

namespace loraplex {
namespace {

constexpr long SMALL = 8192;  // numbers below which a second thread costs more than it saves

// hidden += delta (if there is one), out = hidden / root mean square * weight.
template <class T>
void rms_norm(int threads, long rows, long n, T* hidden, const T* delta, const T* weight, float eps, T* out) {
    parallel_for(rows * n > SMALL ? threads : 1, rows, [&](long row) {
        T* x = hidden + row * n;
        Floats squares = zeros();
        for (long i = 0; i < n; i += LANES) {
            int count = int(n - i < LANES ? n - i : LANES);
            Floats v = load_first(x + i, count);
            if (delta) {
                store_first(x + i, v + load_first(delta + row * n + i, count), count);
                v = load_first(x + i, count);  // as rounded
            }
            squares = fma(v, v, squares);
        }
        Floats factor = splat(1 / std::sqrt(sum(squares) / float(n) + eps));
        for (long i = 0; i < n; i += LANES) {
            int count = int(n - i < LANES ? n - i : LANES);
            Floats normed = load_first(x + i, count) * factor;
            store_first(out + row * n + i, normed * load_first(weight + i, count), count);
        }
    });
}

inline Floats gated(Floats gate, Floats up) {
    return gate / (splat(1.0f) + exp(min(zeros() - gate, splat(80.0f)))) * up;
}

template <class T>
void silu_mul(int threads, long rows, long n, const T* gate_up, T* out) {
    parallel_for(rows * n > SMALL ? threads : 1, rows, [&](long row) {
        const T* gate = gate_up + row * 2 * n;
        long whole = n / LANES * LANES;
        for (long i = 0; i < whole; i += LANES) store(out + row * n + i, gated(load(gate + i), load(gate + n + i)));
        if (int rest = int(n - whole)) {
            Floats last = gated(load_first(gate + whole, rest), load_first(gate + n + whole, rest));
            store_first(out + row * n + whole, last, rest);
        }
    });
}

template <class T>
void upcast(int threads, long rows, long n, const T* x, float* out, std::uint8_t* finite) {
    std::memset(finite, 1, rows);
    long parts = (n + SMALL - 1) / SMALL;  // of a row, since there may be one row of a whole vocabulary
    parallel_for(rows * n > SMALL ? threads : 1, rows * parts, [&](long i) {
        long row = i / parts;
        Range part(n, parts, i % parts);
        Floats nothing = zeros();  // times an infinity or NaN it is NaN
        for (long j = part.begin; j < part.end; j += LANES) {
            int count = int(part.end - j < LANES ? part.end - j : LANES);
            Floats v = load_first(x + row * n + j, count);
            store_first(out + row * n + j, v, count);
            nothing = fma(v, zeros(), nothing);
        }
        if (sum(nothing) != 0) std::atomic_ref(finite[row]).store(0, std::memory_order_relaxed);
    });
}

}  // namespace
}  // namespace loraplex

using namespace loraplex;

// hidden, out [rows, n] and weight [n] of one kind; delta like hidden, or null.
EXPORT void add_rms_norm(int threads, int kind, long rows, long n, void* hidden, const void* delta, const void* weight,
                         float eps, void* out) {
    with_type(kind, [&](auto* t) {
        using T = decltype(t);
        rms_norm(threads, rows, n, (T)hidden, (T)delta, (T)weight, eps, (T)out);
    });
}

// gate_up [rows, 2 n] -> out [rows, n].
EXPORT void silu_mul(int threads, int kind, long rows, long n, const void* gate_up, void* out) {
    with_type(kind, [&](auto* t) {
        using T = decltype(t);
        loraplex::silu_mul(threads, rows, n, (T)gate_up, (T)out);
    });
}

// x [rows, n] -> out [rows, n] float32; finite [rows]: 1 where all numbers of a row are, else 0.
EXPORT void upcast(int threads, int kind, long rows, long n, const void* x, float* out, std::uint8_t* finite) {
    with_type(kind, [&](auto* t) { loraplex::upcast(threads, rows, n, (decltype(t))x, out, finite); });
}
