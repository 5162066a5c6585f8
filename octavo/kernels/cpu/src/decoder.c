/* A whole decoder in one call.
 *
 * The residual stream stays in f32; what enters a product is rounded to the model's dtype. The
 * rows of a large step pass through a layer in chunks, so that what a chunk's next operation reads
 * is still in cache; but the keys and values of all rows of the step are stored before any row
 * reads them, because a row may belong to a request whose earlier rows are in another chunk.
 *
 * Every operation works row by row in a fixed order (linear.c, norm.c), so chunks change no bit.
 */
#include <stdlib.h>
#include <string.h>

#include "kv_cache.h"
#include "linear.h"
#include "memory.h"

#define CHUNK_ROWS 256
#define ALIGNMENT 64
#define WARM_FROM_ROWS 24        /* with fewer rows products have no time to fetch anything */
#define WARM_MOST (64 << 20)     /* bytes of a layer's KV cache */

typedef struct {
    float *residual; /* [rows][hidden] */
    float *qkv;      /* [rows][(H + 2 KV) D] */
    void *attended;  /* [rows][H D] in dtype */
    void *normed;    /* [chunk][hidden] in dtype */
    void *activated; /* [chunk][intermediate] in dtype */
    int64_t *ids;    /* [rows] */
    int64_t *warm;   /* [most_warm()] */
} work_space;

static int64_t widest(const oc_decoder *d, int which) {
    int64_t most = 0;
    for (int i = 0; i < d->num_layers; i++) {
        const oc_decoder_layer *l = &d->layers[i];
        const int64_t width = which == 0 ? l->qkv.n : which == 1 ? l->o.k : l->down.k;
        if (width > most) most = width;
    }
    return most;
}

/* Half of the last-level cache may wait for attention; the other half passes by meanwhile. */
static int64_t most_warm(void) {
    const int64_t room = oc_last_level_cache() / 2;
    return (room < WARM_MOST ? room : WARM_MOST) / OC_WARM_BYTES;
}

static void *take(uintptr_t *cursor, int64_t bytes) {
    const uintptr_t start = *cursor;
    *cursor += (uintptr_t)(bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return (void *)start;
}

/* Lays the buffers out from `base`; with base 0 this only measures. Returns the end. */
static uintptr_t lay_out(const oc_decoder *d, int64_t rows, uintptr_t base, work_space *w) {
    const int64_t size = d->dtype == OC_F32 ? 4 : 2, chunk = rows < CHUNK_ROWS ? rows : CHUNK_ROWS;
    uintptr_t cursor = base;
    w->residual = take(&cursor, rows * d->hidden * 4);
    w->qkv = take(&cursor, rows * widest(d, 0) * 4);
    w->attended = take(&cursor, rows * widest(d, 1) * size);
    w->normed = take(&cursor, chunk * d->hidden * size);
    w->activated = take(&cursor, chunk * widest(d, 2) * size);
    w->ids = take(&cursor, rows * 8);
    w->warm = take(&cursor, rows < WARM_FROM_ROWS ? 0 : most_warm() * 8);
    return cursor;
}

static int32_t prepare(oc_decoder *d, int64_t rows, work_space *w) {
    const int64_t bytes = (int64_t)lay_out(d, rows, 0, w) + ALIGNMENT;
    if (bytes > d->scratch_bytes) {
        free(d->scratch);
        d->scratch_bytes = 0;
        d->scratch = malloc((size_t)bytes);
        if (!d->scratch) return OC_NO_MEMORY;
        oc_use_huge_pages(d->scratch, bytes);
        d->scratch_bytes = bytes;
    }
    const uintptr_t start = ((uintptr_t)d->scratch + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    lay_out(d, rows, start, w);
    return OC_OK;
}

static int32_t embed(const oc_decoder *d, const oc_step *step, const int64_t *ids, work_space *w) {
    for (int64_t i = 0; i < step->num_tokens; i++) {
        const int padding = step->positions[i] < 0;
        if (!padding && (ids[i] < 0 || ids[i] >= d->vocab)) return OC_BAD_ID;
        w->ids[i] = padding ? 0 : ids[i];
    }
    if (d->packed_embedding.data)
        oc_gather_packed(&d->packed_embedding, w->ids, step->num_tokens, w->residual);
    else
        oc_gather_plain(d->plain_embedding, d->dtype, d->hidden, w->ids, step->num_tokens, w->residual);
    return OC_OK;
}

/* The parts of a layer's cache that attention will read and that were written in earlier steps, as
 * offsets; of blocks that the request before has at the same place (a shared prefix) one is enough.
 * Returns their number. */
static int64_t find_warm(const oc_attn_spec *spec, const oc_step *step, int64_t *places) {
    if (step->num_tokens < WARM_FROM_ROWS) return 0;
    const int64_t most = most_warm(), block_bytes = oc_layout_of(spec).block_bytes;
    int64_t count = 0;
    for (int r = 0; r < step->num_reqs; r++) {
        const int64_t rows = step->query_start_loc[r + 1] - step->query_start_loc[r];
        const int64_t end = step->seq_lens[r] - rows;
        const int64_t begin = spec->sliding_window > 0 ? end + 1 - spec->sliding_window : 0;
        const int32_t *table = step->block_table + step->block_table_stride * r;
        for (int64_t b = begin > 0 ? begin / spec->block_size : 0; b * spec->block_size < end; b++) {
            if (r > 0 && table[b] == table[b - step->block_table_stride]) continue;
            for (int64_t part = 0; part < block_bytes; part += OC_WARM_BYTES) {
                if (count == most) return count;
                places[count++] = table[b] * block_bytes + part;
            }
        }
    }
    return count;
}

/* Products of one layer fetch the cache of the next. */
static void warm_next(const oc_decoder *d, const oc_step *step, void *const *kv_caches, int layer,
                      const work_space *w, oc_warm_list *warm) {
    if (layer >= d->num_layers) {
        warm->count = 0;
        return;
    }
    const oc_attn_spec *spec = &d->layers[layer].attention;
    if (layer == 0 || memcmp(spec, &d->layers[layer - 1].attention, sizeof(*spec)) != 0)
        warm->count = find_warm(spec, step, w->warm);
    warm->base = kv_caches[layer];
    warm->places = w->warm;
    atomic_store(&warm->next, 0);
}

static int32_t check_rows(const int64_t *wanted, int64_t num_wanted, int64_t rows) {
    for (int64_t i = 0; i < num_wanted; i++)
        if (wanted[i] < (i ? wanted[i - 1] + 1 : 0) || wanted[i] >= rows) return OC_BAD_ROW;
    return OC_OK;
}

/* These rows move to the front, in ascending order, so that none is overwritten before it has moved. */
static void keep_rows(const work_space *w, const int64_t *wanted, int64_t num_wanted, int64_t residual_bytes,
                      int64_t attended_bytes) {
    for (int64_t i = 0; i < num_wanted; i++) {
        if (wanted[i] == i) continue;
        memcpy((char *)w->residual + i * residual_bytes, (char *)w->residual + wanted[i] * residual_bytes,
               (size_t)residual_bytes);
        memcpy((char *)w->attended + i * attended_bytes, (char *)w->attended + wanted[i] * attended_bytes,
               (size_t)attended_bytes);
    }
}

/* wanted: NULL, or in the last layer the rows that go on behind its attention. */
static int32_t run_layer(const oc_decoder *d, int layer, const oc_step *step, void *const *kv_caches,
                         const int64_t *wanted, int64_t num_wanted, const work_space *w,
                         oc_warm_list *warm) {
    const oc_decoder_layer *l = &d->layers[layer];
    const int64_t size = d->dtype == OC_F32 ? 4 : 2;
    int64_t rows = step->num_tokens;
    int32_t failed = OC_OK;
    for (int64_t start = 0; start < rows; start += CHUNK_ROWS) {
        const int64_t m = rows - start < CHUNK_ROWS ? rows - start : CHUNK_ROWS;
        oc_rms_norm(w->residual + start * d->hidden, OC_F32, l->input_norm, d->eps, m, d->hidden,
                    w->normed, d->dtype);
        failed |= oc_linear_warming(w->normed, d->hidden, m, &l->qkv, l->qkv_bias,
                                    w->qkv + start * l->qkv.n, l->qkv.n, OC_F32, OC_STORE, warm);
    }
    if (failed) return failed;
    oc_rope_store(&l->attention, step, w->qkv, d->cos, d->sin, d->rot_dim, l->q_norm, l->k_norm,
                  d->eps, kv_caches[layer]);
    if (wanted && num_wanted == 0) return OC_OK;
    oc_attend(&l->attention, step, w->qkv, l->qkv.n, kv_caches[layer], w->attended, d->dtype);
    warm_next(d, step, kv_caches, layer + 1, w, warm);
    if (wanted) {
        keep_rows(w, wanted, num_wanted, d->hidden * 4, l->o.k * size);
        rows = num_wanted;
    }
    for (int64_t start = 0; start < rows; start += CHUNK_ROWS) {
        const int64_t m = rows - start < CHUNK_ROWS ? rows - start : CHUNK_ROWS;
        float *residual = w->residual + start * d->hidden;
        failed |= oc_linear_warming((char *)w->attended + start * l->o.k * size, l->o.k, m, &l->o,
                                    l->o_bias, residual, d->hidden, OC_F32, OC_RESIDUAL, warm);
        oc_rms_norm(residual, OC_F32, l->post_norm, d->eps, m, d->hidden, w->normed, d->dtype);
        failed |= oc_linear_warming(w->normed, d->hidden, m, &l->gate_up, l->gate_up_bias, w->activated,
                                    l->down.k, d->dtype, OC_SILU_MUL, warm);
        failed |= oc_linear_warming(w->activated, l->down.k, m, &l->down, l->down_bias, residual,
                                    d->hidden, OC_F32, OC_RESIDUAL, warm);
    }
    return failed;
}

OC_EXPORT int32_t oc_decoder_run(oc_decoder *d, const oc_step *step, const int64_t *ids,
                                 void *const *kv_caches, const int64_t *wanted, int64_t num_wanted,
                                 void *hidden_out) {
    const int64_t num_out = wanted ? num_wanted : step->num_tokens;
    if (wanted && check_rows(wanted, num_wanted, step->num_tokens)) return OC_BAD_ROW;
    if (step->num_tokens <= 0) return OC_OK;
    work_space w;
    int32_t failed = prepare(d, step->num_tokens, &w);
    if (!failed) failed = embed(d, step, ids, &w);
    if (failed) return failed;
    oc_warm_list warm = {.count = 0};
    warm_next(d, step, kv_caches, 0, &w, &warm);
    for (int i = 0; i < d->num_layers && !failed; i++)
        failed = run_layer(d, i, step, kv_caches, i + 1 == d->num_layers ? wanted : NULL, num_wanted, &w,
                           &warm);
    if (failed) return failed;
    oc_rms_norm(w.residual, OC_F32, d->final_norm, d->eps, num_out, d->hidden, hidden_out, d->dtype);
    return OC_OK;
}

OC_EXPORT void oc_decoder_release(oc_decoder *d) {
    free(d->scratch);
    d->scratch = NULL;
    d->scratch_bytes = 0;
}
