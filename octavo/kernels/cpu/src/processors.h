/* What changes logits before a token is drawn (processors.c). */
#ifndef OCTAVO_PROCESSORS_H
#define OCTAVO_PROCESSORS_H

#include "octavo_cpu.h"

#define oc_mask_rows OC_ISA_NAME(oc_mask_rows)
#define oc_penalize_rows OC_ISA_NAME(oc_penalize_rows)

/* One entry for each row with a penalty. Row, slot and lengths must lie within the tables. */
typedef struct {
    const int64_t *rows;           /* rows of logits */
    const int64_t *slots;          /* rows of tokens */
    const int64_t *lengths;        /* of the history, prompt included */
    const int64_t *prompt_lengths; /* may be longer than the history */
    const float *repetition, *presence, *frequency;
    const int32_t *tokens; /* [slots][tokens_stride] */
    int64_t tokens_stride, num_entries;
} oc_penalties;

/* words: [entries][num_words], bit (id % 32) of word (id / 32). Tokens whose bit is 0, and tokens
 * behind the last word, become -inf. `distinct` says that no row appears twice. */
OC_EXPORT void oc_mask_rows(float *logits, int64_t vocab, int64_t row_stride, const int64_t *rows,
                            const uint32_t *words, int64_t entries, int64_t num_words, int32_t distinct);

/* Repetition, frequency and presence penalties in this order, in float32. Returns OC_OK or
 * OC_NO_MEMORY. `distinct` as above. */
OC_EXPORT int32_t oc_penalize_rows(float *logits, int64_t vocab, int64_t row_stride, const oc_penalties *,
                                   int32_t distinct);

#endif
