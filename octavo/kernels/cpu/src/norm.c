/* RMS norm, with or without a residual addition before it, and SiLU times up.
 *
 * Each row is reduced by itself in a fixed order: sixteen running sums, added as a tree.
 */
#include "lanes.h"

#define GRAIN_ELEMENTS 16384 /* fewer elements than this are not worth another thread */

typedef struct {
    const void *x;
    float *residual; /* NULL: norm of x itself */
    const float *weight;
    void *y;
    int64_t k;
    float eps;
    int32_t x_dtype, y_dtype;
} norm_call;

static inline int lanes_at(int64_t k, int64_t i) { return (int)(k - i < 16 ? k - i : 16); }

static void norm_task(void *context, int64_t begin, int64_t end, int thread) {
    (void)thread;
    const norm_call *c = context;
    for (int64_t r = begin; r < end; r++) {
        const int64_t row = r * c->k;
        v16 squares = v16_zero();
        for (int64_t i = 0; i < c->k; i += 16) {
            const int count = lanes_at(c->k, i);
            v16 x = v16_load_any(c->x, row + i, c->x_dtype, count);
            if (c->residual) {
                x = v16_add(x, v16_load_any(c->residual, row + i, OC_F32, count));
                v16_store_any(c->residual, row + i, OC_F32, x, count);
            }
            squares = v16_fma(x, x, squares);
        }
        const void *source = c->residual ? c->residual : c->x;
        const int32_t dtype = c->residual ? OC_F32 : c->x_dtype;
        const v16 scale = v16_set(1.0f / sqrtf(v16_sum(squares) / (float)c->k + c->eps));
        for (int64_t i = 0; i < c->k; i += 16) {
            const int count = lanes_at(c->k, i);
            const v16 x = v16_mul(v16_load_any(source, row + i, dtype, count), scale);
            const v16 y = v16_mul(x, v16_load_any(c->weight, i, OC_F32, count));
            v16_store_any(c->y, row + i, c->y_dtype, y, count);
        }
    }
}

static int64_t grain_rows(int64_t k) { return k < GRAIN_ELEMENTS ? GRAIN_ELEMENTS / (k > 0 ? k : 1) : 1; }

OC_EXPORT void oc_rms_norm(const void *x, int32_t x_dtype, const float *weight, float eps,
                           int64_t m, int64_t k, void *y, int32_t y_dtype) {
    norm_call c = {x, NULL, weight, y, k, eps, x_dtype, y_dtype};
    oc_parallel_for(m, grain_rows(k), norm_task, &c);
}

OC_EXPORT void oc_add_rms_norm(const void *x, int32_t x_dtype, float *residual, const float *weight,
                               float eps, int64_t m, int64_t k, void *y, int32_t y_dtype) {
    norm_call c = {x, residual, weight, y, k, eps, x_dtype, y_dtype};
    oc_parallel_for(m, grain_rows(k), norm_task, &c);
}

typedef struct {
    const void *x;
    void *y;
    int64_t k;
    int32_t dtype;
} silu_call;

static void silu_task(void *context, int64_t begin, int64_t end, int thread) {
    (void)thread;
    const silu_call *c = context;
    for (int64_t r = begin; r < end; r++)
        for (int64_t i = 0; i < c->k; i += 16) {
            const int count = lanes_at(c->k, i);
            const v16 gate = v16_load_any(c->x, r * 2 * c->k + i, c->dtype, count);
            const v16 up = v16_load_any(c->x, (r * 2 + 1) * c->k + i, c->dtype, count);
            v16_store_any(c->y, r * c->k + i, c->dtype, v16_mul(v16_silu(gate), up), count);
        }
}

OC_EXPORT void oc_silu_mul(const void *x, int32_t dtype, int64_t m, int64_t k, void *y) {
    silu_call c = {x, y, k, dtype};
    oc_parallel_for(m, grain_rows(k), silu_task, &c);
}
