/* SPDX-License-Identifier: Apache-2.0 */
#include "base/bitmap.h"

#include <stdlib.h>

uint64_t *bitmap_alloc(size_t nbits)
{
	size_t words = BITMAP_WORDS(nbits);
	return calloc(words ? words : 1, sizeof(uint64_t));
}

void bitmap_take_words(uint64_t *dst, uint64_t *src, size_t first, size_t nwords)
{
	for (size_t w = first; w < first + nwords; w++)
		if (__atomic_load_n(&src[w], __ATOMIC_RELAXED))
			dst[w] |= __atomic_exchange_n(&src[w], 0, __ATOMIC_ACQ_REL);
}

static uint64_t word_mask(size_t first, size_t end, size_t w)
{
	uint64_t mask = ~UINT64_C(0);
	if (w == first / 64)
		mask &= ~UINT64_C(0) << (first % 64);
	if (w == end / 64)
		mask &= ~(~UINT64_C(0) << (end % 64));
	return mask;
}

void bitmap_set_range(uint64_t *map, size_t first, size_t n)
{
	size_t end = first + n;
	for (size_t w = first / 64; w * 64 < end; w++)
		map[w] |= word_mask(first, end, w);
}

void bitmap_clear_range(uint64_t *map, size_t first, size_t n)
{
	size_t end = first + n;
	for (size_t w = first / 64; w * 64 < end; w++)
		map[w] &= ~word_mask(first, end, w);
}

size_t bitmap_count(const uint64_t *map, size_t nbits)
{
	size_t n = 0;
	for (size_t w = 0; w < nbits / 64; w++)
		n += (size_t)__builtin_popcountll(map[w]);
	if (nbits % 64)
		n += (size_t)__builtin_popcountll(map[nbits / 64] & ~(~UINT64_C(0) << (nbits % 64)));
	return n;
}

static size_t next_bit(const uint64_t *map, size_t nbits, size_t from, uint64_t flip)
{
	while (from < nbits) {
		uint64_t word = (map[from / 64] ^ flip) >> (from % 64);
		if (word) {
			from += (size_t)__builtin_ctzll(word);
			return from < nbits ? from : nbits;
		}
		from = (from / 64 + 1) * 64;
	}
	return nbits;
}

size_t bitmap_next_set(const uint64_t *map, size_t nbits, size_t from)
{
	return next_bit(map, nbits, from, 0);
}

size_t bitmap_next_clear(const uint64_t *map, size_t nbits, size_t from)
{
	return next_bit(map, nbits, from, ~UINT64_C(0));
}
