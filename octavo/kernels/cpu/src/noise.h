/* The noise of sampling: exponential variables that depend only on (seed, position, stream, token).
 *
 * Integers: Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2,
 * 3", 2011). Key = (low, high word of the seed); counter = (token / 4, low word of the position,
 * stream, high word of the position). The word w of a token is output[token % 4].
 *
 * From w to G = -log(E), every step one correctly rounded float32 operation, nothing fused:
 *
 *   low half,  w <  2^31:  u = float(w)     * 2^-32 + 2^-33       u = (w + 1/2) / 2^32
 *                          y = 1 - u
 *                          E = u                                  if y == 1
 *                          E = -(log(y) * (u / (1 - y)))          otherwise: -log1p(-u)
 *   high half, w >= 2^31:  y = float(2^32 - 1 - w) * 2^-32 + 2^-33
 *                          E = -log(y)                            y = 1 - u
 *   G = -log(E)
 *
 * So small E, which decide draws, keep their relative precision (down to 2^-33), and so do large
 * ones. log(x), for x > 0 and not subnormal:
 *
 *   i = bits(x) - 0x3f3504f3;  e = i >> 23 (arithmetic);  f = from_bits(bits(x) - (e << 23)) - 1
 *   z = f * f
 *   p = c0;  p = p * f + c1; ... p = p * f + c8        (LOG_0 .. LOG_8)
 *   p = (p * f) * z;  p = p + e * -2.12194440e-4;  p = p - z * 0.5
 *   log = (f + p) + e * 0.693359375
 *
 * (the polynomial is Moshier's, Cephes logf). As no operation is fused, all levels and all vector
 * widths give the same bits. G lies in [-3.14, 22.88].
 */
#ifndef OCTAVO_NOISE_H
#define OCTAVO_NOISE_H

#include "vec.h"

#define GUMBEL_MAX 22.875f /* no G is larger */
#define NOISE_GROUP (4 * OC_VW) /* tokens whose noise is made at once */

#define LOG_0 7.0376836292e-2f
#define LOG_1 -1.1514610310e-1f
#define LOG_2 1.1676998740e-1f
#define LOG_3 -1.2420140846e-1f
#define LOG_4 1.4249322787e-1f
#define LOG_5 -1.6668057665e-1f
#define LOG_6 2.0000714765e-1f
#define LOG_7 -2.4999993993e-1f
#define LOG_8 3.3333331174e-1f

INLINE vf v_log(vf x) {
    const vi e = (vi)(v_bits_of(x) - 0x3f3504f3u) >> 23;
    const vf f = v_from_bits(v_bits_of(x) - ((vu)e << 23)) - 1.0f;
    const vf exponent = __builtin_convertvector(e, vf), z = f * f;
    vf p = v_splat(LOG_0);
    p = p * f + LOG_1;
    p = p * f + LOG_2;
    p = p * f + LOG_3;
    p = p * f + LOG_4;
    p = p * f + LOG_5;
    p = p * f + LOG_6;
    p = p * f + LOG_7;
    p = p * f + LOG_8;
    p = (p * f) * z;
    p = p + exponent * -2.12194440e-4f;
    p = p - z * 0.5f;
    return (f + p) + exponent * 0.693359375f;
}

/* E from the word of a token. */
INLINE vf v_exponential(vu w) {
    const vi high = (vi)w >> 31; /* all ones in the high half */
    const vu near = w ^ (vu)high; /* w, or 2^32 - 1 - w: below 2^31 either way */
    const vf u = __builtin_convertvector((vi)near, vf) * 0x1p-32f + 0x1p-33f;
    const vf one = v_splat(1.0f), zero = v_splat(0.0f);
    const vf rest = 1.0f - u;
    const vmask is_high = v_lt_i(high, (vi){0});
    const vf y = v_select(is_high, u, rest);
    const vf ratio = v_select(is_high, one, u / (1.0f - rest));
    return v_select(v_eq(y, one), u, zero - v_log(y) * ratio);
}

INLINE vf v_gumbel(vu w) { return 0.0f - v_log(v_exponential(w)); }

/* Not less than v_gumbel of the same words, at a tenth of its price. E >= u, and a float's bits, read
 * as a fixed-point number, are not more than its binary logarithm. The margin covers rounding. */
INLINE vf v_gumbel_bound(vu w) {
    const vu near = (w | (vu)((vi)w >> 31)) & 0x7fffffffu; /* the high half counts as its lowest word */
    const vf u = __builtin_convertvector((vi)near, vf) * 0x1p-32f + 0x1p-33f;
    const vi fixed = (vi)v_bits_of(u) - 0x3f800000; /* <= log2(u) * 2^23 */
    return __builtin_convertvector(fixed, vf) * (-0.6931472f * 0x1p-23f) + 0.001f;
}

/* Low and high words of a * m. */
INLINE void v_multiply(vu a, uint32_t m, vu *low, vu *high) {
#if OC_VW == 16
    const __m512i x = (__m512i)a, y = _mm512_set1_epi32((int)m);
    const __m512i even = _mm512_mul_epu32(x, y), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), y);
    *low = (vu)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
    *high = (vu)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
#elif OC_VW == 8
    const __m256i x = (__m256i)a, y = _mm256_set1_epi32((int)m);
    const __m256i even = _mm256_mul_epu32(x, y), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
    *low = (vu)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
    *high = (vu)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
#else
    for (int i = 0; i < OC_VW; i++) {
        const uint64_t product = (uint64_t)a[i] * m;
        (*low)[i] = (uint32_t)product;
        (*high)[i] = (uint32_t)(product >> 32);
    }
#endif
}

/* Ten rounds on OC_VW counters at once; counter and output are words by vector. */
INLINE void philox(vu counter[4], uint64_t seed) {
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        vu low0, high0, low1, high1;
        v_multiply(counter[0], 0xd2511f53u, &low0, &high0);
        v_multiply(counter[2], 0xcd9e8d57u, &low1, &high1);
        counter[0] = high1 ^ counter[1] ^ key0;
        counter[1] = low1;
        counter[2] = high0 ^ counter[3] ^ key1;
        counter[3] = low0;
        key0 += 0x9e3779b9u;
        key1 += 0xbb67ae85u;
    }
}

/* The words of tokens [first, first + NOISE_GROUP), in order; first is a multiple of 4.
 * Lane 4 L + q works on counter q * (OC_VW / 4) + L, so that a 4 x 4 transposition inside each
 * 128-bit part of the registers puts neighbouring tokens side by side. */
INLINE void noise_words(uint64_t seed, int64_t position, uint32_t stream, uint32_t first, vu words[4]) {
    const vu lane = (vu)v_iota();
    const vu counter = (lane & 3u) * (uint32_t)(OC_VW / 4) + (lane >> 2);
    vu c[4] = {counter + first / 4, v_splat_u((uint32_t)position), v_splat_u(stream),
               v_splat_u((uint32_t)((uint64_t)position >> 32))};
    philox(c, seed);
#if defined(__x86_64__)
#if OC_VW == 16
#define OC_UNPACK(op, a, b) _mm512_##op((__m512i)(a), (__m512i)(b))
#elif OC_VW == 8
#define OC_UNPACK(op, a, b) _mm256_##op((__m256i)(a), (__m256i)(b))
#else
#define OC_UNPACK(op, a, b) _mm_##op((__m128i)(a), (__m128i)(b))
#endif
    const vu a = (vu)OC_UNPACK(unpacklo_epi32, c[0], c[1]), b = (vu)OC_UNPACK(unpackhi_epi32, c[0], c[1]);
    const vu d = (vu)OC_UNPACK(unpacklo_epi32, c[2], c[3]), e = (vu)OC_UNPACK(unpackhi_epi32, c[2], c[3]);
    words[0] = (vu)OC_UNPACK(unpacklo_epi64, a, d);
    words[1] = (vu)OC_UNPACK(unpackhi_epi64, a, d);
    words[2] = (vu)OC_UNPACK(unpacklo_epi64, b, e);
    words[3] = (vu)OC_UNPACK(unpackhi_epi64, b, e);
#else
    for (int q = 0; q < 4; q++)
        for (int i = 0; i < OC_VW; i++) words[q][i] = c[i & 3][4 * (i / 4) + q];
#endif
}

#endif
