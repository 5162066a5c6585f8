/* Storing keys and values that already carry their rotary embedding. oc_rope_store, the fused
 * form, is declared in octavo_cpu.h. */
#ifndef OCTAVO_ROPE_STORE_H
#define OCTAVO_ROPE_STORE_H

#include "octavo_cpu.h"

#define oc_kv_store OC_ISA_NAME(oc_kv_store)

/* key, value: [num_tokens][num_kv_heads * head_dim] in dtype, rows *_stride elements apart, each row
 * contiguous. Converted to the cache's dtype. Rows with slot_mapping -1 are skipped. */
OC_EXPORT void oc_kv_store(const oc_attn_spec *, const oc_step *, const void *key, int64_t key_stride,
                           const void *value, int64_t value_stride, int32_t dtype, void *kv_cache);

#endif
