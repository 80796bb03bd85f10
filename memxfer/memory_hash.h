/* SPDX-License-Identifier: Apache-2.0 */
/* interface: hashes of guest memory at rest, between memxfer and vmm */
#ifndef MEMXFER_MEMORY_HASH_H
#define MEMXFER_MEMORY_HASH_H

#include <stdint.h>

#include "base/error.h"
#include "memxfer/memxfer.h"

/* Pages of a chunk: the smallest power of two, from a region on, that makes at most max chunks of them. */
uint32_t mem_hash_chunk_pages(uint64_t npages, uint32_t max);
/*
 * A hash of each chunk of chunk_pages pages, so that two memories can be compared: a page of zeroes and a
 * hole are the same. Nothing may write meanwhile. Chunks whose bit is set in `skip` (NULL: none) are not
 * looked at. Holes are left alone, so that nothing is allocated, and nobody waits for what post-copy brings.
 */
int mem_hash_chunks(const struct mem_space *space, uint32_t chunk_pages, const uint64_t *skip,
		    uint64_t *hashes, struct error *err);

#endif
