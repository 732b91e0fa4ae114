// out = x W^T for weights in float32 or bfloat16, packed into panels of sixteen rows. Sums are float32.
//
// A panel holds sixteen rows of W, one per lane: [k][16] for float32, [k / 2][16][2] for bfloat16, where k is padded to
// be even. A panel is read once for every run of rows of x, each time by one thread. x is converted to words (see
// common.h): of float32, or of bfloat16 if the processor multiplies pairs of them (AVX512_BF16). Processors with tiles
// use linear_tiles.h, with the same panels.

#include "linear_tiles.h"
#include "team.h"

namespace loraplex {
namespace {

#if defined(__AVX512F__)
constexpr int ROWS = 24;  // rows of x at once: their sums and a few more values fill the registers
#else
constexpr int ROWS = 5;
#endif

constexpr long PIECE = 64;  // numbers of a row that one thread converts to words

#if defined(__AVX512BF16__)
template <class T>
using Factor = T;  // the type that x is converted to
#else
template <class T>
using Factor = float;
#endif

// Each of these adds the products of the next words of M rows with the next numbers of a panel, and moves both pointers
// on. Loops over rows are unrolled by pragma, since g++ otherwise keeps the sums of many rows in memory.

template <int M>
inline void multiply(const float*& x, const float*& panel, Floats* sums, Floats*) {
    Floats w = load(panel);
#pragma GCC unroll 24
    for (int m = 0; m < M; m++) sums[m] = fma(splat(x[m]), w, sums[m]);
    x += M;
    panel += LANES;
}

template <int M>
inline void multiply(const float*& x, const bf16*& panel, Floats* sums, Floats* odd) {
    Floats first, second;
    load_pairs(panel, first, second);
#pragma GCC unroll 24
    for (int m = 0; m < M; m++) {
        sums[m] = fma(splat(x[m]), first, sums[m]);
        odd[m] = fma(splat(x[M + m]), second, odd[m]);
    }
    x += 2 * M;
    panel += 2 * LANES;
}

#if defined(__AVX512BF16__)
template <int M>
inline void multiply(const bf16*& x, const bf16*& panel, Floats* sums, Floats*) {
    __m512bh w = (__m512bh)_mm512_loadu_si512(panel);
#pragma GCC unroll 24
    for (int m = 0; m < M; m++) add_pair(sums[m].v, w, x + 2 * m);
    x += 2 * M;
    panel += 2 * LANES;
}
#endif

// Not inlined, since g++ otherwise keeps the sums in memory.
template <int M, class X, class W, class T>
[[gnu::noinline]] void panel_rows(const X* x, const W* panel, const W* end, Ahead ahead, Floats bias, T* out,
                                  long stride, int columns) {
    Floats sums[M], second[M];
    for (int m = 0; m < M; m++) {
        sums[m] = bias;
        second[m] = zeros();
    }
    constexpr bool SPLIT = M <= 2;  // with only one or two sums, each addition would wait for the one before
    while (panel < end) {
        ahead.fetch_line();
        multiply<M>(x, panel, sums, SPLIT ? second : sums);
    }
#pragma GCC unroll 24
    for (int m = 0; m < M; m++) store_first(out + m * stride, SPLIT ? sums[m] + second[m] : sums[m], columns);
}

// Calls panel_rows for `rows` rows, at most M.
template <int M, class X, class W, class T>
void rows_of_panel(int rows, const X* x, const W* panel, const W* end, Ahead ahead, Floats bias, T* out, long stride,
                   int columns) {
    if (rows == M)
        panel_rows<M>(x, panel, end, ahead, bias, out, stride, columns);
    else if constexpr (M > 1)
        rows_of_panel<M - 1>(rows, x, panel, end, ahead, bias, out, stride, columns);
}

// Writes a row of k numbers as every `stride`-th word.
template <class T>
void to_words(const T* row, long k, T* words, int stride) {
    constexpr long NUMBERS = sizeof(Word) / sizeof(T);
    for (long i = 0; i < k / NUMBERS; i++) std::memcpy((Word*)words + i * stride, row + i * NUMBERS, sizeof(Word));
    if (k % NUMBERS) {
        words[k / NUMBERS * NUMBERS * stride] = row[k - 1];
        words[k / NUMBERS * NUMBERS * stride + 1] = T(0);
    }
}

inline void to_words(const bf16* row, long k, float* words, int stride) {
    for (; k > 0; k -= LANES, row += LANES, words += LANES * stride) {
        float numbers[LANES];
        store(numbers, load_first(row, int(k)));
        for (int i = 0; i < LANES && i < k; i++) words[i * stride] = numbers[i];
    }
}

template <class W, class T>
void linear(int threads, long m, long n, long k, const T* x, const W* weight, const T* bias, T* out) {
    using X = Factor<T>;
    static thread_local Scratch scratch;
    long padded = sizeof(W) == 2 ? (k + 1) / 2 * 2 : k;
    bool are_words = std::is_same_v<X, T> && m == 1 && k == padded;
    X* words = are_words ? (X*)x : scratch.get<X>(m * padded);
    long panels = (n + LANES - 1) / LANES, size = padded * LANES, bytes = size * long(sizeof(W));  // sizes of a panel
    Shares shares((m + BLOCK - 1) / BLOCK * panels, threads);
    parallel(threads, [&](Member me) {
        if (!are_words) {
            each_run(me, m, ROWS, (padded + PIECE - 1) / PIECE, [&](long row, int count, long first, long last) {
                long begin = first * PIECE, end = last * PIECE < k ? last * PIECE : k;
                for (int i = 0; i < count; i++) {
                    X* own = words + row * padded + i * sizeof(Word) / sizeof(X);
                    to_words(x + (row + i) * k + begin, end - begin, own + begin * count, count);
                    if (end == k && padded != k && sizeof(X) == sizeof(Word)) own[k * count] = 0;
                }
            });
            me.barrier();
        }
        shares.each(me, [&](long i) {
            long block = i / panels * BLOCK, p = i % panels;
            int columns = int(n - p * LANES < LANES ? n - p * LANES : LANES);
            Floats start = bias ? load_first(bias + p * LANES, columns) : zeros();
            const W* panel = weight + p * size;
            for (Runs run = rows_of_block(block, m, ROWS); run; run.next())
                rows_of_panel<ROWS>(run.count(), words + run.begin * padded, panel, panel + size,
                                    Ahead(panel, bytes, bytes / Ahead::LINE, run), start,
                                    out + run.begin * n + p * LANES, n, columns);
        });
    });
}

template <class T>
void pack(long n, long k, const T* weight, T* packed) {
    constexpr int depth = sizeof(T) == 2 ? 2 : 1;
    long padded = (k + depth - 1) / depth * depth;
    for (long row = 0; row < (n + LANES - 1) / LANES * LANES; row++) {
        T* panel = packed + row / LANES * LANES * padded;
        for (long i = 0; i < padded; i++) {
            T value = row < n && i < k ? weight[row * k + i] : T(0);
            panel[i / depth * depth * LANES + row % LANES * depth + i % depth] = value;
        }
    }
}

template <class T>
void unpack_row(long row, long k, const T* packed, T* out) {
    constexpr int depth = sizeof(T) == 2 ? 2 : 1;
    const T* panel = packed + row / LANES * LANES * ((k + depth - 1) / depth * depth);
    for (long i = 0; i < k; i++) out[i] = panel[i / depth * depth * LANES + row % LANES * depth + i % depth];
}

}  // namespace
}  // namespace loraplex

using namespace loraplex;

// x [m, k], out [m, n] and bias [n] (or null) are of the same kind. weight comes from pack_weight.
EXPORT void linear(int threads, int kind, long m, long n, long k, const void* x, const void* weight, const void* bias,
                   void* out) {
#if defined(__AMX_BF16__)
    if (kind == BFLOAT16 && m >= FEWEST_TILE_ROWS)
        return linear_by_tiles(threads, m, n, k, (const bf16*)x, (const bf16*)weight, (const bf16*)bias, (bf16*)out);
#endif
    with_type(kind, [&](auto* t) {
        using T = decltype(t);
        loraplex::linear(threads, m, n, k, (T)x, (T)weight, (T)bias, (T)out);
    });
}

// Packs weight [n, k] into panels: ceil(n / 16) * 16 rows of k values, with k rounded up to an even number for
// bfloat16.
EXPORT void pack_weight(int kind, long n, long k, const void* weight, void* packed) {
    with_type(kind, [&](auto* t) { pack(n, k, (decltype(t))weight, (decltype(t))packed); });
}

// Copies row ids[i] of a packed weight [n, k], times scale, to row i of out; row 0 if the weight does not have it.
EXPORT void weight_rows(int threads, int kind, long count, const std::int64_t* ids, long n, long k, const void* packed,
                        float scale, void* out) {
    with_type(kind, [&](auto* t) {
        using T = decltype(t);
        parallel_for(count > 1 ? threads : 1, count, [&](long i) {
            T row = (T)out + i * k;
            unpack_row(ids[i] < n ? ids[i] : 0, k, (T)packed, row);
            multiply(row, k, scale);
        });
    });
}
