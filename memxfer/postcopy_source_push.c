/* SPDX-License-Identifier: Apache-2.0 */
/* What goes when: pages that are waited for at once, the others outwards from the last of those. */
#include <errno.h>
#include <sched.h>

#include "base/bitmap.h"
#include "base/clock.h"
#include "base/confine.h"
#include "memxfer/postcopy_source.h"

#define PUSH_PAGES	  32u /* a frame: so long an answer to a fault may have to wait */
#define BANDWIDTH_LOOK_MS 20u

/* False when the session ended first. */
static bool wait_listed(struct mem_postcopy_source *s)
{
	bool go;

	pthread_mutex_lock(&s->lock);
	while (!atomic_load(&s->listed) && !atomic_load(&s->session_over))
		pthread_cond_wait(&s->changed, &s->lock);
	go = atomic_load(&s->listed) && !atomic_load(&s->session_over);
	pthread_mutex_unlock(&s->lock);
	return go;
}

/* True for whoever takes the page: it goes once. */
static bool take_page(struct mem_postcopy_source *s, uint64_t page)
{
	uint64_t bit = UINT64_C(1) << (page % 64);

	return __atomic_fetch_and(&s->pending[page / 64], ~bit, __ATOMIC_ACQ_REL) & bit;
}

/* --- faults --- */

static int answer(struct mem_postcopy_source *s, const struct mem_header *h, struct error *err)
{
	struct mem_tx *tx = &s->tx[MEM_POSTCOPY_FAULTS];
	int ret = 0;

	for (uint32_t i = 0; i < h->nruns && ret == 0; i++) {
		uint64_t first = s->wanted_runs[i].first, end = first + s->wanted_runs[i].npages;

		for (uint64_t page = first; page < end; page++) {
			if (!bitmap_test(s->pages, page))
				return error_set(
					err, EPROTO,
					"post-copy: the destination wants page %llu, which it was given "
					"before",
					(unsigned long long)page);
			/* One that was taken is on its way. */
			if (take_page(s, page))
				bitmap_set(s->wanted, page);
		}
		ret = mem_tx_pages(tx, s->wanted, first, end - first, err);
		bitmap_clear_range(s->wanted, first, end - first);
		atomic_store(&s->pivot, end - 1);
		atomic_fetch_add(&s->faults_seen, 1);
	}
	return ret < 0 ? ret : mem_tx_flush(tx, err);
}

void *postcopy_source_faults(void *arg)
{
	struct mem_postcopy_source *s = arg;
	struct error err = ERROR_INIT;
	int ret;

	confine_self(CONFINE_MEMORY);
	ret = wait_listed(s) ? 0 : -ECANCELED;
	while (ret == 0) {
		struct mem_header h;

		/* No fault may come for long; the other channel tells whether the destination is there. */
		ret = postcopy_channel_read(&s->faults, &h, 0, &err);
		if (ret == 0 && h.type != MEM_FRAME_WANT)
			ret = error_set(&err, EPROTO, "post-copy: %s on the channel of faults",
					mem_frame_name(h.type));
		if (ret == 0)
			ret = mem_runs_decode(&h, s->faults.body, s->opt.space.npages, 1, s->wanted_runs,
					      &err);
		if (ret < 0)
			break;
		atomic_fetch_add(&s->faults_waiting, 1);
		pthread_mutex_lock(&s->faults_lock);
		ret = answer(s, &h, &err);
		pthread_mutex_unlock(&s->faults_lock);
		atomic_fetch_sub(&s->faults_waiting, 1);
	}
	if (error_is_set(&err))
		postcopy_source_break(s, &err);
	return NULL;
}

/* --- push --- */

/* Where the push is: it goes outwards from a pivot, both ways in turn. */
struct push {
	uint64_t faults_seen, up, down; /* next page upwards; downwards from down - 1 */
	bool downwards;
};

/* Last set bit below `end`, plus one; 0 if there is none. */
static uint64_t end_of_pending_below(const uint64_t *map, uint64_t end)
{
	for (uint64_t word = (end + 63) / 64; word-- > 0;) {
		uint64_t bits = __atomic_load_n(&map[word], __ATOMIC_RELAXED);

		if (word == end / 64)
			bits &= ~(~UINT64_C(0) << (end % 64));
		if (bits)
			return word * 64 + 64 - (uint64_t)__builtin_clzll(bits);
	}
	return 0;
}

/* First set bit at or after `page`, or npages. */
static uint64_t pending_from(const struct mem_postcopy_source *s, uint64_t page)
{
	uint64_t npages = s->opt.space.npages;

	for (uint64_t word = page / 64; word < BITMAP_WORDS(npages); word++) {
		uint64_t bits = __atomic_load_n(&s->pending[word], __ATOMIC_RELAXED);

		if (word == page / 64)
			bits &= ~UINT64_C(0) << (page % 64);
		if (bits)
			return word * 64 + (uint64_t)__builtin_ctzll(bits);
	}
	return npages;
}

/* The next stretch to push, of at most PUSH_PAGES: what is pending of [*first, *end) is in `taken` then.
 * False when nothing is. */
static bool take_stretch(struct mem_postcopy_source *s, struct push *p, uint64_t *first, uint64_t *end)
{
	uint64_t seen = atomic_load(&s->faults_seen);

	if (seen != p->faults_seen) {
		p->faults_seen = seen;
		p->up = p->down = atomic_load(&s->pivot);
		p->downwards = false;
	}

	uint64_t above = pending_from(s, p->up), below = end_of_pending_below(s->pending, p->down);

	if (above >= s->opt.space.npages && !below) {
		/* Both ways are done; what lies between the way up and a later start of it is not. */
		p->up = p->down = 0;
		above = pending_from(s, 0);
		if (above >= s->opt.space.npages)
			return false;
	}
	if (below && (p->downwards || above >= s->opt.space.npages)) {
		*end = below;
		*first = below > PUSH_PAGES ? below - PUSH_PAGES : 0;
		p->down = *first;
	} else {
		*first = above;
		*end = above + PUSH_PAGES < s->opt.space.npages ? above + PUSH_PAGES : s->opt.space.npages;
		p->up = *end;
	}
	p->downwards = !p->downwards;
	for (uint64_t page = *first; page < *end; page++)
		if (take_page(s, page))
			bitmap_set(s->taken, page);
	return true;
}

static int beat(struct mem_postcopy_source *s, uint64_t *last_ns, struct error *err)
{
	uint64_t now = clock_now_ns(), interval = postcopy_beat_ms(s->opt.timeout_ms) * UINT64_C(1000000);
	int ret = 0;

	if (now - *last_ns < interval)
		return 0;
	*last_ns = now;
	pthread_mutex_lock(&s->faults_lock);
	ret = mem_tx_control(&s->tx[MEM_POSTCOPY_FAULTS], MEM_FRAME_BEAT, NULL, 0, err);
	pthread_mutex_unlock(&s->faults_lock);
	return ret < 0 ? ret : mem_tx_control(&s->tx[MEM_POSTCOPY_PUSH], MEM_FRAME_BEAT, NULL, 0, err);
}

/* Nothing may be sent, or there is nothing: a moment, or until something changes. */
static void rest(struct mem_postcopy_source *s, unsigned ms)
{
	struct timespec until = clock_timespec(clock_now_ns() + ms * UINT64_C(1000000));

	pthread_mutex_lock(&s->lock);
	if (!atomic_load(&s->session_over))
		pthread_cond_timedwait(&s->changed, &s->lock, &until);
	pthread_mutex_unlock(&s->lock);
}

void *postcopy_source_push(void *arg)
{
	struct mem_postcopy_source *s = arg;
	struct mem_tx *tx = &s->tx[MEM_POSTCOPY_PUSH];
	struct push p = {.faults_seen = atomic_load(&s->faults_seen)};
	struct error err = ERROR_INIT;
	uint64_t first, end, last_beat_ns = clock_now_ns();
	unsigned quiet_ms = postcopy_beat_ms(s->opt.timeout_ms);
	int ret = 0;

	confine_self(CONFINE_MEMORY);
	while (ret == 0 && !atomic_load(&s->session_over)) {
		uint64_t wait_ns = rate_limit_wait_ns(s->opt.bandwidth);

		ret = beat(s, &last_beat_ns, &err);
		if (ret < 0)
			break;
		if (!atomic_load(&s->listed)) {
			rest(s, quiet_ms);
		} else if (wait_ns) {
			rest(s, wait_ns < BANDWIDTH_LOOK_MS * UINT64_C(1000000)
					? (unsigned)(wait_ns / 1000000) + 1
					: BANDWIDTH_LOOK_MS);
		} else if (atomic_load(&s->faults_waiting)) {
			sched_yield();
		} else if (take_stretch(s, &p, &first, &end)) {
			ret = mem_tx_pages(tx, s->taken, first, end - first, &err);
			if (ret == 0)
				ret = mem_tx_flush(tx, &err);
			bitmap_clear_range(s->taken, first, end - first);
		} else {
			rest(s, quiet_ms);
		}
	}
	if (error_is_set(&err))
		postcopy_source_break(s, &err);
	return NULL;
}
