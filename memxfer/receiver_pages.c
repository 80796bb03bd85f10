/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a frame of pages does to guest memory. Its runs are checked before a byte of its payload is read; the
 * payload is then read into the pages themselves, and its checksum taken of what lies there. A frame that
 * fails has spoiled its own pages at most, and ends the move: this memory never runs.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "base/bitmap.h"
#include "memxfer/prefault.h"
#include "memxfer/receiver_impl.h"

int mem_rx_alloc(struct mem_rx *rx, struct error *err)
{
	rx->table = malloc(MEM_FRAME_RUNS_MAX * MEM_RUN_BYTES);
	rx->packed = malloc(MEM_PAYLOAD_MAX);
	rx->unpacked = malloc(MEM_PAYLOAD_MAX);
	rx->runs = malloc(MEM_FRAME_RUNS_MAX * sizeof *rx->runs);
	rx->sum = XXH3_createState();
	rx->zstd = ZSTD_createDCtx();
	if (!rx->table || !rx->packed || !rx->unpacked || !rx->runs || !rx->sum || !rx->zstd)
		return error_errno(err, ENOMEM, "memory stream %u", rx->index);
	return 0;
}

void mem_rx_release(struct mem_rx *rx)
{
	free(rx->table);
	free(rx->packed);
	free(rx->unpacked);
	free(rx->runs);
	XXH3_freeState(rx->sum);
	ZSTD_freeDCtx(rx->zstd);
}

static void mark_written(struct mem_receiver *r, uint64_t first, uint64_t npages)
{
	uint64_t end = first + npages;

	for (uint64_t w = first / 64; w * 64 < end; w++) {
		uint64_t mask = ~UINT64_C(0);

		if (w == first / 64)
			mask &= ~UINT64_C(0) << (first % 64);
		if (w == end / 64)
			mask &= ~(~UINT64_C(0) << (end % 64));
		if ((__atomic_load_n(&r->written[w], __ATOMIC_RELAXED) & mask) != mask)
			__atomic_fetch_or(&r->written[w], mask, __ATOMIC_RELAXED);
	}
}

static int free_pages(struct mem_receiver *r, uint64_t first, uint64_t npages, struct error *err)
{
	if (fallocate(r->opt.space.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
		      (off_t)(first * MEM_PAGE_BYTES), (off_t)(npages * MEM_PAGE_BYTES)) < 0)
		return error_errno(err, errno, "guest memory: freeing %llu pages at page %llu",
				   (unsigned long long)npages, (unsigned long long)first);
	return 0;
}

/* The guest gave the region back after the source had said that there is something in it. */
static bool ready_for_nothing(struct mem_receiver *r, const struct mem_run *run)
{
	return run->kind == MEM_RUN_HOLE && run->npages == MEM_REGION_PAGES && r->opt.prefault &&
	       mem_prefault_forgo(r->opt.prefault, run->first / MEM_REGION_PAGES);
}

/* Zeroes, or for a hole frees, the pages of a run that were written before; the others are left alone. */
static int clear_run(struct mem_receiver *r, const struct mem_run *run, struct error *err)
{
	uint64_t end = run->first + run->npages;
	int ret = 0;

	for (uint64_t page = run->first, first; page < end && ret == 0;) {
		uint8_t *at;

		if (!__atomic_load_n(&r->written[page / 64], __ATOMIC_RELAXED)) {
			page = (page / 64 + 1) * 64;
			continue;
		}
		if (!mem_rx_is_written(r, page)) {
			page++;
			continue;
		}
		for (first = page; page < end && mem_rx_is_written(r, page); page++) {
			if (run->kind == MEM_RUN_HOLE)
				__atomic_fetch_and(&r->written[page / 64], ~(UINT64_C(1) << (page % 64)),
						   __ATOMIC_RELAXED);
		}
		at = r->opt.space.base + first * MEM_PAGE_BYTES;
		if (run->kind == MEM_RUN_ZERO)
			memset(at, 0, (page - first) * MEM_PAGE_BYTES);
		else
			ret = free_pages(r, first, page - first, err);
	}
	if (ret == 0 && ready_for_nothing(r, run))
		ret = free_pages(r, run->first, run->npages, err);
	return ret;
}

/* What came of these pages is void: the guest must fault on each. */
static int expect_later(struct mem_receiver *r, const struct mem_run *run, struct error *err)
{
	uint64_t end = run->first + run->npages;

	if (!r->later)
		return error_set(err, EPROTO,
				 "memory frame: pages that are to come later, which was not agreed");
	uint64_t region = run->first / MEM_REGION_PAGES;
	int ret;

	/* nobody may make pages there from now on, or the guest would not fault */
	for (; r->opt.prefault && region * MEM_REGION_PAGES < end; region++)
		(void)mem_prefault_forgo(r->opt.prefault, region);
	ret = free_pages(r, run->first, run->npages, err);
	if (ret < 0)
		return ret;
	for (uint64_t page = run->first; page < end; page++)
		bitmap_set_atomic(r->later, page);
	atomic_store(&r->any_later, true);
	return 0;
}

/* They have come after all. */
static void forget_later(struct mem_receiver *r, const struct mem_run *run)
{
	uint64_t end = run->first + run->npages;

	for (uint64_t page = run->first; page < end && atomic_load(&r->any_later); page++)
		__atomic_fetch_and(&r->later[page / 64], ~(UINT64_C(1) << (page % 64)), __ATOMIC_RELAXED);
}

/* One run of a frame whose data are in place. */
static int apply_run(struct mem_rx *rx, const struct mem_run *run, struct error *err)
{
	struct mem_receiver *r = rx->receiver;

	if (run->kind == MEM_RUN_LATER)
		return expect_later(r, run, err);
	forget_later(r, run);
	if (run->kind == MEM_RUN_DATA) {
		mark_written(r, run->first, run->npages);
		rx->totals.data_pages += run->npages;
		atomic_fetch_add_explicit(&r->data_pages, run->npages, memory_order_relaxed);
		return 0;
	}
	if (run->kind == MEM_RUN_ZERO) {
		rx->totals.zero_pages += run->npages;
		atomic_fetch_add_explicit(&r->zero_pages, run->npages, memory_order_relaxed);
	} else {
		rx->totals.hole_pages += run->npages;
		atomic_fetch_add_explicit(&r->hole_pages, run->npages, memory_order_relaxed);
	}
	return clear_run(r, run, err);
}

/* Data land before the other runs are applied, so no page may be named twice. */
static int check_ascending(const struct mem_run *runs, uint32_t nruns, struct error *err)
{
	for (uint32_t i = 1; i < nruns; i++)
		if (runs[i].first < runs[i - 1].first + runs[i - 1].npages)
			return error_set(err, EPROTO, "memory frame: run %u at page %llu does not follow on",
					 i, (unsigned long long)runs[i].first);
	return 0;
}

/*
 * A table that makes no sense: changed on the way, if the frame's checksum says so, which is the better thing
 * to say. The payload is not for these pages.
 */
static int blame_wire(struct mem_rx *rx, const struct mem_header *h, int ret, struct error *err)
{
	size_t runs_len = (size_t)h->nruns * MEM_RUN_BYTES;
	struct iovec iov = {.iov_base = rx->packed, .iov_len = h->wire_len};

	uint64_t sum;

	if (mem_rx_readv(rx, &iov, 1, NULL) < 0)
		return ret;
	sum = mem_body_sum(rx->table, runs_len, rx->packed, h->wire_len);
	return sum == h->body_sum ? ret : mem_rx_check_sum(h, sum, err);
}

int mem_rx_check_place(const struct mem_rx *rx, const struct mem_header *h, struct error *err)
{
	if (!(h->flags & MEM_FLAG_FINAL) == !rx->past_barrier)
		return 0;
	return error_set(err, EPROTO, "memory frame: %s the barrier",
			 rx->past_barrier ? "one that belongs before" : "one of the final round, but before");
}

int mem_rx_read_runs(struct mem_rx *rx, const struct mem_header *h, struct error *err)
{
	struct mem_receiver *r = rx->receiver;
	struct iovec iov = {.iov_base = rx->table, .iov_len = (size_t)h->nruns * MEM_RUN_BYTES};
	int ret = mem_rx_readv(rx, &iov, 1, err);

	if (ret < 0)
		return ret;
	ret = mem_runs_decode(h, rx->table, r->opt.space.npages, r->opt.nstreams, rx->runs, err);
	if (ret == 0)
		ret = check_ascending(rx->runs, h->nruns, err);
	return ret < 0 ? blame_wire(rx, h, ret, err) : 0;
}

/* A fault for each page in the middle of a copy out of the socket costs more than a region at once. */
static void make_ready(struct mem_rx *rx, uint64_t region)
{
	struct mem_prefault *prefault = rx->receiver->opt.prefault;

	if (!prefault || (rx->any_region && region == rx->region))
		return;
	rx->any_region = true;
	rx->region = region;
	mem_prefault_region(prefault, region);
}

/* How many pieces of memory the frame's data pages are; at most as many as pages. */
static int find_targets(struct mem_rx *rx, const struct mem_header *h)
{
	const struct mem_space *space = &rx->receiver->opt.space;
	int n = 0;

	for (uint32_t i = 0; i < h->nruns; i++) {
		const struct mem_run *run = &rx->runs[i];
		uint8_t *at = space->base + run->first * MEM_PAGE_BYTES;
		size_t len = (size_t)run->npages * MEM_PAGE_BYTES;

		if (run->kind != MEM_RUN_DATA)
			continue;
		make_ready(rx, run->first / MEM_REGION_PAGES);
		if (n && (uint8_t *)rx->target[n - 1].iov_base + rx->target[n - 1].iov_len == at)
			rx->target[n - 1].iov_len += len;
		else
			rx->target[n++] = (struct iovec){.iov_base = at, .iov_len = len};
	}
	return n;
}

/* mem_body_sum over pages that need not lie together. */
static uint64_t sum_of_targets(struct mem_rx *rx, int n, uint64_t runs_sum)
{
	if (n == 1)
		return XXH3_64bits_withSeed(rx->target->iov_base, rx->target->iov_len, runs_sum);
	XXH3_64bits_reset_withSeed(rx->sum, runs_sum);
	for (int i = 0; i < n; i++)
		XXH3_64bits_update(rx->sum, rx->target[i].iov_base, rx->target[i].iov_len);
	return XXH3_64bits_digest(rx->sum);
}

static int land_plain(struct mem_rx *rx, const struct mem_header *h, int n, uint64_t runs_sum,
		      struct error *err)
{
	int ret;

	memcpy(rx->reading, rx->target, (size_t)n * sizeof *rx->target);
	ret = mem_rx_readv(rx, rx->reading, n, err);
	return ret < 0 ? ret : mem_rx_check_sum(h, sum_of_targets(rx, n, runs_sum), err);
}

/* In place where the pages lie together; nothing that was not sent so is unpacked. */
static int land_packed(struct mem_rx *rx, const struct mem_header *h, int n, uint64_t runs_sum,
		       struct error *err)
{
	struct iovec iov = {.iov_base = rx->packed, .iov_len = h->wire_len};
	uint8_t *to = n == 1 ? rx->target->iov_base : rx->unpacked, *from = rx->unpacked;
	int ret = mem_rx_readv(rx, &iov, 1, err);
	size_t len;

	if (ret == 0)
		ret = mem_rx_check_sum(h, XXH3_64bits_withSeed(rx->packed, h->wire_len, runs_sum), err);
	if (ret < 0)
		return ret;
	len = ZSTD_decompressDCtx(rx->zstd, to, h->raw_len, rx->packed, h->wire_len);
	if (ZSTD_isError(len))
		return error_set(err, EPROTO, "memory frame: unpacking: %s", ZSTD_getErrorName(len));
	if (len != h->raw_len)
		return error_set(err, EPROTO, "memory frame: unpacks to %zu bytes, not to %u", len,
				 h->raw_len);
	for (int i = 0; to == rx->unpacked && i < n; from += rx->target[i++].iov_len)
		memcpy(rx->target[i].iov_base, from, rx->target[i].iov_len);
	return 0;
}

int mem_rx_pages(struct mem_rx *rx, const struct mem_header *h, struct error *err)
{
	uint64_t runs_sum;
	int ret, n;

	ret = mem_rx_check_place(rx, h, err);
	if (ret == 0)
		ret = mem_rx_read_runs(rx, h, err);
	if (ret < 0)
		return ret;
	atomic_store_explicit(&rx->receiver->round, h->round, memory_order_relaxed);
	runs_sum = XXH3_64bits(rx->table, (size_t)h->nruns * MEM_RUN_BYTES);
	n = find_targets(rx, h);
	if (h->flags & MEM_FLAG_ZSTD)
		ret = land_packed(rx, h, n, runs_sum, err);
	else if (n)
		ret = land_plain(rx, h, n, runs_sum, err);
	else
		ret = mem_rx_check_sum(h, runs_sum, err);
	for (uint32_t i = 0; i < h->nruns && ret == 0; i++)
		ret = apply_run(rx, &rx->runs[i], err);
	return ret;
}
