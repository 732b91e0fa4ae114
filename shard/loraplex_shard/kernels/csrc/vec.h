// Sixteen float lanes, with any instruction set: one register with AVX-512, two with AVX2, an array without either. A
// panel of a weight and a block of the KV cache are sixteen wide too, so kernels are written once, for these lanes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace loraplex {

constexpr int LANES = 16;

using bf16 = std::uint16_t;  // the upper half of a float
using f16 = std::uint16_t;   // IEEE half

#if defined(__aarch64__)
using Half = __fp16;  // g++ before 13 has no _Float16 there
#else
using Half = _Float16;
#endif

inline float from_bf16(bf16 x) {
    std::uint32_t bits = std::uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline bf16 to_bf16(float x) {  // rounds to nearest even; NaN stays NaN
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return bf16(bits >> 16 | 0x40);
    return bf16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_f16(f16 x) {
    Half half;
    std::memcpy(&half, &x, 2);
    return float(half);
}

inline f16 to_f16(float x) {
    Half half = Half(x);
    f16 bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}

#if defined(__AVX512F__)

struct Floats {
    __m512 v;
};
inline Floats zeros() { return {_mm512_setzero_ps()}; }
inline Floats splat(float x) { return {_mm512_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Floats load(const bf16* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
inline Floats load_f16(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline Floats load(const std::int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
inline void store(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
inline __m512i upper_halves(Floats a) {  // rounded to nearest even, as 32-bit integers
    __m512i bits = _mm512_castps_si512(a.v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    return _mm512_srli_epi32(_mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000)), 16);
}
#if defined(__AVX512BF16__)
inline void store(bf16* p, Floats a) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(a.v)); }
#else
inline void store(bf16* p, Floats a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(upper_halves(a))); }
#endif
// Loads sixteen pairs of neighbours: the first number and the second number of each pair, as floats.
inline void load_pairs(const bf16* p, Floats& first, Floats& second) {
    __m512i bits = _mm512_loadu_si512(p);
    first.v = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    second.v = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(int(0xffff0000))));
}
inline void store_pairs(bf16* p, Floats first, Floats second) {
    __m512i upper = _mm512_slli_epi32(upper_halves(second), 16);
    _mm512_storeu_si512(p, _mm512_or_si512(upper_halves(first), upper));
}
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats abs(Floats a) { return {_mm512_abs_ps(a.v)}; }
inline float sum(Floats a) { return _mm512_reduce_add_ps(a.v); }
// The sums of four vectors, in a third of the instructions that four single sums would take.
inline __m128 sums(Floats a, Floats b, Floats c, Floats d) {
    auto halves = [](__m512 x, __m512 y) { return _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y)); };
    __m512d ab = _mm512_castps_pd(halves(a.v, b.v)), cd = _mm512_castps_pd(halves(c.v, d.v));
    __m512 abcd =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
}
inline void store_sums(float* p, Floats a, Floats b, Floats c, Floats d) { _mm_storeu_ps(p, sums(a, b, c, d)); }
#if defined(__AVX512BF16__)
inline void store_sums(bf16* p, Floats a, Floats b, Floats c, Floats d) {
    _mm_storel_epi64((__m128i*)p, (__m128i)_mm_cvtneps_pbh(sums(a, b, c, d)));
}
#endif
inline float largest(Floats a) { return _mm512_reduce_max_ps(a.v); }
inline Floats nearest(Floats a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Floats times_power_of_two(Floats a, Floats n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline void store_int8(std::int8_t* p, Floats a) {
    _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

#elif defined(__AVX2__)

struct Floats {
    __m256 a, b;
};
inline Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats splat(float x) {
    __m256 v = _mm256_set1_ps(x);
    return {v, v};
}
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m256 widened(__m128i halves) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
inline Floats load(const bf16* p) {
    return {widened(_mm_loadu_si128((const __m128i*)p)), widened(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline Floats load_f16(const f16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline Floats load(const std::int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}
inline void store(float* p, Floats x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
inline __m256i upper_halves(__m256 x) {  // rounded to nearest even, as 32-bit integers
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}
inline void store(bf16* p, Floats x) {
    __m256i packed = _mm256_packus_epi32(upper_halves(x.a), upper_halves(x.b));
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
inline void load_pairs(const bf16* p, Floats& first, Floats& second) {
    __m256i a = _mm256_loadu_si256((const __m256i*)p), b = _mm256_loadu_si256((const __m256i*)(p + 16));
    __m256i upper = _mm256_set1_epi32(int(0xffff0000));
    first = {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
    second = {_mm256_castsi256_ps(_mm256_and_si256(a, upper)), _mm256_castsi256_ps(_mm256_and_si256(b, upper))};
}
inline void store_pairs(bf16* p, Floats first, Floats second) {
    __m256i a = _mm256_or_si256(upper_halves(first.a), _mm256_slli_epi32(upper_halves(second.a), 16));
    __m256i b = _mm256_or_si256(upper_halves(first.b), _mm256_slli_epi32(upper_halves(second.b), 16));
    _mm256_storeu_si256((__m256i*)p, a);
    _mm256_storeu_si256((__m256i*)(p + 16), b);
}
inline Floats fma(Floats x, Floats y, Floats z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Floats operator+(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats operator-(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Floats operator*(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Floats operator/(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Floats max(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Floats min(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Floats abs(Floats x) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline float sum(Floats x) {
    __m256 eight = _mm256_add_ps(x.a, x.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float largest(Floats x) {
    __m256 eight = _mm256_max_ps(x.a, x.b);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
inline Floats nearest(Floats x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
inline __m256 scaled(__m256 x, __m256 n) {  // n in [-126, 127]
    __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(exponent));
}
inline Floats times_power_of_two(Floats x, Floats n) { return {scaled(x.a, n.a), scaled(x.b, n.b)}; }
inline void store_int8(std::int8_t* p, Floats x) {
    __m256i words =
        _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)), 0xd8);
    _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

#else

struct Floats {
    float v[LANES];
};
template <class F>
inline Floats each(F f) {
    Floats out;
    for (int i = 0; i < LANES; i++) out.v[i] = f(i);
    return out;
}
// clang-format off
inline Floats zeros() { return each([](int) { return 0.0f; }); }
inline Floats splat(float x) { return each([=](int) { return x; }); }
inline Floats load(const float* p) { return each([=](int i) { return p[i]; }); }
inline Floats load(const bf16* p) { return each([=](int i) { return from_bf16(p[i]); }); }
inline Floats load_f16(const f16* p) { return each([=](int i) { return from_f16(p[i]); }); }
inline Floats load(const std::int8_t* p) { return each([=](int i) { return float(p[i]); }); }
inline void store(float* p, Floats a) { std::memcpy(p, a.v, sizeof a.v); }
inline void store(bf16* p, Floats a) {
    for (int i = 0; i < LANES; i++) p[i] = to_bf16(a.v[i]);
}
inline void load_pairs(const bf16* p, Floats& first, Floats& second) {
    first = each([=](int i) { return from_bf16(p[2 * i]); });
    second = each([=](int i) { return from_bf16(p[2 * i + 1]); });
}
inline void store_pairs(bf16* p, Floats first, Floats second) {
    for (int i = 0; i < LANES; i++) {
        p[2 * i] = to_bf16(first.v[i]);
        p[2 * i + 1] = to_bf16(second.v[i]);
    }
}
inline Floats fma(Floats a, Floats b, Floats c) { return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
inline Floats operator+(Floats a, Floats b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
inline Floats operator-(Floats a, Floats b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
inline Floats operator*(Floats a, Floats b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
inline Floats operator/(Floats a, Floats b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
inline Floats max(Floats a, Floats b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline Floats min(Floats a, Floats b) { return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline Floats abs(Floats a) { return each([&](int i) { return std::fabs(a.v[i]); }); }
inline float sum(Floats a) {
    float total = 0;
    for (float x : a.v) total += x;
    return total;
}
inline float largest(Floats a) {
    float most = a.v[0];
    for (float x : a.v) most = x > most ? x : most;
    return most;
}
inline Floats nearest(Floats a) { return each([&](int i) { return std::nearbyint(a.v[i]); }); }
// clang-format on
inline Floats times_power_of_two(Floats a, Floats n) {
    return each([&](int i) { return std::ldexp(a.v[i], int(n.v[i])); });
}
inline void store_int8(std::int8_t* p, Floats a) {
    for (int i = 0; i < LANES; i++) {
        float x = std::nearbyint(a.v[i]);
        p[i] = std::int8_t(x > 127 ? 127 : x < -128 ? -128 : x);
    }
}

#endif

#if !defined(__AVX512F__)
inline void store_sums(float* p, Floats a, Floats b, Floats c, Floats d) {
    p[0] = sum(a);
    p[1] = sum(b);
    p[2] = sum(c);
    p[3] = sum(d);
}
#endif

// These load and store the first n lanes. Other lanes become 0 (load) or stay as they are (store).
template <class T>
[[gnu::always_inline]] inline Floats load_first(const T* p, int n) {
    if (n >= LANES) return load(p);
    T padded[LANES] = {};
    std::memcpy(padded, p, n * sizeof(T));
    return load(padded);
}

template <class T>
[[gnu::always_inline]] inline void store_first(T* p, Floats a, int n) {
    if (n >= LANES) return store(p, a);
    T padded[LANES];
    store(padded, a);
    std::memcpy(p, padded, n * sizeof(T));
}

// e to the power of x, for x <= 88, with a relative error below 2e-7; about 1e-38 for x below -87. With
// x = n ln 2 + r, a polynomial of degree 6 for r in [-ln 2 / 2, ln 2 / 2] (Cephes' expf).
inline Floats exp(Floats x) {
    x = max(x, splat(-87.3f));
    Floats n = nearest(x * splat(1.44269504f));
    Floats r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    Floats p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r + splat(1.0f));
    return times_power_of_two(p, n);
}

// cap * tanh(x / cap)
inline Floats soft_capped(Floats x, float cap) {
    Floats e = exp(min(x * splat(2 / cap), splat(80.0f)));
    return splat(cap) * ((e - splat(1.0f)) / (e + splat(1.0f)));
}

// x *= factor
template <class T>
inline void multiply(T* x, long n, float factor) {
    for (long i = 0; factor != 1 && i < n; i += LANES) {
        int count = int(n - i < LANES ? n - i : LANES);
        store_first(x + i, load_first(x + i, count) * splat(factor), count);
    }
}

}  // namespace loraplex
