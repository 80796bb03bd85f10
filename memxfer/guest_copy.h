/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MEMXFER_GUEST_COPY_H
#define MEMXFER_GUEST_COPY_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "memxfer/memxfer.h"

/*
 * The one read of a guest page. The guest may write it at the same time: the copy may then be torn, which is
 * fine, as the page is dirty again; what is not fine is to read it twice and trust the two to agree.
 */
static inline void guest_page_copy(uint8_t *dst, const uint8_t *guest)
{
#ifdef __SANITIZE_THREAD__
	/* Says to the race detector that this race is meant. */
	const uint64_t *src = (const uint64_t *)guest;

	for (unsigned i = 0; i < MEM_PAGE_BYTES / 8; i++) {
		uint64_t v = __atomic_load_n(&src[i], __ATOMIC_RELAXED);

		memcpy(dst + 8 * i, &v, 8);
	}
#else
	memcpy(dst, guest, MEM_PAGE_BYTES);
#endif
}

/*
 * Whether the page is all zeroes, by one pass over guest memory: a page that is needs no copy, and one that
 * is not ends the look at its first other word, before the copy. A write meanwhile makes the page dirty
 * again, whatever is said here.
 */
static inline bool guest_page_is_zero(const uint8_t *guest)
{
#ifdef __SANITIZE_THREAD__
	const uint64_t *src = (const uint64_t *)guest;

	for (unsigned i = 0; i < MEM_PAGE_BYTES / 8; i++)
		if (__atomic_load_n(&src[i], __ATOMIC_RELAXED))
			return false;
	return true;
#else
	/* As wide as the target's registers are, or words where it has no vectors. */
	typedef uint64_t vector __attribute__((vector_size(16), may_alias));
	const vector *v = (const vector *)guest;

	for (unsigned i = 0; i < MEM_PAGE_BYTES / sizeof *v; i += 8) {
		vector any = ((v[i] | v[i + 1]) | (v[i + 2] | v[i + 3])) |
			     ((v[i + 4] | v[i + 5]) | (v[i + 6] | v[i + 7]));

		if (any[0] | any[1])
			return false;
	}
	return true;
#endif
}

#endif
