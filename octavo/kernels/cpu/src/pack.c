/* Weights into panels and back, and rows read out of a packed or plain table. */
#include "lanes.h"

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
    oc_parallel_for(oc_panels_of(packed), 1, pack_task, &c);
}

OC_EXPORT void oc_unpack(const oc_packed *packed, void *weight) {
    packing c = {weight, packed->k * (packed->dtype == OC_F32 ? 4 : 2), packed};
    oc_parallel_for(oc_panels_of(packed), 1, unpack_task, &c);
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
