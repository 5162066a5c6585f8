/* The tables of octavo/worker/input_batch.py DeviceState; one row a slot. */
#ifndef OCTAVO_SLOTS_H
#define OCTAVO_SLOTS_H

#include <stdint.h>

typedef struct {
    int32_t *tokens; /* [slots][tokens_stride]: confirmed tokens, then drafts */
    int64_t tokens_stride;
    int64_t *num_tokens, *num_computed, *num_drafts, *limit; /* [slots] */
    uint8_t *finished;                                       /* [slots] */
    const int64_t *stop_ids;                                 /* [slots][num_stop], -1 padded */
    int64_t num_stop;
    const int32_t *block_table; /* [slots][table_stride] */
    int64_t table_stride;
    int64_t block_size;
} oc_slots;

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

#endif
