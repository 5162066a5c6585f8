/* One small vocabulary of vector operations for all instruction-set levels.
 *
 * A vector has OC_VW float lanes: the widest native register of the level (16, 8 or 4). Arithmetic
 * is written with the compilers' own operators on vector types (gcc and clang agree on them); only
 * what those cannot express (fused multiply-add, maximum, masks) is named here. Kernels must not
 * let a result depend on OC_VW where they promise equality between levels; inside one level the
 * same operations in the same order give the same bits.
 */
#ifndef OCTAVO_VEC_H
#define OCTAVO_VEC_H

#include "octavo_cpu.h"
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if OC_LEVEL >= OC_LEVEL_AVX512
#define OC_VW 16
#elif OC_LEVEL == OC_LEVEL_AVX2
#define OC_VW 8
#else
#define OC_VW 4
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vf __attribute__((vector_size(OC_VW * 4)));
typedef int32_t vi __attribute__((vector_size(OC_VW * 4)));
typedef uint32_t vu __attribute__((vector_size(OC_VW * 4)));
typedef float vf_any __attribute__((vector_size(OC_VW * 4), aligned(1), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(OC_VW * 4), aligned(1), may_alias));

INLINE vf v_load(const void *p) { return *(const vf_any *)p; }
INLINE vu v_load_u(const void *p) { return *(const vu_any *)p; }
INLINE void v_store(void *p, vf x) { *(vf_any *)p = x; }
INLINE void v_store_u(void *p, vu x) { *(vu_any *)p = x; }
#if OC_VW == 16
#define OC_LANES(x) {x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}
#elif OC_VW == 8
#define OC_LANES(x) {x, x, x, x, x, x, x, x}
#else
#define OC_LANES(x) {x, x, x, x}
#endif
INLINE vf v_splat(float x) { return (vf)OC_LANES(x); }
INLINE vu v_splat_u(uint32_t x) { return (vu)OC_LANES(x); }
INLINE vu v_bits_of(vf x) { return (vu)x; }
INLINE vf v_from_bits(vu x) { return (vf)x; }

INLINE vi v_iota(void) {
#if OC_VW == 16
    return (vi){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif OC_VW == 8
    return (vi){0, 1, 2, 3, 4, 5, 6, 7};
#else
    return (vi){0, 1, 2, 3};
#endif
}

/* ---- what differs by level: fma, max, masks --------------------------------------------- */

#if OC_VW == 16
typedef __mmask16 vmask;
INLINE vf v_fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
/* b where either operand is NaN */
INLINE vf v_max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vmask v_ge(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ); }
INLINE vmask v_gt(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ); }
INLINE vmask v_eq(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ); }
INLINE vmask v_lt_i(vi a, vi b) { return _mm512_cmplt_epi32_mask((__m512i)a, (__m512i)b); }
INLINE vmask v_and(vmask a, vmask b) { return a & b; }
INLINE vmask v_or(vmask a, vmask b) { return a | b; }
INLINE vf v_select(vmask m, vf yes, vf no) {
    return (vf)_mm512_mask_blend_ps(m, (__m512)no, (__m512)yes);
}
INLINE uint32_t v_lanes(vmask m) { return m; } /* bit i = lane i */
#else
typedef vi vmask;
INLINE vmask v_ge(vf a, vf b) { return (vmask)(a >= b); }
INLINE vmask v_gt(vf a, vf b) { return (vmask)(a > b); }
INLINE vmask v_eq(vf a, vf b) { return (vmask)(a == b); }
INLINE vmask v_lt_i(vi a, vi b) { return (vmask)(a < b); }
INLINE vmask v_and(vmask a, vmask b) { return a & b; }
INLINE vmask v_or(vmask a, vmask b) { return a | b; }
INLINE vf v_select(vmask m, vf yes, vf no) { return (vf)(((vi)yes & m) | ((vi)no & ~m)); }
#if OC_VW == 8
INLINE vf v_fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE vf v_max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE uint32_t v_lanes(vmask m) { return (uint32_t)_mm256_movemask_ps((__m256)m); }
#elif defined(__x86_64__)
INLINE vf v_fma(vf a, vf b, vf c) { return a * b + c; }
INLINE vf v_max(vf a, vf b) { return (vf)_mm_max_ps((__m128)a, (__m128)b); }
INLINE uint32_t v_lanes(vmask m) { return (uint32_t)_mm_movemask_ps((__m128)m); }
#else
#if defined(__aarch64__)
INLINE vf v_fma(vf a, vf b, vf c) {
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
#else
INLINE vf v_fma(vf a, vf b, vf c) { return a * b + c; }
#endif
INLINE vf v_max(vf a, vf b) { return v_select(v_gt(a, b), a, b); }
INLINE uint32_t v_lanes(vmask m) {
    uint32_t bits = 0;
    for (int i = 0; i < OC_VW; i++) bits |= (uint32_t)(m[i] & 1) << i;
    return bits;
}
#endif
#endif

/* ---- reductions across lanes, in one fixed order ------------------------------------------ */

INLINE float v_reduce_max(vf x) {
#if OC_VW == 16
    return _mm512_reduce_max_ps((__m512)x);
#elif OC_VW == 8
    __m128 a = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    a = _mm_max_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_max_ss(a, _mm_shuffle_ps(a, a, 1)));
#else
    float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
    return a > b ? a : b;
#endif
}

INLINE float v_reduce_add(vf x) {
    float part[OC_VW];
    v_store(part, x);
    for (int width = OC_VW / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) part[i] += part[i + width];
    return part[0];
}

/* ---- bf16 ------------------------------------------------------------------------------------ */

/* Round to nearest even, NaN stays NaN. */
INLINE uint16_t f32_to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}

INLINE float bf16_to_f32(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* The nearest bf16 value, still as f32. For finite lanes. */
INLINE vf v_round_bf16(vf x) {
    vu bits = v_bits_of(x);
    return v_from_bits((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

#if OC_VW == 16
/* Sixteen at once, as f32_to_bf16 rounds them. */
INLINE __m256i v_to_bf16(vf x) {
    const vu bits = v_bits_of(x);
    const vu nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, quiet = (bits >> 16) | 0x40u;
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32((__m512i)nearest, nan, (__m512i)quiet));
}
#endif

/* to[i] = from[i] * factor, for n values. */
INLINE void f32_to_bf16_row(const float *from, float factor, uint16_t *to, int n) {
    int i = 0;
#if OC_VW == 16
    for (; i + 16 <= n; i += 16) _mm256_storeu_si256((__m256i *)(to + i), v_to_bf16(v_load(from + i) * factor));
#endif
    for (; i < n; i++) to[i] = f32_to_bf16(from[i] * factor);
}

/* ---- exp ------------------------------------------------------------------------------------- */

/* 2^x for x <= 0, relative error 2e-7; exactly 1 at 0; stays at 2^-126 below -126. NaN stays NaN. */
INLINE vf v_exp2_neg(vf x) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer in the low bits */
    x = v_max(v_splat(-126.0f), x);
    vf t = x + shift;
    vf f = x - (t - shift); /* in [-0.5, 0.5] */
    vf p = v_splat(1.5403530393381610e-4f);
    p = v_fma(p, f, v_splat(1.3333558146428443e-3f));
    p = v_fma(p, f, v_splat(9.6181291076284772e-3f));
    p = v_fma(p, f, v_splat(5.5504108664821580e-2f));
    p = v_fma(p, f, v_splat(2.4022650695910072e-1f));
    p = v_fma(p, f, v_splat(6.9314718055994531e-1f));
    p = v_fma(p, f, v_splat(1.0f));
    return v_from_bits((v_bits_of(t) << 23) + v_bits_of(p)); /* p * 2^n, by adding n to the exponent */
}

#endif
