// out = x W^T for weights of 8 or 4 bits in groups along k, w = scale * q + offset. Activations are quantized to 8 bits
// here, in the same groups. Products and sums within a group are exact integers; groups are added in float32.
//
// A panel holds sixteen rows of W. It begins with each group's scales [16] and, for 4 bits, offsets [16], in float16.
// Each group's integers follow from the next cache line on, in the order that dot.h describes.

#include "dot.h"
#include "team.h"
#include "tiles.h"

#include <optional>

namespace loraplex {
namespace {

template <int BITS>
struct Panels {
    static constexpr int SCALES = BITS == 4 ? 2 * LANES : LANES;  // numbers per group: scales, and offsets for 4 bits
    long groups;
    int group;
    long integers() const { return LANES * group * BITS / 8; }                            // bytes of a group
    long scales() const { return (groups * SCALES * long(sizeof(f16)) + 63) / 64 * 64; }  // bytes of all groups
    long bytes() const { return scales() + groups * integers(); }
};

template <int BITS>
using Sum = std::conditional_t<BITS == 4, float, int>;

// Rows of x as words (see common.h), run by run. For each group, the scales of a run's rows are neighbours, and so are
// the sums.
template <int BITS>
struct Activations {
    std::int8_t* values;  // [rows][groups * group]
    float* scales;        // [rows][groups]
    Sum<BITS>* sums;      // [rows][groups]: sums of values, times their scale (4 bits) or -128 (8 bits)
    long groups;
    int group;
};

// Quantizes groups [first, last) of row `row`. It belongs to the run of `count` rows that begins with row `begin`.
template <int BITS, class T>
void quantize_row(const T* x, long k, const Activations<BITS>& out, long row, long begin, int count, long first,
                  long last) {
    for (long g = first; g < last; g++) {
        long from = g * out.group, at = begin * out.groups + g * count + row - begin;
        alignas(64) std::int8_t values[64];
        Floats most = zeros();
        for (int i = 0; i < out.group; i += LANES)
            if (from + i < k) most = max(most, abs(load_first(x + from + i, int(k - from - i))));
        float peak = largest(most);
        Floats inverse = splat(peak > 0 ? 127 / peak : 0), total = zeros();
        for (int i = 0; i < out.group; i += LANES) {
            Floats scaled = from + i < k ? load_first(x + from + i, int(k - from - i)) * inverse : zeros();
            store_int8(values + i, scaled);
            total = total + load(values + i);
        }
        Word* words = (Word*)(out.values + begin * out.groups * out.group + from * count) + row - begin;
        for (int i = 0; i < out.group; i += 4) std::memcpy(words + i / 4 * count, values + i, 4);
        out.scales[at] = peak / 127;
        out.sums[at] = Sum<BITS>(sum(total) * (BITS == 4 ? out.scales[at] : -128));
    }
}

// Not inlined, since g++ otherwise keeps the sums in memory.
template <int BITS, int M, class T>
[[gnu::noinline]] void panel_rows(const Activations<BITS>& x, long row, Panels<BITS> panels, const std::uint8_t* panel,
                                  Ahead ahead, Floats bias, T* out, long stride, int columns) {
    Floats totals[M];
    for (int m = 0; m < M; m++) totals[m] = bias;
    int group = panels.group;
    const std::int8_t* values = x.values + row * x.groups * group;
    const float* x_scales = x.scales + row * x.groups;
    const Sum<BITS>* x_sums = x.sums + row * x.groups;
    const f16* scales = (const f16*)panel;
    const std::uint8_t* integers = panel + panels.scales();
    for (long g = 0; g < x.groups; g++, values += group * M, x_scales += M, x_sums += M) {
        ahead.fetch();
        Floats sums[M], scale = load_f16(scales);
        if constexpr (BITS == 4)
            dot_int4<M>(integers, group, values, sums);
        else
            dot_int8<M>(integers, group, values, x_sums, sums);
        for (int m = 0; m < M; m++) totals[m] = fma(sums[m], scale * splat(x_scales[m]), totals[m]);
        if constexpr (BITS == 4) {
            Floats offset = load_f16(scales + LANES);
            for (int m = 0; m < M; m++) totals[m] = fma(offset, splat(x_sums[m]), totals[m]);
        }
        scales += panels.SCALES;
        integers += panels.integers();
    }
    for (int m = 0; m < M; m++) store_first(out + m * stride, totals[m], columns);
}

template <int BITS, int M, class T>
void rows_of_panel(int rows, const Activations<BITS>& x, long row, Panels<BITS> panels, const std::uint8_t* panel,
                   Ahead ahead, Floats bias, T* out, long stride, int columns) {
    if (rows == M)
        panel_rows<BITS, M>(x, row, panels, panel, ahead, bias, out, stride, columns);
    else if constexpr (M > 1)
        rows_of_panel<BITS, M - 1>(rows, x, row, panels, panel, ahead, bias, out, stride, columns);
}

#if defined(__AMX_INT8__)

// A group as a tile of fours of k, [group / 4][16][4]. 8-bit groups are tiles in the panel; 4-bit groups are unpacked
// into `own`.
template <int BITS>
const void* group_tile(const std::uint8_t* w, int group, std::int8_t* own) {
    if constexpr (BITS == 8) return w;
    __m512i low = _mm512_set1_epi8(15);
    for (int i = 0; i < group * LANES / 2; i += 64) {
        __m512i both = _mm512_loadu_si512(w + i);
        _mm512_store_si512(own + i, _mm512_and_si512(both, low));
        _mm512_store_si512(own + group * LANES / 2 + i, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
    }
    return own;
}

// Multiplies sixteen rows of x with one panel, with a tile for each group's sums. Only the first `rows` are stored.
template <int BITS, class T>
void panel_tile(const Activations<BITS>& x, long row, int rows, Panels<BITS> panels, const std::uint8_t* panel,
                Floats bias, T* out, long stride, int columns) {
    alignas(64) std::int8_t own[TILE_ROWS * TILE_BYTES];
    alignas(64) int sums[2][TILE_ROWS * LANES];  // used in turn: one is written while the other is read
    Floats totals[TILE_ROWS];
#pragma GCC unroll 16
    for (int m = 0; m < TILE_ROWS; m++) totals[m] = bias;
    int group = panels.group;
    const std::int8_t* values = x.values + row * x.groups * group;
    const float* x_scales = x.scales + row * x.groups;
    const Sum<BITS>* x_sums = x.sums + row * x.groups;
    const f16* scales = (const f16*)panel;
    const std::uint8_t* integers = panel + panels.scales();
    for (long g = 0; g < x.groups; g++, scales += panels.SCALES, integers += panels.integers()) {
        zero_tile<0>();
        load_tile<4>(values + g * group, x.groups * group);
        load_tile<6>(group_tile<BITS>(integers, group, own), TILE_BYTES);
        multiply_int8<0, 4, 6>();
        store_tile<0>(sums[g % 2], TILE_BYTES);
        Floats scale = load_f16(scales);
#pragma GCC unroll 16  // so that the totals are registers
        for (int m = 0; m < TILE_ROWS; m++) {
            Floats sum{_mm512_cvtepi32_ps(_mm512_load_si512(sums[g % 2] + m * LANES))};
            totals[m] = fma(sum, scale * splat(x_scales[m * x.groups + g]), totals[m]);
        }
        if constexpr (BITS == 4) {
            Floats offset = load_f16(scales + LANES);
#pragma GCC unroll 16
            for (int m = 0; m < TILE_ROWS; m++) totals[m] = fma(offset, splat(x_sums[m * x.groups + g]), totals[m]);
        }
    }
    alignas(64) float results[TILE_ROWS * LANES];  // registers cannot be indexed
#pragma GCC unroll 16
    for (int m = 0; m < TILE_ROWS; m++) store(results + m * LANES, totals[m]);
    for (int m = 0; m < rows; m++) store_first(out + m * stride, load(results + m * LANES), columns);
}

#endif

template <int BITS, class T>
void linear(int threads, long m, long n, long k, int group, const T* x, const std::uint8_t* weight, const T* bias,
            T* out) {
    static thread_local Scratch for_values, for_scales;
    long groups = (k + group - 1) / group;
    Panels<BITS> panels{groups, group};
    long room = (m + LANES - 1) / LANES * LANES;  // tiles read sixteen rows; results past the last row are dropped
    Activations<BITS> activations{nullptr, for_scales.get<float>(2 * room * groups), nullptr, groups, group};
    activations.values = for_values.get<std::int8_t>(room * groups * group);
    activations.sums = (Sum<BITS>*)(activations.scales + room * groups);
    bool by_tiles = HAS_TILES && m >= FEWEST_TILE_ROWS;
    long panel_count = (n + LANES - 1) / LANES;
    Shares shares((m + BLOCK - 1) / BLOCK * panel_count, threads);
    parallel(threads, [&](Member me) {
        each_run(me, m, by_tiles ? 1 : DOT_ROWS, groups, [&](long begin, int count, long first, long last) {
            for (long row = begin; row < begin + count; row++)
                quantize_row(x + row * k, k, activations, row, begin, count, first, last);
        });
        me.barrier();
#if defined(__AMX_INT8__)
        std::optional<Tiles> tiles;
        if (by_tiles) tiles.emplace(TILE_ROWS, panels.group);
#endif
        shares.each(me, [&](long i) {
            long block = i / panel_count * BLOCK, p = i % panel_count;
            int columns = int(n - p * LANES < LANES ? n - p * LANES : LANES);
            Floats start = bias ? load_first(bias + p * LANES, columns) : zeros();
            const std::uint8_t* panel = weight + p * panels.bytes();
#if defined(__AMX_INT8__)
            if (by_tiles) {
                for (long row = block; row < m && row < block + BLOCK; row += TILE_ROWS)
                    panel_tile<BITS>(activations, row, int(m - row < TILE_ROWS ? m - row : TILE_ROWS), panels, panel,
                                     start, out + row * n + p * LANES, n, columns);
                return;
            }
#endif
            for (Runs run = rows_of_block(block, m, DOT_ROWS); run; run.next())
                rows_of_panel<BITS, DOT_ROWS>(run.count(), activations, run.begin, panels, panel,
                                              Ahead(panel, panels.bytes(), groups, run), start,
                                              out + run.begin * n + p * LANES, n, columns);
        });
    });
}

template <int BITS>
void pack(long n, long k, int group, const std::uint8_t* values, const f16* scales, const f16* offsets,
          std::uint8_t* packed) {
    Panels<BITS> panels{(k + group - 1) / group, group};
    std::memset(packed, 0, (n + LANES - 1) / LANES * panels.bytes());
    for (long row = 0; row < n; row++) {
        long lane = row % LANES;
        std::uint8_t* panel = packed + row / LANES * panels.bytes();
        for (long g = 0; g < panels.groups; g++) {
            f16* own = (f16*)panel + g * panels.SCALES;
            own[lane] = scales[row * panels.groups + g];
            if (BITS == 4) own[LANES + lane] = offsets[row * panels.groups + g];
            std::uint8_t* integers = panel + panels.scales() + g * panels.integers();
            for (int i = 0; i < group && g * group + i < k; i++) {
                std::uint8_t value = values[row * k + g * group + i];
                int place = BITS == 4 ? i % (group / 2) : i, shift = BITS == 4 && i >= group / 2 ? 4 : 0;
                integers[place / 4 * 4 * LANES + lane * 4 + place % 4] |= std::uint8_t(value << shift);
            }
        }
    }
}

template <int BITS, class T>
void unpack_row(long row, long k, int group, const std::uint8_t* packed, T* out) {
    Panels<BITS> panels{(k + group - 1) / group, group};
    long lane = row % LANES;
    const std::uint8_t* panel = packed + row / LANES * panels.bytes();
    for (long g = 0; g < panels.groups; g++) {
        const f16* own = (const f16*)panel + g * panels.SCALES;
        float scale = from_f16(own[lane]);
        float offset = BITS == 4 ? from_f16(own[LANES + lane]) : 0;
        const std::uint8_t* integers = panel + panels.scales() + g * panels.integers();
        for (int i = 0; i < group && g * group + i < k; i++) {
            int place = BITS == 4 ? i % (group / 2) : i;
            std::uint8_t byte = integers[place / 4 * 4 * LANES + lane * 4 + place % 4];
            float q = BITS == 4 ? float(i < group / 2 ? byte & 15 : byte >> 4) : float(std::int8_t(byte));
            float value = scale * q + offset;
            if constexpr (sizeof(T) == 2)
                out[g * group + i] = to_bf16(value);
            else
                out[g * group + i] = value;
        }
    }
}

}  // namespace
}  // namespace loraplex

using namespace loraplex;

// x [m, k], out [m, n] and bias [n] (or null) are of the same kind. weight comes from pack_quantized and has 8 or 4
// bits in groups of 32 or 64.
EXPORT void quantized_linear(int threads, int kind, long m, long n, long k, const void* x, int bits, int group,
                             const void* weight, const void* bias, void* out) {
    with_type(kind, [&](auto* t) {
        using T = decltype(t);
        auto run =
            bits == 4 ? loraplex::linear<4, std::remove_pointer_t<T>> : loraplex::linear<8, std::remove_pointer_t<T>>;
        run(threads, m, n, k, group, (T)x, (const std::uint8_t*)weight, (T)bias, (T)out);
    });
}

// The size of a packed weight [n, k] in bytes.
EXPORT long quantized_bytes(long n, long k, int bits, int group) {
    long groups = (k + group - 1) / group;
    return (n + LANES - 1) / LANES * (bits == 4 ? Panels<4>{groups, group}.bytes() : Panels<8>{groups, group}.bytes());
}

// values [n, k] are one to a byte: int8, or 0 to 15 for 4 bits. scales and offsets (4 bits only) are [n, groups]
// float16.
EXPORT void pack_quantized(long n, long k, int bits, int group, const void* values, const void* scales,
                           const void* offsets, void* packed) {
    auto run = bits == 4 ? pack<4> : pack<8>;
    run(n, k, group, (const std::uint8_t*)values, (const f16*)scales, (const f16*)offsets, (std::uint8_t*)packed);
}

// Copies row ids[i] of a packed weight [n, k], times scale, to row i of out; row 0 if the weight does not have it.
EXPORT void quantized_rows(int threads, int kind, long count, const std::int64_t* ids, long n, long k, int bits,
                           int group, const void* packed, float scale, void* out) {
    with_type(kind, [&](auto* t) {
        using T = decltype(t);
        parallel_for(count > 1 ? threads : 1, count, [&](long i) {
            T row = (T)out + i * k;
            long id = ids[i] < n ? ids[i] : 0;
            if (bits == 4)
                unpack_row<4>(id, k, group, (const std::uint8_t*)packed, row);
            else
                unpack_row<8>(id, k, group, (const std::uint8_t*)packed, row);
            multiply(row, k, scale);
        });
    });
}
