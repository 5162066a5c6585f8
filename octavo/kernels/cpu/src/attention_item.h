/* An item of attention work, and how the splits of a row become its output (attention.c). */
#ifndef OCTAVO_ATTENTION_ITEM_H
#define OCTAVO_ATTENTION_ITEM_H

#include "attention_kernel.h"

#define SPLIT 256
#define SPLIT_UNITS (SPLIT / UNIT)
#define MAX_VECTORS 64       /* query vectors of an item */
#define MAX_VECTOR_LANES 8192 /* their lanes together; a head_dim above 2048 is refused by Python */

typedef struct {
    const oc_attn_spec *spec;
    const oc_step *step;
    oc_layout layout;
    const float *query;
    int64_t query_stride;
    const char *kv_cache;
    void *out;
    int32_t out_dtype;
    struct item *items;
    float *partials;
} attend_job;

typedef struct item {
    int32_t request, row, rows;        /* token rows [row, row + rows) */
    int32_t head, heads;               /* whole groups, or a part of one */
    int32_t first_split, last_split;   /* [first, last) */
    int64_t partial;                   /* offset in partials of first_split, or -1: folds and finishes */
    int32_t kv_first, kv_last;         /* tokens [first, last) that any of its rows sees */
} item;

/* A split's result for some vectors: acc [vectors][lanes], then max [vectors], then sum [vectors]. */
INLINE int64_t partial_floats(const oc_layout *l, int vectors) { return (int64_t)vectors * (l->lanes + 2); }

/* Merges one split into the running result of the same vectors. */
static inline void fold(int vectors, int lanes, float *acc, float *max, float *sum, const float *part,
                 const float *part_max, const float *part_sum) {
    for (int i = 0; i < vectors; i += OC_VW) {
        float both[2][OC_VW] = {{0}}, factor[2][OC_VW];
        const int n = vectors - i < OC_VW ? vectors - i : OC_VW;
        for (int j = 0; j < n; j++) {
            const float a = max[i + j], b = part_max[i + j], top = b > a ? b : a;
            both[0][j] = a - top;
            both[1][j] = b - top;
            max[i + j] = top;
        }
        v_store(factor[0], v_exp2_neg(v_load(both[0])));
        v_store(factor[1], v_exp2_neg(v_load(both[1])));
        for (int j = 0; j < n; j++) {
            const float old = factor[0][j], new = factor[1][j];
            float *a = acc + (int64_t)(i + j) * lanes;
            const float *b = part + (int64_t)(i + j) * lanes;
            for (int d = 0; d < lanes; d += OC_VW)
                v_store(a + d, v_fma(v_load(b + d), v_splat(new), v_load(a + d) * old));
            sum[i + j] = sum[i + j] * old + part_sum[i + j] * new;
        }
    }
}

static inline void start_empty(int vectors, int lanes, float *acc, float *max, float *sum) {
    memset(acc, 0, sizeof(float) * (size_t)vectors * (size_t)lanes);
    for (int i = 0; i < vectors; i++) max[i] = MASKED, sum[i] = 0.0f;
}

/* Row and head of the vectors of an item, in the order in which they lie in its buffers: by KV
 * head, then by row, then by head of the group. */
typedef struct {
    int group, part; /* heads of a KV head, and how many of them this item has */
    int kv_head, kv_heads;
    int per_kv_head, vectors;
} item_shape;

static inline item_shape shape_of(const oc_attn_spec *spec, const item *it) {
    item_shape s;
    s.group = spec->num_heads / spec->num_kv_heads;
    s.part = it->heads < s.group ? it->heads : s.group;
    s.kv_head = it->head / s.group;
    s.kv_heads = it->heads / s.part;
    s.per_kv_head = it->rows * s.part;
    s.vectors = s.per_kv_head * s.kv_heads;
    return s;
}

/* Calls for vector i of the item: its row, its head. */
static inline void place_of(const item *it, const item_shape *s, int i, int *row, int *head) {
    const int kv = i / s->per_kv_head, rest = i % s->per_kv_head;
    *row = it->row + rest / s->part;
    *head = it->head + kv * s->part + rest % s->part;
}

static inline void write_out(const attend_job *job, const item *it, const item_shape *s, const float *acc,
                      const float *sum) {
    const int dim = job->layout.head_dim, lanes = job->layout.lanes;
    for (int i = 0; i < s->vectors; i++) {
        int row, head;
        place_of(it, s, i, &row, &head);
        const int64_t at = ((int64_t)row * job->spec->num_heads + head) * dim;
        const float inverse = sum[i] == 0.0f ? 0.0f : 1.0f / sum[i];
        const float *a = acc + (int64_t)i * lanes;
        if (job->out_dtype == OC_F32) {
            float *out = (float *)job->out + at;
            for (int d = 0; d < dim; d++) out[d] = a[d] * inverse;
        } else {
            f32_to_bf16_row(a, inverse, (uint16_t *)job->out + at, dim);
        }
    }
}

#endif
