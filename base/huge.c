/* SPDX-License-Identifier: Apache-2.0 */
#include <stdint.h>
#include <sys/mman.h>

#include "base/huge.h"

#define HUGE_PAGE_BYTES ((size_t)2 << 20)

static size_t whole(size_t bytes)
{
	return (bytes + HUGE_PAGE_BYTES - 1) / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
}

void *huge_alloc(size_t bytes)
{
	size_t len = whole(bytes);
	uint8_t *p =
		mmap(NULL, len + HUGE_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (p == MAP_FAILED)
		return NULL;
	size_t before = -(uintptr_t)p % HUGE_PAGE_BYTES;
	if (before)
		munmap(p, before);
	if (before < HUGE_PAGE_BYTES)
		munmap(p + before + len, HUGE_PAGE_BYTES - before);
	madvise(p + before, len, MADV_HUGEPAGE); /* advice: without it, it is memory all the same */
	return p + before;
}

void huge_free(void *p, size_t bytes)
{
	if (p)
		munmap(p, whole(bytes));
}

void huge_discard(void *p, size_t bytes)
{
	madvise(p, whole(bytes), MADV_DONTNEED);
}
