// The two products of LoRA with tiles (AMX), for a run of bfloat16 rows of one adapter, whose weights are bfloat16 or
// int8. Used by lora.cpp. Weights are packed into right-hand tiles as they are read, once for all rows. `next` is what
// will be read after them; it is prefetched meanwhile.
#pragma once

#include "common.h"
#include "tiles.h"

namespace loraplex {

constexpr long TILE_RUN = 4 * TILE_ROWS;  // rows per run: there are four tiles for sums

#if defined(__AMX_BF16__)

// Transposes sixteen rows of sixteen 32-bit numbers. In squares of growing size, the two quarters off the diagonal are
// exchanged.
[[gnu::always_inline]] inline void transpose(__m512i (&rows)[LANES]) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma GCC unroll 4
    for (int bit = 0; bit < 4; bit++) {
        const int half = 1 << bit;
        const __mmask16 right = _mm512_test_epi32_mask(lanes, _mm512_set1_epi32(half));
        const __m512i shifted = _mm512_add_epi32(lanes, _mm512_set1_epi32(half));
        const __m512i upper = _mm512_mask_add_epi32(lanes, right, lanes, _mm512_set1_epi32(LANES - half));
        const __m512i lower = _mm512_mask_add_epi32(shifted, right, lanes, _mm512_set1_epi32(LANES));
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            if (i & half) continue;
            const __m512i a = rows[i], b = rows[i + half];
            rows[i] = _mm512_permutex2var_epi32(a, upper, b);
            rows[i + half] = _mm512_permutex2var_epi32(a, lower, b);
        }
    }
}

// Loads n numbers as bfloat16, followed by zeros up to a tile's depth.
inline __m512i row_of_tile(const bf16* p, long n) {
    return _mm512_maskz_loadu_epi16(n < TILE_DEPTH ? (1u << n) - 1 : ~0u, p);
}
inline __m512i row_of_tile(const std::int8_t* p, long n) {
    __m256i bytes = _mm256_maskz_loadu_epi8(n < TILE_DEPTH ? (1u << n) - 1 : ~0u, p);
    __m512 first = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
    __m512 second = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
    return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

// Loads the next n numbers of up to sixteen rows of A, which are k apart, as the columns of a tile. The rest is zeros.
template <class W>
void pack_ranks(const W* a, const W* next, long k, long ranks, long n, bf16* tile) {
    __m512i rows[LANES];
#pragma GCC unroll 16
    for (long r = 0; r < LANES; r++) {
        __builtin_prefetch(next + r * k);
        rows[r] = r < ranks ? row_of_tile(a + r * k, n) : _mm512_setzero_si512();
    }
    transpose(rows);
#pragma GCC unroll 16
    for (long i = 0; i < LANES; i++) _mm512_store_si512(tile + i * 2 * LANES, rows[i]);
}

// Loads up to sixteen columns of up to a tile's depth of rows of B, which are `width` apart. The rest is zeros.
template <class W>
void pack_outputs(const W* b, long width, const W* next, long next_width, long ranks, long columns, bf16* tile) {
    auto row = [&](long r) {
        if (r >= ranks) return _mm512_setzero_si512();
        __builtin_prefetch(next + r * next_width);
        return low_halves(b + r * width, columns);
    };
    for (long r = 0; r < TILE_DEPTH; r += 2) pair_up(row(r), row(r + 1), tile + r * LANES);
}

// The sums of up to four tiles of rows, which are multiplied with one right-hand tile after the other.
class RunTiles {
  public:
    explicit RunTiles(long m) : rows_(m), tiles_(rows_.height, TILE_BYTES) { zero(); }

    void zero() {
        zero_tile<0>();
        zero_tile<1>();
        zero_tile<2>();
        zero_tile<3>();
    }

    // sums += left right. The rows of left are `stride` numbers apart.
    void add(const bf16* left, long stride, const bf16* right) {
        load_tile<6>(right, TILE_BYTES);
        multiply<0, 4>(left, stride);
        if (rows_.count > 1) multiply<1, 5>(left, stride);
        if (rows_.count > 2) multiply<2, 4>(left, stride);
        if (rows_.count > 3) multiply<3, 5>(left, stride);
    }

    // Stores the sums as rows of sixteen.
    void store(float* sums) const {
        store_tile<0>(sums, TILE_BYTES);
        if (rows_.count > 1) store_tile<1>(sums + rows_.begin(1) * LANES, TILE_BYTES);
        if (rows_.count > 2) store_tile<2>(sums + rows_.begin(2) * LANES, TILE_BYTES);
        if (rows_.count > 3) store_tile<3>(sums + rows_.begin(3) * LANES, TILE_BYTES);
    }

  private:
    template <int TILE, int LEFT>
    void multiply(const bf16* left, long stride) {
        load_tile<LEFT>(left + rows_.begin(TILE) * stride, stride * 2);
        multiply_bf16<TILE, LEFT, 6>();
    }

    RowTiles rows_;
    Tiles tiles_;
};

// out [m, ranks] = x [m, k] times up to sixteen rows of A, times their scales if there are any. The rows of out are
// `stride` apart.
template <class W>
void shrink_by_tiles(long m, const bf16* x, long k, const W* a, const W* next, long ranks, const float* scales,
                     bf16* out, long stride) {
    alignas(64) bf16 right[TILE_DEPTH * LANES], tail[TILE_RUN * TILE_DEPTH] = {};
    alignas(64) float sums[TILE_RUN * LANES];
    RunTiles run(m);
    long whole = k / TILE_DEPTH * TILE_DEPTH;
    for (long i = 0; i < whole; i += TILE_DEPTH) {
        pack_ranks(a + i, next + i, k, ranks, TILE_DEPTH, right);
        run.add(x + i, k, right);
    }
    if (whole < k) {
        for (long row = 0; row < m; row++)
            std::memcpy(tail + row * TILE_DEPTH, x + row * k + whole, (k - whole) * sizeof(bf16));
        pack_ranks(a + whole, next + whole, k, ranks, k - whole, right);
        run.add(tail, TILE_DEPTH, right);
    }
    run.store(sums);
    Floats scale = scales ? load_first(scales, int(ranks)) : splat(1);
    for (long row = 0; row < m; row++) store_first(out + row * stride, load(sums + row * LANES) * scale, int(ranks));
}

// out [m, outputs] += shrunk [m, ranks] times B [ranks, outputs]. The rows of out are `out_stride` apart, those of B
// `width` and those of shrunk `stride`. shrunk is read as whole tiles, so finite numbers must follow its rows.
template <class W>
void expand_by_tiles(long m, const bf16* shrunk, long stride, long ranks, const W* b, long width, const W* next,
                     long next_width, bf16* out, long out_stride, long outputs) {
    alignas(64) bf16 right[TILE_DEPTH * LANES];
    alignas(64) float sums[TILE_RUN * LANES];
    RunTiles run(m);
    for (long i = 0; i < outputs; i += LANES) {
        int columns = int(outputs - i < LANES ? outputs - i : LANES);
        run.zero();
        for (long r = 0; r < ranks; r += TILE_DEPTH) {
            pack_outputs(b + r * width + i, width, next + r * next_width + i, next_width, ranks - r, columns, right);
            run.add(shrunk + r, stride, right);
        }
        run.store(sums);
        for (long row = 0; row < m; row++) {
            bf16* to = out + row * out_stride + i;
            store_first(to, load_first(to, columns) + load(sums + row * LANES), columns);
        }
    }
}

#endif

}  // namespace loraplex
