/* y = x W^T for packed weights, and the packing.
 *
 * One output is one chain of multiply-adds along K, in ascending order, in one vector lane,
 * whatever the number of rows, the tile it falls into and the thread that computes it. So a row's
 * result is the same bit for bit alone and in a batch. There is no split along K.
 *
 * A tile is up to TILE_ROWS rows of x times up to TILE_PANELS panels of 16 columns; its sums stay
 * in registers along the whole of K. With few rows the weights stream from memory once and the
 * time is theirs; with many rows a tile's panels stay in the second-level cache while the rows of
 * a block pass by, and the next tile's panels are prefetched meanwhile.
 *
 * bf16: at level avx512bf16 one instruction multiplies pairs along K (that is why weights are
 * stored in pairs); below it pairs are widened to f32, and so is x, once, before the loop.
 */
#include <stdlib.h>

#include "lanes.h"

#if OC_LEVEL >= OC_LEVEL_AVX512
#define TILE_ROWS 6
#define TILE_PANELS 4
#else /* 16 registers, of 8 or 4 lanes: some sums spill, and larger or smaller tiles were slower */
#define TILE_ROWS 4
#define TILE_PANELS 2
#endif
#define BLOCK_ROWS 48        /* rows of x that pass by one tile of panels */
#define PREFETCH_DISTANCE 24 /* steps along K (one cache line a panel) */

/* ---- the tile ---------------------------------------------------------------------------- */

INLINE void prefetch_far(const char *far, int64_t step, int lines) {
    const char *line = far + step * lines * 64;
    __builtin_prefetch(line, 0, 2);
    if (lines > 1) __builtin_prefetch(line + 64, 0, 2);
    if (lines > 2) {
        __builtin_prefetch(line + 128, 0, 2);
        __builtin_prefetch(line + 192, 0, 2);
    }
}

/* sums[r][p] for R rows and P panels, R and P constants at every call. `steps` counts pairs along
 * K for bf16 and elements for f32; a step of a panel is one cache line. x: rows x_stride elements
 * apart. `far`: where to prefetch from, far_lines (1, 2 or 4) a step; NULL: these panels themselves
 * are prefetched, a little ahead of their use. */
#if OC_LEVEL >= OC_LEVEL_AVX512BF16
INLINE void tile_bf16(const int R, const int P, const bf16 *x, int64_t x_stride, const char *w,
                      int64_t panel_bytes, int64_t steps, const char *far, int far_lines, float *sums) {
    __m512 acc[TILE_ROWS][TILE_PANELS];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int p = 0; p < P; p++) acc[r][p] = _mm512_setzero_ps();
    for (int64_t i = 0; i < steps; i++) {
        __m512bh column[TILE_PANELS];
        UNROLL for (int p = 0; p < P; p++) {
            const char *line = w + p * panel_bytes + i * 64;
            column[p] = (__m512bh)_mm512_loadu_si512(line);
            if (!far) __builtin_prefetch(line + PREFETCH_DISTANCE * 64, 0, 3);
        }
        if (far) prefetch_far(far, i, far_lines);
        UNROLL for (int r = 0; r < R; r++) {
            int32_t pair;
            memcpy(&pair, x + r * x_stride + 2 * i, 4);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            UNROLL for (int p = 0; p < P; p++) acc[r][p] = _mm512_dpbf16_ps(acc[r][p], both, column[p]);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int p = 0; p < P; p++) _mm512_storeu_ps(sums + (r * TILE_PANELS + p) * 16, acc[r][p]);
}
#else
INLINE void tile_bf16(const int R, const int P, const float *x, int64_t x_stride, const char *w,
                      int64_t panel_bytes, int64_t steps, const char *far, int far_lines, float *sums) {
    v16 acc[TILE_ROWS][TILE_PANELS];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int p = 0; p < P; p++) acc[r][p] = v16_zero();
    for (int64_t i = 0; i < steps; i++) {
        v16 first[TILE_PANELS], second[TILE_PANELS];
        UNROLL for (int p = 0; p < P; p++) {
            const char *line = w + p * panel_bytes + i * 64;
            first[p] = v16_first_of_pairs(line);
            second[p] = v16_second_of_pairs(line);
            if (!far) __builtin_prefetch(line + PREFETCH_DISTANCE * 64, 0, 3);
        }
        if (far) prefetch_far(far, i, far_lines);
        UNROLL for (int r = 0; r < R; r++) {
            const v16 x_first = v16_set(x[r * x_stride + 2 * i]);
            const v16 x_second = v16_set(x[r * x_stride + 2 * i + 1]);
            UNROLL for (int p = 0; p < P; p++) {
                acc[r][p] = v16_fma(x_first, first[p], acc[r][p]);
                acc[r][p] = v16_fma(x_second, second[p], acc[r][p]);
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int p = 0; p < P; p++) v16_store(sums + (r * TILE_PANELS + p) * 16, acc[r][p]);
}
#endif

INLINE void tile_f32(const int R, const int P, const float *x, int64_t x_stride, const char *w,
                     int64_t panel_bytes, int64_t steps, const char *far, int far_lines, float *sums) {
    v16 acc[TILE_ROWS][TILE_PANELS];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int p = 0; p < P; p++) acc[r][p] = v16_zero();
    for (int64_t i = 0; i < steps; i++) {
        v16 column[TILE_PANELS];
        UNROLL for (int p = 0; p < P; p++) {
            const char *line = w + p * panel_bytes + i * 64;
            column[p] = v16_load((const float *)line);
            if (!far) __builtin_prefetch(line + PREFETCH_DISTANCE * 64, 0, 3);
        }
        if (far) prefetch_far(far, i, far_lines);
        UNROLL for (int r = 0; r < R; r++) {
            const v16 value = v16_set(x[r * x_stride + i]);
            UNROLL for (int p = 0; p < P; p++) acc[r][p] = v16_fma(value, column[p], acc[r][p]);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int p = 0; p < P; p++) v16_store(sums + (r * TILE_PANELS + p) * 16, acc[r][p]);
}

static int64_t panels_of(const oc_packed *p) {
    return p->gate_up ? (p->n / 2 + 15) / 16 * 2 : (p->n + 15) / 16;
}

/* What a linear call is, as its tasks see it. x is as the tiles want it: bf16 pairs at level
 * avx512bf16, f32 otherwise. */
typedef struct {
    const char *x;
    int64_t x_stride, x_size, m, steps, panels, panel_bytes, blocks, block_rows;
    const oc_packed *w;
    const float *bias;
    void *y;
    int64_t y_stride;
    int32_t y_dtype, epilogue;
} linear_call;

#if OC_LEVEL >= OC_LEVEL_AVX512BF16
typedef bf16 bf16_tile_input;
#else
typedef float bf16_tile_input;
#endif

#define TILE_CASE(R, P)                                                                          \
    case (R) * 8 + (P):                                                                          \
        if (bf)                                                                                  \
            tile_bf16(R, P, (const bf16_tile_input *)x, c->x_stride, w, c->panel_bytes, c->steps, \
                      far, far_lines, sums);                                                                \
        else                                                                                     \
            tile_f32(R, P, (const float *)x, c->x_stride, w, c->panel_bytes, c->steps, far, \
                     far_lines, sums); \
        break;
#if TILE_PANELS == 4
#define TILE_CASES(R) TILE_CASE(R, 1) TILE_CASE(R, 2) TILE_CASE(R, 3) TILE_CASE(R, 4)
#else
#define TILE_CASES(R) TILE_CASE(R, 1) TILE_CASE(R, 2)
#endif

static void run_tile(const linear_call *c, int rows, int panels, const char *x, const char *w,
                     const char *far, int far_lines, float *sums) {
    const int bf = c->w->dtype == OC_BF16;
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

/* ---- what happens to a tile's sums ------------------------------------------------------- */

static void finish_tile(const linear_call *c, int64_t row, int rows, int64_t panel, int panels,
                        const float *sums) {
    for (int r = 0; r < rows; r++) {
        const float *sum = sums + r * TILE_PANELS * 16;
        const int64_t start = (row + r) * c->y_stride;
        if (c->epilogue == OC_SILU_MUL) {
            for (int p = 0; p < panels; p += 2) {
                const int64_t column = (panel + p) / 2 * 16;
                const int count = (int)(c->w->n / 2 - column < 16 ? c->w->n / 2 - column : 16);
                v16 gate = v16_load(sum + p * 16), up = v16_load(sum + (p + 1) * 16);
                if (c->bias) {
                    gate = v16_add(gate, v16_load(c->bias + (panel + p) * 16));
                    up = v16_add(up, v16_load(c->bias + (panel + p + 1) * 16));
                }
                v16_store_any(c->y, start + column, c->y_dtype, v16_mul(v16_silu(gate), up), count);
            }
            continue;
        }
        for (int p = 0; p < panels; p++) {
            const int64_t column = (panel + p) * 16;
            const int count = (int)(c->w->n - column < 16 ? c->w->n - column : 16);
            v16 y = v16_load(sum + p * 16);
            if (c->bias) y = v16_add(y, v16_load_any(c->bias, column, OC_F32, count));
            if (c->epilogue == OC_RESIDUAL)
                y = v16_add(y, v16_load_any(c->y, start + column, OC_F32, count));
            v16_store_any(c->y, start + column, c->y_dtype, y, count);
        }
    }
}

/* Item: one tile of panels times one block of rows; the blocks of a tile follow each other. */
static void linear_task(void *context, int64_t begin, int64_t end, int thread) {
    (void)thread;
    const linear_call *c = context;
    _Alignas(64) float sums[TILE_ROWS * TILE_PANELS * 16];
    for (int64_t item = begin; item < end; item++) {
        const int64_t panel = item / c->blocks * TILE_PANELS;
        const int panels = (int)(c->panels - panel < TILE_PANELS ? c->panels - panel : TILE_PANELS);
        const char *w = (const char *)c->w->data + panel * c->panel_bytes;
        int64_t row = item % c->blocks * c->block_rows;
        const int64_t stop = row + c->block_rows < c->m ? row + c->block_rows : c->m;
        const int64_t passes = (stop - row + TILE_ROWS - 1) / TILE_ROWS;
        int64_t ahead = panels; /* the next panel to fetch while this tile is computed */
        for (int64_t pass = 0; row < stop; pass++) {
            const int rows = (int)(stop - row < TILE_ROWS ? stop - row : TILE_ROWS);
            /* The first tile, and a tile passed once, read ahead in their own panels; otherwise the
             * passes that are left share the next tile's panels. */
            const char *far = NULL;
            int lines = 1;
            if (pass > 0 || (item > begin && passes > 1)) {
                const int64_t missing = panels + TILE_PANELS - ahead, share = passes - pass;
                lines = missing > 2 * share ? 4 : missing > share ? 2 : 1;
                far = missing > 0 && panel + ahead + lines <= c->panels ? w + ahead * c->panel_bytes : w;
                ahead += lines;
            }
            run_tile(c, rows, panels, c->x + row * c->x_stride * c->x_size, w, far, lines, sums);
            finish_tile(c, row, rows, panel, panels, sums);
            row += rows;
        }
    }
}

/* ---- x as the tiles want it -------------------------------------------------------------- */

typedef struct {
    const bf16 *x;
    int64_t x_stride, k, padded;
    void *out; /* [m][padded] bf16 or f32, zero behind k */
    int32_t widen;
} prepare_call;

static void prepare_task(void *context, int64_t begin, int64_t end, int thread) {
    (void)thread;
    const prepare_call *c = context;
    for (int64_t r = begin; r < end; r++) {
        const bf16 *x = c->x + r * c->x_stride;
        if (!c->widen) {
            bf16 *out = (bf16 *)c->out + r * c->padded;
            memcpy(out, x, (size_t)c->k * 2);
            for (int64_t i = c->k; i < c->padded; i++) out[i] = 0;
            continue;
        }
        float *out = (float *)c->out + r * c->padded;
        for (int64_t i = 0; i < c->k; i += 16) {
            const int count = (int)(c->k - i < 16 ? c->k - i : 16);
            v16_store_any(out, i, OC_F32, v16_load_any(x, i, OC_BF16, count), count);
        }
        for (int64_t i = c->k; i < c->padded; i++) out[i] = 0;
    }
}

OC_EXPORT int32_t oc_linear(const void *x, int64_t x_stride, int64_t m, const oc_packed *w,
                            const float *bias, void *y, int64_t y_stride, int32_t y_dtype,
                            int32_t epilogue) {
    if (m <= 0 || w->n <= 0) return OC_OK;
    const int bf = w->dtype == OC_BF16, widen = bf && OC_LEVEL < OC_LEVEL_AVX512BF16;
    void *prepared = NULL;
    if (widen || (bf && w->k % 2 != 0)) {
        const int64_t padded = (w->k + 1) / 2 * 2;
        prepared = malloc((size_t)(m * padded) * (widen ? 4 : 2));
        if (!prepared) return OC_NO_MEMORY;
        prepare_call p = {x, x_stride, w->k, padded, prepared, widen};
        oc_parallel_for(m, 16, prepare_task, &p);
        x = prepared;
        x_stride = padded;
    }
    const int64_t panels = panels_of(w), steps = bf ? (w->k + 1) / 2 : w->k;
    const int64_t blocks = (m + BLOCK_ROWS - 1) / BLOCK_ROWS, tiles = (panels + TILE_PANELS - 1) / TILE_PANELS;
    const int64_t even = (m + blocks - 1) / blocks; /* blocks of like size, in whole tiles */
    linear_call c = {
        .x = x,
        .x_stride = x_stride,
        .x_size = bf && !widen ? 2 : 4,
        .m = m,
        .steps = steps,
        .panels = panels,
        .panel_bytes = steps * 64,
        .blocks = blocks,
        .block_rows = (even + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS,
        .w = w,
        .bias = bias,
        .y = y,
        .y_stride = y_stride,
        .y_dtype = y_dtype,
        .epilogue = epilogue,
    };
    oc_parallel_for(tiles * blocks, 1, linear_task, &c);
    free(prepared);
    return OC_OK;
}

/* ---- packing ----------------------------------------------------------------------------- */

/* The row of the plain weight that is column `lane` of panel `panel`, or -1 for padding. */
static int64_t plain_row(const oc_packed *p, int64_t panel, int lane) {
    const int64_t column = panel * 16 + lane;
    if (!p->gate_up) return column < p->n ? column : -1;
    const int64_t half = p->n / 2, row = panel / 2 * 16 + lane;
    if (row >= half) return -1;
    return panel % 2 ? half + row : row;
}

typedef struct {
    char *weight;
    int64_t row_bytes;
    const oc_packed *packed;
} packing;

/* Both directions treat a step along K as one 32-bit word: an f32, or a pair of bf16. */
static void pack_task(void *context, int64_t begin, int64_t end, int thread) {
    (void)thread;
    const packing *c = context;
    const int64_t bytes = c->packed->k * (c->packed->dtype == OC_F32 ? 4 : 2), steps = (bytes + 3) / 4;
    for (int64_t panel = begin; panel < end; panel++)
        for (int lane = 0; lane < 16; lane++) {
            uint32_t *out = (uint32_t *)c->packed->data + panel * steps * 16 + lane;
            const int64_t row = plain_row(c->packed, panel, lane);
            if (row < 0) {
                for (int64_t i = 0; i < steps; i++) out[i * 16] = 0;
                continue;
            }
            const char *in = c->weight + row * c->row_bytes;
            for (int64_t i = 0; i < bytes / 4; i++) memcpy(&out[i * 16], in + i * 4, 4);
            if (bytes % 4 != 0) {
                bf16 last[2] = {0, 0};
                memcpy(last, in + bytes - 2, 2);
                memcpy(&out[bytes / 4 * 16], last, 4);
            }
        }
}

static void unpack_task(void *context, int64_t begin, int64_t end, int thread) {
    (void)thread;
    const packing *c = context;
    const int64_t bytes = c->packed->k * (c->packed->dtype == OC_F32 ? 4 : 2), steps = (bytes + 3) / 4;
    for (int64_t panel = begin; panel < end; panel++)
        for (int lane = 0; lane < 16; lane++) {
            const int64_t row = plain_row(c->packed, panel, lane);
            if (row < 0) continue;
            const uint32_t *in = (const uint32_t *)c->packed->data + panel * steps * 16 + lane;
            char *out = c->weight + row * c->row_bytes;
            for (int64_t i = 0; i < bytes / 4; i++) memcpy(out + i * 4, &in[i * 16], 4);
            if (bytes % 4 != 0) memcpy(out + bytes - 2, &in[bytes / 4 * 16], 2);
        }
}

OC_EXPORT void oc_pack(const void *weight, int64_t row_stride, const oc_packed *packed) {
    packing c = {(char *)weight, row_stride * (packed->dtype == OC_F32 ? 4 : 2), packed};
    oc_parallel_for(panels_of(packed), 1, pack_task, &c);
}

OC_EXPORT void oc_unpack(const oc_packed *packed, void *weight) {
    packing c = {weight, packed->k * (packed->dtype == OC_F32 ? 4 : 2), packed};
    oc_parallel_for(panels_of(packed), 1, unpack_task, &c);
}

/* ---- embedding --------------------------------------------------------------------------- */

typedef struct {
    const void *table; /* plain; NULL: packed */
    const oc_packed *packed;
    int64_t k;
    int32_t dtype;
    const int64_t *ids;
    float *out;
} gather_call;

static void gather_task(void *context, int64_t begin, int64_t end, int thread) {
    (void)thread;
    const gather_call *c = context;
    for (int64_t r = begin; r < end; r++) {
        float *out = c->out + r * c->k;
        if (c->table) {
            for (int64_t i = 0; i < c->k; i += 16) {
                const int count = (int)(c->k - i < 16 ? c->k - i : 16);
                v16_store_any(out, i, OC_F32, v16_load_any(c->table, c->ids[r] * c->k + i, c->dtype, count),
                              count);
            }
            continue;
        }
        const int64_t panel = c->ids[r] / 16, lane = c->ids[r] % 16;
        if (c->dtype == OC_F32) {
            const float *in = (const float *)c->packed->data + panel * c->k * 16 + lane;
            for (int64_t i = 0; i < c->k; i++) out[i] = in[i * 16];
        } else {
            const bf16 *in = (const bf16 *)c->packed->data + panel * ((c->k + 1) / 2) * 32 + lane * 2;
            for (int64_t i = 0; i < c->k; i++) out[i] = bf16_to_f32(in[i / 2 * 32 + i % 2]);
        }
    }
}

OC_EXPORT void oc_gather_packed(const oc_packed *w, const int64_t *ids, int64_t m, float *out) {
    gather_call c = {NULL, w, w->k, w->dtype, ids, out};
    oc_parallel_for(m, 8, gather_task, &c);
}

OC_EXPORT void oc_gather_plain(const void *table, int32_t dtype, int64_t k, const int64_t *ids,
                               int64_t m, float *out) {
    gather_call c = {table, NULL, k, dtype, ids, out};
    oc_parallel_for(m, 32, gather_task, &c);
}
