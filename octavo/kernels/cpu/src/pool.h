/* A pool of worker threads for short parallel loops. See pool.c for how it waits. */
#ifndef OCTAVO_POOL_H
#define OCTAVO_POOL_H

#include <stdint.h>

#ifndef OC_EXPORT
#define OC_EXPORT __attribute__((visibility("default")))
#endif

#define OC_MAX_THREADS 256

/* Works on items [begin, end). `thread` is 0 for the caller, 1 .. threads - 1 for workers. */
typedef void (*oc_task)(void *ctx, int64_t begin, int64_t end, int thread);

/* Runs the task over all items and returns when all are done. `grain` is the fewest items worth
 * handing out; a loop of at most one grain runs in the caller alone and costs nothing. Which
 * thread gets which items is not fixed, so results must not depend on it. A loop started inside a
 * task runs in that thread alone. */
OC_EXPORT void oc_parallel_for(int64_t items, int64_t grain, oc_task task, void *ctx);

OC_EXPORT int oc_num_threads(void);
OC_EXPORT void oc_set_num_threads(int threads);

#endif
