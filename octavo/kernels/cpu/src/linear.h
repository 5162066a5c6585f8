/* Products that fetch, while they compute, what will be read after them. Within a level. */
#ifndef OCTAVO_LINEAR_H
#define OCTAVO_LINEAR_H

#include "octavo_cpu.h"

#include <stdatomic.h>

#define OC_WARM_BYTES 4096

/* Memory that is read soon, in the order in which it will be: OC_WARM_BYTES from each place on. */
typedef struct {
    const char *base;
    const int64_t *places; /* offsets from base */
    int64_t count;
    _Atomic int64_t next; /* the first place that nobody has fetched */
} oc_warm_list;

/* oc_linear; warm may be NULL. */
#define oc_linear_warming OC_ISA_NAME(oc_linear_warming)
int32_t oc_linear_warming(const void *x, int64_t x_stride, int64_t m, const oc_packed *w,
                          const float *bias, void *y, int64_t y_stride, int32_t y_dtype,
                          int32_t epilogue, oc_warm_list *warm);

#endif
