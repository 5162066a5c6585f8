/* Sixteen floats: one panel's width, as one, two or four native vectors (vec.h) of the level.
 *
 * What the linear layers and norms are written in. Loads and stores take f32 or bf16 memory and a
 * number of valid lanes, so that no size needs to be a multiple of anything.
 */
#ifndef OCTAVO_LANES_H
#define OCTAVO_LANES_H

#include <math.h>

#include "vec.h"

#define OC_PARTS (16 / OC_VW)

typedef uint16_t bf16;
typedef struct {
    vf part[OC_PARTS];
} v16;

#define FOR_PARTS UNROLL for (int i_ = 0; i_ < OC_PARTS; i_++)
#define V16_BINARY(name, expression) \
    INLINE v16 name(v16 x, v16 y) {  \
        v16 out;                     \
        FOR_PARTS {                  \
            const vf a = x.part[i_], b = y.part[i_]; \
            out.part[i_] = expression;               \
        }                            \
        return out;                  \
    }
V16_BINARY(v16_add, a + b)
V16_BINARY(v16_mul, a *b)
V16_BINARY(v16_div, a / b)

INLINE v16 v16_set(float x) {
    v16 out;
    FOR_PARTS out.part[i_] = v_splat(x);
    return out;
}
INLINE v16 v16_zero(void) {
    v16 out;
    FOR_PARTS out.part[i_] = (vf){0};
    return out;
}
INLINE v16 v16_fma(v16 x, v16 y, v16 z) {
    v16 out;
    FOR_PARTS out.part[i_] = v_fma(x.part[i_], y.part[i_], z.part[i_]);
    return out;
}
INLINE v16 v16_load(const float *p) {
    v16 out;
    FOR_PARTS out.part[i_] = v_load(p + i_ * OC_VW);
    return out;
}
INLINE void v16_store(float *p, v16 x) { FOR_PARTS v_store(p + i_ * OC_VW, x.part[i_]); }

/* The lanes added as a tree of one shape at every level. */
INLINE float v16_sum(v16 x) {
    float lane[16];
    v16_store(lane, x);
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; i++) lane[i] += lane[i + width];
    return lane[0];
}

/* ---- bf16 -------------------------------------------------------------------------------- */

/* A line of 16 pairs: the first or the second of each pair, widened. */
INLINE v16 v16_first_of_pairs(const void *line) {
    v16 out;
    FOR_PARTS out.part[i_] = v_from_bits(v_load_u((const char *)line + i_ * OC_VW * 4) << 16);
    return out;
}
INLINE v16 v16_second_of_pairs(const void *line) {
    v16 out;
    FOR_PARTS out.part[i_] = v_from_bits(v_load_u((const char *)line + i_ * OC_VW * 4) & 0xffff0000u);
    return out;
}

INLINE v16 v16_load_bf16(const bf16 *p) {
#if OC_VW == 16
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return (v16){{(vf)_mm512_slli_epi32(wide, 16)}};
#else
    float lane[16];
    for (int i = 0; i < 16; i++) lane[i] = bf16_to_f32(p[i]);
    return v16_load(lane);
#endif
}

/* Round to nearest even, NaN stays NaN: at every level the same. */
INLINE void v16_store_bf16(bf16 *p, v16 x) {
#if OC_VW == 16
    _mm256_storeu_si256((__m256i *)p, v_to_bf16(x.part[0]));
#else
    float lane[16];
    v16_store(lane, x);
    for (int i = 0; i < 16; i++) p[i] = f32_to_bf16(lane[i]);
#endif
}

/* ---- memory of either type --------------------------------------------------------------- */

/* `index` counts elements; lanes from `count` on are zero, or left as they are in memory. */
INLINE v16 v16_load_any(const void *p, int64_t index, int32_t dtype, int count) {
    if (dtype == OC_F32) {
        const float *source = (const float *)p + index;
        if (count >= 16) return v16_load(source);
        float lane[16] = {0};
        memcpy(lane, source, (size_t)count * 4);
        return v16_load(lane);
    }
    const bf16 *source = (const bf16 *)p + index;
    if (count >= 16) return v16_load_bf16(source);
    bf16 lane[16] = {0};
    memcpy(lane, source, (size_t)count * 2);
    return v16_load_bf16(lane);
}

INLINE void v16_store_any(void *p, int64_t index, int32_t dtype, v16 x, int count) {
    if (dtype == OC_F32) {
        float *target = (float *)p + index;
        if (count >= 16) {
            v16_store(target, x);
            return;
        }
        float lane[16];
        v16_store(lane, x);
        memcpy(target, lane, (size_t)count * 4);
        return;
    }
    bf16 *target = (bf16 *)p + index;
    if (count >= 16) {
        v16_store_bf16(target, x);
        return;
    }
    bf16 lane[16];
    v16_store_bf16(lane, x);
    memcpy(target, lane, (size_t)count * 2);
}

/* ---- SiLU -------------------------------------------------------------------------------- */

/* e^x within 2 units in the last place for x in [-87, 88], where it is clamped: x = n ln 2 + r with
 * |r| <= ln 2 / 2, the Taylor polynomial of degree 7 for e^r, then n added to the exponent. */
INLINE vf v_exp(vf x) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer in the low bits */
    x = v_max(v_splat(-87.0f), x);
    x = v_splat(0.0f) - v_max(v_splat(-88.0f), v_splat(0.0f) - x);
    const vf t = v_fma(x, v_splat(1.44269504088896f), v_splat(shift));
    const vf n = t - shift;
    vf r = v_fma(n, v_splat(-0.693359375f), x); /* ln 2 in two pieces, the first exact in n */
    r = v_fma(n, v_splat(2.12194440e-4f), r);
    vf p = v_splat(1.0f / 5040);
    p = v_fma(p, r, v_splat(1.0f / 720));
    p = v_fma(p, r, v_splat(1.0f / 120));
    p = v_fma(p, r, v_splat(1.0f / 24));
    p = v_fma(p, r, v_splat(1.0f / 6));
    p = v_fma(p, r, v_splat(0.5f));
    p = v_fma(p, r, v_splat(1.0f));
    p = v_fma(p, r, v_splat(1.0f));
    return v_from_bits((v_bits_of(t) << 23) + v_bits_of(p));
}

/* x / (1 + e^-x). NaN stays NaN. */
INLINE v16 v16_silu(v16 x) {
    v16 out;
    FOR_PARTS out.part[i_] = x.part[i_] / (v_exp(v_splat(0.0f) - x.part[i_]) + 1.0f);
    return out;
}

#endif
