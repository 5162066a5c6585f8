/* What happens to a row between the QKV projection and attention: optional RMS norm of each query
 * and key head, rotary embedding, and storing key and value in the paged cache.
 *
 * Rows are independent, so that a row's bits never depend on its neighbours. Two rows may write
 * into one pair of values, so nothing here reads and rewrites bytes that belong to another token.
 */
#include "kv_cache.h"
#include "rope_store.h"
#include "vec.h"

typedef struct {
    const oc_attn_spec *spec;
    const oc_step *step;
    oc_layout layout;
    float *qkv;
    const float *cos, *sin, *q_norm, *k_norm;
    int32_t rot_dim;
    float eps;
    char *kv_cache;
    const void *key, *value; /* oc_kv_store only */
    int64_t key_stride, value_stride;
    int32_t dtype;
} store_job;

/* x *= weight / sqrt(mean(x^2) + eps) */
static void normalise(float *x, int dim, const float *weight, float eps) {
    vf sums = v_splat(0.0f);
    int i = 0;
    for (; i + OC_VW <= dim; i += OC_VW) {
        vf part = v_load(x + i);
        sums = v_fma(part, part, sums);
    }
    float sum = v_reduce_add(sums);
    for (; i < dim; i++) sum += x[i] * x[i];
    const float factor = 1.0f / __builtin_sqrtf(sum / (float)dim + eps);
    for (int j = 0; j < dim; j++) x[j] = x[j] * factor * weight[j];
}

static void rotate(float *x, int half, const float *cos, const float *sin) {
    int i = 0;
    for (; i + OC_VW <= half; i += OC_VW) {
        const vf a = v_load(x + i), b = v_load(x + half + i), c = v_load(cos + i), s = v_load(sin + i);
        v_store(x + i, a * c - b * s);
        v_store(x + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
        const float a = x[i], b = x[half + i];
        x[i] = a * cos[i] - b * sin[i];
        x[half + i] = b * cos[i] + a * sin[i];
    }
}

/* One head of one token. */
static void store_key_f32(const oc_layout *l, const float *key, float *keys, int token) {
    for (int d = 0; d < l->head_dim; d++) keys[(int64_t)d * OC_TILE + token] = key[d];
    if (l->padded_dim > l->head_dim) keys[(int64_t)l->head_dim * OC_TILE + token] = 0.0f;
}

static void store_key_bf16(const oc_layout *l, const uint16_t *key, uint32_t *keys, int token) {
    const int pairs = l->head_dim / 2;
    for (int p = 0; p < pairs; p++) {
        uint32_t pair;
        memcpy(&pair, key + 2 * p, 4);
        keys[(int64_t)p * OC_TILE + token] = pair;
    }
    if (l->head_dim & 1) keys[(int64_t)pairs * OC_TILE + token] = key[l->head_dim - 1];
}

static void store_value_bf16(const oc_layout *l, const uint16_t *value, uint16_t *values, int token) {
    uint16_t *out = values + (int64_t)(token / 2) * l->lanes * 2 + (token & 1);
    int d = 0;
#if OC_LEVEL >= OC_LEVEL_AVX512
    /* A masked store leaves the neighbour token's halves alone. */
    const __mmask32 mine = (token & 1) ? 0xaaaaaaaau : 0x55555555u;
    uint16_t *row = values + (int64_t)(token / 2) * l->lanes * 2;
    for (; d + 16 <= l->head_dim; d += 16) {
        __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(value + d)));
        wide = _mm512_or_si512(wide, _mm512_slli_epi32(wide, 16));
        _mm512_mask_storeu_epi16(row + 2 * (int64_t)d, mine, wide);
    }
#endif
    for (; d < l->head_dim; d++) out[2 * (int64_t)d] = value[d];
}

#define OC_HEAD_CHUNK 2048 /* Python refuses a larger head_dim */

static void store_head(const store_job *job, char *head, int token, const void *key, const void *value,
                       int32_t dtype) {
    const oc_layout *l = &job->layout;
    char *values = head + l->key_bytes;
    const int dim = l->head_dim;
    if (job->spec->dtype == OC_F32) {
        float buffer[OC_HEAD_CHUNK];
        const float *row = key;
        if (dtype == OC_BF16) {
            for (int d = 0; d < dim; d++) buffer[d] = bf16_to_f32(((const uint16_t *)key)[d]);
            row = buffer;
        }
        store_key_f32(l, row, (float *)head, token);
        row = value;
        if (dtype == OC_BF16) {
            for (int d = 0; d < dim; d++) buffer[d] = bf16_to_f32(((const uint16_t *)value)[d]);
            row = buffer;
        }
        memcpy(values + (int64_t)token * l->lanes * 4, row, (size_t)dim * 4);
        return;
    }
    uint16_t buffer[OC_HEAD_CHUNK];
    const uint16_t *row = key;
    if (dtype == OC_F32) f32_to_bf16_row(key, 1.0f, buffer, dim), row = buffer;
    store_key_bf16(l, row, (uint32_t *)head, token);
    row = value;
    if (dtype == OC_F32) f32_to_bf16_row(value, 1.0f, buffer, dim), row = buffer;
    store_value_bf16(l, row, (uint16_t *)values, token);
}

static void store_token(const store_job *job, int64_t row, const char *key, const char *value,
                        int32_t dtype) {
    const int64_t slot = job->step->slot_mapping[row];
    if (slot < 0) return;
    const oc_layout *l = &job->layout;
    char *tile = job->kv_cache + oc_tile_of_slot(l, slot);
    const int token = (int)(slot % l->block_size % OC_TILE);
    const int64_t head_size = (int64_t)l->head_dim * (dtype == OC_F32 ? 4 : 2);
    for (int h = 0; h < job->spec->num_kv_heads; h++)
        store_head(job, tile + h * l->head_bytes, token, key + h * head_size, value + h * head_size, dtype);
}

static void rope_store_rows(void *ctx, int64_t begin, int64_t end, int thread) {
    (void)thread;
    const store_job *job = ctx;
    const oc_attn_spec *spec = job->spec;
    const int dim = spec->head_dim, half = job->rot_dim / 2;
    const int64_t width = (int64_t)(spec->num_heads + 2 * spec->num_kv_heads) * dim;
    for (int64_t row = begin; row < end; row++) {
        const int64_t position = job->step->positions[row];
        if (position < 0) continue;
        const float *cos = job->cos + position * half, *sin = job->sin + position * half;
        float *head = job->qkv + row * width;
        for (int h = 0; h < spec->num_heads + spec->num_kv_heads; h++, head += dim) {
            const float *norm = h < spec->num_heads ? job->q_norm : job->k_norm;
            if (norm) normalise(head, dim, norm, job->eps);
            if (half) rotate(head, half, cos, sin);
        }
        const float *key = head - (int64_t)spec->num_kv_heads * dim;
        store_token(job, row, (const char *)key, (const char *)head, OC_F32);
    }
}

static void store_rows(void *ctx, int64_t begin, int64_t end, int thread) {
    (void)thread;
    const store_job *job = ctx;
    const int64_t element = job->dtype == OC_F32 ? 4 : 2;
    for (int64_t row = begin; row < end; row++)
        store_token(job, row, (const char *)job->key + row * job->key_stride * element,
                    (const char *)job->value + row * job->value_stride * element, job->dtype);
}

/* Few rows are not worth waking a thread for. */
static int64_t rows_per_task(const oc_attn_spec *spec) {
    const int64_t width = (int64_t)(spec->num_heads + 2 * spec->num_kv_heads) * spec->head_dim;
    const int64_t rows = 8192 / width;
    return rows < 1 ? 1 : rows;
}

void oc_rope_store(const oc_attn_spec *spec, const oc_step *step, float *qkv, const float *cos,
                   const float *sin, int32_t rot_dim, const float *q_norm, const float *k_norm, float eps,
                   void *kv_cache) {
    store_job job = {.spec = spec, .step = step, .layout = oc_layout_of(spec), .qkv = qkv,
                     .cos = cos, .sin = sin, .q_norm = q_norm, .k_norm = k_norm, .rot_dim = rot_dim,
                     .eps = eps, .kv_cache = kv_cache};
    oc_parallel_for(step->num_tokens, rows_per_task(spec), rope_store_rows, &job);
}

void oc_kv_store(const oc_attn_spec *spec, const oc_step *step, const void *key, int64_t key_stride,
                 const void *value, int64_t value_stride, int32_t dtype, void *kv_cache) {
    store_job job = {.spec = spec, .step = step, .layout = oc_layout_of(spec), .kv_cache = kv_cache,
                     .key = key, .value = value, .key_stride = key_stride,
                     .value_stride = value_stride, .dtype = dtype};
    oc_parallel_for(step->num_tokens, rows_per_task(spec), store_rows, &job);
}
