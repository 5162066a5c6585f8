/* Order statistics of a row of logits without sorting it (select.c), for sample.c and logprobs.c.
 * NaN counts as below everything. */
#ifndef OCTAVO_SELECT_H
#define OCTAVO_SELECT_H

#include "octavo_cpu.h"

typedef struct {
    float value, weight;
} oc_weighted;

/* A threshold that keeps a set: everything above `value`, and `ties` of the `equal` items equal to it. */
typedef struct {
    float value;
    int64_t ties, equal;
} oc_cut;

/* Memory of one thread; grows and is kept. */
typedef struct {
    oc_weighted *items;
    int64_t space;
} oc_select_room;

#define oc_room_for OC_ISA_NAME(oc_room_for)
#define oc_weighted_cut OC_ISA_NAME(oc_weighted_cut)
#define oc_row_max OC_ISA_NAME(oc_row_max)
#define oc_row_find OC_ISA_NAME(oc_row_find)
#define oc_at_least_k OC_ISA_NAME(oc_at_least_k)
#define oc_collect OC_ISA_NAME(oc_collect)

/* This thread's room with space for n items; NULL without memory. */
oc_select_room *oc_room_for(int64_t n);

/* The smallest set of the greatest items whose weight reaches `target`; `above` is the weight of
 * items that are greater than all of these and left out of the list. Reorders the items. n >= 1. */
oc_cut oc_weighted_cut(oc_weighted *items, int64_t n, double above, double target);

/* The greatest value, -inf for none. */
float oc_row_max(const float *row, int64_t n);

/* Index of the `count`-th (from 1) item equal to the value, or n - 1 if there are fewer. */
int64_t oc_row_find(const float *row, int64_t n, float value, int64_t count);

/* A value that at least k items reach, and not many more (-inf if no good one is found). Uses items. */
float oc_at_least_k(const float *row, int64_t n, int64_t k, oc_weighted *items);

/* The items in [low, high), by index, with weight 1. Returns how many. */
int64_t oc_collect(const float *row, int64_t n, float low, float high, oc_weighted *items);

#endif
