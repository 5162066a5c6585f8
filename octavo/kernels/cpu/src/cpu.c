// octavo: built once
/* Which instruction-set level this processor and its operating system support. */
#include "octavo_cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>

static uint64_t enabled_state(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return ((uint64_t)high << 32) | low;
}

OC_EXPORT int32_t oc_cpu_level(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return OC_LEVEL_SCALAR;
    const unsigned needed = bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C;
    if ((c & needed) != needed) return OC_LEVEL_SCALAR;
    const uint64_t state = enabled_state();
    if ((state & 0x6) != 0x6) return OC_LEVEL_SCALAR; /* the system saves xmm and ymm */
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return OC_LEVEL_SCALAR;
    if (!(b & (1u << 5))) return OC_LEVEL_SCALAR; /* avx2 */
    const unsigned avx512 = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31); /* f dq bw vl */
    if ((b & avx512) != avx512 || (state & 0xe6) != 0xe6) return OC_LEVEL_AVX2;
    if (a < 1 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return OC_LEVEL_AVX512;
    return (a & (1u << 5)) ? OC_LEVEL_AVX512BF16 : OC_LEVEL_AVX512;
}

/* 1 if the processor has AMX tiles for bf16 and the system has them switched on. */
OC_EXPORT int32_t oc_cpu_has_amx_bf16(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
    if ((enabled_state() & (3u << 17)) != (3u << 17)) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    return (d & (1u << 24)) && (d & (1u << 22));
}
#else
OC_EXPORT int32_t oc_cpu_level(void) { return OC_LEVEL_SCALAR; }
OC_EXPORT int32_t oc_cpu_has_amx_bf16(void) { return 0; }
#endif
