// The two products of LoRA with vectors: rows of A with rows of x, and rows of A x with B. Used by lora.cpp. `next` is
// what will be read after the weights; it is prefetched meanwhile.
#pragma once

#include "common.h"

#include <type_traits>

namespace loraplex {
namespace {  // only one file includes this, and its compiler may inline everything

constexpr int WIDTH = 2 * LANES;  // weights read at once

// How much is multiplied at once depends on the number of registers: rows of A with rows of x, and rows of A x with B.
#if defined(__AVX512F__)
constexpr int SHRINK_RANKS = 4, SHRINK_ROWS = 4, EXPAND_ROWS = 8;
#else
constexpr int SHRINK_RANKS = 2, SHRINK_ROWS = 2, EXPAND_ROWS = 3;
#endif

#if defined(__AVX512BF16__)
template <class W, class T>
using Factor = std::conditional_t<sizeof(W) == 2 && sizeof(T) == 2, bf16, float>;  // the type of x and A x in products
#else
template <class W, class T>
using Factor = float;
#endif

inline float number(float x) { return x; }
inline float number(bf16 x) { return from_bf16(x); }
inline void store(float& to, float x) { to = x; }
inline void store(bf16& to, float x) { to = to_bf16(x); }

// Loads WIDTH values as floats. 16-bit weights are split into the first and the second numbers of each pair, and so is
// what they are multiplied with or added to.
template <bool PAIRS, class T>
inline void load_two(const T* p, Floats& first, Floats& second) {
    if constexpr (PAIRS && sizeof(T) == 2) {
        load_pairs(p, first, second);
    } else {
        first = load(p);
        second = load(p + LANES);
    }
}

template <bool PAIRS, class T>
inline void store_two(T* p, Floats first, Floats second) {
    if constexpr (PAIRS && sizeof(T) == 2) {
        store_pairs(p, first, second);
    } else {
        store(p, first);
        store(p + LANES, second);
    }
}

template <bool PAIRS, class T>
inline void load_first_two(const T* p, long n, Floats& first, Floats& second) {
    T padded[WIDTH] = {};
    std::memcpy(padded, p, n * sizeof(T));
    load_two<PAIRS>(padded, first, second);
}

// Writes x [rows, k] to `out` as floats, in the order in which weights of type W are loaded. Each row is padded with
// zeros to a multiple of WIDTH.
template <class W, class T>
const float* convert(const T* x, long rows, long k, float* out) {
    constexpr bool PAIRS = sizeof(W) == 2;
    const float* converted = out;
    for (long m = 0; m < rows; m++, x += k)
        for (long i = 0; i < k; i += WIDTH, out += WIDTH) {
            Floats first, second;
            if (k - i >= WIDTH)
                load_two<PAIRS>(x + i, first, second);
            else
                load_first_two<PAIRS>(x + i, k - i, first, second);
            store(out, first);
            store(out + LANES, second);
        }
    return converted;
}

// Adds the products of the next n numbers, at most WIDTH, of a row of A with those of M rows of x.
template <int M, class W>
inline void add_products(const float* x, long stride, const W* a, long n, Floats* sums) {
    constexpr bool PAIRS = sizeof(W) == 2;
    Floats first, second;
    if (n < WIDTH)
        load_first_two<PAIRS>(a, n, first, second);
    else
        load_two<PAIRS>(a, first, second);
    for (int m = 0; m < M; m++) {
        sums[m] = fma(load(x + m * stride), first, sums[m]);
        sums[m] = fma(load(x + m * stride + LANES), second, sums[m]);
    }
}

#if defined(__AVX512BF16__)
template <int M>
inline void add_products(const bf16* x, long stride, const bf16* a, long n, Floats* sums) {
    __mmask32 mask = n < WIDTH ? (__mmask32(1) << n) - 1 : ~__mmask32(0);
    __m512bh weights = (__m512bh)_mm512_maskz_loadu_epi16(mask, a);
    for (int m = 0; m < M; m++)
        sums[m].v = _mm512_dpbf16_ps(sums[m].v, (__m512bh)_mm512_maskz_loadu_epi16(mask, x + m * stride), weights);
}
#endif

// R rows of A times M rows of x. `next` is what will be read next; the same amount of it is prefetched.
template <int R, int M, class X, class W>
inline void shrink(const X* x, long stride, long k, const W* a, const W* next, X* out, long ranks) {
    Floats sums[R][M];
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) sums[r][m] = zeros();
    long i = 0;
    for (; i + WIDTH <= k; i += WIDTH)
        for (int r = 0; r < R; r++) {
            __builtin_prefetch(next + r * k + i);
            add_products<M>(x + i, stride, a + r * k + i, WIDTH, sums[r]);
        }
    if (i < k)
        for (int r = 0; r < R; r++) add_products<M>(x + i, stride, a + r * k + i, k - i, sums[r]);
    for (int m = 0; m < M; m++, out += ranks) {
        if constexpr (R == 4)
            store_sums(out, sums[0][m], sums[1][m], sums[2][m], sums[3][m]);
        else
            for (int r = 0; r < R; r++) store(out[r], sum(sums[r][m]));
    }
}

// Calls shrink for `rows` rows, at most M.
template <int R, int M, class X, class W>
void rows_of_shrink(int rows, const X* x, long stride, long k, const W* a, const W* next, X* out, long ranks) {
    if (rows == M)
        shrink<R, M>(x, stride, k, a, next, out, ranks);
    else if constexpr (M > 1)
        rows_of_shrink<R, M - 1>(rows, x, stride, k, a, next, out, ranks);
}

// Adds to P * WIDTH outputs of M rows: `count` ranks of `shrunk`, whose rows are `ranks` apart, times B.
template <int P, int M, class T, class W>
inline void expand(const float* shrunk, long ranks, long count, const W* b, long width, const W* next, long next_width,
                   T* out, long stride) {
    constexpr bool PAIRS = sizeof(W) == 2;
    Floats sums[M][P][2];
    for (int m = 0; m < M; m++)
        for (int p = 0; p < P; p++) load_two<PAIRS>(out + m * stride + p * WIDTH, sums[m][p][0], sums[m][p][1]);
    for (long r = 0; r < count; r++)
        for (int p = 0; p < P; p++) {
            __builtin_prefetch(next + r * next_width + p * WIDTH);
            Floats first, second;
            load_two<PAIRS>(b + r * width + p * WIDTH, first, second);
            for (int m = 0; m < M; m++) {
                Floats h = splat(shrunk[m * ranks + r]);
                sums[m][p][0] = fma(h, first, sums[m][p][0]);
                sums[m][p][1] = fma(h, second, sums[m][p][1]);
            }
        }
    for (int m = 0; m < M; m++)
        for (int p = 0; p < P; p++) store_two<PAIRS>(out + m * stride + p * WIDTH, sums[m][p][0], sums[m][p][1]);
}

#if defined(__AVX512BF16__)

// The same with pairs of ranks. Weights of two ranks are interleaved within 128 bits. The outputs that they are added
// to are interleaved with zeros, which makes them float32.
template <int P, int M>
inline void expand(const bf16* shrunk, long ranks, long count, const bf16* b, long width, const bf16* next,
                   long next_width, bf16* out, long stride) {
    const __m512i none = _mm512_setzero_si512();
    __m512 sums[M][P][2];
    for (int m = 0; m < M; m++)
        for (int p = 0; p < P; p++) {
            __m512i values = _mm512_loadu_si512(out + m * stride + p * WIDTH);
            sums[m][p][0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(none, values));
            sums[m][p][1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(none, values));
        }
    auto add = [&](long r, auto pair) {
        for (int p = 0; p < P; p++) {
            __builtin_prefetch(next + r * next_width + p * WIDTH);
            if (pair) __builtin_prefetch(next + (r + 1) * next_width + p * WIDTH);
            __m512i first = _mm512_loadu_si512(b + r * width + p * WIDTH);
            __m512i second = pair ? _mm512_loadu_si512(b + (r + 1) * width + p * WIDTH) : none;
            __m512bh low = (__m512bh)_mm512_unpacklo_epi16(first, second);
            __m512bh high = (__m512bh)_mm512_unpackhi_epi16(first, second);
            for (int m = 0; m < M; m++) {
                const bf16* own = shrunk + m * ranks + r;
                const bf16 last[2] = {*own, 0};
                add_pair(sums[m][p][0], low, pair ? own : last);
                add_pair(sums[m][p][1], high, pair ? own : last);
            }
        }
    };
    long r = 0;
    for (; r + 2 <= count; r += 2) add(r, std::true_type());
    if (r < count) add(r, std::false_type());
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    for (int m = 0; m < M; m++)
        for (int p = 0; p < P; p++) {
            __m512i values = (__m512i)_mm512_cvtne2ps_pbh(sums[m][p][1], sums[m][p][0]);
            _mm512_storeu_si512(out + m * stride + p * WIDTH, _mm512_permutexvar_epi64(order, values));
        }
}

#endif

// Adds to the last outputs of a part, which are fewer than WIDTH.
template <class H, class T, class W>
void expand_rest(const H* shrunk, long count, const W* b, long width, T* out, long n) {
    for (long i = 0; i < n; i += LANES) {
        int lanes = int(n - i < LANES ? n - i : LANES);
        Floats total = load_first(out + i, lanes);
        for (long r = 0; r < count; r++)
            total = fma(splat(number(shrunk[r])), load_first(b + r * width + i, lanes), total);
        store_first(out + i, total, lanes);
    }
}

// Calls expand for WIDTH outputs of `rows` rows, at most M.
template <int M, class H, class T, class W>
void rows_of_expand(int rows, const H* shrunk, long ranks, long count, const W* b, long width, const W* next,
                    long next_width, T* out, long stride) {
    if (rows == M)
        expand<1, M>(shrunk, ranks, count, b, width, next, next_width, out, stride);
    else if constexpr (M > 1)
        rows_of_expand<M - 1>(rows, shrunk, ranks, count, b, width, next, next_width, out, stride);
}

}  // namespace
}  // namespace loraplex
