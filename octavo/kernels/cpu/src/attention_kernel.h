/* The inner loops of attention: up to four query vectors against one unit of 64 cached tokens.
 *
 * A query vector is one head of one row. All arithmetic of a query vector is its own: how many
 * others share the loads (1 to 4), and how many tiles are multiplied at once, only changes which
 * registers hold it, never which operations it goes through or their order. Tokens that a vector
 * may not see get probability exactly zero, and multiplying by zero and adding, or not doing it,
 * gives the same bits; that is why a vector's result does not depend on its company.
 *
 * Three kinds of arithmetic: f32 caches; bf16 caches where the processor multiplies bf16 pairs;
 * bf16 caches elsewhere, where pairs are widened to f32. For bf16 caches the query and the
 * probabilities are rounded to bf16 at every level, so that levels differ by rounding of sums only.
 */
#ifndef OCTAVO_ATTENTION_KERNEL_H
#define OCTAVO_ATTENTION_KERNEL_H

#include "kv_cache.h"
#include "vec.h"

#define UNIT 64 /* tokens whose scores are made before the running maximum is looked at */
#define UNIT_TILES (UNIT / OC_TILE)
#define TILE_VECTORS (OC_TILE / OC_VW)
#define MASKED (-1e30f) /* finite, so that "nothing seen yet" never makes inf - inf */
#define LOG2E 1.4426950408889634f

enum { KIND_F32 = 0, KIND_BF16_WIDENED = 1, KIND_BF16_DOT = 2 };
#if OC_LEVEL >= OC_LEVEL_AVX512BF16
#define KIND_BF16 KIND_BF16_DOT
#else
#define KIND_BF16 KIND_BF16_WIDENED
#endif

/* acc + a.pair . b.pair, in every lane */
INLINE vf v_dot_bf16(vf acc, vu a, vu b) {
#if OC_LEVEL >= OC_LEVEL_AVX512BF16
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
    (void)a, (void)b;
    return acc;
#endif
}

/* What a chunk of query vectors needs; pointers are to the first vector of the chunk. */
typedef struct {
    const char *query;    /* f32 dims, or bf16 pairs for KIND_BF16_DOT; rows query_bytes apart */
    int64_t query_bytes;
    const int32_t *first, *last; /* tokens [first, last) of the request are visible, by vector */
    float *acc;                  /* [R][lanes] running weighted sum of values */
    float *max;                  /* [R] running maximum, in log2 units */
    float *sum;                  /* [R][OC_VW] running sum of probabilities, by lane */
} chunk_state;

typedef struct {
    const char *tile[UNIT_TILES]; /* this KV head's part of each tile */
    const char *next[UNIT_TILES]; /* what will be read next: the same tiles of the next unit */
    int64_t start;                /* first token of the unit */
} unit_pointers;

/* Scores of R vectors with C vectors of tokens: acc[r][c] = q_r . k, over all key steps. */
INLINE void score_block(const int R, const int C, const int kind, const int prefetch, const char *query,
                        int64_t query_bytes, const char *const *keys, const char *const *next, int steps,
                        float (*scores)[UNIT], int column) {
    vf acc[4][4];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) acc[r][c] = v_splat(0.0f);
    for (int s = 0; s < steps; s++) {
        vf k[4], odd[4];
        UNROLL for (int c = 0; c < C; c++) {
            k[c] = v_load(keys[c] + (int64_t)s * 64);
            if (prefetch) {
                /* Keys and values of a head are adjacent and about equally long. To the second-level
                 * cache: fetched into the first, this was slower than not fetching at all. */
                __builtin_prefetch(next[c] + (int64_t)s * 128, 0, 2);
                if (TILE_VECTORS == 1) __builtin_prefetch(next[c] + (int64_t)s * 128 + 64, 0, 2);
            }
            if (kind == KIND_BF16_WIDENED) {
                odd[c] = v_from_bits(v_bits_of(k[c]) & 0xffff0000u);
                k[c] = v_from_bits(v_bits_of(k[c]) << 16);
            }
        }
        UNROLL for (int r = 0; r < R; r++) {
            const char *q = query + r * query_bytes;
            if (kind == KIND_BF16_DOT) {
                const vu pair = v_splat_u(((const uint32_t *)q)[s]);
                UNROLL for (int c = 0; c < C; c++) acc[r][c] = v_dot_bf16(acc[r][c], v_bits_of(k[c]), pair);
            } else if (kind == KIND_BF16_WIDENED) {
                const vf high = v_splat(((const float *)q)[2 * s + 1]);
                UNROLL for (int c = 0; c < C; c++) acc[r][c] = v_fma(odd[c], high, acc[r][c]);
                const vf low = v_splat(((const float *)q)[2 * s]);
                UNROLL for (int c = 0; c < C; c++) acc[r][c] = v_fma(k[c], low, acc[r][c]);
            } else {
                const vf x = v_splat(((const float *)q)[s]);
                UNROLL for (int c = 0; c < C; c++) acc[r][c] = v_fma(k[c], x, acc[r][c]);
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) v_store(&scores[r][column + c * OC_VW], acc[r][c]);
}

/* Scores of tiles [from, to) of the unit. */
INLINE void score_unit(const int R, const int kind, const int prefetch, const oc_layout *l,
                       const chunk_state *chunk, const unit_pointers *unit, int from, int to,
                       float (*scores)[UNIT]) {
#if TILE_VECTORS == 1
    /* As many tiles at once as there are: the sums of one tile alone would wait for each other. */
#define SCORE_TILES(C)                                                                             \
    score_block(R, C, kind, prefetch, chunk->query, chunk->query_bytes, unit->tile + from,         \
                unit->next + from, l->key_steps, scores, from *OC_TILE)
    switch (to - from) {
        case 1: SCORE_TILES(1); break;
        case 2: SCORE_TILES(2); break;
        case 3: SCORE_TILES(3); break;
        default: SCORE_TILES(4); break;
    }
#undef SCORE_TILES
#else
    for (int t = from; t < to; t++)
        for (int part = 0; part < TILE_VECTORS; part += 2) {
            const int64_t offset = (int64_t)part * OC_VW * 4;
            const char *keys[2] = {unit->tile[t] + offset, unit->tile[t] + offset + OC_VW * 4};
            const char *next[2] = {unit->next[t], unit->next[t] + 64};
            score_block(R, 2, kind, prefetch && part == 0, chunk->query, chunk->query_bytes, keys, next,
                        l->key_steps, scores, t * OC_TILE + part * OC_VW);
        }
#endif
}

/* cap * tanh(x / cap), by way of 2^-|2 x / cap| */
INLINE vf soft_capped(vf x, float cap) {
    const vf zero = v_splat(0.0f);
    const vf magnitude = v_max(x, zero - x);
    const vf e = v_exp2_neg(magnitude * (-2.0f * LOG2E / cap));
    const vf t = (1.0f - e) / (1.0f + e) * cap;
    return v_select(v_ge(x, zero), t, zero - t);
}

/* The weights of the unit: f32, or bf16 pairs for the dot kind. */
typedef union {
    float f32[4][UNIT];
    uint32_t pairs[4][UNIT / 2];
} unit_weights;

/* Scores -> weights relative to the new running maximum; alpha[r] is what older sums shrink by. */
INLINE void soften(const int R, const int kind, const oc_attn_spec *spec, const chunk_state *chunk,
                   int64_t start, int from, int to, float (*scores)[UNIT], unit_weights *weights,
                   float alpha[OC_VW]) {
    const float factor = spec->scale * LOG2E;
    const vf masked = v_splat(MASKED), zero = v_splat(0.0f);
    float old[OC_VW], new[OC_VW];
    for (int i = 0; i < OC_VW; i++) old[i] = new[i] = 0.0f;
    UNROLL for (int r = 0; r < R; r++) {
        const int64_t low = chunk->first[r] - start, high = chunk->last[r] - start;
        const vi below = (vi)v_splat_u((uint32_t)(low > 0 ? (low < UNIT ? low : UNIT) : 0));
        const vi above = (vi)v_splat_u((uint32_t)(high > 0 ? (high < UNIT ? high : UNIT) : 0));
        const int whole = low <= from * OC_TILE && high >= to * OC_TILE;
        vf top = masked;
        for (int i = from * OC_TILE; i < to * OC_TILE; i += OC_VW) {
            vf x = v_load(&scores[r][i]);
            if (spec->soft_cap > 0.0f)
                x = soft_capped(x * spec->scale, spec->soft_cap) * LOG2E;
            else
                x = x * factor;
            if (!whole) {
                const vi id = v_iota() + (int32_t)i;
                x = v_select(v_and(v_lt_i(below - 1, id), v_lt_i(id, above)), x, masked);
            }
            v_store(&scores[r][i], x);
            top = v_max(top, x);
        }
        const float highest = v_reduce_max(top);
        old[r] = chunk->max[r];
        new[r] = highest > old[r] ? highest : old[r];
        chunk->max[r] = new[r];
    }
    v_store(alpha, v_exp2_neg(v_load(old) - v_load(new)));
    UNROLL for (int r = 0; r < R; r++) {
        const vf top = v_splat(new[r]);
        vf sum = v_load(chunk->sum + r * OC_VW) * alpha[r];
        for (int i = from * OC_TILE; i < to * OC_TILE; i += OC_VW) {
            const vf x = v_load(&scores[r][i]);
            vf p = v_exp2_neg(x - top);
            p = v_select(v_eq(x, masked), zero, p);
            if (kind == KIND_F32) {
                v_store(&weights->f32[r][i], p);
            } else if (kind == KIND_BF16_WIDENED) {
                p = v_round_bf16(p);
                v_store(&weights->f32[r][i], p);
            } else {
#if OC_LEVEL >= OC_LEVEL_AVX512BF16
                const __m256i packed = (__m256i)_mm512_cvtneps_pbh((__m512)p);
                _mm256_storeu_si256((__m256i *)&weights->pairs[r][i / 2], packed);
                p = (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(packed), 16);
#endif
            }
            sum = sum + p;
        }
        v_store(chunk->sum + r * OC_VW, sum);
    }
}

/* One row of values (a token, or a pair of tokens) into the sums of R vectors. */
INLINE void add_value_row(const int R, const int C, const int kind, const int low_only, vf (*acc)[4],
                          const char *row, const unit_weights *weights, int index) {
    vu v[4];
    UNROLL for (int c = 0; c < C; c++) {
        v[c] = v_load_u(row + c * OC_VW * 4);
        if (low_only) v[c] &= 0x0000ffffu;
    }
    UNROLL for (int r = 0; r < R; r++) {
        if (kind == KIND_BF16_DOT) {
            const vu pair = v_splat_u(weights->pairs[r][index]);
            UNROLL for (int c = 0; c < C; c++) acc[r][c] = v_dot_bf16(acc[r][c], v[c], pair);
        } else if (kind == KIND_BF16_WIDENED) {
            const vf odd = v_splat(weights->f32[r][2 * index + 1]);
            const vf even = v_splat(weights->f32[r][2 * index]);
            UNROLL for (int c = 0; c < C; c++) {
                acc[r][c] = v_fma(v_from_bits(v[c] & 0xffff0000u), odd, acc[r][c]);
                acc[r][c] = v_fma(v_from_bits(v[c] << 16), even, acc[r][c]);
            }
        } else {
            const vf p = v_splat(weights->f32[r][index]);
            UNROLL for (int c = 0; c < C; c++) acc[r][c] = v_fma(v_from_bits(v[c]), p, acc[r][c]);
        }
    }
}

/* Lanes [lane, lane + C * OC_VW) of the values of tiles [from, to); the last tile has `last` tokens. */
INLINE void add_values(const int R, const int C, const int kind, const oc_layout *l, float *sums,
                       const unit_pointers *unit, int from, int to, int last, const unit_weights *weights,
                       const float *alpha, int lane) {
    const int64_t row_bytes = (int64_t)l->lanes * 4;
    vf acc[4][4];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++)
            acc[r][c] = v_load(sums + (int64_t)r * l->lanes + lane + c * OC_VW) * alpha[r];
    for (int t = from; t < to; t++) {
        const char *row = unit->tile[t] + l->key_bytes + (int64_t)lane * 4;
        const int tokens = t == to - 1 ? last : OC_TILE;
        int index = t * (kind == KIND_F32 ? OC_TILE : OC_TILE / 2);
        const int rows = kind == KIND_F32 ? tokens : tokens / 2;
        for (int i = 0; i < rows; i++, row += row_bytes, index++)
            add_value_row(R, C, kind, 0, acc, row, weights, index);
        /* The other half of the last pair may hold anything. */
        if (kind != KIND_F32 && (tokens & 1)) add_value_row(R, C, kind, 1, acc, row, weights, index);
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++)
            v_store(sums + (int64_t)r * l->lanes + lane + c * OC_VW, acc[r][c]);
}

/* One chunk of R vectors through one unit. */
INLINE void attend_unit(const int R, const int kind, const int prefetch, const oc_attn_spec *spec,
                        const oc_layout *l, const chunk_state *chunk, const unit_pointers *unit) {
    int64_t first = INT64_MAX, last = 0;
    UNROLL for (int r = 0; r < R; r++) {
        if (chunk->first[r] >= chunk->last[r]) continue;
        if (chunk->first[r] < first) first = chunk->first[r];
        if (chunk->last[r] > last) last = chunk->last[r];
    }
    first = first > unit->start ? first - unit->start : 0;
    last = last < unit->start + UNIT ? last - unit->start : UNIT;
    if (first >= last) return;
    const int from = (int)first / OC_TILE, to = ((int)last + OC_TILE - 1) / OC_TILE;
    float scores[4][UNIT], alpha[OC_VW];
    unit_weights weights;
    score_unit(R, kind, prefetch, l, chunk, unit, from, to, scores);
    soften(R, kind, spec, chunk, unit->start, from, to, scores, &weights, alpha);
    const int last_tile = (int)last - (to - 1) * OC_TILE;
    int lane = 0;
#if OC_VW == 16
    for (; lane + 4 * OC_VW <= l->lanes; lane += 4 * OC_VW)
        add_values(R, 4, kind, l, chunk->acc, unit, from, to, last_tile, &weights, alpha, lane);
    for (; lane < l->lanes; lane += OC_VW)
        add_values(R, 1, kind, l, chunk->acc, unit, from, to, last_tile, &weights, alpha, lane);
#else
    for (; lane < l->lanes; lane += 2 * OC_VW)
        add_values(R, 2, kind, l, chunk->acc, unit, from, to, last_tile, &weights, alpha, lane);
#endif
}

#define ATTEND_UNIT(name, R, kind, prefetch)                                                           \
    static __attribute__((noinline)) void name(const oc_attn_spec *spec, const oc_layout *l,           \
                                               const chunk_state *chunk, const unit_pointers *unit) {  \
        attend_unit(R, kind, prefetch, spec, l, chunk, unit);                                          \
    }
#define ATTEND_UNITS(kind)                                                                             \
    ATTEND_UNIT(kind##_1, 1, kind, 0) ATTEND_UNIT(kind##_1p, 1, kind, 1)                               \
    ATTEND_UNIT(kind##_2, 2, kind, 0) ATTEND_UNIT(kind##_2p, 2, kind, 1)                               \
    ATTEND_UNIT(kind##_3, 3, kind, 0) ATTEND_UNIT(kind##_3p, 3, kind, 1)                               \
    ATTEND_UNIT(kind##_4, 4, kind, 0) ATTEND_UNIT(kind##_4p, 4, kind, 1)

typedef void (*unit_function)(const oc_attn_spec *, const oc_layout *, const chunk_state *,
                              const unit_pointers *);

#if OC_LEVEL >= OC_LEVEL_AVX512BF16
ATTEND_UNITS(KIND_BF16_DOT)
#define BF16_FUNCTION(n) KIND_BF16_DOT_##n
#else
ATTEND_UNITS(KIND_BF16_WIDENED)
#define BF16_FUNCTION(n) KIND_BF16_WIDENED_##n
#endif
ATTEND_UNITS(KIND_F32)

/* [cache is bf16][vectors - 1][prefetch the next unit] */
static const unit_function unit_functions[2][4][2] = {
    {{KIND_F32_1, KIND_F32_1p},
     {KIND_F32_2, KIND_F32_2p},
     {KIND_F32_3, KIND_F32_3p},
     {KIND_F32_4, KIND_F32_4p}},
    {{BF16_FUNCTION(1), BF16_FUNCTION(1p)},
     {BF16_FUNCTION(2), BF16_FUNCTION(2p)},
     {BF16_FUNCTION(3), BF16_FUNCTION(3p)},
     {BF16_FUNCTION(4), BF16_FUNCTION(4p)}},
};

#endif
