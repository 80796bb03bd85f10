/* SPDX-License-Identifier: Apache-2.0 */
#ifndef BASE_BITMAP_H
#define BASE_BITMAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Bit i of a bitmap is bit (i % 64) of word i / 64, as KVM's dirty log on x86. */
#define BITMAP_WORDS(nbits) (((nbits) + 63) / 64)

/* All bits clear; NULL when memory is short. free(3) it. */
uint64_t *bitmap_alloc(size_t nbits);

static inline bool bitmap_test(const uint64_t *map, size_t i)
{
	return (map[i / 64] >> (i % 64)) & 1;
}
static inline void bitmap_set(uint64_t *map, size_t i)
{
	map[i / 64] |= UINT64_C(1) << (i % 64);
}
static inline void bitmap_clear(uint64_t *map, size_t i)
{
	map[i / 64] &= ~(UINT64_C(1) << (i % 64));
}
/* Atomic, release order: what was stored before is seen by whoever takes the bit with bitmap_take_words. */
static inline void bitmap_set_atomic(uint64_t *map, size_t i)
{
	__atomic_fetch_or(&map[i / 64], UINT64_C(1) << (i % 64), __ATOMIC_RELEASE);
}
/* dst |= src for words [first, first+nwords); src is atomically read and cleared. */
void bitmap_take_words(uint64_t *dst, uint64_t *src, size_t first, size_t nwords);
void bitmap_set_range(uint64_t *map, size_t first, size_t n);
void bitmap_clear_range(uint64_t *map, size_t first, size_t n);
size_t bitmap_count(const uint64_t *map, size_t nbits);
/* First set (clear) bit at or after from, or nbits. */
size_t bitmap_next_set(const uint64_t *map, size_t nbits, size_t from);
size_t bitmap_next_clear(const uint64_t *map, size_t nbits, size_t from);

#endif
