// The two products of attention, for sixteen rows of bfloat16 queries and SPAN blocks of a bfloat16 or int8 cache at
// once: with tiles (AMX), or with vectors of pairs (AVX512_BF16). attention.cpp uses them and does the masks, the
// softmax and the scales.
#pragma once

#include "common.h"
#include "tiles.h"

#if defined(__AVX512BF16__)

namespace loraplex {

constexpr long TILE_BLOCKS = 4;                  // cache blocks; their positions are the columns of four tiles
constexpr long TILE_SPAN = TILE_BLOCKS * LANES;  // positions

// Packs a block's keys [head_dim][16] as a panel of sixteen columns: [head_dim / 2][16][2].
template <class C>
void pack_keys(const C* keys, long head_dim, bf16* panel) {
    for (long d = 0; d < head_dim; d += 2)
        pair_up(low_halves(keys + d * LANES), low_halves(keys + (d + 1) * LANES), panel + d * LANES);
}

// Packs a block's values [16][head_dim] into the panels of a span, one for every sixteen dimensions:
// [head_dim / 16][TILE_SPAN / 2][16][2]. The first `positions` values are the sequence's. The others become 0, since
// they may be NaN.
template <class C>
void pack_values(const C* values, long head_dim, long block, long positions, bf16* panels) {
    auto row = [&](long d, long j) {
        return j < positions ? low_halves(values + j * head_dim + d) : _mm512_setzero_si512();
    };
    for (long d = 0; d < head_dim; d += LANES)
        for (long j = 0; j < LANES; j += 2)
            pair_up(row(d, j), row(d, j + 1), panels + (d * TILE_SPAN) + (block * LANES + j) * LANES);
}

#if defined(__AMX_BF16__)

// Copies a query to row `row` of queries [.., head_dim].
inline void copy_query(const bf16* query, long head_dim, long row, bf16* queries) {
    std::memcpy(queries + row * head_dim, query, head_dim * sizeof(bf16));
}

// scores [16, TILE_SPAN] = query [16, head_dim] times the panels of four blocks' keys.
inline void score_tiles(const bf16* query, long head_dim, const bf16* panels, float* scores) {
    long panel = head_dim * LANES;
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
    for (long d = 0; d < head_dim; d += TILE_DEPTH, query += TILE_DEPTH, panels += TILE_DEPTH * LANES) {
        load_tile<4>(query, head_dim * 2);
        load_tile<6>(panels, TILE_BYTES);
        multiply_bf16<0, 4, 6>();
        load_tile<7>(panels + panel, TILE_BYTES);
        multiply_bf16<1, 4, 7>();
        load_tile<6>(panels + 2 * panel, TILE_BYTES);
        multiply_bf16<2, 4, 6>();
        load_tile<7>(panels + 3 * panel, TILE_BYTES);
        multiply_bf16<3, 4, 7>();
    }
    store_tile<0>(scores, TILE_SPAN * 4);
    store_tile<1>(scores + LANES, TILE_SPAN * 4);
    store_tile<2>(scores + 2 * LANES, TILE_SPAN * 4);
    store_tile<3>(scores + 3 * LANES, TILE_SPAN * 4);
}

// out [16, head_dim] += weights [16, TILE_SPAN] times the panels of a span's values. A row of weights is in the first
// half of a row of float32 numbers.
inline void add_value_tiles(const bf16* weights, long head_dim, const bf16* panels, float* out) {
    constexpr long stride = 2 * TILE_SPAN;
    load_tile<4>(weights, stride * 2);
    load_tile<5>(weights + TILE_DEPTH, stride * 2);
    constexpr long panel = TILE_SPAN * LANES;
    for (long d = 0; d < head_dim; d += 2 * LANES, out += 2 * LANES, panels += 2 * panel) {
        load_tile<0>(out, head_dim * 4);
        load_tile<1>(out + LANES, head_dim * 4);
        load_tile<6>(panels, TILE_BYTES);
        multiply_bf16<0, 4, 6>();
        load_tile<7>(panels + panel, TILE_BYTES);
        multiply_bf16<1, 4, 7>();
        load_tile<6>(panels + TILE_DEPTH * LANES, TILE_BYTES);
        multiply_bf16<0, 5, 6>();
        load_tile<7>(panels + panel + TILE_DEPTH * LANES, TILE_BYTES);
        multiply_bf16<1, 5, 7>();
        store_tile<0>(out, head_dim * 4);
        store_tile<1>(out + LANES, head_dim * 4);
    }
}

#else

// Copies a query to row `row` of queries. Sixteen rows are interleaved word by word (see common.h):
// [.. / 16][head_dim / 2][16][2].
inline void copy_query(const bf16* query, long head_dim, long row, bf16* queries) {
    Word* words = (Word*)(queries + row / TILE_ROWS * TILE_ROWS * head_dim) + row % TILE_ROWS;
    for (long i = 0; i < head_dim / 2; i++) std::memcpy(words + i * TILE_ROWS, query + 2 * i, sizeof(Word));
}

// sums [16] += pairs of sixteen rows times a panel. Rows are STRIDE words apart, and the pairs of a row STEP words.
template <long STRIDE, long STEP>
[[gnu::always_inline]] inline void add_pairs(const Word* x, long pairs, const bf16* panel, __m512* sums) {
    for (long i = 0; i < pairs; i++, x += STEP, panel += 2 * LANES) {
        __m512bh w = (__m512bh)_mm512_loadu_si512(panel);
#pragma GCC unroll 16
        for (long m = 0; m < TILE_ROWS; m++) add_pair(sums[m], w, x + m * STRIDE);
    }
}

inline void score_tiles(const bf16* query, long head_dim, const bf16* panels, float* scores) {
    for (long block = 0; block < TILE_BLOCKS; block++, panels += head_dim * LANES) {
        __m512 sums[TILE_ROWS] = {};
        add_pairs<1, TILE_ROWS>((const Word*)query, head_dim / 2, panels, sums);
#pragma GCC unroll 16
        for (long m = 0; m < TILE_ROWS; m++) _mm512_storeu_ps(scores + m * TILE_SPAN + block * LANES, sums[m]);
    }
}

inline void add_value_tiles(const bf16* weights, long head_dim, const bf16* panels, float* out) {
    for (long d = 0; d < head_dim; d += LANES, panels += TILE_SPAN * LANES) {
        __m512 sums[TILE_ROWS];
#pragma GCC unroll 16
        for (long m = 0; m < TILE_ROWS; m++) sums[m] = _mm512_loadu_ps(out + m * head_dim + d);
        add_pairs<TILE_SPAN, 1>((const Word*)weights, TILE_SPAN / 2, panels, sums);
#pragma GCC unroll 16
        for (long m = 0; m < TILE_ROWS; m++) _mm512_storeu_ps(out + m * head_dim + d, sums[m]);
    }
}

#endif

}  // namespace loraplex

#endif
