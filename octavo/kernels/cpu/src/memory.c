// octavo: built once
/* What the kernels ask of the system's memory: large pages, and the size of the last-level cache. */
#include "memory.h"

#include <stdatomic.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

/* With pages of 4 KiB, panels of weights that are read once a step miss the translation buffer every
 * 64 lines: products of 16 rows are a quarter slower. */
OC_EXPORT void oc_use_huge_pages(void *start, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    const uintptr_t first = ((uintptr_t)start + page - 1) / page * page;
    const uintptr_t last = ((uintptr_t)start + (uintptr_t)bytes) / page * page;
    if (bytes >= OC_HUGE_PAGE && last > first) (void)madvise((void *)first, last - first, MADV_HUGEPAGE);
#else
    (void)start, (void)bytes;
#endif
}

int64_t oc_last_level_cache(void) {
    static _Atomic int64_t known = -1;
    int64_t bytes = atomic_load_explicit(&known, memory_order_relaxed);
    if (bytes >= 0) return bytes;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    bytes = sysconf(_SC_LEVEL3_CACHE_SIZE); /* a system call's time on some systems, hence kept */
#endif
    if (bytes < 0) bytes = 0;
    atomic_store_explicit(&known, bytes, memory_order_relaxed);
    return bytes;
}
