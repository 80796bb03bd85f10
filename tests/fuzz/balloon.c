/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A balloon's queue whose rings and descriptors the input chooses. Pages go only where a chain names them as
 * a whole, a call does no more than its turn, and every request comes to its end.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/bitmap.h"
#include "base/bytes.h"
#include "tests/fuzz/queue.h"
#include "vmm/balloon.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define MEMORY_BYTES (2u << 20)
#define PAGES	     (MEMORY_BYTES / MEM_PAGE_BYTES)
#define TABLE_GPA    0x1000u
#define TABLE_BYTES  0x8000u
#define OWN_PAGES    0x10u /* not judged: the input's bytes lie there */
#define HEADER_BYTES 40u
#define PFNS_JUDGED  4096u
#define TURNS_MAX    64u

static struct guest_memory mem;
static struct virtqueue_chain chain;
static uint64_t may_go[BITMAP_WORDS(PAGES)];

static bool is_hole(uint64_t page)
{
	off_t at = (off_t)(page * MEM_PAGE_BYTES);

	return lseek(mem.fd, at, SEEK_DATA) != at;
}

static void name_reported(void)
{
	for (unsigned i = chain.nout; i < chain.nout + chain.nin; i++) {
		const struct virtqueue_segment *s = &chain.seg[i];

		for (uint64_t p = (s->gpa + MEM_PAGE_BYTES - 1) / MEM_PAGE_BYTES;
		     (p + 1) * MEM_PAGE_BYTES <= s->gpa + s->len; p++)
			bitmap_set(may_go, p);
	}
}

static void name_inflated(void)
{
	uint8_t raw[4];

	for (unsigned i = 0; i < PFNS_JUDGED && virtqueue_chain_read(&chain, 4 * i, raw, 4); i++)
		if (get_le32(raw) < PAGES)
			bitmap_set(may_go, get_le32(raw));
}

static void serve(bool inflate)
{
	uint64_t done = 0;

	if (inflate)
		name_inflated();
	else
		name_reported();
	for (unsigned turn = 0; turn < (inflate ? PFNS_JUDGED / BALLOON_TURN_PAGES : TURNS_MAX); turn++) {
		uint64_t before = done, all = inflate ? chain.out_bytes / 4 * 4 : chain.in_bytes;
		bool end =
			inflate ? balloon_inflate(&mem, &chain, &done) : balloon_report(&mem, &chain, &done);

		if (end)
			break;
		if (done <= before || done >= all)
			abort();
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct virtqueue q;
	bool inflate;

	if (size < HEADER_BYTES)
		return 0;
	if (!mem.base) {
		if (guest_memory_create(MEMORY_BYTES, &mem, NULL) < 0)
			abort();
		memset(mem.base, 0xa5, MEMORY_BYTES);
	}
	memset(mem.base, 0, OWN_PAGES * MEM_PAGE_BYTES);
	memset(mem.vmm_dirty, 0, sizeof may_go);
	memset(may_go, 0, sizeof may_go);
	virtqueue_init(&q, &mem, VIRTQUEUE_SIZE_MAX);
	inflate = data[36] & 1;
	if (queue_load(&q, data, false, data[36] & 2) < 0 || !q.enabled)
		return 0;
	data += HEADER_BYTES;
	size -= HEADER_BYTES;
	memcpy(mem.base + TABLE_GPA, data, size < TABLE_BYTES ? size : TABLE_BYTES);
	for (unsigned i = 0; i < 16 && virtqueue_pop(&q, &chain, NULL) > 0; i++) {
		serve(inflate);
		virtqueue_push(&q, chain.head, 0);
	}
	for (uint64_t page = OWN_PAGES; page < PAGES; page++) {
		if (!is_hole(page))
			continue;
		if (!bitmap_test(may_go, page) || !bitmap_test(mem.vmm_dirty, page))
			abort();
		memset(mem.base + page * MEM_PAGE_BYTES, 0xa5, MEM_PAGE_BYTES);
	}
	return 0;
}
