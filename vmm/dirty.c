/* SPDX-License-Identifier: Apache-2.0 */
/* KVM's dirty log or-ed with the VMM's own writes, as the memory transfer wants it. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bitmap.h"
#include "base/cleanup.h"
#include "vmm/machine_internal.h"

/* Pages [first, first+n) of the flat space that a slot holds. */
struct slot_pages {
	uint64_t first, n;
};

static struct slot_pages slot_pages(const struct machine *m, unsigned slot)
{
	uint64_t low = m->mem.low_bytes / MEM_PAGE_BYTES, all = m->mem.size_bytes / MEM_PAGE_BYTES;
	return slot == 0 ? (struct slot_pages){0, low} : (struct slot_pages){low, all - low};
}

static int dirty_start(void *opaque, struct error *err)
{
	struct machine *m = opaque;
	uint64_t npages = m->mem.size_bytes / MEM_PAGE_BYTES;
	uint64_t low = slot_pages(m, 0).n, high = slot_pages(m, 1).n;
	m->dirty_log = bitmap_alloc(low > high ? low : high);
	if (!m->dirty_log)
		return error_errno(err, ENOMEM, "dirty log");
	int ret = kvm_set_memory(m, true, err);
	if (ret) {
		free(steal_ptr(m->dirty_log));
		return ret;
	}
	__atomic_store_n(&m->tracking, true, __ATOMIC_RELEASE);
	if (!m->caps.initially_set)
		for (uint64_t w = 0; w < BITMAP_WORDS(npages); w++)
			__atomic_fetch_or(&m->mem.vmm_dirty[w], ~UINT64_C(0), __ATOMIC_RELEASE);
	return 0;
}

static int dirty_collect(void *opaque, uint64_t *bitmap, struct error *err)
{
	struct machine *m = opaque;
	uint64_t npages = m->mem.size_bytes / MEM_PAGE_BYTES;
	for (unsigned slot = 0; slot < 2; slot++) {
		struct slot_pages p = slot_pages(m, slot);
		if (!p.n)
			continue;
		const uint64_t *log = m->dirty_log;
		struct kvm_dirty_log q = {.slot = slot, .dirty_bitmap = m->dirty_log};
		int ret = kvm_ioctl(m->vm_fd, KVM_GET_DIRTY_LOG, &q);
		if (ret < 0)
			return error_errno(err, ret, "KVM_GET_DIRTY_LOG of slot %u", slot);
		/* Both slots begin at a multiple of 2 MiB, so whole words meet whole words. */
		for (uint64_t w = 0; w < BITMAP_WORDS(p.n); w++)
			bitmap[p.first / 64 + w] |= log[w];
	}
	bitmap_take_words(bitmap, m->mem.vmm_dirty, 0, BITMAP_WORDS(npages));
	if (npages % 64)
		bitmap[npages / 64] &= (UINT64_C(1) << npages % 64) - 1;
	return 0;
}

static int dirty_clear(void *opaque, uint64_t first, uint64_t npages, const uint64_t *bitmap,
		       struct error *err)
{
	struct machine *m = opaque;
	if (!m->caps.manual_protect)
		return 0; /* collecting has cleared it */
	for (unsigned slot = 0; slot < 2; slot++) {
		struct slot_pages p = slot_pages(m, slot);
		uint64_t from = first > p.first ? first : p.first;
		uint64_t to = first + npages < p.first + p.n ? first + npages : p.first + p.n;
		if (from >= to)
			continue;
		struct kvm_clear_dirty_log q = {
			.slot = slot,
			.first_page = from - p.first,
			.num_pages = (uint32_t)(to - from),
			.dirty_bitmap = (void *)(bitmap + from / 64),
		};
		int ret = kvm_ioctl(m->vm_fd, KVM_CLEAR_DIRTY_LOG, &q);
		if (ret < 0)
			return error_errno(err, ret, "KVM_CLEAR_DIRTY_LOG of slot %u, page %llu", slot,
					   (unsigned long long)from);
	}
	return 0;
}

static int dirty_stop(void *opaque)
{
	struct machine *m = opaque;
	__atomic_store_n(&m->tracking, false, __ATOMIC_RELEASE);
	free(steal_ptr(m->dirty_log));
	return kvm_set_memory(m, false, NULL);
}

struct dirty_source machine_dirty_source(struct machine *m)
{
	return (struct dirty_source){
		.opaque = m,
		.start = dirty_start,
		.collect = dirty_collect,
		.clear = dirty_clear,
		.stop = dirty_stop,
	};
}
