/* y = x W^T for packed weights.
 *
 * One output is one chain of multiply-adds along K, in ascending order, in one vector lane,
 * whatever the number of rows, the tile it falls into and the thread that computes it. So a row's
 * result is the same bit for bit alone and in a batch. There is no split along K.
 *
 * With few rows the weights stream from memory once and the time is theirs. With many rows a tile's
 * panels stay in the second-level cache while the rows of a block pass by, and the loop has time to
 * fetch: first the next tile's panels, then what the caller says will be read after the products
 * (oc_warm_list): attention over many contexts is bound by memory, products of many rows are not.
 */
#include "linear.h"
#include "linear_tile.h"

#include <stdlib.h>

#define BLOCK_ROWS 24 /* rows of x that pass by one tile of panels */
/* A y larger than this (logits) would only drive weights and activations out of the caches, and be
 * read into them before it is written. */
#define STREAM_BYTES (4 << 20)
#define WARM_LINES (OC_WARM_BYTES / (SEGMENT * 64))

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
    int32_t streams; /* y goes past the caches */
    oc_warm_list *warm;
} linear_call;

/* ---- what happens to a tile's sums ------------------------------------------------------- */

typedef struct {
    int64_t row, panel;
    int rows, panels;
} tile_place;

#if OC_LEVEL >= OC_LEVEL_AVX512
/* Past the caches: see STREAM_BYTES. */
INLINE void v16_store_past(float *p, v16 x) { _mm512_stream_ps(p, (__m512)x.part[0]); }
INLINE void end_of_stores_past(void) { _mm_sfence(); } /* no later store orders them */
#else
INLINE void v16_store_past(float *p, v16 x) { v16_store(p, x); }
INLINE void end_of_stores_past(void) {}
#endif

/* One row's sums of P panels. epilogue, dtype (of y) and whole (all columns are there, and the sums
 * are those of a whole tile) are constants at every call. */
INLINE void finish_row(const linear_call *c, int64_t row, int64_t panel, const int P, const v16 *sum,
                       const int epilogue, const int32_t dtype, const int whole) {
    const int64_t width = epilogue == OC_SILU_MUL ? c->w->n / 2 : c->w->n, start = row * c->y_stride;
    if (epilogue == OC_SILU_MUL) {
        UNROLL for (int p = 0; p + 1 < P; p += 2) {
            const int64_t column = (panel + p) / 2 * 16;
            const int count = whole || width - column >= 16 ? 16 : (int)(width - column);
            v16 gate = sum[p], up = sum[p + 1];
            if (c->bias) {
                gate = v16_add(gate, v16_load(c->bias + (panel + p) * 16));
                up = v16_add(up, v16_load(c->bias + (panel + p + 1) * 16));
            }
            v16_store_any(c->y, start + column, dtype, v16_mul(v16_silu(gate), up), count);
        }
        return;
    }
    UNROLL for (int p = 0; p < P; p++) {
        const int64_t column = (panel + p) * 16;
        const int count = whole || width - column >= 16 ? 16 : (int)(width - column);
        v16 y = sum[p];
        if (c->bias) y = v16_add(y, v16_load_any(c->bias, column, OC_F32, count));
        if (epilogue == OC_RESIDUAL) y = v16_add(y, v16_load_any(c->y, start + column, dtype, count));
        if (whole && epilogue == OC_STORE && dtype == OC_F32 && c->streams)
            v16_store_past((float *)c->y + start + column, y);
        else
            v16_store_any(c->y, start + column, dtype, y, count);
    }
}

/* Tiles at an edge: their sums lie in memory, [TILE_ROWS][TILE_PANELS][16]. */
static void finish_part(const linear_call *c, const tile_place *t, const float *sums) {
    for (int r = 0; r < t->rows; r++) {
        v16 sum[TILE_PANELS];
        UNROLL for (int p = 0; p < TILE_PANELS; p++) sum[p] = v16_load(sums + (r * TILE_PANELS + p) * 16);
        switch (c->epilogue) {
            case OC_STORE:
                for (int p = 0; p < t->panels; p++)
                    finish_row(c, t->row + r, t->panel + p, 1, sum + p, OC_STORE, c->y_dtype, 0);
                break;
            case OC_RESIDUAL:
                for (int p = 0; p < t->panels; p++)
                    finish_row(c, t->row + r, t->panel + p, 1, sum + p, OC_RESIDUAL, OC_F32, 0);
                break;
            case OC_SILU_MUL:
                for (int p = 0; p < t->panels; p += 2)
                    finish_row(c, t->row + r, t->panel + p, 2, sum + p, OC_SILU_MUL, c->y_dtype, 0);
                break;
        }
    }
}

/* Whole tiles: from the registers of the loop to y. */
typedef void (*whole_tile)(const linear_call *c, const tile_place *t, const void *x, const tile_weights *w,
                           const fetching *ahead);

#define WHOLE_TILE(name, w_dtype, epilogue, y_dtype)                                                   \
    static void name(const linear_call *c, const tile_place *t, const void *x, const tile_weights *w,  \
                     const fetching *ahead) {                                                          \
        tile_sums sums;                                                                                \
        tile(TILE_ROWS, TILE_PANELS, w_dtype, x, c->x_stride, w, ahead, sums);                         \
        UNROLL for (int r = 0; r < TILE_ROWS; r++)                                                     \
            finish_row(c, t->row + r, t->panel, TILE_PANELS, sums[r], epilogue, y_dtype, 1);           \
    }
WHOLE_TILE(bf16_store_f32, OC_BF16, OC_STORE, OC_F32)
WHOLE_TILE(bf16_store_bf16, OC_BF16, OC_STORE, OC_BF16)
WHOLE_TILE(bf16_residual, OC_BF16, OC_RESIDUAL, OC_F32)
WHOLE_TILE(bf16_silu_mul, OC_BF16, OC_SILU_MUL, OC_BF16)
WHOLE_TILE(f32_store, OC_F32, OC_STORE, OC_F32)
WHOLE_TILE(f32_residual, OC_F32, OC_RESIDUAL, OC_F32)
WHOLE_TILE(f32_silu_mul, OC_F32, OC_SILU_MUL, OC_F32)

/* NULL for the rarer combinations, whose tiles all go through memory. */
static whole_tile find_whole_tile(int32_t w_dtype, int32_t epilogue, int32_t y_dtype) {
    const int bf16_out = y_dtype == OC_BF16;
    if (w_dtype == OC_BF16) {
        if (epilogue == OC_RESIDUAL) return bf16_residual;
        if (epilogue == OC_SILU_MUL) return bf16_out ? bf16_silu_mul : NULL;
        return bf16_out ? bf16_store_bf16 : bf16_store_f32;
    }
    if (epilogue == OC_RESIDUAL) return f32_residual;
    if (bf16_out) return NULL;
    return epilogue == OC_SILU_MUL ? f32_silu_mul : f32_store;
}

/* ---- the tiles of a call ------------------------------------------------------------------ */

/* What one pass of rows over a tile fetches. `fetched` counts the next tile's panels that are on their
 * way; `passes` is how many passes of this tile are left. */
static fetching plan_fetch(const linear_call *c, const char *panels, int64_t present, int64_t left,
                           int64_t *fetched, int64_t passes) {
    const int64_t next = left < TILE_PANELS ? left : TILE_PANELS, missing = next - *fetched;
    if (missing > 0) {
        int64_t lines = missing > 2 * passes ? 4 : missing > passes ? 2 : 1;
        while (lines > missing) lines /= 2;
        const char *start = panels + (present + *fetched) * c->panel_bytes;
        *fetched += lines;
        return (fetching){.start = start, .lines = (int)lines};
    }
    oc_warm_list *warm = c->warm;
    const int64_t segments = (c->steps + SEGMENT - 1) / SEGMENT;
    if (warm && atomic_load_explicit(&warm->next, memory_order_relaxed) < warm->count) {
        const int64_t first = atomic_fetch_add_explicit(&warm->next, segments, memory_order_relaxed);
        const int64_t count = warm->count - first < segments ? warm->count - first : segments;
        if (count > 0)
            return (fetching){.start = panels, .base = warm->base, .places = warm->places + first,
                              .num_places = count, .lines = WARM_LINES};
    }
    return (fetching){.start = panels, .lines = 1}; /* what is there already */
}

/* Item: one tile of panels times one block of rows; the blocks of a tile follow each other. */
static void linear_task(void *context, int64_t begin, int64_t end, int thread) {
    (void)thread;
    const linear_call *c = context;
    _Alignas(64) float sums[TILE_ROWS * TILE_PANELS * 16];
    const whole_tile finish_whole = find_whole_tile(c->w->dtype, c->epilogue, c->y_dtype);
    const int64_t whole_panels = c->epilogue == OC_SILU_MUL ? c->w->n / 32 * 2 : c->w->n / 16;
    int64_t fetched = 0; /* panels of the next tile */
    for (int64_t item = begin; item < end; item++) {
        const int64_t block = item % c->blocks, panel = item / c->blocks * TILE_PANELS;
        const int64_t left = c->panels - panel;
        tile_place t = {.row = block * c->block_rows, .panel = panel};
        t.panels = (int)(left < TILE_PANELS ? left : TILE_PANELS);
        const int64_t stop = t.row + c->block_rows < c->m ? t.row + c->block_rows : c->m;
        const int64_t passes = (stop - t.row + TILE_ROWS - 1) / TILE_ROWS;
        const tile_weights w = {(const char *)c->w->data + panel * c->panel_bytes, c->panel_bytes, c->steps};
        if (block == 0) fetched = 0;
        for (int64_t pass = 0; pass < passes; pass++) {
            /* The first tile of a thread, and a tile passed once, read ahead in their own panels. */
            fetching ahead = {.start = NULL};
            if (pass > 0 || (item > begin && passes > 1))
                ahead = plan_fetch(c, w.panels, t.panels, left - t.panels, &fetched, passes - pass);
            t.rows = (int)(stop - t.row < TILE_ROWS ? stop - t.row : TILE_ROWS);
            const char *x = c->x + t.row * c->x_stride * c->x_size;
            if (finish_whole && t.rows == TILE_ROWS && panel + TILE_PANELS <= whole_panels) {
                finish_whole(c, &t, x, &w, &ahead);
            } else {
                run_tile(c->w->dtype, t.rows, t.panels, x, c->x_stride, &w, &ahead, sums);
                finish_part(c, &t, sums);
            }
            t.row += t.rows;
        }
    }
    if (c->streams) end_of_stores_past();
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

int32_t oc_linear_warming(const void *x, int64_t x_stride, int64_t m, const oc_packed *w,
                          const float *bias, void *y, int64_t y_stride, int32_t y_dtype,
                          int32_t epilogue, oc_warm_list *warm) {
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
    const int64_t panels = oc_panels_of(w), steps = bf ? (w->k + 1) / 2 : w->k;
    const int64_t blocks = (m + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const int64_t tiles = (panels + TILE_PANELS - 1) / TILE_PANELS;
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
        .streams = y_dtype == OC_F32 && m * w->n * 4 > STREAM_BYTES && y_stride % 16 == 0 &&
                   (uintptr_t)y % 64 == 0,
        .warm = warm,
    };
    oc_parallel_for(tiles * blocks, 1, linear_task, &c);
    free(prepared);
    return OC_OK;
}

OC_EXPORT int32_t oc_linear(const void *x, int64_t x_stride, int64_t m, const oc_packed *w,
                            const float *bias, void *y, int64_t y_stride, int32_t y_dtype,
                            int32_t epilogue) {
    return oc_linear_warming(x, x_stride, m, w, bias, y, y_stride, y_dtype, epilogue, NULL);
}
