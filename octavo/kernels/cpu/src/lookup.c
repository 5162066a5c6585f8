// octavo: built once
/* Drafts by looking the last tokens up in a text: the request's own, or a predicted one.
 *
 * Defined by octavo/speculation/lookup.py, whose Python form is the oracle in the tests.
 */
#include "octavo_cpu.h"
#include "slots.h"

OC_EXPORT void oc_prompt_lookup(const oc_slots *slots, const int64_t *slot_ids, const int64_t *counts,
                                int64_t n, int64_t min_match, int64_t max_match);
OC_EXPORT void oc_predicted_lookup(const oc_slots *slots, const int64_t *slot_ids, const int64_t *counts,
                                   int64_t n, const int32_t *predictions, int64_t stride,
                                   const int64_t *lengths, int64_t *cursors, int64_t *read,
                                   const int64_t *prompt_lengths, int64_t min_match);

/* Tokens that text[..end] and text[..at] have in common, backwards, up to `most`. */
static int64_t common_suffix(const int32_t *a, int64_t a_end, const int32_t *b, int64_t b_end, int64_t most)
{
    int64_t n = 0;
    while (n < most && n <= a_end && n <= b_end && a[a_end - n] == b[b_end - n])
        n++;
    return n;
}

void oc_prompt_lookup(const oc_slots *slots, const int64_t *slot_ids, const int64_t *counts, int64_t n,
                      int64_t min_match, int64_t max_match)
{
    for (int64_t i = 0; i < n; i++) {
        const int64_t slot = slot_ids[i], known = slots->num_tokens[slot];
        int32_t *tokens = slots->tokens + slot * slots->tokens_stride;
        slots->num_drafts[slot] = 0;
        if (slots->finished[slot])
            continue;
        int64_t best = min_match - 1, from = -1;
        for (int64_t p = known - 2; p >= 0 && best < max_match; p--) {
            if (tokens[p] != tokens[known - 1])
                continue;
            const int64_t match = common_suffix(tokens, p, tokens, known - 1, max_match);
            if (match > best) { /* the longest match, the latest of equals */
                best = match;
                from = p + 1;
            }
        }
        if (from < 0)
            continue;
        const int64_t room = slots->limit[slot] - known;
        const int64_t count = min64(counts[i], room);
        /* Reading may run into the drafts just written: a loop in the text goes on. */
        for (int64_t j = 0; j < count; j++)
            tokens[known + j] = tokens[from + j];
        slots->num_drafts[slot] = max64(count, 0);
    }
}

/* Where to go on in `prediction` after the token at `at` of the text, or -1 if that is not known.
 * The nearest place ahead of the cursor, then the nearest behind it, whose tokens match the last
 * min_match of the text. */
static int64_t find_place(const int32_t *prediction, int64_t length, int64_t cursor, const int32_t *tokens,
                          int64_t at, int64_t min_match)
{
    for (int64_t p = cursor; p < length; p++)
        if (common_suffix(prediction, p, tokens, at, min_match) == min_match)
            return p + 1;
    for (int64_t p = min64(cursor, length) - 1; p >= 0; p--)
        if (common_suffix(prediction, p, tokens, at, min_match) == min_match)
            return p + 1;
    return -1;
}

void oc_predicted_lookup(const oc_slots *slots, const int64_t *slot_ids, const int64_t *counts, int64_t n,
                         const int32_t *predictions, int64_t stride, const int64_t *lengths,
                         int64_t *cursors, int64_t *read, const int64_t *prompt_lengths, int64_t min_match)
{
    for (int64_t i = 0; i < n; i++) {
        const int64_t slot = slot_ids[i], known = slots->num_tokens[slot], length = lengths[slot];
        int32_t *tokens = slots->tokens + slot * slots->tokens_stride;
        const int32_t *prediction = predictions + slot * stride;
        slots->num_drafts[slot] = 0;
        if (slots->finished[slot] || length == 0)
            continue;
        int64_t cursor = cursors[slot];
        for (int64_t at = max64(read[slot], prompt_lengths[slot]); at < known; at++) {
            if (cursor < length && prediction[cursor] == tokens[at]) {
                cursor++;
                continue;
            }
            const int64_t enough = at + 1 - prompt_lengths[slot] >= min_match;
            const int64_t place = enough ? find_place(prediction, length, cursor, tokens, at, min_match) : -1;
            /* A place that is not found: take it that this one token was replaced by another. */
            cursor = place >= 0 ? place : min64(cursor + 1, length);
        }
        cursors[slot] = cursor;
        read[slot] = known;
        const int64_t room = min64(slots->limit[slot] - known, length - cursor);
        const int64_t count = max64(min64(counts[i], room), 0);
        for (int64_t j = 0; j < count; j++)
            tokens[known + j] = prediction[cursor + j];
        slots->num_drafts[slot] = count;
    }
}
