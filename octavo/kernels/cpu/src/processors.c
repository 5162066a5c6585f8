/* Bit masks and penalties on rows of logits. octavo/sampling/processors.py defines them and is the
 * oracle in the tests: the same float32 operations in the same order, so the same bits.
 *
 * A row is the work of one thread. Where a row appears twice, all of them are the work of one.
 */
#include "processors.h"
#include "vec.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>

/* ---- masks ------------------------------------------------------------------------------- */

typedef struct {
    float *logits;
    int64_t vocab, row_stride, num_words;
    const int64_t *rows;
    const uint32_t *words;
} mask_job;

/* 32 logits of one word. */
INLINE void mask_word(float *at, uint32_t word) {
    const vu banned = v_bits_of(v_splat(-INFINITY)), lane = (vu)v_iota();
    if (word == UINT32_MAX) return;
    UNROLL for (int i = 0; i < 32; i += OC_VW) {
        const vu bit = v_splat_u(1u) << (lane + (uint32_t)i);
        const vu keep = (vu)((v_splat_u(word) & bit) != 0); /* all ones where allowed */
        v_store_u(at + i, (v_load_u(at + i) & keep) | (banned & ~keep));
    }
}

static void mask_some(void *ctx, int64_t begin, int64_t end, int thread) {
    (void)thread;
    const mask_job *job = ctx;
    for (int64_t e = begin; e < end; e++) {
        float *row = job->logits + job->rows[e] * job->row_stride;
        const uint32_t *words = job->words + e * job->num_words;
        const int64_t whole = job->vocab / 32, n = whole < job->num_words ? whole : job->num_words;
        for (int64_t w = 0; w < n; w++) mask_word(row + 32 * w, words[w]);
        for (int64_t id = 32 * n; id < job->vocab; id++) /* a last word in part, or ids behind the last */
            if (id / 32 >= job->num_words || !(words[id / 32] >> (id % 32) & 1u)) row[id] = -INFINITY;
    }
}

void oc_mask_rows(float *logits, int64_t vocab, int64_t row_stride, const int64_t *rows,
                  const uint32_t *words, int64_t entries, int64_t num_words, int32_t distinct) {
    mask_job job = {.logits = logits, .vocab = vocab, .row_stride = row_stride, .num_words = num_words,
                    .rows = rows, .words = words};
    oc_parallel_for(entries, distinct ? 1 : entries, mask_some, &job);
}

/* ---- penalties --------------------------------------------------------------------------- */

typedef struct {
    float *logits;
    int64_t vocab, row_stride;
    const oc_penalties *penalties;
    _Atomic int32_t status;
} penalty_job;

/* A cell for every token: 0 never met, else 1 + how often it is in the output. Zero between rows. */
static _Thread_local int32_t *thread_cells;
static _Thread_local int64_t thread_space;

static int32_t *cells_for(int64_t vocab) {
    if (vocab > thread_space) {
        int32_t *bigger = calloc((size_t)vocab, sizeof *bigger);
        if (!bigger) return NULL;
        free(thread_cells);
        thread_cells = bigger;
        thread_space = vocab;
    }
    return thread_cells;
}

/* An id that the vocabulary lacks, negative ones included, is passed over. */
INLINE int is_known(int32_t id, int64_t vocab) { return (uint32_t)id < (uint64_t)vocab; }

#define AHEAD 12 /* tokens: their logits lie anywhere, and the cache should know early */

static void penalize(float *row, int64_t vocab, const int32_t *history, int64_t length, int64_t prompt,
                     float repetition, float presence, float frequency, int32_t *cells) {
    const int repeats = repetition != 1.0f, counts = presence != 0.0f || frequency != 0.0f;
    if (prompt > length) prompt = length;
    const int64_t begin = repeats ? 0 : prompt; /* what is left out never enters the cells */
    for (int64_t i = begin; i < length; i++) {
        const int32_t id = history[i];
        if (i + AHEAD < length && is_known(history[i + AHEAD], vocab)) {
            __builtin_prefetch(row + history[i + AHEAD], 1);
            __builtin_prefetch(cells + history[i + AHEAD], 1);
        }
        if (!is_known(id, vocab)) continue;
        if (cells[id] == 0) {
            cells[id] = 1;
            if (repeats) { /* both, then a choice: signs cannot be predicted */
                const float divided = row[id] / repetition, multiplied = row[id] * repetition;
                row[id] = row[id] > 0.0f ? divided : multiplied;
            }
        }
        cells[id] += i >= prompt;
    }
    if (counts)
        for (int64_t i = prompt; i < length; i++) {
            const int32_t id = history[i];
            if (!is_known(id, vocab) || cells[id] < 2) continue;
            const float times = (float)(cells[id] - 1);
            row[id] = (row[id] - frequency * times) - presence;
            cells[id] = 1; /* once for each token */
        }
    for (int64_t i = begin; i < length; i++)
        if (is_known(history[i], vocab)) cells[history[i]] = 0;
}

static void penalize_some(void *ctx, int64_t begin, int64_t end, int thread) {
    (void)thread;
    penalty_job *job = ctx;
    const oc_penalties *p = job->penalties;
    int32_t *cells = cells_for(job->vocab);
    if (!cells) {
        atomic_store(&job->status, OC_NO_MEMORY);
        return;
    }
    for (int64_t e = begin; e < end; e++)
        penalize(job->logits + p->rows[e] * job->row_stride, job->vocab,
                 p->tokens + p->slots[e] * p->tokens_stride, p->lengths[e], p->prompt_lengths[e],
                 p->repetition[e], p->presence[e], p->frequency[e], cells);
}

int32_t oc_penalize_rows(float *logits, int64_t vocab, int64_t row_stride, const oc_penalties *penalties,
                         int32_t distinct) {
    penalty_job job = {.logits = logits, .vocab = vocab, .row_stride = row_stride,
                       .penalties = penalties};
    oc_parallel_for(penalties->num_entries, distinct ? 1 : penalties->num_entries, penalize_some, &job);
    return job.status;
}
