/* SPDX-License-Identifier: Apache-2.0 */
#include "memxfer/delta_cache.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "memxfer/codec.h"

/* Rounds for which a page keeps its place. */
#define KEEPS_ROUNDS 2u

struct slot {
	uint64_t holds; /* page + 1; 0: none */
	uint32_t round; /* put last */
};

struct part {
	uint64_t nslots, used;
	struct slot *slots;
	uint8_t *pages;
};

struct delta_cache {
	unsigned nstreams;
	struct part parts[MEM_STREAMS_MAX];
};

/* Reads as zeroes and takes no memory until it is written. */
static void *reserve(uint64_t bytes)
{
	void *p =
		mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	return p == MAP_FAILED ? NULL : p;
}

int delta_cache_create(uint64_t bytes, uint64_t npages, unsigned nstreams, struct delta_cache **out,
		       struct error *err)
{
	uint64_t regions = (MEM_REGIONS(npages) + nstreams - 1) / nstreams;
	uint64_t nslots = bytes / MEM_PAGE_BYTES / nstreams;
	struct delta_cache *c;

	*out = NULL;
	if (!nslots)
		return error_set(err, EINVAL, "cache of former pages: %llu bytes for %u streams",
				 (unsigned long long)bytes, nstreams);
	if (nslots > regions * MEM_REGION_PAGES)
		nslots = regions * MEM_REGION_PAGES;
	c = calloc(1, sizeof *c);
	if (!c)
		return error_errno(err, ENOMEM, "cache of former pages");
	c->nstreams = nstreams;
	for (unsigned i = 0; i < nstreams; i++) {
		struct part *p = &c->parts[i];

		p->nslots = nslots;
		p->slots = reserve(nslots * sizeof *p->slots);
		p->pages = reserve(nslots * MEM_PAGE_BYTES);
		if (!p->slots || !p->pages) {
			delta_cache_free(c);
			return error_errno(err, ENOMEM, "cache of former pages");
		}
	}
	*out = c;
	return 0;
}

void delta_cache_free(struct delta_cache *c)
{
	if (!c)
		return;
	for (unsigned i = 0; i < c->nstreams; i++) {
		struct part *p = &c->parts[i];

		if (p->slots)
			munmap(p->slots, p->nslots * sizeof *p->slots);
		if (p->pages)
			munmap(p->pages, p->nslots * MEM_PAGE_BYTES);
	}
	free(c);
}

static struct part *part_of(const struct delta_cache *c, uint64_t page)
{
	return (struct part *)&c->parts[page / MEM_REGION_PAGES % c->nstreams];
}

static uint64_t place(const struct delta_cache *c, const struct part *p, uint64_t page)
{
	uint64_t region = page / MEM_REGION_PAGES / c->nstreams;

	return (region * MEM_REGION_PAGES + page % MEM_REGION_PAGES) % p->nslots;
}

const uint8_t *delta_cache_find(const struct delta_cache *c, uint64_t page)
{
	const struct part *p = c ? part_of(c, page) : NULL;
	uint64_t at;

	if (!p || !p->used)
		return NULL;
	at = place(c, p, page);
	return p->slots[at].holds == page + 1 ? p->pages + at * MEM_PAGE_BYTES : NULL;
}

void delta_cache_put(struct delta_cache *c, uint64_t page, const uint8_t *copy, uint32_t round)
{
	struct part *p = part_of(c, page);
	uint64_t at = place(c, p, page);
	struct slot *s = &p->slots[at];

	if (s->holds && s->holds != page + 1 && round - s->round < KEEPS_ROUNDS)
		return;
	p->used += !s->holds;
	*s = (struct slot){.holds = page + 1, .round = round};
	memcpy(p->pages + at * MEM_PAGE_BYTES, copy, MEM_PAGE_BYTES);
}

void delta_cache_forget(struct delta_cache *c, uint64_t first, uint64_t npages)
{
	for (uint64_t page = first; c && page < first + npages; page++) {
		struct part *p = part_of(c, page);
		struct slot *s = p->used ? &p->slots[place(c, p, page)] : NULL;

		if (s && s->holds == page + 1) {
			s->holds = 0;
			p->used--;
		}
	}
}

void delta_cache_clear(struct delta_cache *c, unsigned stream)
{
	struct part *p = c ? &c->parts[stream] : NULL;

	if (!p || !p->used)
		return;
	p->used = 0;
	memset(p->slots, 0, p->nslots * sizeof *p->slots);
	madvise(p->pages, p->nslots * MEM_PAGE_BYTES, MADV_DONTNEED);
}
