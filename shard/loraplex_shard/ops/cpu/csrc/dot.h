// Dot products of small integers: one group of a panel's sixteen rows with M rows of activations.
//
// Weights lie in fours of k, [group / 4][16][4] bytes: int8 as they are; int4 unsigned, two to a byte, the fours of the
// group's first half in the low and those of its second half in the high nibbles. Activations are int8 in [-127, 127].
#pragma once

#include "vec.h"

namespace loraplex {

#if defined(__AVX512VNNI__)

constexpr int DOT_ROWS = 12;

inline __m512i four(const std::int8_t* x) {
    int quad;
    std::memcpy(&quad, x, 4);
    return _mm512_set1_epi32(quad);
}

template <int M>
inline void dot_int8(const std::uint8_t* w, int group, const std::int8_t* x, long stride, Floats* sums) {
    __m512i totals[M], bias = _mm512_setzero_si512(), offset = _mm512_set1_epi8(char(0x80));
    for (int m = 0; m < M; m++) totals[m] = _mm512_setzero_si512();
    for (int i = 0; i < group; i += 4, w += 64) {
        __m512i weights = _mm512_loadu_si512(w);
        bias = _mm512_dpbusd_epi32(bias, offset, weights);
        // One factor must be unsigned: x + 128, of which the weights' part of 128 is taken off again.
        for (int m = 0; m < M; m++)
            totals[m] = _mm512_dpbusd_epi32(totals[m], _mm512_xor_si512(four(x + m * stride + i), offset), weights);
    }
    for (int m = 0; m < M; m++) sums[m].v = _mm512_cvtepi32_ps(_mm512_sub_epi32(totals[m], bias));
}

template <int M>
inline void dot_int4(const std::uint8_t* w, int group, const std::int8_t* x, long stride, Floats* sums) {
    __m512i totals[M], low = _mm512_set1_epi8(15);
    for (int m = 0; m < M; m++) totals[m] = _mm512_setzero_si512();
    for (int i = 0; i < group / 2; i += 4, w += 64) {
        __m512i both = _mm512_loadu_si512(w);
        __m512i first = _mm512_and_si512(both, low), second = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
        for (int m = 0; m < M; m++) {
            totals[m] = _mm512_dpbusd_epi32(totals[m], first, four(x + m * stride + i));
            totals[m] = _mm512_dpbusd_epi32(totals[m], second, four(x + m * stride + i + group / 2));
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
inline void dot_int8(const std::uint8_t* w, int group, const std::int8_t* x, long stride, Floats* sums) {
    __m256i a[M], b[M], ones = _mm256_set1_epi16(1);
    for (int m = 0; m < M; m++) a[m] = b[m] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int i = 0; i < group; i += 4, w += 64) {
        __m256i wa = _mm256_loadu_si256((const __m256i*)w), wb = _mm256_loadu_si256((const __m256i*)(w + 32));
        __m256i pa = _mm256_abs_epi8(wa), pb = _mm256_abs_epi8(wb);
        for (int m = 0; m < M; m++) {
            __m256i v = four(x + m * stride + i);
            // Two products of at most 128 * 127 fit into 16 bits.
            __m256i da = _mm256_maddubs_epi16(pa, _mm256_sign_epi8(v, wa));
            __m256i db = _mm256_maddubs_epi16(pb, _mm256_sign_epi8(v, wb));
            a[m] = _mm256_add_epi32(a[m], _mm256_madd_epi16(da, ones));
            b[m] = _mm256_add_epi32(b[m], _mm256_madd_epi16(db, ones));
        }
    }
    for (int m = 0; m < M; m++) sums[m] = {_mm256_cvtepi32_ps(a[m]), _mm256_cvtepi32_ps(b[m])};
}

template <int M>
inline void dot_int4(const std::uint8_t* w, int group, const std::int8_t* x, long stride, Floats* sums) {
    __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15);
    __m256i totals_a[M], totals_b[M];
    for (int m = 0; m < M; m++) totals_a[m] = totals_b[m] = _mm256_setzero_si256();
    for (int begin = 0; begin < group / 2; begin += 16) {
        // Sixteen products of at most 15 * 127 fit into 16 bits.
        __m256i a[M], b[M];
        for (int m = 0; m < M; m++) a[m] = b[m] = _mm256_setzero_si256();
        for (int i = begin; i < begin + 16; i += 4, w += 64) {
            __m256i wa = _mm256_loadu_si256((const __m256i*)w), wb = _mm256_loadu_si256((const __m256i*)(w + 32));
            __m256i first_a = _mm256_and_si256(wa, low), second_a = _mm256_and_si256(_mm256_srli_epi16(wa, 4), low);
            __m256i first_b = _mm256_and_si256(wb, low), second_b = _mm256_and_si256(_mm256_srli_epi16(wb, 4), low);
            for (int m = 0; m < M; m++) {
                __m256i v = four(x + m * stride + i), u = four(x + m * stride + i + group / 2);
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
inline void dot_int8(const std::uint8_t* w, int group, const std::int8_t* x, long stride, Floats* sums) {
    for (int m = 0; m < M; m++)
        for (int lane = 0; lane < LANES; lane++) {
            int total = 0;
            for (int i = 0; i < group; i++)
                total += int(std::int8_t(w[i / 4 * 64 + lane * 4 + i % 4])) * x[m * stride + i];
            float value = float(total);
            std::memcpy((float*)&sums[m] + lane, &value, 4);
        }
}

template <int M>
inline void dot_int4(const std::uint8_t* w, int group, const std::int8_t* x, long stride, Floats* sums) {
    for (int m = 0; m < M; m++)
        for (int lane = 0; lane < LANES; lane++) {
            int total = 0;
            for (int i = 0; i < group / 2; i++) {
                int both = w[i / 4 * 64 + lane * 4 + i % 4];
                total += (both & 15) * x[m * stride + i] + (both >> 4) * x[m * stride + i + group / 2];
            }
            float value = float(total);
            std::memcpy((float*)&sums[m] + lane, &value, 4);
        }
}

#endif

}  // namespace loraplex
