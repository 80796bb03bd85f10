/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MEMXFER_DELTA_CACHE_H
#define MEMXFER_DELTA_CACHE_H

#include <stdint.h>

#include "base/error.h"

/*
 * Copies of pages as the destination has them, to make deltas against: so many bytes of them, taken as they
 * are filled. Each page has one place, by its number among its stream's pages; a page that was put there in
 * this round or the last keeps it against others, so that a guest that writes more pages than there is room
 * for finds a part of them, and not none.
 *
 * A page's place belongs to the stream that sends the page, as long as regions are bound to streams; after
 * the barrier any may look, and none may change.
 */
struct delta_cache;

/* bytes: at least a page a stream. */
int delta_cache_create(uint64_t bytes, uint64_t npages, unsigned nstreams, struct delta_cache **out,
		       struct error *err);
void delta_cache_free(struct delta_cache *c); /* NULL is fine, as below */
/* What the destination has of the page, or NULL: not known. */
const uint8_t *delta_cache_find(const struct delta_cache *c, uint64_t page);
/* The page goes to the destination so, in this round: kept where there is room, else not known any more. */
void delta_cache_put(struct delta_cache *c, uint64_t page, const uint8_t *copy, uint32_t round);
/* Those pages go some other way. */
void delta_cache_forget(struct delta_cache *c, uint64_t first, uint64_t npages);
/* All of a stream's, and its memory. */
void delta_cache_clear(struct delta_cache *c, unsigned stream);

#endif
