/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Self-describing pages and sectors, shared by the native test guest and the tools on the host.
 *
 * A unit is an array of 64-bit little-endian words: a header of five words, then a body that is a function of
 * the header alone. Whoever finds a unit can therefore check all of it without knowing what ought to be
 * there; whoever knows the number and generation that ought to be there also finds it stale or swapped.
 */
#ifndef TESTS_GUEST_SELFDESC_H
#define TESTS_GUEST_SELFDESC_H

#include <stdint.h>

#define SELFDESC_SECTOR_MAGIC 0x3130434553444d53ULL /* "SMDSEC01" */
#define SELFDESC_PAGE_MAGIC   0x3130474150444d53ULL /* "SMDPAG01": body of noise */
#define SELFDESC_EASY_MAGIC                                                                                  \
	0x3130595345444d53ULL /* "SMDESY01": one word in four is noise, so it compresses */
#define SELFDESC_FEW_MAGIC                                                                                   \
	0x3130574546444d53ULL /* "SMDFEW01": noise, of which one word in 64 changes with the generation */

#define SELFDESC_SECTOR_WORDS 64u
#define SELFDESC_PAGE_WORDS   512u

/* Sectors at the start of a disk that hold the numbered, flushed records; a record's generation is its
 * number. */
#define SELFDESC_RECORD_SECTORS 64u

enum selfdesc_word {
	SELFDESC_MAGIC,
	SELFDESC_SEED,
	SELFDESC_NUMBER, /* page number or LBA */
	SELFDESC_GENERATION,
	SELFDESC_SUM, /* of the four before it */
	SELFDESC_HEADER_WORDS
};

static inline uint64_t selfdesc_mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15ULL;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
	return x ^ (x >> 31);
}

static inline uint64_t selfdesc_sum(uint64_t magic, uint64_t seed, uint64_t number, uint64_t generation)
{
	return selfdesc_mix(magic ^ selfdesc_mix(seed ^ selfdesc_mix(number ^ selfdesc_mix(generation))));
}

/* What the words of the body that do not change with the generation are made of. */
static inline uint64_t selfdesc_still(uint64_t magic, uint64_t seed, uint64_t number, uint64_t generation)
{
	return selfdesc_sum(magic, seed, number, magic == SELFDESC_FEW_MAGIC ? 0 : generation);
}

#define SELFDESC_FEW_EVERY 64u

static inline uint64_t selfdesc_body(uint64_t sum, unsigned i, unsigned noise_mask)
{
	uint64_t x = sum + i * 0x9e3779b97f4a7c15ULL;

	if (i & noise_mask)
		return sum;
	x ^= x >> 29;
	x *= 0xbf58476d1ce4e5b9ULL;
	return x ^ (x >> 32);
}

static inline unsigned selfdesc_noise_mask(uint64_t magic)
{
	return magic == SELFDESC_EASY_MAGIC ? 3 : 0;
}

static inline void selfdesc_fill(uint64_t *words, unsigned nwords, uint64_t magic, uint64_t seed,
				 uint64_t number, uint64_t generation)
{
	uint64_t sum = selfdesc_sum(magic, seed, number, generation);
	unsigned mask = selfdesc_noise_mask(magic);

	words[SELFDESC_MAGIC] = magic;
	words[SELFDESC_SEED] = seed;
	words[SELFDESC_NUMBER] = number;
	words[SELFDESC_GENERATION] = generation;
	words[SELFDESC_SUM] = sum;
	if (magic == SELFDESC_FEW_MAGIC) {
		uint64_t still = selfdesc_still(magic, seed, number, generation);

		/* as such a guest would: a word that stays is not written */
		if (words[SELFDESC_HEADER_WORDS] == selfdesc_body(still, SELFDESC_HEADER_WORDS, mask)) {
			for (unsigned i = SELFDESC_FEW_EVERY; i < nwords; i += SELFDESC_FEW_EVERY)
				words[i] = selfdesc_body(sum, i, mask);
			return;
		}
		for (unsigned i = SELFDESC_HEADER_WORDS; i < nwords; i++)
			words[i] = selfdesc_body(i % SELFDESC_FEW_EVERY ? still : sum, i, mask);
		return;
	}
	for (unsigned i = SELFDESC_HEADER_WORDS; i < nwords; i++)
		words[i] = selfdesc_body(sum, i, mask);
}

/* The word that ought to be at index i of a unit. */
static inline uint64_t selfdesc_expected(unsigned i, uint64_t magic, uint64_t seed, uint64_t number,
					 uint64_t generation)
{
	uint64_t sum = selfdesc_sum(magic, seed, number, generation);

	switch (i) {
	case SELFDESC_MAGIC:
		return magic;
	case SELFDESC_SEED:
		return seed;
	case SELFDESC_NUMBER:
		return number;
	case SELFDESC_GENERATION:
		return generation;
	case SELFDESC_SUM:
		return sum;
	default:
		if (i % SELFDESC_FEW_EVERY)
			sum = selfdesc_still(magic, seed, number, generation);
		return selfdesc_body(sum, i, selfdesc_noise_mask(magic));
	}
}

/* Zero if the unit is exactly the one described. */
static inline uint64_t selfdesc_differs(const uint64_t *words, unsigned nwords, uint64_t magic, uint64_t seed,
					uint64_t number, uint64_t generation)
{
	uint64_t sum = selfdesc_sum(magic, seed, number, generation);
	unsigned mask = selfdesc_noise_mask(magic);
	uint64_t diff = (words[SELFDESC_MAGIC] ^ magic) | (words[SELFDESC_SEED] ^ seed) |
			(words[SELFDESC_NUMBER] ^ number) | (words[SELFDESC_GENERATION] ^ generation) |
			(words[SELFDESC_SUM] ^ sum);

	if (magic == SELFDESC_FEW_MAGIC) {
		uint64_t still = selfdesc_still(magic, seed, number, generation);

		for (unsigned i = SELFDESC_HEADER_WORDS; i < nwords; i++)
			diff |= words[i] ^ selfdesc_body(i % SELFDESC_FEW_EVERY ? still : sum, i, mask);
		return diff;
	}
	for (unsigned i = SELFDESC_HEADER_WORDS; i < nwords; i++)
		diff |= words[i] ^ selfdesc_body(sum, i, mask);
	return diff;
}

/* Zero if the unit agrees with its own header, whatever that says. */
static inline uint64_t selfdesc_inconsistent(const uint64_t *words, unsigned nwords)
{
	return selfdesc_differs(words, nwords, words[SELFDESC_MAGIC], words[SELFDESC_SEED],
				words[SELFDESC_NUMBER], words[SELFDESC_GENERATION]);
}

static inline uint64_t selfdesc_nonzero(const uint64_t *words, unsigned nwords)
{
	uint64_t any = 0;

	for (unsigned i = 0; i < nwords; i++)
		any |= words[i];
	return any;
}

/* One sector's share of the digest of a disk: the sum over all its sectors says which generation each of them
 * holds. */
static inline uint64_t selfdesc_digest(uint64_t lba, uint64_t generation)
{
	return selfdesc_mix(lba ^ selfdesc_mix(generation));
}

#endif
