// octavo: built once
/* The bookkeeping around a forward pass: from slots to inputs, and from drawn tokens to counters.
 *
 * These loops over a few hundred integers are no work for vectors, but as thirty torch operations
 * they cost more than half a millisecond a step. What they compute is defined by the torch form in
 * octavo/worker/step_torch.py, which is their oracle in the tests.
 */
#include "octavo_cpu.h"
#include "slots.h"

/* One request's rows: octavo/core/messages.py Rows. */
typedef struct {
    int64_t slot, num_rows, kind, samples;
} oc_rows;

enum { CHUNK = 0, VERIFY = 1 };
enum { NOT_FINISHED = 0, STOPPED = 1, LENGTH = 2 };

typedef struct {
    int64_t *input_ids, *positions, *slot_mapping; /* [num_tokens] */
    int32_t *query_start_loc;                      /* [num_reqs + 1] */
    int32_t *seq_lens;                             /* [num_reqs] */
    int32_t *block_table;                          /* [num_reqs][max_blocks] */
    int64_t max_blocks;
    int64_t *num_valid;      /* [num_reqs] */
    int64_t *logits_rows;    /* [num_logits] */
    int64_t *logits_slots;   /* [num_logits] */
    int64_t *draw_positions; /* [num_logits], -1 for padding */
} oc_inputs;

typedef struct {
    int64_t *tokens; /* [num_sampled][width] */
    int64_t width;
    int64_t *num_emitted, *num_drafts, *num_accepted, *finished; /* [num_sampled] */
} oc_result;

OC_EXPORT void oc_prepare_step(const oc_slots *slots, const oc_rows *rows, int64_t num_reqs,
                               const oc_inputs *out);
OC_EXPORT void oc_finish_step(const oc_slots *slots, const oc_rows *rows, int64_t num_reqs,
                              const int64_t *num_valid, const int64_t *drawn, const oc_result *out);

void oc_prepare_step(const oc_slots *slots, const oc_rows *rows, int64_t num_reqs, const oc_inputs *out)
{
    int64_t row = 0, logits = 0;
    for (int64_t r = 0; r < num_reqs; r++) {
        const int64_t slot = rows[r].slot, count = rows[r].num_rows;
        const int64_t start = slots->num_computed[slot];
        const int32_t *tokens = slots->tokens + slot * slots->tokens_stride;
        const int32_t *table = slots->block_table + slot * slots->table_stride;
        int64_t valid = count;
        if (rows[r].kind == VERIFY) {
            /* The last token, and the drafts there are, as far as the limit lets any be emitted. */
            const int64_t room = slots->limit[slot] - slots->num_tokens[slot] - 1;
            valid = min64(1 + max64(min64(slots->num_drafts[slot], room), 0), count);
        }
        if (slots->finished[slot])
            valid = 0;
        out->num_valid[r] = valid;
        out->query_start_loc[r] = (int32_t)row;
        out->seq_lens[r] = (int32_t)(start + valid);
        for (int64_t b = 0; b < out->max_blocks; b++)
            out->block_table[r * out->max_blocks + b] = table[b];
        const int64_t sampled = rows[r].samples ? (rows[r].kind == VERIFY ? count : 1) : 0;
        for (int64_t i = 0; i < count; i++, row++) {
            const int real = i < valid;
            const int64_t position = start + i;
            out->input_ids[row] = real ? tokens[position] : tokens[0];
            out->positions[row] = real ? position : -1;
            out->slot_mapping[row] =
                real ? (int64_t)table[position / slots->block_size] * slots->block_size +
                           position % slots->block_size
                     : -1;
            if (i >= count - sampled) {
                out->logits_rows[logits] = row;
                out->logits_slots[logits] = slot;
                out->draw_positions[logits++] = real ? position + 1 : -1;
            }
        }
    }
    out->query_start_loc[num_reqs] = (int32_t)row;
}

static int is_stop(const oc_slots *slots, int64_t slot, int64_t token)
{
    /* The padding is -1, and so is the token of a row that had no legal one: that stops as well. */
    const int64_t *stop = slots->stop_ids + slot * slots->num_stop;
    for (int64_t i = 0; i < slots->num_stop; i++)
        if (stop[i] == token)
            return 1;
    return 0;
}

void oc_finish_step(const oc_slots *slots, const oc_rows *rows, int64_t num_reqs, const int64_t *num_valid,
                    const int64_t *drawn, const oc_result *out)
{
    int64_t sample = 0;
    for (int64_t r = 0; r < num_reqs; r++) {
        const int64_t slot = rows[r].slot, valid = num_valid[r];
        const int verify = rows[r].kind == VERIFY;
        int64_t emitted = 0;
        if (rows[r].samples) {
            const int64_t known = slots->num_tokens[slot], room = slots->limit[slot] - known;
            const int64_t drafts = verify ? max64(valid - 1, 0) : 0;
            int32_t *next = slots->tokens + slot * slots->tokens_stride + known;
            int64_t *tokens = out->tokens + sample * out->width;
            int64_t accepted = 0, finished = NOT_FINISHED;
            int more = valid > 0;
            while (more) {
                const int64_t token = drawn[emitted];
                const int right = emitted < drafts && next[emitted] == token;
                accepted += right;
                next[emitted] = (int32_t)token;
                tokens[emitted++] = token;
                if (is_stop(slots, slot, token))
                    finished = STOPPED;
                else if (emitted == room)
                    finished = LENGTH;
                more = right && finished == NOT_FINISHED;
            }
            out->num_emitted[sample] = emitted;
            out->num_drafts[sample] = drafts;
            out->num_accepted[sample] = accepted;
            out->finished[sample] = finished;
            slots->num_tokens[slot] = known + emitted;
            slots->finished[slot] |= finished != NOT_FINISHED;
            drawn += verify ? rows[r].num_rows : 1;
            sample++;
        }
        slots->num_computed[slot] += verify ? emitted : valid;
        slots->num_drafts[slot] = 0;
    }
}
