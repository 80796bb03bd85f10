/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MEMXFER_DELTA_H
#define MEMXFER_DELTA_H

#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "memxfer/memxfer.h"

/*
 * A page as what differs from its former copy, private to memxfer/ and pure. A delta is a sequence of runs,
 * each a big-endian u16 (bits 15..7: words of 8 bytes that are as they were, 0 to 511; bits 6..0: words that
 * are not, less one) and so many words, old xor new. What follows the last run is as it was. Nothing changed:
 * no run.
 *
 * On the wire a page is u16 length of the delta, u64 XXH3-64 of the page that it makes, then the delta.
 */
#define MEM_DELTA_HEAD_BYTES 10u
/* All words have changed: four runs. Every other one is less, 2560. */
#define MEM_DELTA_MAX_BYTES 4104u

/* At most max bytes into out: the delta's length, or -1 if it is longer than that. */
int mem_delta_encode(const uint8_t base[MEM_PAGE_BYTES], const uint8_t new[MEM_PAGE_BYTES], uint8_t *out,
		     size_t max);
/* Turns page, which holds the base, into the new one. -EPROTO where a run leaves the page or is cut off; the
 * page is then neither. Reads len bytes, writes the page alone. */
int mem_delta_decode(uint8_t page[MEM_PAGE_BYTES], const uint8_t *delta, size_t len, struct error *err);

/* With its head, room for MEM_DELTA_HEAD_BYTES + max: the bytes taken, or -1. */
int mem_delta_page_encode(const uint8_t base[MEM_PAGE_BYTES], const uint8_t new[MEM_PAGE_BYTES], uint8_t *out,
			  size_t max);
/* Whether so many pages follow one another in exactly len bytes: what a frame holds, before any is used. */
int mem_delta_pages_check(const uint8_t *p, size_t len, uint64_t npages, struct error *err);
/*
 * Takes the page at *at, which was checked, and moves *at behind it. `now` holds the base and gets the new
 * page; `scratch` is room for one. The new page is made there: until its hash agrees nothing is written.
 * -EPROTO, -EBADMSG where `now` is not what the source took it for.
 */
int mem_delta_page_apply(uint8_t now[MEM_PAGE_BYTES], uint8_t scratch[MEM_PAGE_BYTES], const uint8_t **at,
			 struct error *err);

#endif
