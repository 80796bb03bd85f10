/* SPDX-License-Identifier: Apache-2.0 */
#include "memxfer/page_hashes.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <xxhash.h>

#include "memxfer/memxfer.h"

/* Both halves 0: not known. A page whose hash that is goes every time. */
struct page_hashes {
	uint64_t seed, npages;
	XXH128_hash_t *entries;
};

int page_hashes_create(uint64_t npages, struct page_hashes **out, struct error *err)
{
	struct page_hashes *h = calloc(1, sizeof *h);

	*out = NULL;
	if (!h)
		return error_errno(err, ENOMEM, "memory transfer: hashes");
	h->npages = npages;
	/* Reads as zeroes and takes no memory until it is written. */
	h->entries = mmap(NULL, npages * sizeof *h->entries, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (h->entries == MAP_FAILED || getrandom(&h->seed, sizeof h->seed, 0) != sizeof h->seed) {
		error_errno(err, errno, "memory transfer: hashes");
		page_hashes_free(h);
		return err ? err->code : -ENOMEM;
	}
	*out = h;
	return 0;
}

void page_hashes_free(struct page_hashes *h)
{
	if (!h)
		return;
	if (h->entries != MAP_FAILED)
		munmap(h->entries, h->npages * sizeof *h->entries);
	free(h);
}

static bool known(const XXH128_hash_t *e)
{
	return e->low64 || e->high64;
}

bool page_hashes_same(struct page_hashes *h, uint64_t page, const uint8_t *copy)
{
	XXH128_hash_t *entry = &h->entries[page], now = XXH3_128bits_withSeed(copy, MEM_PAGE_BYTES, h->seed);

	if (known(entry) && XXH128_isEqual(*entry, now))
		return true;
	*entry = now;
	return false;
}

void page_hashes_forget(struct page_hashes *h, uint64_t first, uint64_t npages)
{
	/* Looked at before it is written, so that no memory is taken for what was never known. */
	for (uint64_t page = first; h && page < first + npages; page++)
		if (known(&h->entries[page]))
			h->entries[page] = (XXH128_hash_t){0};
}
