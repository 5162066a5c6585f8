// octavo: built once
/* A bounded memory of token sequences, and what followed in it where some tokens occurred before.
 *
 * Defined by octavo/speculation/suffix.py, whose Python form is the oracle in the tests: a ring of
 * tokens and, for each run of OC_RUN of them, a chain through the earlier places of the same run.
 */
#include "octavo_cpu.h"
#include "slots.h"

enum { RUN = 3, MOST_PLACES = 64 };

typedef struct {
    int32_t *tokens;  /* [capacity], -1 between sequences */
    int32_t *spaces;  /* [capacity] whose it is */
    int64_t *earlier; /* [capacity] place of the same run before this one, -1 */
    int64_t *latest;  /* [capacity] by hash, the latest place of a run, -1 */
    int64_t capacity; /* a power of two */
    int64_t written;  /* tokens ever written; place p lies at p & (capacity - 1) */
} oc_history;

OC_EXPORT void oc_history_add(oc_history *h, const int32_t *tokens, int64_t n, int32_t space);
OC_EXPORT int64_t oc_history_find(const oc_history *h, const int32_t *tail, int64_t n, int32_t space,
                                  int64_t min_match, int64_t max_match, double least, int64_t most,
                                  int32_t *found, int64_t *match);

static int64_t hash_run(const oc_history *h, int32_t a, int32_t b, int32_t c, int32_t space)
{
    uint64_t x = (uint32_t)a * 0x9E3779B97F4A7C15u;
    x = (x ^ (uint32_t)b) * 0xC2B2AE3D27D4EB4Fu;
    x = (x ^ (uint32_t)c) * 0x165667B19E3779F9u;
    x = (x ^ (uint32_t)space) * 0x9E3779B97F4A7C15u;
    return (int64_t)((x ^ (x >> 29)) & (uint64_t)(h->capacity - 1));
}

static void write_token(oc_history *h, int32_t token, int32_t space)
{
    const int64_t at = h->written++ & (h->capacity - 1);
    h->tokens[at] = token;
    h->spaces[at] = space;
    h->earlier[at] = -1;
}

void oc_history_add(oc_history *h, const int32_t *tokens, int64_t n, int32_t space)
{
    write_token(h, -1, space);
    for (int64_t i = 0; i < n; i++) {
        write_token(h, tokens[i], space);
        if (i + 1 < RUN)
            continue;
        const int64_t key = hash_run(h, tokens[i - 2], tokens[i - 1], tokens[i], space);
        h->earlier[(h->written - 1) & (h->capacity - 1)] = h->latest[key];
        h->latest[key] = h->written - 1;
    }
}

/* Tokens that the memory's places up to `place` and the tail have in common, backwards. */
static int64_t common(const oc_history *h, int64_t place, const int32_t *tail, int64_t n, int32_t space,
                      int64_t most)
{
    const int64_t mask = h->capacity - 1, oldest = h->written - h->capacity;
    int64_t count = 0;
    while (count < most && count < n && place - count >= max64(0, oldest)) {
        const int64_t at = (place - count) & mask;
        if (h->tokens[at] != tail[n - 1 - count] || h->spaces[at] != space)
            break;
        count++;
    }
    return count;
}

int64_t oc_history_find(const oc_history *h, const int32_t *tail, int64_t n, int32_t space,
                        int64_t min_match, int64_t max_match, double least, int64_t most, int32_t *found,
                        int64_t *match)
{
    const int64_t mask = h->capacity - 1, oldest = h->written - h->capacity;
    int64_t places[MOST_PLACES], num_places = 0, best = min_match - 1;
    *match = 0;
    if (n < RUN)
        return 0;
    int64_t place = h->latest[hash_run(h, tail[n - 3], tail[n - 2], tail[n - 1], space)];
    for (int64_t seen = 0; seen < MOST_PLACES && place >= 0 && place >= oldest; seen++) {
        const int64_t length = common(h, place, tail, n, space, max_match);
        if (length > best) {
            best = length;
            num_places = 0;
        }
        if (length == best && length >= min_match)
            places[num_places++] = place;
        place = h->earlier[place & mask];
    }
    if (!num_places)
        return 0;
    *match = best;
    double confidence = 1.0;
    int64_t count = 0;
    while (count < most) {
        /* Each place votes for the token that follows there; of equal votes the latest place wins. */
        int64_t votes_of_best = 0, best_at = -1;
        for (int64_t i = 0; i < num_places; i++) {
            const int64_t next = places[i] + 1;
            const int32_t token = next < h->written ? h->tokens[next & mask] : -1;
            int64_t votes = 0;
            for (int64_t j = i; token >= 0 && j < num_places; j++) {
                const int64_t other = places[j] + 1;
                votes += other < h->written && h->tokens[other & mask] == token;
            }
            if (votes > votes_of_best) {
                votes_of_best = votes;
                best_at = i;
            }
        }
        if (best_at < 0)
            break;
        confidence *= (double)votes_of_best / (double)num_places;
        if (confidence < least)
            break;
        const int32_t token = h->tokens[(places[best_at] + 1) & mask];
        found[count++] = token;
        int64_t kept = 0;
        for (int64_t i = 0; i < num_places; i++) {
            const int64_t next = places[i] + 1;
            if (next < h->written && h->tokens[next & mask] == token)
                places[kept++] = next;
        }
        num_places = kept;
    }
    return count;
}
