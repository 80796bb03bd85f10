/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The thread that hears of faults: asks the source for the page, or fills it with zeroes where it was never
 * missing. It alone writes to the source. It touches neither guest memory nor any lock of a device.
 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/bitmap.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "base/confine.h"
#include "base/log.h"
#include "memxfer/postcopy_dest.h"
#include "memxfer/postcopy_faults.h"

#define FAULTS_GROW 64u

struct server {
	struct mem_postcopy_dest *dest;
	uint64_t last_status_ns;
	uint32_t nruns;
	uint8_t runs[MEM_FRAME_RUNS_MAX * MEM_RUN_BYTES]; /* the frame being made */
};

/* --- writing to the source --- */

static struct postcopy_channel *channel(struct server *v, enum mem_postcopy_channel i)
{
	return &v->dest->rx[i].channel;
}

static int send_named(struct server *v, enum mem_postcopy_channel to, enum mem_frame_type type,
		      struct error *err)
{
	uint32_t n = v->nruns;

	v->nruns = 0;
	return n ? postcopy_channel_send(channel(v, to), type, n, 0, v->runs, err) : 0;
}

/* Adds pages of one region to the frame. */
static int name_pages(struct server *v, enum mem_postcopy_channel to, enum mem_frame_type type,
		      uint64_t first, uint64_t npages, struct error *err)
{
	struct mem_run run = {.first = first, .npages = (uint32_t)npages, .kind = MEM_RUN_LATER};

	mem_run_encode(v->runs + (size_t)v->nruns * MEM_RUN_BYTES, &run);
	return ++v->nruns == MEM_FRAME_RUNS_MAX ? send_named(v, to, type, err) : 0;
}

static int send_status(struct server *v, struct error *err)
{
	struct mem_postcopy_dest *d = v->dest;
	uint8_t raw[MEM_STATUS_BYTES];

	pthread_mutex_lock(&d->lock);
	struct mem_postcopy_status st = {
		.missing_pages = d->missing_pages,
		.faults = d->latency.count,
		.fault_median_us = fault_latency_median(&d->latency),
		.fault_worst_us = d->latency.worst_us,
		.duplicate_pages = d->duplicate_pages,
	};
	pthread_mutex_unlock(&d->lock);
	mem_status_encode(raw, &st);
	v->last_status_ns = clock_now_ns();
	return postcopy_channel_send(channel(v, MEM_POSTCOPY_PUSH), MEM_FRAME_STATUS, 0, sizeof raw, raw,
				     err);
}

/* The first stretch at or after *at, within a region. */
static bool missing_stretch(struct mem_postcopy_dest *d, uint64_t *at, uint64_t *end)
{
	uint64_t npages = d->opt.space.npages, region_end;

	SCOPE_LOCK(&d->lock);
	*at = bitmap_next_set(d->missing, npages, *at);
	region_end = (*at / MEM_REGION_PAGES + 1) * MEM_REGION_PAGES;
	*end = bitmap_next_clear(d->missing, region_end < npages ? region_end : npages, *at);
	return *at < npages;
}

static int send_missing(struct server *v, struct error *err)
{
	uint64_t end;
	int ret = 0;

	for (uint64_t at = 0; ret == 0 && missing_stretch(v->dest, &at, &end); at = end) {
		ret = name_pages(v, MEM_POSTCOPY_PUSH, MEM_FRAME_MISSING, at, end - at, err);
	}
	return ret == 0 ? send_named(v, MEM_POSTCOPY_PUSH, MEM_FRAME_MISSING, err) : ret;
}

/* What this session's source has to know first: what is missing, and who waits already. */
static int greet(struct server *v, struct error *err)
{
	struct mem_postcopy_dest *d = v->dest;
	int ret = send_missing(v, err);

	if (ret == 0)
		ret = send_status(v, err);
	/* Only this thread adds to them; those that went meanwhile cost a question. */
	pthread_mutex_lock(&d->lock);
	unsigned n = d->nfaults;
	CLEANUP_FREE uint64_t *pages = n ? malloc(n * sizeof *pages) : NULL;
	for (unsigned i = 0; i < n && pages; i++)
		pages[i] = d->faults[i].page;
	pthread_mutex_unlock(&d->lock);
	if (ret == 0 && n && !pages)
		ret = error_errno(err, ENOMEM, "post-copy");
	for (unsigned i = 0; i < n && ret == 0; i++)
		ret = name_pages(v, MEM_POSTCOPY_FAULTS, MEM_FRAME_WANT, pages[i], 1, err);
	return ret == 0 ? send_named(v, MEM_POSTCOPY_FAULTS, MEM_FRAME_WANT, err) : ret;
}

/* A session's connections stay while `writing` is set. */
static bool begin_writing(struct mem_postcopy_dest *d, bool *greeted)
{
	SCOPE_LOCK(&d->lock);
	d->writing = d->session;
	*greeted = d->greeted;
	d->greeted |= d->session;
	return d->writing;
}

static void end_writing(struct mem_postcopy_dest *d, bool failed)
{
	SCOPE_LOCK(&d->lock);
	if (failed)
		postcopy_dest_cut(d);
	d->writing = false;
	pthread_cond_broadcast(&d->changed);
}

/* Says what there is to say, if somebody listens. The faults in the frame that is being made are in the
 * table, too: without a session they wait for the next greeting. */
static void talk(struct server *v, bool complete)
{
	struct mem_postcopy_dest *d = v->dest;
	uint64_t due = v->last_status_ns + postcopy_beat_ms(d->opt.timeout_ms) * UINT64_C(1000000);
	struct error err = ERROR_INIT;
	bool greeted;
	int ret;

	if (!begin_writing(d, &greeted)) {
		v->nruns = 0;
		return;
	}
	if (!greeted) {
		v->nruns = 0;
		ret = greet(v, &err);
	} else {
		ret = send_named(v, MEM_POSTCOPY_FAULTS, MEM_FRAME_WANT, &err);
		if (ret == 0 && (complete || clock_now_ns() >= due))
			ret = send_status(v, &err);
	}
	if (ret < 0)
		log_info("post-copy: telling the source: %s", err.message);
	end_writing(d, ret < 0);
}

/* --- faults --- */

/* 1: it is to be asked for; 0: it has been; -ENOENT: it is not missing. */
static int note_fault(struct mem_postcopy_dest *d, uint64_t page)
{
	SCOPE_LOCK(&d->lock);
	if (!bitmap_test(d->missing, page))
		return -ENOENT;
	for (unsigned i = 0; i < d->nfaults; i++)
		if (d->faults[i].page == page)
			return 0;
	if (d->nfaults == d->faults_room) {
		unsigned room = d->faults_room + FAULTS_GROW;
		struct postcopy_fault *more = realloc(d->faults, room * sizeof *more);

		if (!more) {
			d->unnoted = true;
			return 1; /* asked for, and not measured */
		}
		d->faults = more;
		d->faults_room = room;
	}
	d->faults[d->nfaults++] = (struct postcopy_fault){.page = page, .since_ns = clock_now_ns()};
	return 1;
}

/* All faults in the queue, as far as the frame has room. */
static int take_faults(struct server *v, struct error *err)
{
	struct mem_postcopy_dest *d = v->dest;
	uint64_t page, present = 0;
	int ret = 0;

	while (v->nruns < MEM_FRAME_RUNS_MAX - 1 &&
	       (ret = faults_next(d->opt.faults_fd, &d->opt.space, &page, err)) == 0) {
		if (page >= d->opt.space.npages)
			return error_set(err, ERANGE, "userfaultfd: a fault at page %llu",
					 (unsigned long long)page);
		int wanted = note_fault(d, page);
		/* A hole, or the page has come meanwhile. */
		if (wanted == -ENOENT)
			ret = faults_fill(d->opt.faults_fd, &d->opt.space, page, 1, NULL, &present, err);
		else if (wanted)
			ret = name_pages(v, MEM_POSTCOPY_FAULTS, MEM_FRAME_WANT, page, 1, err);
		if (ret < 0)
			return ret;
	}
	return ret == -EAGAIN ? 0 : ret;
}

/* The last page is there: memory is like any other from here on. */
static void complete(struct mem_postcopy_dest *d)
{
	struct error err = ERROR_INIT;

	if (faults_unregister(d->opt.faults_fd, &d->opt.space, &err) < 0)
		log_warn("post-copy: %s", err.message);
	SCOPE_LOCK(&d->lock);
	d->complete = true;
	pthread_cond_broadcast(&d->changed);
}

enum look { LOOK_IDLE, LOOK_SERVE, LOOK_COMPLETE, LOOK_END };

static enum look look(struct mem_postcopy_dest *d)
{
	SCOPE_LOCK(&d->lock);
	if (d->closing || d->aborted)
		return LOOK_END;
	if (!d->begun)
		return LOOK_IDLE;
	return d->missing_pages ? LOOK_SERVE : LOOK_COMPLETE;
}

void *postcopy_dest_server(void *arg)
{
	CLEANUP_FREE struct server *v = calloc(1, sizeof *v);
	struct mem_postcopy_dest *d = arg;
	unsigned beat_ms = postcopy_beat_ms(d->opt.timeout_ms);
	enum look now;

	confine_self(CONFINE_MEMORY);
	if (!v) {
		log_error("post-copy: out of memory");
		mem_postcopy_dest_abort(d);
		return NULL;
	}
	v->dest = d;
	while ((now = look(d)) != LOOK_END) {
		struct pollfd p[2] = {{.fd = d->wake_fd, .events = POLLIN},
				      {.fd = now == LOOK_IDLE ? -1 : d->opt.faults_fd, .events = POLLIN}};
		struct error err = ERROR_INIT;
		uint64_t count;

		if (now == LOOK_COMPLETE) {
			complete(d);
			talk(v, true);
			return NULL;
		}
		poll(p, 2, now == LOOK_IDLE ? -1 : (int)beat_ms);
		if (p[0].revents && read(d->wake_fd, &count, sizeof count) < 0)
			log_debug("post-copy: woken for nothing");
		if (now == LOOK_SERVE && take_faults(v, &err) < 0)
			log_error("post-copy: %s", err.message);
		if (now == LOOK_SERVE)
			talk(v, false);
	}
	return NULL;
}
