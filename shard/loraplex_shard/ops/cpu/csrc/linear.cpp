// out = x W^T for weights in float32 or bfloat16, packed into panels of sixteen rows. Sums are float32.
//
// A panel holds sixteen rows of W, one per lane: for float32 [k][16], for bfloat16 [k / 2][16][2], where k is padded
// to be even. A panel is read once for every BLOCK rows of x, each time by one thread.
// Processors that multiply bfloat16 do so by linear_bf16.h, over the same panels.

#include "linear_bf16.h"
#include "team.h"

namespace loraplex {
namespace {

#if defined(__AVX512F__)
constexpr int ROWS = 12;  // of x at once: as many sums as there are registers for
#else
constexpr int ROWS = 5;
#endif
constexpr long BLOCK = 128;  // rows of x that stay in the cache while all panels are read

template <int M>
inline void multiply(const float* x, long stride, long k, const float* panel, Ahead ahead, Floats* sums) {
    for (long i = 0; i < k; i++, panel += LANES) {
        ahead.fetch_line();
        Floats w = load(panel);
        for (int m = 0; m < M; m++) sums[m] = fma(splat(x[m * stride + i]), w, sums[m]);
    }
}

template <int M>
inline void multiply(const float* x, long stride, long k, const bf16* panel, Ahead ahead, Floats* sums) {
    Floats odd[M];  // a second chain of sums, since one or two alone would wait for each other's results
    for (int m = 0; m < M; m++) odd[m] = zeros();
    for (long i = 0; i < k; i += 2, panel += 2 * LANES) {
        ahead.fetch_line();
        Floats first, second;
        load_pairs(panel, first, second);
        for (int m = 0; m < M; m++) {
            sums[m] = fma(splat(x[m * stride + i]), first, sums[m]);
            if (M <= 2)
                odd[m] = fma(splat(x[m * stride + i + 1]), second, odd[m]);
            else
                sums[m] = fma(splat(x[m * stride + i + 1]), second, sums[m]);
        }
    }
    if (M <= 2)
        for (int m = 0; m < M; m++) sums[m] = sums[m] + odd[m];
}

// Not inlined, since g++ otherwise keeps the sums in memory.
template <int M, class W, class T>
[[gnu::noinline]] void panel_rows(const float* x, long stride, long k, const W* panel, Ahead ahead, Floats bias, T* out,
                                  long out_stride, int columns) {
    Floats sums[M];
    for (int m = 0; m < M; m++) sums[m] = bias;
    multiply<M>(x, stride, k, panel, ahead, sums);
    for (int m = 0; m < M; m++) store_first(out + m * out_stride, sums[m], columns);
}

// Calls panel_rows for `rows` rows, fewer than or equal to M.
template <int M, class W, class T>
void rows_of_panel(int rows, const float* x, long stride, long k, const W* panel, Ahead ahead, Floats bias, T* out,
                   long out_stride, int columns) {
    if (rows == M)
        panel_rows<M>(x, stride, k, panel, ahead, bias, out, out_stride, columns);
    else if constexpr (M > 1)
        rows_of_panel<M - 1>(rows, x, stride, k, panel, ahead, bias, out, out_stride, columns);
}

template <class W, class T>
void linear(int threads, long m, long n, long k, const T* x, const W* weight, const T* bias, T* out) {
    static thread_local Scratch scratch;
    long padded = sizeof(W) == 2 ? (k + 1) / 2 * 2 : k;
    bool convert = sizeof(T) == 2 || padded != k;
    float* floats = convert ? scratch.get<float>(m * padded) : nullptr;
    const float* rows = convert ? floats : (const float*)x;
    long panels = (n + LANES - 1) / LANES, bytes = padded * LANES * long(sizeof(W));  // of a panel
    Shares shares((m + BLOCK - 1) / BLOCK * panels);
    parallel(threads, [&](Member me) {
        if (convert) {
            Range mine = me.share(m);
            for (long i = mine.begin; i < mine.end; i++) {
                for (long j = 0; j < k; j += LANES)
                    store_first(floats + i * padded + j, load_first(x + i * k + j, int(k - j)), int(k - j));
                if (padded != k) floats[i * padded + k] = 0;
            }
            me.barrier();
        }
        shares.each(me, [&](long i) {
            long block = i / panels * BLOCK, p = i % panels, end = block + BLOCK < m ? block + BLOCK : m;
            int columns = int(n - p * LANES < LANES ? n - p * LANES : LANES);
            Floats start = bias ? load_first(bias + p * LANES, columns) : zeros();
            const W* panel = weight + p * padded * LANES;
            for (Runs run(block, end, ROWS); run; run.next())
                rows_of_panel<ROWS>(run.count(), rows + run.begin * padded, padded, padded, panel,
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

// x [m, k], out [m, n] and bias [n] (or null) of one kind; weight as pack_weight made it.
EXPORT void linear(int threads, int kind, long m, long n, long k, const void* x, const void* weight, const void* bias,
                   void* out) {
#if defined(__AMX_BF16__)
    if (kind == BFLOAT16)
        return linear_bf16(threads, m, n, k, (const bf16*)x, (const bf16*)weight, (const bf16*)bias, (bf16*)out);
#endif
    with_type(kind, [&](auto* t) {
        using T = decltype(t);
        loraplex::linear(threads, m, n, k, (T)x, (T)weight, (T)bias, (T)out);
    });
}

// weight [n, k] to panels: ceil(n / 16) * 16 rows of k values, k rounded up to an even number for bfloat16.
EXPORT void pack_weight(int kind, long n, long k, const void* weight, void* packed) {
    with_type(kind, [&](auto* t) { pack(n, k, (decltype(t))weight, (decltype(t))packed); });
}

// Row ids[i] of a packed weight of k columns, to row i of out.
EXPORT void weight_rows(int threads, int kind, long count, const std::int64_t* ids, long k, const void* packed, void* out) {
    with_type(kind, [&](auto* t) {
        using T = decltype(t);
        parallel_for(count > 1 ? threads : 1, count, [&](long i) { unpack_row(ids[i], k, (T)packed, (T)out + i * k); });
    });
}
