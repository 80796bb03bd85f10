/* SPDX-License-Identifier: Apache-2.0 */
/* The source's half of post-copy: one session after the other, in each a thread that answers faults, one that
 * pushes, and the manager, which reads what the destination tells. */
#include "memxfer/postcopy_source.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "base/bitmap.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "base/cond.h"
#include "base/log.h"

/* What is pushed lies in front of the answer to a fault for as long as it is in the socket and the network.
 */
#define PUSH_SOCKET_BYTES (256 << 10)

void postcopy_source_break(struct mem_postcopy_source *s, const struct error *why)
{
	pthread_mutex_lock(&s->lock);
	if (!error_is_set(&s->broken))
		s->broken = *why;
	atomic_store(&s->session_over, true);
	pthread_cond_broadcast(&s->changed);
	pthread_mutex_unlock(&s->lock);
	for (unsigned i = 0; i < MEM_POSTCOPY_CHANNELS; i++)
		conn_shutdown(s->conns[i]);
}

/* --- what the destination tells, on the push channel --- */

static int check_named(struct mem_postcopy_source *s, const struct mem_header *h, struct error *err)
{
	for (uint32_t i = 0; i < h->nruns; i++) {
		uint64_t first = s->runs[i].first, end = first + s->runs[i].npages;
		uint64_t clear = bitmap_next_clear(s->pages, end, first);

		if (clear < end)
			return error_set(
				err, EPROTO,
				"post-copy: the destination says that it lacks page %llu, which it was "
				"given before",
				(unsigned long long)clear);
	}
	return 0;
}

static int take_missing(struct mem_postcopy_source *s, const struct mem_header *h, struct error *err)
{
	int ret = s->listed ? error_set(err, EPROTO, "post-copy: pages are listed after the list's end")
			    : mem_runs_decode(h, s->push.body, s->opt.space.npages, 1, s->runs, err);

	if (ret == 0)
		ret = check_named(s, h, err);
	if (ret < 0)
		return ret;
	for (uint32_t i = 0; i < h->nruns; i++)
		bitmap_set_range(s->pending, s->runs[i].first, s->runs[i].npages);
	return 0;
}

static void take_status(struct mem_postcopy_source *s)
{
	SCOPE_LOCK(&s->lock);
	mem_status_decode(s->push.body, &s->status);
	s->listed = true;
	s->done = !s->status.missing_pages;
	pthread_cond_broadcast(&s->changed);
}

/* Until the session breaks, or all is there. */
static int listen_to_destination(struct mem_postcopy_source *s, struct error *err)
{
	while (!s->done) {
		struct mem_header h;
		/* Before _begin the destination has nothing to say; then it does, all the time. */
		bool silent = !s->begun;
		int ret = postcopy_channel_read(&s->push, &h, s->opt.timeout_ms, err);

		if (ret == -ETIMEDOUT && silent)
			continue;
		if (ret == -ENODATA)
			return error_set(err, ECONNRESET, "the destination closed the channel");
		if (ret < 0)
			return ret;
		pthread_mutex_lock(&s->lock);
		while (!s->begun && !s->cancelled)
			pthread_cond_wait(&s->changed, &s->lock);
		pthread_mutex_unlock(&s->lock);
		if (h.type == MEM_FRAME_MISSING)
			ret = take_missing(s, &h, err);
		else if (h.type == MEM_FRAME_STATUS)
			take_status(s);
		else
			ret = error_set(err, EPROTO, "post-copy: %s on the push channel",
					mem_frame_name(h.type));
		if (ret < 0)
			return ret;
	}
	return 0;
}

/* --- sessions --- */

static int open_channel(struct mem_postcopy_source *s, unsigned i, struct error *err)
{
	struct mem_tx *tx = &s->tx[i];
	int bytes = PUSH_SOCKET_BYTES;

	if (i == MEM_POSTCOPY_PUSH)
		setsockopt(conn_fd(s->conns[i]), SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
	mem_tx_restart(tx, s->conns[i]);
	tx->round = s->sessions;
	int ret = mem_tx_control(tx, MEM_FRAME_OPEN, NULL, 0, err);
	tx->round = 1;
	return ret;
}

static int start_threads(struct mem_postcopy_source *s, struct error *err)
{
	int e = pthread_create(&s->faulter, NULL, postcopy_source_faults, s);

	s->faulter_started = !e;
	if (!e) {
		e = pthread_create(&s->pusher, NULL, postcopy_source_push, s);
		s->pusher_started = !e;
	}
	return e ? error_errno(err, e, "post-copy: thread") : 0;
}

static void end_session(struct mem_postcopy_source *s)
{
	atomic_store(&s->session_over, true);
	for (unsigned i = 0; i < MEM_POSTCOPY_CHANNELS; i++)
		conn_shutdown(s->conns[i]);
	pthread_mutex_lock(&s->lock);
	pthread_cond_broadcast(&s->changed);
	pthread_mutex_unlock(&s->lock);
	if (s->faulter_started)
		pthread_join(s->faulter, NULL);
	if (s->pusher_started)
		pthread_join(s->pusher, NULL);
	s->faulter_started = s->pusher_started = false;

	struct conn *old[MEM_POSTCOPY_CHANNELS];

	pthread_mutex_lock(&s->lock);
	s->connected = false;
	for (unsigned i = 0; i < MEM_POSTCOPY_CHANNELS; i++) {
		old[i] = steal_ptr(s->conns[i]);
		s->wire_before += conn_bytes_sent(old[i]);
	}
	pthread_mutex_unlock(&s->lock);
	for (unsigned i = 0; i < MEM_POSTCOPY_CHANNELS; i++)
		conn_close(old[i]);
}

/* With the channels of a session in s->conns: until it is over. */
static int run_session(struct mem_postcopy_source *s, struct error *err)
{
	int ret = 0;

	s->listed = false;
	s->broken = ERROR_INIT;
	atomic_store(&s->session_over, s->cancelled);
	/* Nobody else looks at it between two sessions. */
	bitmap_clear_range(s->pending, 0, s->opt.space.npages);
	postcopy_channel_attach(&s->faults, s->conns[MEM_POSTCOPY_FAULTS]);
	postcopy_channel_attach(&s->push, s->conns[MEM_POSTCOPY_PUSH]);
	for (unsigned i = 0; i < MEM_POSTCOPY_CHANNELS && ret == 0; i++)
		ret = open_channel(s, i, err);
	if (ret == 0)
		ret = start_threads(s, err);
	if (ret == 0)
		ret = listen_to_destination(s, err);
	end_session(s);
	/* What a thread ran into first is the reason. */
	if (ret < 0 && error_is_set(&s->broken))
		error_copy(err, &s->broken);
	return ret;
}

static void finish(struct mem_postcopy_source *s, const struct error *failure)
{
	SCOPE_LOCK(&s->lock);
	s->over = true;
	if (failure)
		s->failure = *failure;
	pthread_cond_broadcast(&s->changed);
}

static void *manage(void *arg)
{
	struct mem_postcopy_source *s = arg;

	for (;;) {
		struct error why = ERROR_INIT, err = ERROR_INIT;
		struct conn *next[MEM_POSTCOPY_CHANNELS] = {0};
		int ret = run_session(s, &why);

		if (ret < 0 && !s->cancelled) {
			log_warn("post-copy session %u: %s", s->sessions, why.message);
			ret = s->opt.again(s->opt.opaque, &why, next, &err);
			if (ret == 1)
				s->done = true;
		}
		if (s->done || s->cancelled || ret < 0) {
			if (s->cancelled && !s->done)
				error_set(&err, ECANCELED, "post-copy was cancelled");
			for (unsigned i = 0; i < MEM_POSTCOPY_CHANNELS; i++)
				conn_close(next[i]);
			finish(s, s->done ? NULL : &err);
			return NULL;
		}
		SCOPE_LOCK(&s->lock);
		memcpy(s->conns, next, sizeof next);
		s->sessions++;
		s->connected = true;
		for (unsigned i = 0; i < MEM_POSTCOPY_CHANNELS && s->cancelled; i++)
			conn_shutdown(s->conns[i]);
	}
}

/* --- interface --- */

static int init_tx(struct mem_postcopy_source *s, struct error *err)
{
	struct mem_sender_options mo = {
		.space = s->opt.space,
		.streams = s->conns,
		.nstreams = MEM_POSTCOPY_CHANNELS,
		.zstd_level = s->opt.zstd_level,
		.timeout_ms = s->opt.timeout_ms,
		.bandwidth = s->opt.bandwidth,
		.epoch = s->opt.epoch,
	};
	int ret = 0;

	for (unsigned i = 0; i < MEM_POSTCOPY_CHANNELS && ret == 0; i++) {
		/* The time to pack a page is time that somebody waits. */
		mo.compress = i == MEM_POSTCOPY_PUSH ? s->opt.compress : MEM_COMPRESS_OFF;
		ret = mem_tx_init(&s->tx[i], &mo, i, &s->counters, &s->session_over, &s->idle_cpu, NULL, err);
		s->tx[i].space = &s->opt.space;
		s->tx[i].final = true;
		s->tx[i].round = 1;
	}
	return ret;
}

int mem_postcopy_source_create(const struct mem_postcopy_source_options *opt,
			       struct mem_postcopy_source **out, struct error *err)
{
	struct mem_postcopy_source *s = calloc(1, sizeof *s);
	int ret = 0;

	*out = NULL;
	if (!s) {
		for (unsigned i = 0; i < MEM_POSTCOPY_CHANNELS; i++)
			conn_close(opt->channels[i]);
		return error_errno(err, ENOMEM, "post-copy");
	}
	s->opt = *opt;
	memcpy(s->conns, opt->channels, sizeof s->conns);
	s->sessions = 1;
	s->connected = true;
	pthread_mutex_init(&s->lock, NULL);
	pthread_mutex_init(&s->faults_lock, NULL);
	cond_init_monotonic(&s->changed);
	idle_cpu_init(&s->idle_cpu);
	s->pages = bitmap_alloc(opt->space.npages);
	s->pending = bitmap_alloc(opt->space.npages);
	s->taken = bitmap_alloc(opt->space.npages);
	s->wanted = bitmap_alloc(opt->space.npages);
	s->runs = malloc(MEM_FRAME_RUNS_MAX * sizeof *s->runs);
	s->wanted_runs = malloc(MEM_FRAME_RUNS_MAX * sizeof *s->wanted_runs);
	if (!s->pages || !s->pending || !s->taken || !s->wanted || !s->runs || !s->wanted_runs)
		ret = error_errno(err, ENOMEM, "post-copy");
	if (ret == 0)
		ret = postcopy_channel_init(&s->faults, MEM_POSTCOPY_FAULTS, opt->timeout_ms, opt->epoch,
					    err);
	if (ret == 0)
		ret = postcopy_channel_init(&s->push, MEM_POSTCOPY_PUSH, opt->timeout_ms, opt->epoch, err);
	if (ret == 0)
		ret = init_tx(s, err);
	if (ret == 0) {
		int e = pthread_create(&s->manager, NULL, manage, s);

		s->manager_started = !e;
		ret = e ? error_errno(err, e, "post-copy: thread") : 0;
	}
	if (ret < 0) {
		mem_postcopy_source_free(s);
		return ret;
	}
	*out = s;
	return 0;
}

void mem_postcopy_source_begin(struct mem_postcopy_source *s, const uint64_t *pages)
{
	SCOPE_LOCK(&s->lock);
	memcpy(s->pages, pages, BITMAP_WORDS(s->opt.space.npages) * 8);
	s->total_pages = s->status.missing_pages = bitmap_count(pages, s->opt.space.npages);
	s->begun = true;
	pthread_cond_broadcast(&s->changed);
}

int mem_postcopy_source_wait(struct mem_postcopy_source *s, struct error *err)
{
	SCOPE_LOCK(&s->lock);
	while (!s->over)
		pthread_cond_wait(&s->changed, &s->lock);
	if (error_is_set(&s->failure))
		error_copy(err, &s->failure);
	return s->failure.code;
}

void mem_postcopy_source_stats(struct mem_postcopy_source *s, struct mem_postcopy_stats *out)
{
	SCOPE_LOCK(&s->lock);
	*out = (struct mem_postcopy_stats){
		.total_pages = s->total_pages,
		.missing_pages = s->status.missing_pages,
		.sent_pages = atomic_load(&s->counters.data_pages) + atomic_load(&s->counters.zero_pages),
		.wire_bytes = s->wire_before,
		.faults = s->status.faults,
		.fault_median_us = s->status.fault_median_us,
		.fault_worst_us = s->status.fault_worst_us,
		.duplicate_pages = s->status.duplicate_pages,
		.sessions = s->sessions,
		.connected = s->connected,
	};
	for (unsigned i = 0; i < MEM_POSTCOPY_CHANNELS; i++)
		out->wire_bytes += s->conns[i] ? conn_bytes_sent(s->conns[i]) : 0;
}

void mem_postcopy_source_cancel(struct mem_postcopy_source *s)
{
	SCOPE_LOCK(&s->lock);
	s->cancelled = true;
	atomic_store(&s->session_over, true);
	pthread_cond_broadcast(&s->changed);
	for (unsigned i = 0; i < MEM_POSTCOPY_CHANNELS; i++)
		if (s->conns[i])
			conn_shutdown(s->conns[i]);
}

void mem_postcopy_source_free(struct mem_postcopy_source *s)
{
	if (!s)
		return;
	mem_postcopy_source_cancel(s);
	if (s->manager_started)
		pthread_join(s->manager, NULL);
	for (unsigned i = 0; i < MEM_POSTCOPY_CHANNELS; i++) {
		conn_close(s->conns[i]);
		mem_tx_release(&s->tx[i]);
	}
	postcopy_channel_release(&s->faults);
	postcopy_channel_release(&s->push);
	idle_cpu_release(&s->idle_cpu);
	free(s->pages);
	free(s->pending);
	free(s->taken);
	free(s->wanted);
	free(s->runs);
	free(s->wanted_runs);
	pthread_cond_destroy(&s->changed);
	pthread_mutex_destroy(&s->faults_lock);
	pthread_mutex_destroy(&s->lock);
	free(s);
}
