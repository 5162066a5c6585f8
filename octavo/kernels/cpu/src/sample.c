/* One token from each row of logits.
 *
 * Logits already carry penalties, bias and masks (-inf). temperature 0 takes the greatest, the
 * lowest id of equal ones. Otherwise z = logit / temperature (one float32 division), and the token
 * is the argmax of z + G over the *kept set*, again the lowest id of equal ones; G is the noise of
 * noise.h, where it is written down step by step.
 *
 * The kept set is what top-k, then top-p, then min-p leave:
 *   top-k   exactly k tokens (fewer if fewer are not -inf);
 *   top-p   of those, the smallest number of the greatest whose probability, renormalised over the
 *           top-k, reaches top_p (at least 1); exp in float32, sums in double;
 *   min-p   of those, the tokens with z - max(z) >= log(min_p), the logarithm rounded to float32.
 * The first two are a threshold on the float32 logits: all above it, and of those equal to it the
 * lowest ids. So the set is described by three numbers and found without sorting: a bound from the
 * maxima of groups, then a selection among the few that reach it.
 *
 * Noise is made only for groups of tokens in which one is kept and could still win, and its
 * logarithms only where the integers leave that open. All levels make
 * the same noise; the exp behind top-p may differ between levels in its last bit, which matters
 * only where a probability sum meets top_p to within 1e-6.
 */
#include "sample.h"
#include "noise.h"
#include "select.h"

#include <float.h>
#include <math.h>
#include <stdatomic.h>

typedef struct {
    const float *logits;
    int64_t vocab, row_stride;
    const float *temperature, *top_p, *min_p;
    const int32_t *top_k;
    const uint64_t *seed;
    const int64_t *position;
    uint32_t stream;
    int64_t *tokens;
    _Atomic int32_t status;
} sample_job;

/* Kept: x > at, or x == at and id <= tie_last; and z >= top + log_min_p, as z - top >= log_min_p. */
typedef struct {
    float at, top, log_min_p;
    int64_t tie_last;
} kept_set;

/* ---- which tokens are kept --------------------------------------------------------------------- */

/* weight = exp((value - max) / temperature) */
static double weigh(oc_weighted *items, int64_t n, float temperature, float top) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; i += OC_VW) {
        float x[OC_VW] = {0};
        const int64_t count = n - i < OC_VW ? n - i : OC_VW;
        for (int j = 0; j < count; j++) x[j] = items[i + j].value;
        v_store(x, v_exp2_neg((v_load(x) / temperature - top) * 1.4426950408889634f));
        for (int j = 0; j < count; j++) {
            items[i + j].weight = x[j];
            sum += x[j];
        }
    }
    return sum;
}

/* Probability mass above each of twelve descending thresholds, and that of the whole row. */
#define STEPS 12

static double masses_above(const float *row, int64_t n, float temperature, float top, const float *limits,
                           double *mass) {
    double total = 0.0;
    for (int s = 0; s < STEPS; s++) mass[s] = 0.0;
    for (int64_t i = 0; i < n;) {
        const int64_t until = i + 32 * OC_VW < n ? i + 32 * OC_VW : n;
        vf part[STEPS], all = v_splat(0.0f);
        UNROLL for (int s = 0; s < STEPS; s++) part[s] = v_splat(0.0f);
        for (; i < until; i += OC_VW) {
            vf x;
            if (i + OC_VW <= n) {
                x = v_load(row + i);
            } else {
                float last[OC_VW];
                for (int j = 0; j < OC_VW; j++) last[j] = i + j < n ? row[i + j] : -INFINITY;
                x = v_load(last);
            }
            vf e = v_exp2_neg((x / temperature - top) * 1.4426950408889634f);
            e = v_select(v_gt(x, v_splat(-INFINITY)), e, v_splat(0.0f));
            all = all + e;
            UNROLL for (int s = 0; s < STEPS; s++)
                part[s] = part[s] + v_select(v_ge(x, v_splat(limits[s])), e, v_splat(0.0f));
        }
        total += (double)v_reduce_add(all);
        UNROLL for (int s = 0; s < STEPS; s++) mass[s] += (double)v_reduce_add(part[s]);
    }
    return total;
}

/* top-p over the whole row: thresholds first at these distances below the greatest z, then, where
 * many tokens lie between the two around top_p, evenly between those; a selection at the end. */
static const float distances[STEPS] = {0.5f, 1, 1.5f, 2, 3, 4, 5, 6, 8, 10, 13, 17};

static oc_cut nucleus_of_row(const float *row, int64_t n, float temperature, float top, float greatest,
                             float top_p, oc_weighted *items) {
    float limits[STEPS];
    double mass[STEPS];
    for (int s = 0; s < STEPS; s++) limits[s] = greatest - distances[s] * temperature;
    for (int pass = 0;; pass++) {
        const double target = (double)top_p * masses_above(row, n, temperature, top, limits, mass);
        int s = 0;
        while (s < STEPS && mass[s] < target) s++;
        const float high = s > 0 ? limits[s - 1] : INFINITY, low = s < STEPS ? limits[s] : -FLT_MAX;
        const int64_t count = oc_collect(row, n, low, high, items);
        if (count > 2048 && s > 0 && s < STEPS && pass < 3) {
            for (int i = 0; i < STEPS; i++)
                limits[i] = high - (high - low) * ((float)i / (float)(STEPS - 1));
            continue;
        }
        if (count == 0) return (oc_cut){.value = -INFINITY}; /* top_p is not reached, by rounding: all */
        weigh(items, count, temperature, top);
        return oc_weighted_cut(items, count, s > 0 ? mass[s - 1] : 0.0, target);
    }
}

static kept_set find_kept(const float *row, int64_t n, float temperature, float greatest, int32_t top_k,
                          float top_p, float min_p, oc_weighted *items) {
    const float top = greatest / temperature;
    kept_set kept = {.at = -INFINITY, .top = top, .log_min_p = -INFINITY, .tie_last = -1};
    if (min_p > 0.0f) kept.log_min_p = (float)log((double)min_p);
    const int by_k = top_k > 0 && top_k < n, by_p = top_p < 1.0f;
    oc_cut cut;
    int64_t equal;
    if (by_k) {
        float low = oc_at_least_k(row, n, top_k, items);
        if (low == -INFINITY) low = -FLT_MAX;
        int64_t count = oc_collect(row, n, low, INFINITY, items);
        if (count < top_k) { /* all that are not -inf */
            cut = (oc_cut){.value = -INFINITY};
            equal = 0;
        } else {
            cut = oc_weighted_cut(items, count, 0.0, (double)top_k);
            equal = cut.equal;
        }
        if (by_p) {
            /* Selection left the k greatest, ties included, in unknown order. */
            int64_t taken = 0, ties = cut.ties;
            for (int64_t i = 0; i < count; i++) {
                const float value = items[i].value;
                if (value > cut.value || (value == cut.value && ties-- > 0)) items[taken++] = items[i];
            }
            const double total = weigh(items, taken, temperature, top);
            const oc_cut inner = oc_weighted_cut(items, taken, 0.0, (double)top_p * total);
            equal = inner.value == cut.value ? equal : inner.equal;
            cut = inner;
        }
    } else if (by_p) {
        cut = nucleus_of_row(row, n, temperature, top, greatest, top_p, items);
        equal = cut.equal;
    } else {
        return kept;
    }
    kept.at = cut.value;
    if (cut.ties > 0) kept.tie_last = cut.ties < equal ? oc_row_find(row, n, cut.value, cut.ties) : n;
    return kept;
}

/* ---- the draw ---------------------------------------------------------------------------------- */

typedef struct {
    float score;
    int64_t token;
} winner;

typedef struct {
    const float *row;
    int64_t n;
    float temperature;
    uint64_t seed;
    int64_t position;
    uint32_t stream;
    kept_set kept;
    float floor; /* a score that the winner reaches */
    winner *slices;
} draw_job;

#define SLICE 8192 /* tokens, a multiple of NOISE_GROUP */

static winner better_of(winner a, winner b) {
    if (b.token < 0) return a;
    if (a.token < 0 || b.score > a.score || (b.score == a.score && b.token < a.token)) return b;
    return a;
}

/* Lanes of x, tokens [id, id + OC_VW), that are kept. */
INLINE vmask kept_lanes(const kept_set *kept, vf x, vf z, int64_t id) {
    const vi ids = v_iota() + (int32_t)id;
    const int64_t tie_last = kept->tie_last < INT32_MAX - 1 ? kept->tie_last : INT32_MAX - 1;
    const vf at = v_splat(kept->at);
    const vmask tie = v_and(v_eq(x, at), v_lt_i(ids, (vi)v_splat_u((uint32_t)(tie_last + 1))));
    return v_and(v_or(v_gt(x, at), tie), v_ge(z - kept->top, v_splat(kept->log_min_p)));
}

static winner draw_slice(const draw_job *job, int64_t begin, int64_t end) {
    const vf lowest = v_splat(-INFINITY);
    winner best = {.score = -INFINITY, .token = -1};
    float floor = job->floor;
    for (int64_t first = begin; first < end; first += NOISE_GROUP) {
        float rest[NOISE_GROUP];
        const float *row = job->row + first;
        if (first + NOISE_GROUP > job->n) {
            for (int i = 0; i < NOISE_GROUP; i++) rest[i] = first + i < job->n ? row[i] : -INFINITY;
            row = rest;
        }
        vf z[4];
        uint32_t any = 0;
        UNROLL for (int q = 0; q < 4; q++) {
            const vf x = v_load(row + q * OC_VW);
            z[q] = x / job->temperature;
            const vmask keep = kept_lanes(&job->kept, x, z[q], first + q * OC_VW);
            z[q] = v_select(keep, z[q], lowest);
            any |= v_lanes(v_ge(z[q] + GUMBEL_MAX, v_splat(floor)));
        }
        if (!any) continue;
        vu words[4];
        noise_words(job->seed, job->position, job->stream, (uint32_t)first, words);
        any = 0;
        UNROLL for (int q = 0; q < 4; q++)
            any |= v_lanes(v_ge(z[q] + v_gumbel_bound(words[q]), v_splat(floor)));
        if (!any) continue;
        vf score[4];
        UNROLL for (int q = 0; q < 4; q++) score[q] = z[q] + v_gumbel(words[q]);
        const float top = v_reduce_max(v_max(v_max(score[0], score[1]), v_max(score[2], score[3])));
        if (!(top > best.score)) continue;
        for (int q = 0; q < 4; q++) {
            const uint32_t lanes = v_lanes(v_eq(score[q], v_splat(top)));
            if (!lanes) continue;
            best = (winner){.score = top, .token = first + q * OC_VW + __builtin_ctz(lanes)};
            break;
        }
        if (top > floor) floor = top;
    }
    return best;
}

static void draw_slices(void *ctx, int64_t begin, int64_t end, int thread) {
    (void)thread;
    const draw_job *job = ctx;
    for (int64_t i = begin; i < end; i++) {
        const int64_t until = (i + 1) * SLICE < job->n ? (i + 1) * SLICE : job->n;
        job->slices[i] = draw_slice(job, i * SLICE, until);
    }
}

static int64_t draw(draw_job *job, int in_parallel) {
    /* The greatest logit is always kept: its score is a bound before the first group is looked at. */
    job->floor = job->kept.top - 3.15f;
    winner few[64];
    const int64_t slices = (job->n + SLICE - 1) / SLICE;
    if (!in_parallel || slices > 64) return draw_slice(job, 0, job->n).token;
    job->slices = few;
    oc_parallel_for(slices, 1, draw_slices, job);
    winner best = few[0];
    for (int64_t i = 1; i < slices; i++) best = better_of(best, few[i]);
    return best.token;
}

static int64_t greatest_token(const float *row, int64_t n) {
    const float top = oc_row_max(row, n);
    return top == -INFINITY ? -1 : oc_row_find(row, n, top, 1);
}

static void sample_one(sample_job *job, int64_t r, int in_parallel) {
    const float *row = job->logits + r * job->row_stride;
    const float temperature = job->temperature[r], greatest = oc_row_max(row, job->vocab);
    /* An infinite z leaves nothing to draw. */
    if (greatest == -INFINITY || temperature == 0.0f || !(greatest / temperature < INFINITY)) {
        job->tokens[r] = greatest_token(row, job->vocab);
        return;
    }
    oc_select_room *room = oc_room_for(job->vocab + OC_VW);
    if (!room) {
        atomic_store(&job->status, OC_NO_MEMORY);
        return;
    }
    draw_job one = {.row = row, .n = job->vocab, .temperature = temperature, .seed = job->seed[r],
                    .position = job->position[r], .stream = job->stream,
                    .kept = find_kept(row, job->vocab, temperature, greatest, job->top_k[r],
                                      job->top_p[r], job->min_p[r], room->items)};
    job->tokens[r] = draw(&one, in_parallel);
}

static void sample_some(void *ctx, int64_t begin, int64_t end, int thread) {
    (void)thread;
    for (int64_t r = begin; r < end; r++) sample_one(ctx, r, 0);
}

int32_t oc_sample_rows(const float *logits, int64_t rows, int64_t vocab, int64_t row_stride,
                       const float *temperature, const int32_t *top_k, const float *top_p,
                       const float *min_p, const uint64_t *seed, const int64_t *position, uint32_t stream,
                       int64_t *tokens) {
    sample_job job = {.logits = logits, .vocab = vocab, .row_stride = row_stride,
                      .temperature = temperature, .top_p = top_p, .min_p = min_p, .top_k = top_k,
                      .seed = seed, .position = position, .stream = stream, .tokens = tokens};
    if (rows < oc_num_threads())
        for (int64_t r = 0; r < rows; r++) sample_one(&job, r, 1);
    else
        oc_parallel_for(rows, 1, sample_some, &job);
    return job.status;
}

/* ---- greedy, and what tests look at ------------------------------------------------------------ */

static void argmax_some(void *ctx, int64_t begin, int64_t end, int thread) {
    (void)thread;
    const sample_job *job = ctx;
    for (int64_t r = begin; r < end; r++)
        job->tokens[r] = greatest_token(job->logits + r * job->row_stride, job->vocab);
}

void oc_argmax_rows(const float *logits, int64_t rows, int64_t vocab, int64_t row_stride, int64_t *tokens) {
    sample_job job = {.logits = logits, .vocab = vocab, .row_stride = row_stride, .tokens = tokens};
    oc_parallel_for(rows, 1, argmax_some, &job);
}

void oc_exponentials(uint64_t seed, int64_t position, uint32_t stream, int64_t vocab, float *noise) {
    for (int64_t first = 0; first < vocab; first += NOISE_GROUP) {
        vu words[4];
        float group[NOISE_GROUP];
        noise_words(seed, position, stream, (uint32_t)first, words);
        for (int q = 0; q < 4; q++) v_store(group + q * OC_VW, v_exponential(words[q]));
        const int64_t count = vocab - first < NOISE_GROUP ? vocab - first : NOISE_GROUP;
        memcpy(noise + first, group, (size_t)count * 4);
    }
}

void oc_philox(const uint32_t *counter, uint64_t key, uint32_t *out) {
    vu c[4];
    for (int i = 0; i < 4; i++) c[i] = v_splat_u(counter[i]);
    philox(c, key);
    for (int i = 0; i < 4; i++) out[i] = c[i][0];
}
