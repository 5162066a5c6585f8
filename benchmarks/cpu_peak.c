/* What the machine can do at best: bytes read from memory, and bf16 products out of registers.
 * Compiled and run by benchmarks/cpu_kernels.py, one thread a call. */
#include <immintrin.h>
#include <stdint.h>

/* Sums `lines` cache lines; eight independent chains. */
__attribute__((target("avx512f"))) int64_t read_lines(const char *p, int64_t lines) {
    __m512i sum[8];
    for (int j = 0; j < 8; j++) sum[j] = _mm512_setzero_si512();
    for (int64_t i = 0; i + 8 <= lines; i += 8)
        for (int j = 0; j < 8; j++) {
            const char *line = p + (i + j) * 64;
            __builtin_prefetch(line + 4096);
            sum[j] = _mm512_add_epi64(sum[j], _mm512_load_si512(line));
        }
    for (int j = 1; j < 8; j++) sum[0] = _mm512_add_epi64(sum[0], sum[j]);
    return _mm512_reduce_add_epi64(sum[0]);
}

/* 24 chains of vdpbf16ps, `rounds` long: 64 operations each. */
__attribute__((target("avx512f,avx512bf16"))) float multiply(int64_t rounds) {
    __m512 acc[24];
    for (int j = 0; j < 24; j++) acc[j] = _mm512_set1_ps((float)j);
    const __m512bh x = (__m512bh)_mm512_set1_epi32(0x3c003c00);
    for (int64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 24
        for (int j = 0; j < 24; j++) acc[j] = _mm512_dpbf16_ps(acc[j], x, x);
    }
    for (int j = 1; j < 24; j++) acc[0] = _mm512_add_ps(acc[0], acc[j]);
    return _mm512_reduce_add_ps(acc[0]);
}
