/* SPDX-License-Identifier: Apache-2.0 */
#include "memxfer/memory_hash.h"

#include <errno.h>
#include <sys/mman.h>
#include <xxhash.h>

#include "base/bitmap.h"
#include "memxfer/codec.h"
#include "memxfer/guest_copy.h"
#include "memxfer/holes.h"

uint32_t mem_hash_chunk_pages(uint64_t npages, uint32_t max)
{
	uint32_t pages = MEM_REGION_PAGES;

	while ((npages + pages - 1) / pages > max)
		pages *= 2;
	return pages;
}

/*
 * Goes on with *hash over the pages of a region that are not all zeroes, and their numbers. A page that is
 * not resident is a hole or swapped out. SEEK_HOLE is not used: it walks to the end of the data.
 */
static int hash_region(const struct mem_space *space, uint64_t page, uint64_t end, uint64_t *hash,
		       struct error *err)
{
	uint8_t resident[MEM_REGION_PAGES];
	uint64_t first = page;

	if (mincore(space->base + page * MEM_PAGE_BYTES, (end - page) * MEM_PAGE_BYTES, resident) < 0)
		return error_errno(err, errno, "mincore");
	while (page < end) {
		const uint8_t *p = space->base + page * MEM_PAGE_BYTES;

		if (!(resident[page - first] & 1)) {
			uint64_t data;
			int ret = mem_holes_next_data(space, page, &data, err);

			if (ret < 0)
				return ret;
			if (data > page) {
				page = data;
				continue;
			}
		}
		if (!guest_page_is_zero(p))
			*hash = XXH3_64bits_withSeed(p, MEM_PAGE_BYTES, *hash ^ (page + 1));
		page++;
	}
	return 0;
}

int mem_hash_chunks(const struct mem_space *space, uint32_t chunk_pages, const uint64_t *skip,
		    uint64_t *hashes, struct error *err)
{
	for (uint64_t i = 0, page = 0; page < space->npages; i++, page += chunk_pages) {
		uint64_t left = space->npages - page, end = page + (left < chunk_pages ? left : chunk_pages);

		hashes[i] = 0;
		for (uint64_t at = page; at < end && !(skip && bitmap_test(skip, i));
		     at += MEM_REGION_PAGES) {
			uint64_t stop = at + MEM_REGION_PAGES < end ? at + MEM_REGION_PAGES : end;
			int ret = hash_region(space, at, stop, &hashes[i], err);

			if (ret < 0)
				return error_prefix(err, "hash of guest memory");
		}
	}
	return 0;
}
