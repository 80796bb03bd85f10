/* SPDX-License-Identifier: Apache-2.0 */
#include "memxfer/dirty_rate.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bitmap.h"
#include "base/cleanup.h"
#include "base/clock.h"

#define LOOK_MS	     50u /* so often somebody may want it to end */
#define REGION_PAGES (MEM_REGION_BYTES / MEM_PAGE_BYTES)

struct measurement {
	const struct dirty_source *source;
	uint64_t npages;
	int (*stop)(void *opaque, struct error *err);
	void *opaque;
	uint64_t *dirty, *all;
};

/* Region by region, as a move does: one call for all would keep the guest from its page tables for long. */
static int clear_log(struct measurement *m, struct error *err)
{
	for (uint64_t at = 0; at < m->npages; at += REGION_PAGES) {
		uint64_t n = m->npages - at < REGION_PAGES ? m->npages - at : REGION_PAGES;

		if (bitmap_next_set(m->dirty, at + n, at) == at + n)
			continue;
		int ret = m->source->clear(m->source->opaque, at, n, m->dirty, err);
		if (ret < 0)
			return ret;
	}
	bitmap_clear_range(m->dirty, 0, m->npages);
	return 0;
}

static int wait_until(struct measurement *m, uint64_t ns, struct error *err)
{
	uint64_t now;
	int ret = m->stop(m->opaque, err);

	while (ret == 0 && (now = clock_now_ns()) < ns) {
		uint64_t ms = (ns - now) / 1000000 + 1;

		clock_sleep_ms(ms < LOOK_MS ? (unsigned)ms : LOOK_MS);
		ret = m->stop(m->opaque, err);
	}
	return ret;
}

static int take_samples(struct measurement *m, unsigned samples, struct mem_dirty_rate *out,
			struct error *err)
{
	uint64_t begin, last, pages = 0;
	int ret = m->source->collect(m->source->opaque, m->dirty, err);

	/* At the start all pages are dirty. */
	bitmap_set_range(m->dirty, 0, m->npages);
	if (ret == 0)
		ret = clear_log(m, err);
	begin = last = clock_now_ns();
	while (ret == 0 && out->samples < samples) {
		ret = wait_until(m, begin + (out->samples + 1) * MEM_DIRTY_SAMPLE_MS * UINT64_C(1000000),
				 err);
		if (ret == 0)
			ret = m->source->collect(m->source->opaque, m->dirty, err);
		if (ret < 0)
			break;
		uint64_t now = clock_now_ns(), n = bitmap_count(m->dirty, m->npages);
		uint64_t rate = (uint64_t)((double)n * MEM_PAGE_BYTES * 1e9 / (double)(now - last + 1));

		last = now;
		pages += n;
		out->samples++;
		if (rate > out->most_bytes_per_s)
			out->most_bytes_per_s = rate;
		for (uint64_t w = 0; w < BITMAP_WORDS(m->npages); w++)
			m->all[w] |= m->dirty[w];
		ret = clear_log(m, err);
	}
	out->bytes_per_s = (uint64_t)((double)pages * MEM_PAGE_BYTES * 1e9 / (double)(last - begin + 1));
	out->working_set_bytes = bitmap_count(m->all, m->npages) * MEM_PAGE_BYTES;
	return ret;
}

int mem_dirty_rate_measure(const struct dirty_source *source, uint64_t npages, unsigned samples,
			   int (*stop)(void *opaque, struct error *err), void *opaque,
			   struct mem_dirty_rate *out, struct error *err)
{
	CLEANUP_FREE uint64_t *dirty = bitmap_alloc(npages), *all = bitmap_alloc(npages);
	struct measurement m = {source, npages, stop, opaque, dirty, all};

	*out = (struct mem_dirty_rate){0};
	if (!dirty || !all)
		return error_errno(err, ENOMEM, "dirty rate: bitmap");
	int ret = source->start(source->opaque, err);
	if (ret < 0)
		return error_prefix(err, "dirty rate: tracking");
	ret = take_samples(&m, samples, out, err);
	source->stop(source->opaque);
	return ret;
}
