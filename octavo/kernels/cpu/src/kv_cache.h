/* The layout of the paged KV cache, known only to attention*.[ch] and rope_store.c.
 *
 * A block is block_size / 16 *tiles* of 16 tokens, one after the other. A tile holds all KV heads,
 * so that a block is one contiguous read, and of each head first the keys, then the values:
 *
 *   bf16  keys    [padded_dim / 2][16 tokens][2]     two neighbouring dims of a token are a pair
 *         values  [8 token pairs][lanes][2]          two neighbouring tokens of a dim are a pair
 *   f32   keys    [padded_dim][16 tokens]
 *         values  [16 tokens][lanes]
 *
 * padded_dim is head_dim rounded up to 2, lanes is head_dim rounded up to 16. So both dtypes have
 * 16 * (padded_dim + lanes) elements a head and tile, one step along the keys is 16 dwords, and a
 * vdpbf16ps over the pairs makes 16 scores (or 16 lanes of the output) from one 64-byte line.
 * The odd key lane is written as zero; padding lanes of values are never written and never reach
 * an output. Slots that hold no token may hold anything, NaN included.
 */
#ifndef OCTAVO_KV_CACHE_H
#define OCTAVO_KV_CACHE_H

#include "octavo_cpu.h"

#define OC_TILE 16 /* tokens */

typedef struct {
    int32_t head_dim, padded_dim, lanes;
    int32_t key_steps;   /* 64-byte lines of keys a head and tile */
    int32_t value_rows;  /* rows of `lanes` dwords of values a head and tile */
    int64_t key_bytes;   /* offset of the values of a head */
    int64_t head_bytes, tile_bytes, block_bytes;
    int32_t block_size, tiles_per_block;
} oc_layout;

static inline oc_layout oc_layout_of(const oc_attn_spec *spec) {
    oc_layout l;
    l.head_dim = spec->head_dim;
    l.padded_dim = (spec->head_dim + 1) / 2 * 2;
    l.lanes = (spec->head_dim + 15) / 16 * 16;
    const int bf16 = spec->dtype == OC_BF16;
    l.key_steps = bf16 ? l.padded_dim / 2 : l.padded_dim;
    l.value_rows = bf16 ? OC_TILE / 2 : OC_TILE;
    l.key_bytes = (int64_t)l.key_steps * 64;
    l.head_bytes = l.key_bytes + (int64_t)l.value_rows * l.lanes * 4;
    l.tile_bytes = l.head_bytes * spec->num_kv_heads;
    l.block_size = spec->block_size;
    l.tiles_per_block = spec->block_size / OC_TILE;
    l.block_bytes = l.tile_bytes * l.tiles_per_block;
    return l;
}

/* Byte offset of the tile that holds a slot (block id * block_size + offset). 64 bit: a cache may
 * well exceed 2^31 bytes. */
static inline int64_t oc_tile_of_slot(const oc_layout *l, int64_t slot) {
    return slot / l->block_size * l->block_bytes + slot % l->block_size / OC_TILE * l->tile_bytes;
}

#endif
