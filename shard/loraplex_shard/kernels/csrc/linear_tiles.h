// out = x W^T with tiles (AMX), for x and panels of W in bfloat16. Sums are float32. Used by linear.cpp.
#pragma once

#include "team.h"
#include "tiles.h"

#if defined(__AMX_BF16__)

namespace loraplex {

constexpr long BLOCK_TILES = 16;  // row tiles of x that stay in the cache while all panels are read

struct Panels {  // one panel, or two that follow each other
    const bf16* first;
    const bf16* second;
    const bf16* tails;  // the rest of the panels after the last whole tile of k, padded with zeros
};

template <bool TWO_ROWS, bool TWO_PANELS>
void tile_rows(const bf16* x0, const bf16* x1, long stride, const Panels& panels, float* sums) {
    zero_tile<0>();
    if constexpr (TWO_PANELS) zero_tile<1>();
    if constexpr (TWO_ROWS) zero_tile<2>();
    if constexpr (TWO_ROWS && TWO_PANELS) zero_tile<3>();
    long whole = panels.tails ? stride - TILE_DEPTH : stride;
    for (long i = 0; i < whole; i += TILE_DEPTH)
        multiply_step<TWO_ROWS, TWO_PANELS>(x0 + i, x1 + i, stride, panels.first + i * LANES,
                                            panels.second + i * LANES);
    if (panels.tails)
        multiply_step<TWO_ROWS, TWO_PANELS>(x0 + whole, x1 + whole, stride, panels.tails,
                                            panels.tails + TILE_DEPTH * LANES);
    constexpr long tile = TILE_ROWS * LANES;
    store_tile<0>(sums, TILE_BYTES);
    if constexpr (TWO_PANELS) store_tile<1>(sums + tile, TILE_BYTES);
    if constexpr (TWO_ROWS) store_tile<2>(sums + 2 * tile, TILE_BYTES);
    if constexpr (TWO_ROWS && TWO_PANELS) store_tile<3>(sums + 3 * tile, TILE_BYTES);
}

inline void add_bias(const float* sums, long rows, const bf16* bias, bf16* out, long n, long columns) {
    int first = int(columns < LANES ? columns : LANES);
    Floats start = bias ? load_first(bias, first) : zeros();
    for (long row = 0; row < rows; row++) store_first(out + row * n, load(sums + row * LANES) + start, first);
}

// Multiplies a block of row tiles of x with one panel, which gives columns [column, column + 16) of out, or with that
// panel and the next. The `stride` of x is a multiple of a tile's depth; `k` is the depth of the panels.
template <bool TWO_PANELS>
void rows_by_tiles(const RowTiles& tiles, long first_tile, const bf16* x, long stride, long k, const bf16* panel,
                   const bf16* bias, bf16* out, long n, long column) {
    alignas(64) bf16 tails[2 * TILE_DEPTH * LANES] = {};
    alignas(64) float sums[4 * TILE_ROWS * LANES];
    Panels panels{panel, panel + k * LANES, k == stride ? nullptr : tails};
    long whole = k / TILE_DEPTH * TILE_DEPTH;
    for (int p = 0; p < 1 + TWO_PANELS; p++)
        std::memcpy(tails + p * TILE_DEPTH * LANES, panel + (p * k + whole) * LANES,
                    (k - whole) * LANES * sizeof(bf16));
    long end = first_tile + BLOCK_TILES < tiles.count ? first_tile + BLOCK_TILES : tiles.count;
    for (long t = first_tile; t < end; t += 2) {
        bool two = t + 1 < end;
        long begin[] = {tiles.begin(t), two ? tiles.begin(t + 1) : 0};
        (two ? tile_rows<true, TWO_PANELS> : tile_rows<false, TWO_PANELS>)(x + begin[0] * stride, x + begin[1] * stride,
                                                                           stride, panels, sums);
        for (int r = 0; r < 1 + two; r++)
            for (int p = 0; p < 1 + TWO_PANELS; p++) {
                long at = column + p * LANES;
                add_bias(sums + (2 * r + p) * TILE_ROWS * LANES, tiles.height, bias ? bias + at : nullptr,
                         out + begin[r] * n + at, n, n - at);
            }
    }
}

inline void linear_by_tiles(int threads, long m, long n, long k, const bf16* x, const bf16* weight, const bf16* bias,
                            bf16* out) {
    static thread_local Scratch scratch;
    long stride = (k + TILE_DEPTH - 1) / TILE_DEPTH * TILE_DEPTH, even = (k + 1) / 2 * 2;
    bf16* filled = stride == k ? nullptr : scratch.get<bf16>(m * stride);
    const bf16* rows = filled ? filled : x;
    RowTiles row_tiles(m);
    long panels = (n + LANES - 1) / LANES, pairs = (panels + 1) / 2;
    Shares shares((row_tiles.count + BLOCK_TILES - 1) / BLOCK_TILES * pairs, threads);
    parallel(threads, [&](Member me) {
        if (filled) {
            Range mine = me.share(m);
            for (long i = mine.begin; i < mine.end; i++) {
                std::memcpy(filled + i * stride, x + i * k, k * sizeof(bf16));
                std::memset(filled + i * stride + k, 0, (stride - k) * sizeof(bf16));
            }
            me.barrier();
        }
        Tiles tiles(row_tiles.height, TILE_BYTES);
        shares.each(me, [&](long i) {
            long p = i % pairs * 2;
            (p + 1 < panels ? rows_by_tiles<true> : rows_by_tiles<false>)(row_tiles, i / pairs * BLOCK_TILES, rows,
                                                                          stride, even, weight + p * even * LANES, bias,
                                                                          out, n, p * LANES);
        });
    });
}

}  // namespace loraplex

#endif
