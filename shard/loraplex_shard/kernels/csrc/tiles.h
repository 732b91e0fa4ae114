// Products of tiles with the processor's matrix unit (Intel AMX): sixteen rows of sixty-four bytes at a time.
//
// A panel of a weight has sixteen columns and pairs of bfloat16 (or fours of int8) along k, so a piece of it is a
// right-hand tile as it is in memory. The instructions are inline assembly because g++ 12's intrinsics do not tell the
// compiler which memory they read and write.
#pragma once

#include "common.h"

namespace loraplex {

constexpr long TILE_ROWS = 16;
constexpr long TILE_BYTES = 64;              // bytes per row
constexpr long TILE_DEPTH = TILE_BYTES / 2;  // bfloat16 numbers along k in a tile
constexpr long FEWEST_TILE_ROWS = 8;         // rows of x; with fewer, vectors are as fast as memory is read

#if defined(__AVX512BF16__)

// Loads n numbers as bfloat16 in the lower halves of 32-bit lanes. Bytes are converted exactly.
inline __m512i low_halves(const bf16* p, long n = LANES) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16((1 << n) - 1), p));
}
inline __m512i low_halves(const std::int8_t* p, long n = LANES) {
    __m128i bytes = _mm_maskz_loadu_epi8(__mmask16((1 << n) - 1), p);
    return _mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))), 16);
}

// Interleaves two rows of lower halves as the pairs of a right-hand tile.
inline void pair_up(__m512i first, __m512i second, bf16* pairs) {
    _mm512_storeu_si512(pairs, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
}

#endif

#if !defined(__AMX_BF16__)

constexpr bool HAS_TILES = false;

#else

constexpr bool HAS_TILES = true;

// Divides m rows into tiles of the same height. The last two tiles may overlap, and compute the shared rows twice, so
// that no tile reads past the last row of x.
struct RowTiles {
    long m, count, height;
    explicit RowTiles(long m) : m(m), count((m + TILE_ROWS - 1) / TILE_ROWS), height((m + count - 1) / count) {}
    long begin(long tile) const { return tile * height < m - height ? tile * height : m - height; }
};

// Configures the tile registers of this thread for as long as the object lives. 0 to 3 are sums: `rows` rows of sixteen
// 32-bit numbers. 4 and 5 are left-hand sides: `rows` rows of `depth` bytes. 6 and 7 are right-hand sides: depth / 4
// rows of sixteen columns. The process must have permission to use them (library.py asks for it).
class Tiles {
  public:
    Tiles(long rows, long depth) {
        struct alignas(64) {
            std::uint8_t palette = 1, start = 0, reserved[14] = {};
            std::uint16_t bytes[16] = {};
            std::uint8_t rows[16] = {};
        } shapes;
        for (int tile = 0; tile < 8; tile++) {
            shapes.rows[tile] = std::uint8_t(tile < 6 ? rows : depth / 4);
            shapes.bytes[tile] = std::uint16_t(tile == 4 || tile == 5 ? depth : TILE_BYTES);
        }
        asm volatile("ldtilecfg %0" ::"m"(shapes));
    }
    ~Tiles() { asm volatile("tilerelease" ::: "memory"); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

template <int TILE>
[[gnu::always_inline]] inline void zero_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
}

// `stride` is in bytes.
template <int TILE>
[[gnu::always_inline]] inline void load_tile(const void* from, long stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE) : "memory");
}

template <int TILE>
[[gnu::always_inline]] inline void store_tile(void* to, long stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(TILE) : "memory");
}

// sums += left right, for pairs of bfloat16.
template <int SUMS, int LEFT, int RIGHT>
[[gnu::always_inline]] inline void multiply_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(LEFT), "i"(RIGHT));
}

// sums += left right, for fours of signed bytes.
template <int SUMS, int LEFT, int RIGHT>
[[gnu::always_inline]] inline void multiply_int8() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(LEFT), "i"(RIGHT));
}

// sums += x panels over one tile's depth of k, for one or two row tiles of x and one or two panels.
template <bool TWO_ROWS, bool TWO_PANELS>
[[gnu::always_inline]] inline void multiply_step(const bf16* x0, const bf16* x1, long stride, const bf16* panel0,
                                                 const bf16* panel1) {
    load_tile<4>(x0, stride * 2);
    load_tile<6>(panel0, TILE_BYTES);
    multiply_bf16<0, 4, 6>();
    if constexpr (TWO_PANELS) {
        load_tile<7>(panel1, TILE_BYTES);
        multiply_bf16<1, 4, 7>();
    }
    if constexpr (TWO_ROWS) {
        load_tile<5>(x1, stride * 2);
        multiply_bf16<2, 5, 6>();
        if constexpr (TWO_PANELS) multiply_bf16<3, 5, 7>();
    }
}

#endif

}  // namespace loraplex
