/* Paged attention over a ragged batch: which thread reads which part of whose cache.
 *
 * The arithmetic of a row is fixed by its own position alone. The KV of a request is cut into
 * splits of SPLIT tokens, counted from its first token. Each split is an online softmax of its own,
 * walked in units of 64 tokens (attention_kernel.h), and the splits are folded together in order.
 * An *item* is the work one thread does in one go: some rows and heads of one request over some
 * splits. How items are cut depends on the number of threads and on the batch, and may, because no
 * bit of the result depends on it: an item that covers all splits folds as it goes; where the
 * splits of a row are spread over items, they are kept apart and folded, in order, in a second
 * loop.
 *
 * Items of few rows take all KV heads, so that a block is read as it lies in memory, and fetch the
 * next unit, or the next item's first, while working. Items of many rows take one KV head, whose
 * unit stays in the first-level cache while all its query vectors pass over it.
 *
 * There is no allocation that can fail a step: without memory for splitting, items stay whole.
 */
#include "attention_item.h"

#include <stdlib.h>

/* ---- one item ------------------------------------------------------------------------------ */

/* Where tiles [0, count) of a unit begin in the cache; the rest repeats the first. */
static void find_tiles(const attend_job *job, int request, int64_t unit, int count, const char **tiles) {
    const oc_layout *l = &job->layout;
    const int32_t *table = job->step->block_table + job->step->block_table_stride * request;
    for (int t = 0; t < UNIT_TILES; t++) {
        int64_t block = unit * UNIT_TILES + (t < count ? t : 0), tile = 0;
        if (l->tiles_per_block > 1) { /* divisions are slow */
            tile = block % l->tiles_per_block;
            block /= l->tiles_per_block;
        }
        tiles[t] = job->kv_cache + table[block] * l->block_bytes + tile * l->tile_bytes;
    }
}

static int tiles_in_unit(const item *it, int64_t unit) {
    const int64_t tokens = it->kv_last - unit * UNIT;
    return tokens >= UNIT ? UNIT_TILES : (int)((tokens + OC_TILE - 1) / OC_TILE);
}

/* Query vectors in the form the kernel of this cache wants. */
static void load_queries(const attend_job *job, const item *it, const item_shape *s, char *buffer,
                         int64_t query_bytes, int32_t *first, int32_t *last) {
    const int dim = job->layout.head_dim, window = job->spec->sliding_window;
    for (int i = 0; i < s->vectors; i++) {
        int row, head;
        place_of(it, s, i, &row, &head);
        const int64_t position = job->step->positions[row];
        last[i] = (int32_t)(position + 1);
        first[i] = window > 0 && position + 1 > window ? (int32_t)(position + 1 - window) : 0;
        const float *from = job->query + row * job->query_stride + (int64_t)head * dim;
        char *to = buffer + i * query_bytes;
        memset(to + query_bytes - 8, 0, 8);
        if (job->spec->dtype == OC_F32) {
            memcpy(to, from, sizeof(float) * (size_t)dim);
        } else if (KIND_BF16 == KIND_BF16_DOT) {
            f32_to_bf16_row(from, 1.0f, (uint16_t *)to, dim);
        } else {
            for (int d = 0; d < dim; d++) ((float *)to)[d] = bf16_to_f32(f32_to_bf16(from[d]));
        }
    }
}

static void run_item(const attend_job *job, const item *it, const item *following) {
    const oc_attn_spec *spec = job->spec;
    const oc_layout *l = &job->layout;
    const item_shape s = shape_of(spec, it);
    const int bf16 = spec->dtype == OC_BF16;
    const int dot = bf16 && KIND_BF16 == KIND_BF16_DOT;
    /* One odd lane may follow the head; at least 8 bytes, which load_queries clears. */
    const int64_t query_bytes = dot ? (l->padded_dim * 2 + 7) / 8 * 8 : (l->padded_dim * 4 + 7) / 8 * 8;

    _Alignas(64) float acc[MAX_VECTOR_LANES], part[MAX_VECTOR_LANES];
    _Alignas(64) char query[MAX_VECTOR_LANES * 4];
    float max[MAX_VECTORS], sum[MAX_VECTORS], part_max[MAX_VECTORS], part_sum[MAX_VECTORS];
    float lane_sums[MAX_VECTORS][OC_VW];
    int32_t first[MAX_VECTORS], last[MAX_VECTORS];

    load_queries(job, it, &s, query, query_bytes, first, last);
    const int folding = it->partial < 0;
    if (folding) start_empty(s.vectors, l->lanes, acc, max, sum);

    const char *tiles[UNIT_TILES], *coming[UNIT_TILES];
    for (int split = it->first_split; split < it->last_split; split++) {
        float *a = part, *m = part_max, *sums = part_sum;
        if (!folding) {
            a = job->partials + it->partial + (split - it->first_split) * partial_floats(l, s.vectors);
            m = a + (int64_t)s.vectors * l->lanes;
            sums = m + s.vectors;
        }
        start_empty(s.vectors, l->lanes, a, m, sums);
        memset(lane_sums, 0, sizeof(lane_sums[0]) * (size_t)s.vectors);
        int64_t from = it->kv_first / UNIT, to = (it->kv_last + UNIT - 1) / UNIT;
        if (from < (int64_t)split * SPLIT_UNITS) from = (int64_t)split * SPLIT_UNITS;
        if (to > (int64_t)(split + 1) * SPLIT_UNITS) to = (int64_t)(split + 1) * SPLIT_UNITS;
        for (int64_t unit = from; unit < to; unit++) {
            const int count = tiles_in_unit(it, unit);
            find_tiles(job, it->request, unit, count, tiles);
            int64_t ahead = 0; /* from the present heads to those of the following item */
            if ((unit + 1) * UNIT < it->kv_last && unit + 1 < (int64_t)it->last_split * SPLIT_UNITS) {
                find_tiles(job, it->request, unit + 1, tiles_in_unit(it, unit + 1), coming);
            } else if (following && following->kv_last > following->kv_first) {
                int64_t start = following->kv_first / UNIT;
                if (start < (int64_t)following->first_split * SPLIT_UNITS)
                    start = (int64_t)following->first_split * SPLIT_UNITS;
                find_tiles(job, following->request, start, tiles_in_unit(following, start), coming);
                ahead = following->head / s.group - s.kv_head;
            } else {
                memcpy(coming, tiles, sizeof(tiles));
            }
            for (int kv = 0; kv < s.kv_heads; kv++) {
                unit_pointers pointers = {.start = unit * UNIT};
                const int64_t head_at = (s.kv_head + kv) * l->head_bytes;
                for (int t = 0; t < UNIT_TILES; t++) {
                    pointers.tile[t] = tiles[t] + head_at;
                    pointers.next[t] = coming[t] + head_at + ahead * l->head_bytes;
                }
                for (int i = 0; i < s.per_kv_head; i += 4) {
                    const int vector = kv * s.per_kv_head + i;
                    const int n = s.per_kv_head - i < 4 ? s.per_kv_head - i : 4;
                    const chunk_state chunk = {
                        .query = query + vector * query_bytes, .query_bytes = query_bytes,
                        .first = first + vector, .last = last + vector,
                        .acc = a + (int64_t)vector * l->lanes, .max = m + vector,
                        .sum = lane_sums[vector]};
                    unit_functions[bf16][n - 1][i == 0](spec, l, &chunk, &pointers);
                }
            }
        }
        for (int i = 0; i < s.vectors; i++) sums[i] = v_reduce_add(v_load(lane_sums[i]));
        if (folding) fold(s.vectors, l->lanes, acc, max, sum, a, m, sums);
    }
    if (folding) write_out(job, it, &s, acc, sum);
}

static void run_items(void *ctx, int64_t begin, int64_t end, int thread) {
    (void)thread;
    const attend_job *job = ctx;
    for (int64_t i = begin; i < end; i++)
        run_item(job, job->items + i, i + 1 < end ? job->items + i + 1 : NULL);
}

/* The second loop: items whose splits lie in partials. */
static void fold_items(void *ctx, int64_t begin, int64_t end, int thread) {
    (void)thread;
    const attend_job *job = ctx;
    const oc_layout *l = &job->layout;
    _Alignas(64) float acc[MAX_VECTOR_LANES];
    float max[MAX_VECTORS], sum[MAX_VECTORS];
    for (int64_t i = begin; i < end; i++) {
        const item *it = job->items + i;
        const item_shape s = shape_of(job->spec, it);
        const int64_t floats = partial_floats(l, s.vectors);
        start_empty(s.vectors, l->lanes, acc, max, sum);
        for (int split = it->first_split; split < it->last_split; split++) {
            const float *a = job->partials + it->partial + (split - it->first_split) * floats;
            const float *m = a + (int64_t)s.vectors * l->lanes;
            fold(s.vectors, l->lanes, acc, max, sum, a, m, m + s.vectors);
        }
        write_out(job, it, &s, acc, sum);
    }
}

/* ---- cutting a batch into items -------------------------------------------------------------- */

/* Grows only, one per calling thread, so that a step allocates nothing. */
typedef struct {
    item *items, *folds;
    float *partials;
    int64_t item_space, fold_space, partial_space;
} scratch;

static _Thread_local scratch room;

static int grow(void **memory, int64_t *space, int64_t wanted, size_t size) {
    if (wanted <= *space) return 1;
    void *bigger = realloc(*memory, (size_t)(wanted + wanted / 2) * size);
    if (!bigger) return 0;
    *memory = bigger;
    *space = wanted + wanted / 2;
    return 1;
}

typedef struct {
    attend_job *job;
    int64_t items, folds, partials;
} plan;

/* In units of one KV byte read; a query vector costs about as much as 8 bytes of each lane. */
static int64_t cost_of(const oc_layout *l, const item *it, int kv_heads, int vectors) {
    return (int64_t)(it->kv_last - it->kv_first) * l->lanes * (kv_heads * 4 + vectors * 2);
}

static void find_kv_range(const attend_job *job, item *it) {
    const int window = job->spec->sliding_window;
    int64_t first = INT32_MAX, last = 0;
    for (int r = it->row; r < it->row + it->rows; r++) {
        const int64_t end = job->step->positions[r] + 1;
        if (end <= 0) continue;
        const int64_t begin = window > 0 && end > window ? end - window : 0;
        if (begin < first) first = begin;
        if (end > last) last = end;
    }
    it->kv_first = (int32_t)(first < last ? first : last);
    it->kv_last = (int32_t)last;
    it->first_split = it->kv_first / SPLIT;
    it->last_split = (it->kv_last + SPLIT - 1) / SPLIT;
}

static void emit(plan *p, const item *it) {
    if (grow((void **)&room.items, &room.item_space, p->items + 1, sizeof(item)))
        room.items[p->items++] = *it;
    else
        p->job->partials = room.partials, run_item(p->job, it, NULL);
}

/* Cuts an item that holds more than its share: by splits, then by KV heads. */
static void emit_cut(plan *p, item it, int64_t share) {
    const oc_layout *l = &p->job->layout;
    const item_shape s = shape_of(p->job->spec, &it);
    const int64_t cost = cost_of(l, &it, s.kv_heads, s.vectors);
    int parts = (int)((cost + share - 1) / share);
    int splits = it.last_split - it.first_split;
    int by_split = parts < splits ? parts : splits;
    if (by_split < 1) by_split = 1;
    const int by_head = (parts + by_split - 1) / by_split;
    const int kv_each = by_head <= 1 ? s.kv_heads : (s.kv_heads + by_head - 1) / by_head;
    for (int kv = 0; kv < s.kv_heads; kv += kv_each) {
        item sub = it;
        sub.head = it.head + kv * s.part;
        sub.heads = (s.kv_heads - kv < kv_each ? s.kv_heads - kv : kv_each) * s.part;
        const int64_t floats = partial_floats(l, shape_of(p->job->spec, &sub).vectors);
        const int64_t wanted = p->partials + floats * splits;
        if (by_split <= 1 ||
            !grow((void **)&room.partials, &room.partial_space, wanted, sizeof(float)) ||
            !grow((void **)&room.folds, &room.fold_space, p->folds + 1, sizeof(item))) {
            emit(p, &sub);
            continue;
        }
        sub.partial = p->partials;
        p->partials += floats * splits;
        room.folds[p->folds++] = sub;
        for (int i = 0; i < by_split; i++) {
            item piece = sub;
            piece.first_split = it.first_split + (int)((int64_t)splits * i / by_split);
            piece.last_split = it.first_split + (int)((int64_t)splits * (i + 1) / by_split);
            piece.partial = sub.partial + floats * (piece.first_split - it.first_split);
            emit(p, &piece);
        }
    }
}

/* Rows and heads that fit into one item's buffers. */
static void plan_request(plan *p, int request, int row, int rows, int64_t share) {
    const oc_attn_spec *spec = p->job->spec;
    const int group = spec->num_heads / spec->num_kv_heads;
    int space = MAX_VECTOR_LANES / p->job->layout.lanes;
    if (space > MAX_VECTORS) space = MAX_VECTORS;
    const int part = group < space ? group : space;
    const int fit = part < group ? 1 : space / group;
    const int tile_rows = rows < fit ? rows : fit;
    int kv_each = fit / tile_rows;
    if (kv_each > spec->num_kv_heads) kv_each = spec->num_kv_heads;
    /* Last rows first: they see the most, and small items at the end even out the threads. */
    for (int end = rows; end > 0; end -= tile_rows) {
        const int begin = end > tile_rows ? end - tile_rows : 0;
        item it = {.request = request, .row = row + begin, .rows = end - begin, .partial = -1};
        find_kv_range(p->job, &it);
        for (int kv = 0; kv < spec->num_kv_heads; kv += kv_each)
            for (int head = 0; head < group; head += part) {
                item sub = it;
                const int kv_heads = spec->num_kv_heads - kv < kv_each ? spec->num_kv_heads - kv : kv_each;
                sub.head = kv * group + head;
                sub.heads = part < group ? (group - head < part ? group - head : part) : kv_heads * group;
                emit_cut(p, sub, share);
            }
    }
}

void oc_attend(const oc_attn_spec *spec, const oc_step *step, const float *query, int64_t query_stride,
               const void *kv_cache, void *out, int32_t out_dtype) {
    attend_job job = {.spec = spec, .step = step, .layout = oc_layout_of(spec), .query = query,
                      .query_stride = query_stride, .kv_cache = kv_cache, .out = out,
                      .out_dtype = out_dtype};
    plan p = {.job = &job};
    const int32_t *starts = step->query_start_loc;
    int64_t total = 0;
    for (int r = 0; r < step->num_reqs; r++) {
        item it = {.row = starts[r], .rows = starts[r + 1] - starts[r]};
        find_kv_range(&job, &it);
        total += cost_of(&job.layout, &it, spec->num_kv_heads, it.rows * spec->num_heads);
    }
    const int threads = oc_num_threads();
    const int64_t least = 64 * 1024; /* not worth handing to another thread */
    int64_t share = threads > 1 ? total / (threads * 4) : INT64_MAX / 2;
    if (share < least) share = least;
    for (int r = 0; r < step->num_reqs; r++)
        if (starts[r + 1] > starts[r]) plan_request(&p, r, starts[r], starts[r + 1] - starts[r], share);
    job.items = room.items;
    job.partials = room.partials;
    oc_parallel_for(p.items, total <= least ? p.items : 1, run_items, &job);
    if (p.folds) {
        job.items = room.folds;
        oc_parallel_for(p.folds, total <= 4 * least ? p.folds : 1, fold_items, &job);
    }
    /* Rows after the last request's are padding too. */
    const int64_t width = (int64_t)spec->num_heads * spec->head_dim * (out_dtype == OC_F32 ? 4 : 2);
    const int64_t used = starts[step->num_reqs];
    if (used < step->num_tokens)
        memset((char *)out + used * width, 0, (size_t)((step->num_tokens - used) * width));
}
