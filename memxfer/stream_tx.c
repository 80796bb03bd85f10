/* SPDX-License-Identifier: Apache-2.0 */
#include "memxfer/stream_tx.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "base/bitmap.h"
#include "base/clock.h"
#include "memxfer/guest_copy.h"
#include "memxfer/holes.h"

int mem_tx_init(struct mem_tx *tx, const struct mem_sender_options *opt, unsigned index,
		struct mem_tx_counters *counters, const atomic_bool *stop, struct idle_cpu *idle_cpu,
		struct page_hashes *hashes, struct error *err)
{
	bool compress = opt->compress != MEM_COMPRESS_OFF;

	*tx = (struct mem_tx){
		.conn = opt->streams[index],
		.space = &opt->space,
		.counters = counters,
		.stop = stop,
		.index = index,
		.timeout_ms = opt->timeout_ms,
		.zstd_level = opt->zstd_level,
		.idle_cpu = idle_cpu,
		.hashes = hashes,
		.bandwidth = opt->bandwidth,
		.epoch = opt->epoch,
	};
	compress_policy_init(&tx->policy, opt->compress);
	tx->head = malloc(MEM_HEADER_BYTES + MEM_FRAME_RUNS_MAX * MEM_RUN_BYTES);
	tx->payload = malloc(MEM_PAYLOAD_MAX);
	if (compress) {
		tx->packed = malloc(MEM_PAYLOAD_MAX);
		tx->zstd = ZSTD_createCCtx();
	}
	if (!tx->head || !tx->payload || (compress && (!tx->packed || !tx->zstd)))
		return error_errno(err, ENOMEM, "memory stream %u", index);
	return 0;
}

void mem_tx_release(struct mem_tx *tx)
{
	mem_tx_delta_release(tx);
	ZSTD_freeCCtx(tx->zstd);
	free(tx->head);
	free(tx->payload);
	free(tx->packed);
}

void mem_tx_restart(struct mem_tx *tx, struct conn *conn)
{
	tx->conn = conn;
	tx->sequence = 0;
	tx->nruns = tx->ndata = 0;
	tx->last.npages = 0;
}

int mem_tx_frame(struct mem_tx *tx, struct mem_header *h, uint8_t *head, const void *payload,
		 struct error *err)
{
	size_t runs_len = (size_t)h->nruns * MEM_RUN_BYTES;
	struct iovec iov[2] = {{.iov_base = head, .iov_len = MEM_HEADER_BYTES + runs_len},
			       {.iov_base = (void *)payload, .iov_len = h->wire_len}};
	uint64_t before;
	int ret;

	h->stream = (uint16_t)tx->index;
	h->epoch = tx->epoch;
	h->sequence = tx->sequence++;
	h->round = tx->round;
	h->body_sum = mem_body_sum(head + MEM_HEADER_BYTES, runs_len, payload, h->wire_len);
	mem_header_encode(head, h);
	before = clock_now_ns();
	ret = conn_writev_full(tx->conn, iov, 2, tx->timeout_ms, err);
	tx->last_send_ns = clock_now_ns();
	tx->send_ns += tx->last_send_ns - before;
	tx->sent_bytes += MEM_HEADER_BYTES + runs_len + h->wire_len;
	tx->totals.frames++;
	return ret;
}

/* One page in so many stands for a frame that is a probe. */
#define SAMPLE_EVERY 16u

/* Whether a sample of the frame packs. Each page by itself, so that nothing has to be copied together. */
static bool sample_packs(struct mem_tx *tx, uint32_t raw_len)
{
	uint64_t before = clock_now_ns();
	size_t raw = 0, packed = 0;

	for (uint32_t at = 0; at < raw_len; at += SAMPLE_EVERY * MEM_PAGE_BYTES) {
		size_t n = ZSTD_compressCCtx(tx->zstd, tx->packed, MEM_PAGE_BYTES, tx->payload + at,
					     MEM_PAGE_BYTES, tx->zstd_level);

		raw += MEM_PAGE_BYTES;
		packed += ZSTD_isError(n) ? MEM_PAGE_BYTES : n;
	}
	if (!compress_policy_poor(raw, packed))
		return true;
	compress_policy_packed(&tx->policy, raw, packed, clock_now_ns() - before);
	return false;
}

/* Packs the payload if that is worth while; else leaves *payload and wire_len as they are. */
static void pack(struct mem_tx *tx, struct mem_header *h, const uint8_t **payload)
{
	uint64_t before;
	size_t n;

	if (!h->raw_len || !compress_policy_wants(&tx->policy))
		return;
	if (!tx->final) /* the guest waits: the last look will do */
		tx->policy.spare = idle_cpu_to_spare(tx->idle_cpu);
	if (compress_policy_probes(&tx->policy) && !sample_packs(tx, h->raw_len))
		return;
	before = clock_now_ns();
	/* Short of room for a poor result, zstd gives up early. */
	n = ZSTD_compressCCtx(tx->zstd, tx->packed, h->raw_len - h->raw_len / 8, tx->payload, h->raw_len,
			      tx->zstd_level);
	if (ZSTD_isError(n))
		n = h->raw_len;
	compress_policy_packed(&tx->policy, h->raw_len, n, clock_now_ns() - before);
	if (n >= h->raw_len)
		return;
	h->flags |= MEM_FLAG_ZSTD;
	h->wire_len = (uint32_t)n;
	*payload = tx->packed;
}

static void close_run(struct mem_tx *tx)
{
	if (!tx->last.npages)
		return;
	mem_run_encode(tx->head + MEM_HEADER_BYTES + (size_t)tx->nruns * MEM_RUN_BYTES, &tx->last);
	tx->nruns++;
	tx->last.npages = 0;
}

static int flush_pages(struct mem_tx *tx, struct error *err)
{
	struct mem_header h = {.type = MEM_FRAME_PAGES, .flags = tx->final ? MEM_FLAG_FINAL : 0};
	const uint8_t *payload = tx->payload;
	uint64_t before;
	int ret;

	close_run(tx);
	if (!tx->nruns)
		return 0;
	if (atomic_load_explicit(tx->stop, memory_order_relaxed))
		return error_set(err, ECANCELED, "memory transfer was stopped");
	h.nruns = tx->nruns;
	h.raw_len = h.wire_len = tx->ndata * MEM_PAGE_BYTES;
	pack(tx, &h, &payload);
	rate_limit_take(tx->bandwidth, MEM_HEADER_BYTES + h.nruns * MEM_RUN_BYTES + h.wire_len);
	before = tx->send_ns;
	ret = mem_tx_frame(tx, &h, tx->head, payload, err);
	compress_policy_sent(&tx->policy, h.wire_len, tx->send_ns - before);
	if (tx->ndata)
		mem_tx_delta_whole(tx, (double)h.wire_len / tx->ndata);
	tx->nruns = 0;
	tx->ndata = 0;
	if (tx->yield)
		mem_yield_step(tx->yield);
	return ret;
}

/* A page is in one of the two only. */
int mem_tx_flush(struct mem_tx *tx, struct error *err)
{
	int ret = flush_pages(tx, err);

	return ret < 0 ? ret : mem_tx_delta_flush(tx, err);
}

int mem_tx_control(struct mem_tx *tx, enum mem_frame_type type, const void *payload, uint32_t len,
		   struct error *err)
{
	struct mem_header h = {.type = (uint16_t)type, .raw_len = len, .wire_len = len};
	int ret = mem_tx_flush(tx, err);

	return ret < 0 ? ret : mem_tx_frame(tx, &h, tx->head, payload, err);
}

/* Counts first: whoever sees the frame sees it counted. */
static int add_run(struct mem_tx *tx, uint16_t kind, uint64_t first, uint64_t npages, struct error *err)
{
	struct mem_run *last = &tx->last;
	int ret;

	switch (kind) {
	case MEM_RUN_HOLE:
		tx->totals.hole_pages += npages;
		atomic_fetch_add_explicit(&tx->counters->hole_pages, npages, memory_order_relaxed);
		break;
	case MEM_RUN_LATER:
		break;
	case MEM_RUN_ZERO:
		tx->totals.zero_pages += npages;
		atomic_fetch_add_explicit(&tx->counters->zero_pages, npages, memory_order_relaxed);
		break;
	default:
		tx->totals.data_pages += npages;
		atomic_fetch_add_explicit(&tx->counters->data_pages, npages, memory_order_relaxed);
	}
	/* In the first round holes were never counted as work. */
	if (kind != MEM_RUN_LATER && (kind != MEM_RUN_HOLE || tx->round > 1))
		atomic_fetch_sub_explicit(&tx->counters->remaining_pages, (int64_t)npages,
					  memory_order_relaxed);
	if (last->npages && last->kind == kind && last->first + last->npages == first &&
	    last->first / MEM_REGION_PAGES == first / MEM_REGION_PAGES) {
		last->npages += (uint32_t)npages;
		return 0;
	}
	close_run(tx);
	if (tx->nruns == MEM_FRAME_RUNS_MAX) {
		/* A page just copied lies behind those of the full frame: it moves to the next. */
		uint32_t ndata = tx->ndata;

		ret = flush_pages(tx, err);
		if (ret < 0)
			return ret;
		if (kind == MEM_RUN_DATA)
			memmove(tx->payload, tx->payload + (size_t)ndata * MEM_PAGE_BYTES, MEM_PAGE_BYTES);
	}
	*last = (struct mem_run){.first = first, .npages = (uint32_t)npages, .kind = kind};
	return 0;
}

/* What the destination will have of those pages is not what was sent of them. */
static void forget(struct mem_tx *tx, uint64_t first, uint64_t npages)
{
	page_hashes_forget(tx->hashes, first, npages);
	mem_tx_delta_forget(tx, first, npages);
}

static int add_page(struct mem_tx *tx, uint64_t page, struct error *err)
{
	const uint8_t *guest = tx->space->base + page * MEM_PAGE_BYTES;
	uint8_t *copy = tx->payload + (size_t)tx->ndata * MEM_PAGE_BYTES;
	int ret;

	if (guest_page_is_zero(guest)) {
		forget(tx, page, 1);
		return add_run(tx, MEM_RUN_ZERO, page, 1, err);
	}
	guest_page_copy(copy, guest);
	if (tx->round > 1 && page_hashes_same(tx->hashes, page, copy)) {
		atomic_fetch_add_explicit(&tx->counters->unchanged_pages, 1, memory_order_relaxed);
		atomic_fetch_sub_explicit(&tx->counters->remaining_pages, 1, memory_order_relaxed);
		return 0;
	}
	ret = tx->round > 1 ? mem_tx_delta_page(tx, page, copy, err) : 0;
	if (ret)
		return ret < 0 ? ret : 0;
	ret = add_run(tx, MEM_RUN_DATA, page, 1, err);
	if (ret < 0)
		return ret;
	tx->ndata++;
	return tx->ndata == MEM_FRAME_PAGES_MAX ? flush_pages(tx, err) : 0;
}

/* mincore(2) is asked about the span of dirty pages in a region; a page that is not resident may be a hole or
 * swapped out, which SEEK_DATA tells apart. SEEK_HOLE is not used: it walks to the end of the data. */
static int add_span(struct mem_tx *tx, const uint64_t *bitmap, uint64_t page, uint64_t end, struct error *err)
{
	uint8_t resident[MEM_REGION_PAGES];
	uint64_t base = page, hole_end = 0;
	int ret;

	if (mincore(tx->space->base + page * MEM_PAGE_BYTES, (end - page) * MEM_PAGE_BYTES, resident) < 0)
		return error_errno(err, errno, "guest memory: mincore");
	for (; page < end; page = bitmap_next_set(bitmap, end, page)) {
		if (!(resident[page - base] & 1) && page >= hole_end) {
			ret = mem_holes_next_data(tx->space, page, &hole_end, err);
			if (ret < 0)
				return ret;
		}
		if (page < hole_end) {
			uint64_t stop = bitmap_next_clear(bitmap, end, page);

			stop = stop < hole_end ? stop : hole_end;
			forget(tx, page, stop - page);
			ret = add_run(tx, MEM_RUN_HOLE, page, stop - page, err);
			if (tx->naming)
				bitmap_clear_range(tx->naming, page, stop - page);
			page = stop;
		} else if (tx->naming) {
			/* Should it go in a round after all, it is not as the destination has it. */
			if (!tx->final)
				forget(tx, page, 1);
			ret = add_run(tx, MEM_RUN_LATER, page++, 1, err);
		} else {
			ret = add_page(tx, page++, err);
		}
		if (ret < 0)
			return ret;
	}
	return 0;
}

int mem_tx_pages(struct mem_tx *tx, const uint64_t *bitmap, uint64_t first, uint64_t npages,
		 struct error *err)
{
	uint64_t end = first + npages, page;

	while ((page = bitmap_next_set(bitmap, end, first)) < end) {
		uint64_t span_end = (page / MEM_REGION_PAGES + 1) * MEM_REGION_PAGES;
		int ret;

		span_end = span_end < end ? span_end : end;
		first = span_end;
		/* Up to the last set bit: in a late round that is often the same page. */
		while (!bitmap_test(bitmap, span_end - 1))
			span_end--;
		ret = add_span(tx, bitmap, page, span_end, err);
		if (ret < 0)
			return ret;
	}
	return 0;
}

int mem_tx_later(struct mem_tx *tx, uint64_t *bitmap, uint64_t first, uint64_t npages, struct error *err)
{
	int ret;

	tx->naming = bitmap;
	ret = mem_tx_pages(tx, bitmap, first, npages, err);
	tx->naming = NULL;
	return ret;
}
