/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/balloon.h"

#include <errno.h>
#include <linux/virtio_balloon.h>
#include <string.h>

#include "base/bytes.h"
#include "base/log.h"

#define PFN_BYTES 4u

static void give_back(struct guest_memory *mem, uint64_t gpa, uint64_t len)
{
	int rc = guest_memory_discard(mem, gpa, len);

	/* Memory that the host cannot have back is memory that it never had less of. */
	if (rc < 0 && rc != -EFAULT)
		log_debug("balloon: 0x%llx+0x%llx: %s", (unsigned long long)gpa, (unsigned long long)len,
			  strerror(-rc));
}

/* Pages that follow one another, up or down as an allocator hands them out, go at once: a call takes about as
 * long for one as for some hundred. */
static void give_back_pages(struct guest_memory *mem, const uint32_t *pfns, unsigned n)
{
	uint64_t first = 0, pages = 0;

	for (unsigned i = 0; i < n; i++) {
		uint64_t pfn = pfns[i];

		if (!guest_memory_ptr(mem, pfn << VIRTIO_BALLOON_PFN_SHIFT, MEM_PAGE_BYTES))
			continue;
		if (pages && (pfn == first + pages || pfn + 1 == first)) {
			first = pfn < first ? pfn : first;
			pages++;
			continue;
		}
		give_back(mem, first << VIRTIO_BALLOON_PFN_SHIFT, pages * MEM_PAGE_BYTES);
		first = pfn;
		pages = 1;
	}
	give_back(mem, first << VIRTIO_BALLOON_PFN_SHIFT, pages * MEM_PAGE_BYTES);
}

bool balloon_inflate(struct guest_memory *mem, const struct virtqueue_chain *c, uint64_t *done)
{
	uint64_t end = c->out_bytes - c->out_bytes % PFN_BYTES;
	uint32_t pfns[BALLOON_TURN_PAGES];
	uint64_t n = *done < end ? (end - *done) / PFN_BYTES : 0;

	n = n < BALLOON_TURN_PAGES ? n : BALLOON_TURN_PAGES;
	if (n && virtqueue_chain_read(c, *done, pfns, n * PFN_BYTES)) {
		for (unsigned i = 0; i < n; i++)
			pfns[i] = le32toh(pfns[i]);
		give_back_pages(mem, pfns, (unsigned)n);
	}
	*done += n * PFN_BYTES;
	return *done >= end;
}

bool balloon_report(struct guest_memory *mem, const struct virtqueue_chain *c, uint64_t *done)
{
	uint64_t left = BALLOON_TURN_BYTES, begin = 0;

	for (unsigned i = c->nout; i < c->nout + c->nin && left; begin += c->seg[i++].len) {
		const struct virtqueue_segment *s = &c->seg[i];
		uint64_t end = begin + s->len, from, to;

		if (*done >= end)
			continue;
		/* where a turn ended within a segment, it was between two pages */
		from = s->gpa + (*done > begin ? *done - begin : 0);
		from = (from + MEM_PAGE_BYTES - 1) & ~(uint64_t)(MEM_PAGE_BYTES - 1);
		to = (s->gpa + s->len) & ~(uint64_t)(MEM_PAGE_BYTES - 1);
		*done = end;
		if (from >= to)
			continue;
		if (to - from > left) {
			to = from + left;
			*done = begin + (to - s->gpa);
		}
		give_back(mem, from, to - from);
		left -= to - from;
	}
	return *done >= c->in_bytes;
}
