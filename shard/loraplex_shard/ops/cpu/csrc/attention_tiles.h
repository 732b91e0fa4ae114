// The two products of attention by tiles, for many rows of bfloat16 queries and SPAN blocks of the cache, of bfloat16 or
// int8, at once. Used by attention.cpp; knows neither masks nor softmax nor scales.
#pragma once

#include "common.h"
#include "tiles.h"

#if defined(__AMX_BF16__)

namespace loraplex {

constexpr long TILE_BLOCKS = 4;                     // of the cache, whose positions are the columns of four tiles
constexpr long TILE_SPAN = TILE_BLOCKS * LANES;     // positions

// A block's keys [head_dim][16] as a panel of sixteen columns: [head_dim / 2][16][2].
template <class C>
void pack_keys(const C* keys, long head_dim, bf16* panel) {
    for (long d = 0; d < head_dim; d += 2)
        pair_up(low_halves(keys + d * LANES), low_halves(keys + (d + 1) * LANES), panel + d * LANES);
}

// The values [16][head_dim] of a block, of which `positions` are a sequence's, into the panels of a span, one for every
// sixteen dimensions: [head_dim / 16][TILE_SPAN / 2][16][2]. What is not the sequence's becomes 0, since it may be NaN.
template <class C>
void pack_values(const C* values, long head_dim, long block, long positions, bf16* panels) {
    auto row = [&](long d, long j) {
        return j < positions ? low_halves(values + j * head_dim + d) : _mm512_setzero_si512();
    };
    for (long d = 0; d < head_dim; d += LANES)
        for (long j = 0; j < LANES; j += 2)
            pair_up(row(d, j), row(d, j + 1), panels + (d * TILE_SPAN) + (block * LANES + j) * LANES);
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

// out [16, head_dim] += weights [16, TILE_SPAN], `stride` apart, times the panels of a span's values.
inline void add_value_tiles(const bf16* weights, long stride, long head_dim, const bf16* panels, float* out) {
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

}  // namespace loraplex

#endif
