/* The contract between the C files of Octavo's CPU kernels.
 *
 * How one library serves every processor: each .c file of this folder is compiled once for every
 * instruction-set level of the architecture, with OC_ISA (a name: scalar, avx2, avx512,
 * avx512bf16) and OC_LEVEL (a number, below) defined, and all objects are linked into one shared
 * library. Every function with external linkage carries the level in its symbol, through
 * OC_ISA_NAME; a call from one file to another stays within its level. Python looks at the
 * processor once (oc_cpu_level) and binds the symbols of one level, so there is no table of
 * function pointers and no state to switch. Files whose first line is "// octavo: built once"
 * (thread pool, processor detection) are compiled once, for the baseline, without suffix.
 *
 * A function that Python calls is marked OC_EXPORT; anything else shared between files is hidden
 * by -fvisibility=hidden. Compiled with -std=gnu11 -O3 -ffp-contract=off: a multiply-add happens
 * only where it is written, so that results do not depend on how a compiler unrolls.
 */
#ifndef OCTAVO_CPU_H
#define OCTAVO_CPU_H

#include <stddef.h>
#include <stdint.h>

#define OC_LEVEL_SCALAR 0     /* baseline of the architecture: SSE2 on x86-64, NEON on arm64 */
#define OC_LEVEL_AVX2 1       /* avx2, fma, f16c */
#define OC_LEVEL_AVX512 2     /* avx512 f, bw, dq, vl on top of avx2 */
#define OC_LEVEL_AVX512BF16 3 /* avx512bf16 on top of that */

#ifndef OC_ISA
#define OC_ISA scalar
#define OC_LEVEL OC_LEVEL_SCALAR
#endif
#define OC_PASTE_(a, b) a##__##b
#define OC_PASTE(a, b) OC_PASTE_(a, b)
#define OC_ISA_NAME(fn) OC_PASTE(fn, OC_ISA) /* oc_attend -> oc_attend__avx512 */
#define OC_EXPORT __attribute__((visibility("default")))

enum { OC_F32 = 0, OC_BF16 = 1 };
enum { OC_OK = 0, OC_NO_MEMORY = 1, OC_BAD_ID = 2, OC_BAD_ROW = 3 }; /* of what may fail */

/* ---- threads (pool.c) ------------------------------------------------------------------- */

#include "pool.h"

/* ---- the ragged batch of one step; the fields are AttentionMetadata's ------------------- */

typedef struct {
    const int32_t *query_start_loc; /* [num_reqs + 1] */
    const int32_t *seq_lens;        /* [num_reqs] */
    const int32_t *block_table;     /* [num_reqs][block_table_stride] */
    int64_t block_table_stride;
    const int64_t *slot_mapping; /* [num_tokens], -1 for a padding row */
    const int64_t *positions;    /* [num_tokens], -1 for a padding row */
    int32_t num_reqs, num_tokens;
} oc_step;

typedef struct {
    int32_t num_heads, num_kv_heads, head_dim, block_size;
    float scale;
    int32_t sliding_window; /* 0 = none */
    float soft_cap;         /* 0 = none */
    int32_t dtype;          /* of the KV cache */
} oc_attn_spec;

/* ---- rope_store.c, attention.c ---------------------------------------------------------- */

#define oc_rope_store OC_ISA_NAME(oc_rope_store)
#define oc_attend OC_ISA_NAME(oc_attend)

/* qk-norm (weights may be NULL), rotary (rot_dim <= head_dim, half-split "neox" style; cos and
 * sin are [max_pos][rot_dim / 2] f32), in place on q and k of qkv [num_tokens][(H + 2 KV) D] f32;
 * then k and v go to kv_cache for rows with slot_mapping >= 0. Returns when all rows are stored. */
OC_EXPORT void oc_rope_store(const oc_attn_spec *, const oc_step *, float *qkv, const float *cos,
                             const float *sin, int32_t rot_dim, const float *q_norm,
                             const float *k_norm, float eps, void *kv_cache);

/* q: the first H * D floats of each row, rows q_stride floats apart.
 * out: [num_tokens][H * D] in out_dtype (OC_F32 or OC_BF16); zeros for padding rows. */
OC_EXPORT void oc_attend(const oc_attn_spec *, const oc_step *, const float *q, int64_t q_stride,
                         const void *kv_cache, void *out, int32_t out_dtype);

/* ---- linear.c, pack.c ------------------------------------------------------------------------ */

#define OC_PANEL 16 /* columns of W^T that are stored side by side */

/* A weight [n, k], packed once. bf16: [panels][ceil(k/2)][16][2]; f32: [panels][k][16]; padding is
 * zero. panels = ceil(n/16); or, where the rows are gate [n/2] and then up [n/2], 2 * ceil(n/2/16),
 * a panel of gate and a panel of up in turn. */
typedef struct {
    const void *data;
    int64_t n, k;
    int32_t dtype;
    int32_t gate_up;
} oc_packed;

static inline int64_t oc_panels_of(const oc_packed *w) {
    return w->gate_up ? (w->n / 2 + 15) / 16 * 2 : (w->n + 15) / 16;
}

enum {
    OC_STORE = 0,    /* y = acc + bias */
    OC_RESIDUAL = 1, /* y += acc + bias, y f32 */
    OC_SILU_MUL = 2, /* y = silu(gate + bias) * (up + bias), for a gate_up weight and only for it */
};

#define oc_pack OC_ISA_NAME(oc_pack)
#define oc_unpack OC_ISA_NAME(oc_unpack)
#define oc_linear OC_ISA_NAME(oc_linear)
#define oc_gather_packed OC_ISA_NAME(oc_gather_packed)
#define oc_gather_plain OC_ISA_NAME(oc_gather_plain)

OC_EXPORT void oc_pack(const void *weight, int64_t row_stride, const oc_packed *out);
OC_EXPORT void oc_unpack(const oc_packed *packed, void *weight);
/* x [m][k] in w->dtype, rows x_stride elements apart. y [m][n], or [m][n / 2] for OC_SILU_MUL, in
 * y_dtype, rows y_stride elements apart. bias: NULL or f32 [n]; for a gate_up weight [panels * 16] in
 * the order of the panels. Returns OC_OK or OC_NO_MEMORY. */
OC_EXPORT int32_t oc_linear(const void *x, int64_t x_stride, int64_t m, const oc_packed *w,
                            const float *bias, void *y, int64_t y_stride, int32_t y_dtype,
                            int32_t epilogue);
/* Rows ids[i] of the weight as f32: out [m][k]. Ids must be in range. */
OC_EXPORT void oc_gather_packed(const oc_packed *w, const int64_t *ids, int64_t m, float *out);
OC_EXPORT void oc_gather_plain(const void *table, int32_t dtype, int64_t k, const int64_t *ids,
                               int64_t m, float *out);

/* ---- norm.c ------------------------------------------------------------------------------ */

#define oc_rms_norm OC_ISA_NAME(oc_rms_norm)
#define oc_add_rms_norm OC_ISA_NAME(oc_add_rms_norm)
#define oc_silu_mul OC_ISA_NAME(oc_silu_mul)

/* y = x / sqrt(mean(x^2) + eps) * weight, row by row; weight f32. */
OC_EXPORT void oc_rms_norm(const void *x, int32_t x_dtype, const float *weight, float eps,
                           int64_t m, int64_t k, void *y, int32_t y_dtype);
/* residual += x, then the norm of the residual. residual [m][k] f32. */
OC_EXPORT void oc_add_rms_norm(const void *x, int32_t x_dtype, float *residual, const float *weight,
                               float eps, int64_t m, int64_t k, void *y, int32_t y_dtype);
/* x [m][2 k] (gate, then up) -> y [m][k] in the same dtype. */
OC_EXPORT void oc_silu_mul(const void *x, int32_t dtype, int64_t m, int64_t k, void *y);

/* ---- decoder.c --------------------------------------------------------------------------- */

/* All vectors are f32. NULL where the model has no such thing. Biases as oc_linear takes them. */
typedef struct {
    oc_packed qkv, o, gate_up, down;
    const float *qkv_bias, *o_bias, *gate_up_bias, *down_bias;
    const float *input_norm, *post_norm; /* [hidden], before attention and before the MLP */
    const float *q_norm, *k_norm;        /* [head_dim] */
    oc_attn_spec attention;
} oc_decoder_layer;

typedef struct {
    int64_t hidden, vocab;
    int32_t num_layers, dtype; /* of weights and of what enters a product */
    float eps;
    int32_t rot_dim;
    const float *cos, *sin;      /* [max_pos][rot_dim / 2] */
    oc_packed packed_embedding;  /* the tied head's weight; data NULL if the table is plain */
    const void *plain_embedding; /* [vocab][hidden] in dtype */
    const float *final_norm;
    const oc_decoder_layer *layers;
    void *scratch; /* NULL at first; grown by oc_decoder_run, freed by oc_decoder_release */
    int64_t scratch_bytes;
} oc_decoder;

#define oc_decoder_run OC_ISA_NAME(oc_decoder_run)
#define oc_decoder_release OC_ISA_NAME(oc_decoder_release)

/* The whole model for the rows of one step: ids [num_tokens] -> hidden_out [num_tokens][hidden] in
 * dtype, after the final norm. kv_caches: one a layer. The id of a padding row (position -1) is not
 * looked at; another id outside the vocabulary gives OC_BAD_ID, before anything is stored.
 * wanted: NULL, or the rows [num_wanted] whose hidden states go to hidden_out [num_wanted][hidden]; all
 * rows store their keys and values. OC_BAD_ROW if they do not ascend or leave the step.
 * One call at a time for one decoder. */
OC_EXPORT int32_t oc_decoder_run(oc_decoder *, const oc_step *, const int64_t *ids,
                                 void *const *kv_caches, const int64_t *wanted, int64_t num_wanted,
                                 void *hidden_out);
OC_EXPORT void oc_decoder_release(oc_decoder *);

#endif
