/* Log-probabilities from a float32 softmax of raw logits: of one token a row, and the greatest.
 *
 * exp in float32 with a relative error of 2e-7; four vectors are added in float32, the rest in
 * double, so that log of the sum is good to 1e-6 for any vocabulary.
 */
#include "sample.h"
#include "select.h"
#include "vec.h"

#include <math.h>
#include <stdatomic.h>

typedef struct {
    const float *logits;
    int64_t vocab, row_stride;
    const int64_t *token;
    int32_t top_n;
    float *token_logprob, *top_logprobs;
    int32_t *token_rank, *top_ids;
    _Atomic int32_t status;
} logprob_job;

static double log_sum_exp(const float *row, int64_t n, float top) {
    double lanes[OC_VW] = {0}, sum = 0.0;
    int64_t i = 0;
    for (; i + 4 * OC_VW <= n; i += 4 * OC_VW) {
        vf part = v_splat(0.0f);
        UNROLL for (int c = 0; c < 4; c++)
            part = part + v_exp2_neg((v_load(row + i + c * OC_VW) - top) * 1.4426950408889634f);
        float four[OC_VW];
        v_store(four, part);
        for (int j = 0; j < OC_VW; j++) lanes[j] += (double)four[j];
    }
    for (; i < n; i += OC_VW) {
        float rest[OC_VW];
        for (int j = 0; j < OC_VW; j++) rest[j] = i + j < n ? row[i + j] : -INFINITY;
        v_store(rest, v_exp2_neg((v_load(rest) - top) * 1.4426950408889634f));
        for (int j = 0; j < OC_VW && i + j < n; j++) lanes[j] += (double)rest[j];
    }
    for (int j = 0; j < OC_VW; j++) sum += lanes[j];
    return (double)top + log(sum);
}

static int32_t rank_of(const float *row, int64_t n, float value) {
    const vf own = v_splat(value);
    int32_t rank = 1;
    int64_t i = 0;
    for (; i + OC_VW <= n; i += OC_VW) rank += __builtin_popcount(v_lanes(v_gt(v_load(row + i), own)));
    for (; i < n; i++) rank += row[i] > value;
    return rank;
}

/* Sorted insertion by value; ids come in ascending order, so an equal one goes behind. */
static int insert(float *values, int32_t *ids, int count, int space, float value, int32_t id) {
    if (count == space && !(value > values[count - 1])) return count;
    int at = count < space ? count : count - 1;
    for (; at > 0 && value > values[at - 1]; at--) values[at] = values[at - 1], ids[at] = ids[at - 1];
    values[at] = value;
    ids[at] = id;
    return count < space ? count + 1 : count;
}

static void find_top(const float *row, int64_t n, int top_n, oc_weighted *items, float *values,
                     int32_t *ids) {
    const float low = oc_at_least_k(row, n, top_n, items);
    const vf from = v_splat(low);
    int count = 0;
    int64_t i = 0;
    for (; i + OC_VW <= n; i += OC_VW) {
        uint32_t lanes = v_lanes(v_ge(v_load(row + i), from));
        for (; lanes; lanes &= lanes - 1) {
            const int64_t id = i + __builtin_ctz(lanes);
            count = insert(values, ids, count, top_n, row[id], (int32_t)id);
        }
    }
    for (; i < n; i++)
        if (row[i] >= low) count = insert(values, ids, count, top_n, row[i], (int32_t)i);
}

static void logprobs_some(void *ctx, int64_t begin, int64_t end, int thread) {
    (void)thread;
    logprob_job *job = ctx;
    const int64_t n = job->vocab;
    for (int64_t r = begin; r < end; r++) {
        const float *row = job->logits + r * job->row_stride;
        const double total = log_sum_exp(row, n, oc_row_max(row, n));
        const float own = row[job->token[r]];
        job->token_logprob[r] = (float)((double)own - total);
        job->token_rank[r] = rank_of(row, n, own);
        if (job->top_n == 0) continue;
        oc_select_room *room = oc_room_for(n + OC_VW);
        if (!room) {
            atomic_store(&job->status, OC_NO_MEMORY);
            return;
        }
        float *values = job->top_logprobs + r * job->top_n;
        int32_t *ids = job->top_ids + r * job->top_n;
        for (int i = 0; i < job->top_n; i++) values[i] = -INFINITY, ids[i] = -1; /* only where NaN is */
        find_top(row, n, job->top_n, room->items, values, ids);
        for (int i = 0; i < job->top_n; i++) values[i] = (float)((double)values[i] - total);
    }
}

int32_t oc_logprobs_rows(const float *logits, int64_t rows, int64_t vocab, int64_t row_stride,
                         const int64_t *token, int32_t top_n, float *token_logprob, int32_t *token_rank,
                         int32_t *top_ids, float *top_logprobs) {
    logprob_job job = {.logits = logits, .vocab = vocab, .row_stride = row_stride, .token = token,
                       .top_n = top_n, .token_logprob = token_logprob, .top_logprobs = top_logprobs,
                       .token_rank = token_rank, .top_ids = top_ids};
    oc_parallel_for(rows, 1, logprobs_some, &job);
    return job.status;
}
