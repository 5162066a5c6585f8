/* The inner loops of the linear layers: a tile of up to TILE_ROWS rows of x times up to TILE_PANELS
 * panels of 16 columns, whose sums stay in registers along the whole of K.
 *
 * One output is one chain of multiply-adds along K, in ascending order, in one vector lane.
 *
 * bf16: at level avx512bf16 one instruction multiplies pairs along K (that is why weights are
 * stored in pairs); below it pairs are widened to f32, and so is x, once, before the loop.
 */
#ifndef OCTAVO_LINEAR_TILE_H
#define OCTAVO_LINEAR_TILE_H

#include "lanes.h"

#if OC_LEVEL >= OC_LEVEL_AVX512
#define TILE_ROWS 6
#define TILE_PANELS 4
#else /* 16 registers, of 8 or 4 lanes: some sums spill, and larger or smaller tiles were slower */
#define TILE_ROWS 4
#define TILE_PANELS 2
#endif
#define PREFETCH_DISTANCE 24 /* steps along K (one cache line a panel) */
#define SEGMENT 32           /* steps along K that fetch from one place */

/* What a tile fetches into the second-level cache while it computes: `lines` (1, 2 or 4) a step, one
 * segment after the other from `start` on; but the first num_places segments from offsets of their own
 * from `base`. start NULL: the tile's own panels are fetched, a little ahead of their use. */
typedef struct {
    const char *start, *base;
    const int64_t *places;
    int64_t num_places;
    int lines;
} fetching;

INLINE const char *place_of_segment(const fetching *f, int64_t segment) {
    if (!f->start) return NULL;
    if (segment < f->num_places) return f->base + f->places[segment];
    return f->start + segment * f->lines * SEGMENT * 64;
}

INLINE void fetch(const char *place, int64_t step, int lines) {
    const char *line = place + step * lines * 64;
    __builtin_prefetch(line, 0, 2);
    if (lines > 1) __builtin_prefetch(line + 64, 0, 2);
    if (lines > 2) {
        __builtin_prefetch(line + 128, 0, 2);
        __builtin_prefetch(line + 192, 0, 2);
    }
}

/* A product's weights as a tile sees them. A step of a panel is one cache line: a pair along K of
 * bf16, or one f32. */
typedef struct {
    const char *panels; /* of this tile, panel_bytes apart */
    int64_t panel_bytes, steps;
} tile_weights;

/* The sums of R rows and P panels, R and P constants at every call; x rows x_stride elements apart. */
typedef v16 tile_sums[TILE_ROWS][TILE_PANELS];

#if OC_LEVEL >= OC_LEVEL_AVX512BF16
typedef bf16 bf16_tile_input;

INLINE void tile_bf16(const int R, const int P, const bf16 *x, int64_t x_stride, const tile_weights *w,
                      const fetching *ahead, tile_sums sums) {
    __m512 acc[TILE_ROWS][TILE_PANELS];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int p = 0; p < P; p++) acc[r][p] = _mm512_setzero_ps();
    const char *line = w->panels;
    const int64_t panel_bytes = w->panel_bytes;
    const int lines = ahead->lines;
    for (int64_t i = 0; i < w->steps; i += SEGMENT) {
        const int count = (int)(w->steps - i < SEGMENT ? w->steps - i : SEGMENT);
        const char *place = place_of_segment(ahead, i / SEGMENT);
        for (int j = 0; j < count; j++, line += 64) {
            __m512bh column[TILE_PANELS];
            UNROLL for (int p = 0; p < P; p++) {
                column[p] = (__m512bh)_mm512_loadu_si512(line + p * panel_bytes);
                if (!place) __builtin_prefetch(line + p * panel_bytes + PREFETCH_DISTANCE * 64, 0, 3);
            }
            if (place) fetch(place, j, lines);
            UNROLL for (int r = 0; r < R; r++) {
                int32_t pair;
                memcpy(&pair, x + r * x_stride + 2 * (i + j), 4);
                const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
                UNROLL for (int p = 0; p < P; p++) acc[r][p] = _mm512_dpbf16_ps(acc[r][p], both, column[p]);
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int p = 0; p < P; p++) sums[r][p].part[0] = (vf)acc[r][p];
}
#else
typedef float bf16_tile_input;

INLINE void tile_bf16(const int R, const int P, const float *x, int64_t x_stride, const tile_weights *w,
                      const fetching *ahead, tile_sums acc) {
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int p = 0; p < P; p++) acc[r][p] = v16_zero();
    const char *line = w->panels;
    for (int64_t i = 0; i < w->steps; i += SEGMENT) {
        const int count = (int)(w->steps - i < SEGMENT ? w->steps - i : SEGMENT);
        const char *place = place_of_segment(ahead, i / SEGMENT);
        for (int j = 0; j < count; j++, line += 64) {
            v16 first[TILE_PANELS], second[TILE_PANELS];
            UNROLL for (int p = 0; p < P; p++) {
                first[p] = v16_first_of_pairs(line + p * w->panel_bytes);
                second[p] = v16_second_of_pairs(line + p * w->panel_bytes);
                if (!place) __builtin_prefetch(line + p * w->panel_bytes + PREFETCH_DISTANCE * 64, 0, 3);
            }
            if (place) fetch(place, j, ahead->lines);
            UNROLL for (int r = 0; r < R; r++) {
                const float *pair = x + r * x_stride + 2 * (i + j);
                const v16 x_first = v16_set(pair[0]), x_second = v16_set(pair[1]);
                UNROLL for (int p = 0; p < P; p++) {
                    acc[r][p] = v16_fma(x_first, first[p], acc[r][p]);
                    acc[r][p] = v16_fma(x_second, second[p], acc[r][p]);
                }
            }
        }
    }
}
#endif

INLINE void tile_f32(const int R, const int P, const float *x, int64_t x_stride, const tile_weights *w,
                     const fetching *ahead, tile_sums acc) {
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int p = 0; p < P; p++) acc[r][p] = v16_zero();
    const char *line = w->panels;
    for (int64_t i = 0; i < w->steps; i += SEGMENT) {
        const int count = (int)(w->steps - i < SEGMENT ? w->steps - i : SEGMENT);
        const char *place = place_of_segment(ahead, i / SEGMENT);
        for (int j = 0; j < count; j++, line += 64) {
            v16 column[TILE_PANELS];
            UNROLL for (int p = 0; p < P; p++) {
                column[p] = v16_load((const float *)(line + p * w->panel_bytes));
                if (!place) __builtin_prefetch(line + p * w->panel_bytes + PREFETCH_DISTANCE * 64, 0, 3);
            }
            if (place) fetch(place, j, ahead->lines);
            UNROLL for (int r = 0; r < R; r++) {
                const v16 value = v16_set(x[r * x_stride + i + j]);
                UNROLL for (int p = 0; p < P; p++) acc[r][p] = v16_fma(value, column[p], acc[r][p]);
            }
        }
    }
}

/* dtype is a constant at every call. */
INLINE void tile(const int R, const int P, const int32_t dtype, const void *x, int64_t x_stride,
                 const tile_weights *w, const fetching *ahead, tile_sums sums) {
    if (dtype == OC_BF16)
        tile_bf16(R, P, x, x_stride, w, ahead, sums);
    else
        tile_f32(R, P, x, x_stride, w, ahead, sums);
}

#define TILE_CASE(R, P)                                                                  \
    case (R) * 8 + (P):                                                                  \
        if (dtype == OC_BF16)                                                            \
            tile(R, P, OC_BF16, x, x_stride, w, ahead, sums);                            \
        else                                                                             \
            tile(R, P, OC_F32, x, x_stride, w, ahead, sums);                             \
        UNROLL for (int r = 0; r < R; r++)                                               \
            UNROLL for (int p = 0; p < P; p++) v16_store(out + (r * TILE_PANELS + p) * 16, sums[r][p]); \
        break;
#if TILE_PANELS == 4
#define TILE_CASES(R) TILE_CASE(R, 1) TILE_CASE(R, 2) TILE_CASE(R, 3) TILE_CASE(R, 4)
#else
#define TILE_CASES(R) TILE_CASE(R, 1) TILE_CASE(R, 2)
#endif

/* A tile of any size, its sums to memory: out [TILE_ROWS][TILE_PANELS][16]. */
static void run_tile(int32_t dtype, int rows, int panels, const void *x, int64_t x_stride,
                     const tile_weights *w, const fetching *ahead, float *out) {
    tile_sums sums;
    switch (rows * 8 + panels) {
        TILE_CASES(1)
        TILE_CASES(2)
        TILE_CASES(3)
        TILE_CASES(4)
#if TILE_ROWS == 6
        TILE_CASES(5)
        TILE_CASES(6)
#endif
    }
}

#endif
