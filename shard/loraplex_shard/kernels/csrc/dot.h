// Dot products of small integers: one group of a panel's sixteen rows with M rows of activations.
//
// Weights are stored in fours of k: [group / 4][16][4] bytes. 8-bit weights are int8. 4-bit weights are unsigned, two
// to a byte: the group's first half is in the low nibbles, its second half in the high ones. Activations are int8 in
// [-127, 127], interleaved word by word (see common.h).
#pragma once

#include "common.h"

namespace loraplex {

#if defined(__AVX512VNNI__)

constexpr int DOT_ROWS = 12;

// sums += products of fours, of unsigned w in sixteen columns and signed x in one word. This is inline assembly because
// g++ 12 copies the sums before and after its intrinsic.
[[gnu::always_inline]] inline void add_dot(__m512i& sums, __m512i w, const std::int8_t* x) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(w), "m"(*(const Word*)x));
}

template <int M>
inline void dot_int8(const std::uint8_t* w, int group, const std::int8_t* x, const int* x_sums, Floats* sums) {
    // One factor must be unsigned, so w + 128 is used. What the 128 adds is subtracted beforehand: x_sums are -128
    // times the rows' sums.
    __m512i totals[M], offset = _mm512_set1_epi8(char(0x80));
    for (int m = 0; m < M; m++) totals[m] = _mm512_set1_epi32(x_sums[m]);
    if (group < 32) __builtin_unreachable();  // otherwise g++ copies all sums, in case there is nothing to add
    for (int i = 0; i < group; i += 4, w += 64) {
        __m512i weights = _mm512_xor_si512(_mm512_loadu_si512(w), offset);
        for (int m = 0; m < M; m++) add_dot(totals[m], weights, x + i * M + 4 * m);
    }
    for (int m = 0; m < M; m++) sums[m].v = _mm512_cvtepi32_ps(totals[m]);
}

template <int M>
inline void dot_int4(const std::uint8_t* w, int group, const std::int8_t* x, Floats* sums) {
    __m512i totals[M], low = _mm512_set1_epi8(15);
    for (int m = 0; m < M; m++) totals[m] = _mm512_setzero_si512();
    if (group < 32) __builtin_unreachable();
    for (int i = 0; i < group / 2; i += 4, w += 64) {
        __m512i both = _mm512_loadu_si512(w);
        __m512i first = _mm512_and_si512(both, low), second = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
        for (int m = 0; m < M; m++) {
            add_dot(totals[m], first, x + i * M + 4 * m);
            add_dot(totals[m], second, x + (i + group / 2) * M + 4 * m);
        }
    }
    for (int m = 0; m < M; m++) sums[m].v = _mm512_cvtepi32_ps(totals[m]);
}

#elif defined(__AVX2__)

constexpr int DOT_ROWS = 5;

inline __m256i four(const std::int8_t* x) {
    int quad;
    std::memcpy(&quad, x, 4);
    return _mm256_set1_epi32(quad);
}

template <int M>
inline void dot_int8(const std::uint8_t* w, int group, const std::int8_t* x, const int*, Floats* sums) {
    __m256i a[M], b[M], ones = _mm256_set1_epi16(1);
    for (int m = 0; m < M; m++) a[m] = b[m] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int i = 0; i < group; i += 4, w += 64) {
        __m256i wa = _mm256_loadu_si256((const __m256i*)w), wb = _mm256_loadu_si256((const __m256i*)(w + 32));
        __m256i pa = _mm256_abs_epi8(wa), pb = _mm256_abs_epi8(wb);
        for (int m = 0; m < M; m++) {
            __m256i v = four(x + i * M + 4 * m);
            // The sum of two products of at most 128 * 127 fits into 16 bits.
            __m256i da = _mm256_maddubs_epi16(pa, _mm256_sign_epi8(v, wa));
            __m256i db = _mm256_maddubs_epi16(pb, _mm256_sign_epi8(v, wb));
            a[m] = _mm256_add_epi32(a[m], _mm256_madd_epi16(da, ones));
            b[m] = _mm256_add_epi32(b[m], _mm256_madd_epi16(db, ones));
        }
    }
    for (int m = 0; m < M; m++) sums[m] = {_mm256_cvtepi32_ps(a[m]), _mm256_cvtepi32_ps(b[m])};
}

template <int M>
inline void dot_int4(const std::uint8_t* w, int group, const std::int8_t* x, Floats* sums) {
    __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15);
    __m256i totals_a[M], totals_b[M];
    for (int m = 0; m < M; m++) totals_a[m] = totals_b[m] = _mm256_setzero_si256();
    for (int begin = 0; begin < group / 2; begin += 16) {
        // The sum of sixteen products of at most 15 * 127 fits into 16 bits.
        __m256i a[M], b[M];
        for (int m = 0; m < M; m++) a[m] = b[m] = _mm256_setzero_si256();
        for (int i = begin; i < begin + 16; i += 4, w += 64) {
            __m256i wa = _mm256_loadu_si256((const __m256i*)w), wb = _mm256_loadu_si256((const __m256i*)(w + 32));
            __m256i first_a = _mm256_and_si256(wa, low), second_a = _mm256_and_si256(_mm256_srli_epi16(wa, 4), low);
            __m256i first_b = _mm256_and_si256(wb, low), second_b = _mm256_and_si256(_mm256_srli_epi16(wb, 4), low);
            for (int m = 0; m < M; m++) {
                __m256i v = four(x + i * M + 4 * m), u = four(x + (i + group / 2) * M + 4 * m);
                a[m] = _mm256_add_epi16(a[m], _mm256_maddubs_epi16(first_a, v));
                b[m] = _mm256_add_epi16(b[m], _mm256_maddubs_epi16(first_b, v));
                a[m] = _mm256_add_epi16(a[m], _mm256_maddubs_epi16(second_a, u));
                b[m] = _mm256_add_epi16(b[m], _mm256_maddubs_epi16(second_b, u));
            }
        }
        for (int m = 0; m < M; m++) {
            totals_a[m] = _mm256_add_epi32(totals_a[m], _mm256_madd_epi16(a[m], ones));
            totals_b[m] = _mm256_add_epi32(totals_b[m], _mm256_madd_epi16(b[m], ones));
        }
    }
    for (int m = 0; m < M; m++) sums[m] = {_mm256_cvtepi32_ps(totals_a[m]), _mm256_cvtepi32_ps(totals_b[m])};
}

#else

constexpr int DOT_ROWS = 4;

template <int M>
inline void dot_int8(const std::uint8_t* w, int group, const std::int8_t* x, const int*, Floats* sums) {
    for (int m = 0; m < M; m++)
        for (int lane = 0; lane < LANES; lane++) {
            int total = 0;
            for (int i = 0; i < group; i++)
                total += int(std::int8_t(w[i / 4 * 64 + lane * 4 + i % 4])) * x[i / 4 * 4 * M + 4 * m + i % 4];
            float value = float(total);
            std::memcpy((float*)&sums[m] + lane, &value, 4);
        }
}

template <int M>
inline void dot_int4(const std::uint8_t* w, int group, const std::int8_t* x, Floats* sums) {
    for (int m = 0; m < M; m++)
        for (int lane = 0; lane < LANES; lane++) {
            int total = 0;
            for (int i = 0; i < group / 2; i++) {
                int both = w[i / 4 * 64 + lane * 4 + i % 4];
                total += (both & 15) * x[i / 4 * 4 * M + 4 * m + i % 4] +
                         (both >> 4) * x[(i / 4 * 4 + group / 2) * M + 4 * m + i % 4];
            }
            float value = float(total);
            std::memcpy((float*)&sums[m] + lane, &value, 4);
        }
}

#endif

}  // namespace loraplex
