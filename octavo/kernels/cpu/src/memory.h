/* Large pages and the last-level cache. See memory.c. */
#ifndef OCTAVO_MEMORY_H
#define OCTAVO_MEMORY_H

#include <stdint.h>

#ifndef OC_EXPORT
#define OC_EXPORT __attribute__((visibility("default")))
#endif

#define OC_HUGE_PAGE (2 << 20)

/* Asks for large pages for [start, start + bytes), best before it is first touched. A wish: where the
 * system has none, or none left, nothing changes. */
OC_EXPORT void oc_use_huge_pages(void *start, int64_t bytes);

/* Bytes of the last-level cache; 0 where the system does not say. */
int64_t oc_last_level_cache(void);

#endif
