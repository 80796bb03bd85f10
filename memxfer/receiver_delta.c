/* SPDX-License-Identifier: Apache-2.0 */
/* What a frame of deltas does to guest memory: each is against what came of its page last, and of nothing
 * else. */
#include <errno.h>

#include "memxfer/delta.h"
#include "memxfer/receiver_impl.h"

static int apply(struct mem_receiver *r, uint64_t page, const uint8_t **at, struct error *err)
{
	uint8_t scratch[MEM_PAGE_BYTES];
	int ret;

	if (mem_rx_is_later(r, page) || !mem_rx_is_written(r, page))
		return error_set(err, EPROTO, "memory delta: nothing has come of page %llu to change",
				 (unsigned long long)page);
	ret = mem_delta_page_apply(r->opt.space.base + page * MEM_PAGE_BYTES, scratch, at, err);
	return ret < 0 ? error_prefix(err, "page %llu", (unsigned long long)page) : 0;
}

static int read_payload(struct mem_rx *rx, const struct mem_header *h, struct error *err)
{
	struct iovec iov = {.iov_base = rx->packed, .iov_len = h->wire_len};
	int ret = mem_rx_readv(rx, &iov, 1, err);

	if (ret < 0)
		return ret;
	return mem_rx_check_sum(
		h, mem_body_sum(rx->table, (size_t)h->nruns * MEM_RUN_BYTES, rx->packed, h->wire_len), err);
}

int mem_rx_deltas(struct mem_rx *rx, const struct mem_header *h, struct error *err)
{
	struct mem_receiver *r = rx->receiver;
	const uint8_t *at = rx->packed;
	uint64_t npages = 0;
	int ret = mem_rx_check_place(rx, h, err);

	if (ret == 0 && !r->opt.deltas)
		ret = error_set(err, EPROTO, "memory frame: changes of pages, which were not agreed");
	if (ret == 0)
		ret = mem_rx_read_runs(rx, h, err);
	if (ret == 0)
		ret = read_payload(rx, h, err);
	for (uint32_t i = 0; i < h->nruns && ret == 0; i++)
		npages += rx->runs[i].npages;
	if (ret == 0)
		ret = mem_delta_pages_check(at, h->raw_len, npages, err);
	for (uint32_t i = 0; i < h->nruns && ret == 0; i++) {
		uint64_t page = rx->runs[i].first, end = page + rx->runs[i].npages;

		while (page < end && ret == 0)
			ret = apply(r, page++, &at, err);
	}
	if (ret < 0)
		return ret;
	rx->totals.data_pages += npages;
	atomic_fetch_add_explicit(&r->data_pages, npages, memory_order_relaxed);
	atomic_store_explicit(&r->round, h->round, memory_order_relaxed);
	return 0;
}
