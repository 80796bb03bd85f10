/* SPDX-License-Identifier: Apache-2.0 */
#include "memxfer/stream_delta.h"

#include <errno.h>
#include <stdlib.h>

#include "base/clock.h"
#include "memxfer/delta.h"
#include "memxfer/stream_tx.h"

/* Of a frame. The deltas of a few hundred pages fit. */
#define DELTA_PAYLOAD_BYTES (64u << 10)
/* A delta that takes more than this of what the page takes is not worth the comparing at the other side. */
#define DELTA_WORTH 0.75

int mem_tx_delta_init(struct mem_tx *tx, struct delta_cache *cache, struct error *err)
{
	struct mem_tx_delta *d = &tx->delta;

	delta_policy_init(&d->policy);
	if (!cache)
		return 0;
	d->head = malloc(MEM_HEADER_BYTES + MEM_FRAME_RUNS_MAX * MEM_RUN_BYTES);
	d->payload = malloc(DELTA_PAYLOAD_BYTES);
	if (!d->head || !d->payload)
		return error_errno(err, ENOMEM, "memory stream %u", tx->index);
	d->cache = cache;
	return 0;
}

void mem_tx_delta_release(struct mem_tx *tx)
{
	free(tx->delta.head);
	free(tx->delta.payload);
}

void mem_tx_delta_round(struct mem_tx *tx)
{
	struct mem_tx_delta *d = &tx->delta;
	enum delta_use before = d->policy.use;

	if (!d->cache)
		return;
	d->sent_before = tx->sent_bytes;
	d->send_ns_before = tx->send_ns;
	if (tx->round == 1)
		return;
	if (delta_policy_judge(&d->policy, tx->bandwidth ? rate_limit_get(tx->bandwidth) : 0,
			       idle_cpu_to_spare(tx->idle_cpu)) < before)
		delta_cache_clear(d->cache, tx->index);
}

void mem_tx_delta_arrived(struct mem_tx *tx, uint64_t drain_ns)
{
	struct mem_tx_delta *d = &tx->delta;

	if (d->cache)
		delta_policy_arrived(&d->policy, tx->sent_bytes - d->sent_before,
				     tx->send_ns - d->send_ns_before + drain_ns);
}

void mem_tx_delta_whole(struct mem_tx *tx, double page_bytes)
{
	delta_policy_whole(&tx->delta.policy, page_bytes);
}

static void close_run(struct mem_tx_delta *d)
{
	if (!d->last.npages)
		return;
	mem_run_encode(d->head + MEM_HEADER_BYTES + (size_t)d->nruns * MEM_RUN_BYTES, &d->last);
	d->nruns++;
	d->last.npages = 0;
}

int mem_tx_delta_flush(struct mem_tx *tx, struct error *err)
{
	struct mem_tx_delta *d = &tx->delta;
	struct mem_header h = {.type = MEM_FRAME_DELTA, .flags = tx->final ? MEM_FLAG_FINAL : 0};
	int ret;

	close_run(d);
	if (!d->nruns)
		return 0;
	if (atomic_load_explicit(tx->stop, memory_order_relaxed))
		return error_set(err, ECANCELED, "memory transfer was stopped");
	h.nruns = d->nruns;
	h.raw_len = h.wire_len = d->len;
	rate_limit_take(tx->bandwidth, MEM_HEADER_BYTES + h.nruns * MEM_RUN_BYTES + h.wire_len);
	ret = mem_tx_frame(tx, &h, d->head, d->payload, err);
	d->nruns = 0;
	d->len = 0;
	return ret;
}

static void add_run(struct mem_tx_delta *d, uint64_t page)
{
	struct mem_run *last = &d->last;

	if (last->npages && last->first + last->npages == page &&
	    last->first / MEM_REGION_PAGES == page / MEM_REGION_PAGES) {
		last->npages++;
		return;
	}
	close_run(d);
	*last = (struct mem_run){.first = page, .npages = 1, .kind = MEM_RUN_DELTA};
}

static void count(struct mem_tx *tx, unsigned bytes)
{
	struct mem_tx_counters *c = tx->counters;

	tx->totals.data_pages++;
	atomic_fetch_add_explicit(&c->data_pages, 1, memory_order_relaxed);
	atomic_fetch_add_explicit(&c->delta_pages, 1, memory_order_relaxed);
	atomic_fetch_add_explicit(&c->delta_bytes, bytes, memory_order_relaxed);
	atomic_fetch_sub_explicit(&c->remaining_pages, 1, memory_order_relaxed);
}

/* Length of the page's delta, which lies behind those of the frame, or -1: none, or not worth it. */
static int encode(struct mem_tx_delta *d, const uint8_t *base, const uint8_t *copy)
{
	double max = d->policy.page_bytes * DELTA_WORTH - MEM_DELTA_HEAD_BYTES - MEM_RUN_BYTES;

	return max > 0 ? mem_delta_page_encode(base, copy, d->payload + d->len, (size_t)max) : -1;
}

int mem_tx_delta_page(struct mem_tx *tx, uint64_t page, const uint8_t *copy, struct error *err)
{
	struct mem_tx_delta *d = &tx->delta;
	const uint8_t *base;
	uint64_t before;
	int len, ret;

	if (!d->cache)
		return 0;
	if (!delta_policy_takes(&d->policy, page)) {
		mem_tx_delta_forget(tx, page, 1);
		return 0;
	}
	/* the run that is open needs its place in the table, and this page may another */
	if (d->len + MEM_DELTA_HEAD_BYTES + MEM_DELTA_MAX_BYTES > DELTA_PAYLOAD_BYTES ||
	    d->nruns + 2 > MEM_FRAME_RUNS_MAX) {
		ret = mem_tx_delta_flush(tx, err);
		if (ret < 0)
			return ret;
	}
	before = clock_now_ns();
	base = delta_cache_find(d->cache, page);
	len = base ? encode(d, base, copy) : -1;
	if (!tx->final)
		delta_cache_put(d->cache, page, copy, tx->round);
	if (base)
		delta_policy_tried(&d->policy, clock_now_ns() - before,
				   len < 0 ? 0 : d->policy.page_bytes - len - MEM_RUN_BYTES);
	if (len < 0)
		return 0;
	add_run(d, page);
	d->len += (uint32_t)len;
	count(tx, (unsigned)len);
	return 1;
}

void mem_tx_delta_forget(struct mem_tx *tx, uint64_t first, uint64_t npages)
{
	/* After the last round nobody looks; and its pages may be another stream's. */
	if (tx->delta.cache && !tx->final)
		delta_cache_forget(tx->delta.cache, first, npages);
}
