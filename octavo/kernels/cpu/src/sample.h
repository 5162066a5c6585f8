/* Drawing tokens from rows of logits, and log-probabilities (sample.c, logprobs.c). */
#ifndef OCTAVO_SAMPLE_H
#define OCTAVO_SAMPLE_H

#include "octavo_cpu.h"

#define oc_argmax_rows OC_ISA_NAME(oc_argmax_rows)
#define oc_sample_rows OC_ISA_NAME(oc_sample_rows)
#define oc_exponentials OC_ISA_NAME(oc_exponentials)
#define oc_philox OC_ISA_NAME(oc_philox)
#define oc_logprobs_rows OC_ISA_NAME(oc_logprobs_rows)

#define OC_MAX_TOP 64

/* The greatest logit of each row, the lowest id of equal ones; -1 for a row of nothing but -inf. */
OC_EXPORT void oc_argmax_rows(const float *logits, int64_t rows, int64_t vocab, int64_t row_stride,
                              int64_t *tokens);

/* One token a row, see the top of sample.c; -1 for a row of nothing but -inf. The parameters are
 * arrays of one value a row. temperature 0 is greedy; top_k <= 0, top_p >= 1, min_p <= 0 are off. */
OC_EXPORT int32_t oc_sample_rows(const float *logits, int64_t rows, int64_t vocab, int64_t row_stride,
                                 const float *temperature, const int32_t *top_k, const float *top_p,
                                 const float *min_p, const uint64_t *seed, const int64_t *position,
                                 uint32_t stream, int64_t *tokens);

/* The noise E of tokens [0, vocab), for tests and for comparison with other implementations. */
OC_EXPORT void oc_exponentials(uint64_t seed, int64_t position, uint32_t stream, int64_t vocab,
                               float *noise);

/* One Philox4x32-10 block, for the published test vectors. */
OC_EXPORT void oc_philox(const uint32_t *counter, uint64_t key, uint32_t *out);

/* log softmax at `token` and the rank of it (1 + the number of strictly greater logits), and the
 * top_n <= OC_MAX_TOP greatest: [rows][top_n], by logprob descending, id ascending. */
OC_EXPORT int32_t oc_logprobs_rows(const float *logits, int64_t rows, int64_t vocab, int64_t row_stride,
                                   const int64_t *token, int32_t top_n, float *token_logprob,
                                   int32_t *token_rank, int32_t *top_ids, float *top_logprobs);

#endif
