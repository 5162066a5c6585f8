/* Order statistics of a row of logits without sorting it. See select.h. */
#include "select.h"
#include "vec.h"

#include <math.h>
#include <stdlib.h>

static _Thread_local oc_select_room thread_room;

oc_select_room *oc_room_for(int64_t n) {
    if (n > thread_room.space) {
        oc_weighted *bigger = realloc(thread_room.items, (size_t)n * sizeof(oc_weighted));
        if (!bigger) return NULL;
        thread_room.items = bigger;
        thread_room.space = n;
    }
    return &thread_room;
}

static inline void swap(oc_weighted *a, oc_weighted *b) {
    const oc_weighted t = *a;
    *a = *b;
    *b = t;
}

static float median_of_three(float a, float b, float c) {
    if (a < b) return b < c ? b : (a < c ? c : a);
    return a < c ? a : (b < c ? c : b);
}

oc_cut oc_weighted_cut(oc_weighted *items, int64_t n, double above, double target) {
    /* Quickselect by weight, with all items equal to the pivot set aside at once. */
    int64_t begin = 0, end = n;
    for (;;) {
        const float pivot = median_of_three(items[begin].value, items[begin + (end - begin) / 2].value,
                                            items[end - 1].value);
        /* [begin, greater) > pivot, [greater, i) == pivot, [less, end) < pivot */
        int64_t greater = begin, less = end;
        double greater_weight = 0.0, equal_weight = 0.0;
        float one = 0.0f;
        for (int64_t i = begin; i < less;) {
            const oc_weighted item = items[i];
            if (item.value > pivot) {
                greater_weight += item.weight;
                swap(&items[i++], &items[greater++]);
            } else if (item.value < pivot) {
                swap(&items[i], &items[--less]);
            } else {
                equal_weight += item.weight;
                one = item.weight;
                i++;
            }
        }
        const int64_t equal = less - greater;
        if (greater > begin && above + greater_weight >= target) {
            end = greater;
        } else if (above + greater_weight + equal_weight >= target || less == end) {
            double ties = ceil((target - above - greater_weight) / (double)one);
            if (!(ties >= 1.0)) ties = 1.0;
            if (ties > (double)equal) ties = (double)equal;
            return (oc_cut){.value = pivot, .ties = (int64_t)ties, .equal = equal};
        } else {
            above += greater_weight + equal_weight;
            begin = less;
        }
    }
}

float oc_row_max(const float *row, int64_t n) {
    const vf lowest = v_splat(-INFINITY);
    vf top[4] = {lowest, lowest, lowest, lowest};
    int64_t i = 0;
    for (; i + 4 * OC_VW <= n; i += 4 * OC_VW)
        UNROLL for (int c = 0; c < 4; c++) top[c] = v_max(v_load(row + i + c * OC_VW), top[c]);
    float best = v_reduce_max(v_max(v_max(top[0], top[1]), v_max(top[2], top[3])));
    for (; i < n; i++)
        if (row[i] > best) best = row[i];
    return best;
}

int64_t oc_row_find(const float *row, int64_t n, float value, int64_t count) {
    const vf wanted = v_splat(value);
    int64_t i = 0;
    for (; i + OC_VW <= n; i += OC_VW) {
        uint32_t lanes = v_lanes(v_eq(v_load(row + i), wanted));
        for (; lanes; lanes &= lanes - 1)
            if (--count == 0) return i + __builtin_ctz(lanes);
    }
    for (; i < n; i++)
        if (row[i] == value && --count == 0) return i;
    return n - 1;
}

float oc_at_least_k(const float *row, int64_t n, int64_t k, oc_weighted *items) {
    /* The maxima of disjoint groups: if k groups have one of at least t, so have k items. A group is
     * one lane of `run` vectors in a row; the fewer groups, the cheaper, the more, the tighter. */
    int64_t run = 64;
    while (run > 4 && n / run < 8 * k) run /= 2;
    if (n / run < 2 * k) return -INFINITY;
    int64_t groups = 0, i = 0;
    for (; i + run * OC_VW <= n; i += run * OC_VW) {
        vf top = v_splat(-INFINITY);
        for (int64_t j = 0; j < run; j++) top = v_max(v_load(row + i + j * OC_VW), top);
        UNROLL for (int lane = 0; lane < OC_VW; lane++)
            items[groups++] = (oc_weighted){top[lane], 1.0f};
    }
    for (; i < n; i += run) {
        float top = -INFINITY;
        for (int64_t j = i; j < n && j < i + run; j++)
            if (row[j] > top) top = row[j];
        items[groups++] = (oc_weighted){top, 1.0f};
    }
    if (groups < k) return -INFINITY;
    return oc_weighted_cut(items, groups, 0.0, (double)k).value;
}

int64_t oc_collect(const float *row, int64_t n, float low, float high, oc_weighted *items) {
    const vf from = v_splat(low), to = v_splat(high);
    int64_t count = 0, i = 0;
    for (; i + OC_VW <= n; i += OC_VW) {
        const vf x = v_load(row + i);
        uint32_t lanes = v_lanes(v_and(v_ge(x, from), v_gt(to, x)));
        for (; lanes; lanes &= lanes - 1)
            items[count++] = (oc_weighted){row[i + __builtin_ctz(lanes)], 1.0f};
    }
    for (; i < n; i++)
        if (row[i] >= low && row[i] < high) items[count++] = (oc_weighted){row[i], 1.0f};
    return count;
}
