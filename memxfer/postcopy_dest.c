/* SPDX-License-Identifier: Apache-2.0 */
/* The destination's half of post-copy: the manager runs one session after the other and reads its push
 * channel; a thread a session reads the channel of faults; the server (postcopy_dest_server.c) does the rest.
 */
#include "memxfer/postcopy_dest.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/bitmap.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "base/cond.h"
#include "base/confine.h"
#include "memxfer/postcopy_faults.h"

void postcopy_dest_wake(struct mem_postcopy_dest *d)
{
	uint64_t one = 1;

	/* EAGAIN: it is awake enough. */
	if (write(d->wake_fd, &one, sizeof one) < 0)
		return;
}

void postcopy_dest_cut(struct mem_postcopy_dest *d)
{
	for (unsigned i = 0; i < MEM_POSTCOPY_CHANNELS; i++)
		if (d->conns[i])
			conn_shutdown(d->conns[i]);
}

/* --- pages --- */

/* Whoever waited for it has it. Lock held. */
static void end_faults(struct mem_postcopy_dest *d, uint64_t first, uint64_t end)
{
	uint64_t now = clock_now_ns();

	for (unsigned i = 0; i < d->nfaults;) {
		struct postcopy_fault *f = &d->faults[i];

		if (f->page < first || f->page >= end) {
			i++;
			continue;
		}
		fault_latency_add(&d->latency, (now - f->since_ns) / 1000);
		*f = d->faults[--d->nfaults];
	}
}

/* Pages of [first, end) are in place. The bit goes after the page has come: the server takes a page whose bit
 * is clear for one that was never missing. */
static void count_landed(struct mem_postcopy_dest *d, uint64_t first, uint64_t end)
{
	SCOPE_LOCK(&d->lock);
	for (uint64_t page = first; page < end; page++) {
		if (!bitmap_test(d->missing, page))
			continue;
		bitmap_clear(d->missing, page);
		d->missing_pages--;
	}
	end_faults(d, first, end);
	if (!d->missing_pages)
		postcopy_dest_wake(d);
}

/* The next stretch of [*at, end) that is missing; false when there is none. What is not counts as come twice.
 */
static bool next_missing(struct mem_postcopy_dest *d, uint64_t *at, uint64_t end, uint64_t *stretch_end)
{
	SCOPE_LOCK(&d->lock);
	uint64_t first = bitmap_next_set(d->missing, end, *at);

	d->duplicate_pages += first - *at;
	*at = first;
	*stretch_end = bitmap_next_clear(d->missing, end, first);
	return first < end;
}

static int fill_run(struct mem_postcopy_dest *d, const struct mem_run *run, const uint8_t *data,
		    struct error *err)
{
	uint64_t end = run->first + run->npages, stretch_end;
	uint64_t unasked = bitmap_next_clear(d->expected, end, run->first);

	if (unasked < end)
		return error_set(err, EPROTO, "post-copy: page %llu came, which was never missing here",
				 (unsigned long long)unasked);
	for (uint64_t at = run->first; next_missing(d, &at, end, &stretch_end); at = stretch_end) {
		const uint8_t *from = data ? data + (at - run->first) * MEM_PAGE_BYTES : NULL;
		uint64_t present = 0;
		int ret = faults_fill(d->opt.faults_fd, &d->opt.space, at, stretch_end - at, from, &present,
				      err);

		if (ret < 0)
			return ret;
		count_landed(d, at, stretch_end);
		if (present) {
			SCOPE_LOCK(&d->lock);
			d->duplicate_pages += present;
		}
	}
	return 0;
}

static int take_pages(struct postcopy_rx *rx, const struct mem_header *h, struct error *err)
{
	struct mem_postcopy_dest *d = rx->dest;
	const uint8_t *data = rx->channel.body + (size_t)h->nruns * MEM_RUN_BYTES;
	int ret;

	if (!(h->flags & MEM_FLAG_FINAL))
		return error_set(err, EPROTO, "post-copy: pages of a round");
	ret = mem_runs_decode(h, rx->channel.body, d->opt.space.npages, 1, rx->runs, err);
	if (ret == 0 && h->flags & MEM_FLAG_ZSTD) {
		size_t n = ZSTD_decompressDCtx(rx->zstd, rx->unpacked, h->raw_len, data, h->wire_len);

		if (ZSTD_isError(n) || n != h->raw_len)
			return error_set(err, EPROTO, "post-copy: pages do not unpack to %u bytes",
					 h->raw_len);
		data = rx->unpacked;
	}
	for (uint32_t i = 0; i < h->nruns && ret == 0; i++) {
		const struct mem_run *run = &rx->runs[i];
		bool has_data = run->kind == MEM_RUN_DATA;

		if (run->kind == MEM_RUN_LATER)
			return error_set(err, EPROTO, "post-copy: pages that are to come later still");
		ret = fill_run(d, run, has_data ? data : NULL, err);
		if (has_data)
			data += (size_t)run->npages * MEM_PAGE_BYTES;
	}
	return ret;
}

static int read_opening(struct postcopy_rx *rx, uint32_t *session, struct error *err)
{
	struct mem_header h;
	int ret = postcopy_channel_read(&rx->channel, &h, rx->dest->opt.timeout_ms, err);

	if (ret == 0 && h.type != MEM_FRAME_OPEN)
		ret = error_set(err, EPROTO, "post-copy: a channel begins with %s", mem_frame_name(h.type));
	*session = ret == 0 ? h.round : 0;
	return ret;
}

/* Until the channel ends. */
static int read_channel(struct postcopy_rx *rx, struct error *err)
{
	for (;;) {
		struct mem_header h;
		int ret = postcopy_channel_read(&rx->channel, &h, rx->dest->opt.timeout_ms, err);

		if (ret == -ENODATA)
			return error_set(err, ECONNRESET, "the source closed the channel");
		if (ret == 0 && h.type == MEM_FRAME_PAGES)
			ret = take_pages(rx, &h, err);
		else if (ret == 0 && h.type != MEM_FRAME_BEAT)
			ret = error_set(err, EPROTO, "post-copy: %s is not the source's to send",
					mem_frame_name(h.type));
		if (ret < 0)
			return ret;
	}
}

static void *read_faults(void *arg)
{
	struct postcopy_rx *rx = arg;

	read_channel(rx, &rx->error);
	pthread_mutex_lock(&rx->dest->lock);
	postcopy_dest_cut(rx->dest);
	pthread_mutex_unlock(&rx->dest->lock);
	return NULL;
}

/* --- sessions --- */

/* Both channels of the same session have opened. */
static int open_session(struct mem_postcopy_dest *d, struct error *err)
{
	uint32_t number[MEM_POSTCOPY_CHANNELS];
	int ret = 0;

	for (unsigned i = 0; i < MEM_POSTCOPY_CHANNELS && ret == 0; i++) {
		postcopy_channel_attach(&d->rx[i].channel, d->conns[i]);
		ret = read_opening(&d->rx[i], &number[i], err);
	}
	if (ret == 0 && number[0] != number[1])
		ret = error_set(err, EPROTO, "post-copy: channels of sessions %u and %u", number[0],
				number[1]);
	return ret;
}

static int run_session(struct mem_postcopy_dest *d, struct error *err)
{
	struct postcopy_rx *faults = &d->rx[MEM_POSTCOPY_FAULTS];
	pthread_t reader;
	int ret = open_session(d, err);

	if (ret < 0)
		return ret;
	faults->error = ERROR_INIT;

	int e = pthread_create(&reader, NULL, read_faults, faults);

	if (e)
		return error_errno(err, e, "post-copy: thread");
	pthread_mutex_lock(&d->lock);
	d->greeted = false;
	d->session = true;
	d->sessions++;
	pthread_mutex_unlock(&d->lock);
	postcopy_dest_wake(d);
	ret = read_channel(&d->rx[MEM_POSTCOPY_PUSH], err);
	pthread_mutex_lock(&d->lock);
	postcopy_dest_cut(d);
	d->session = false;
	while (d->writing)
		pthread_cond_wait(&d->changed, &d->lock);
	pthread_mutex_unlock(&d->lock);
	pthread_join(reader, NULL);
	/* The other one was cut because of it. */
	if (ret == -ESHUTDOWN && error_is_set(&faults->error) && faults->error.code != -ESHUTDOWN) {
		error_copy(err, &faults->error);
		ret = faults->error.code;
	}
	return ret;
}

/* Waits for the channels of a session; false when there is no use for one any more. */
static bool take_channels(struct mem_postcopy_dest *d)
{
	SCOPE_LOCK(&d->lock);
	while (!d->closing && !(d->begun && d->waiting[0] && d->waiting[1]))
		pthread_cond_wait(&d->changed, &d->lock);
	if (d->closing)
		return false;
	for (unsigned i = 0; i < MEM_POSTCOPY_CHANNELS; i++)
		d->conns[i] = steal_ptr(d->waiting[i]);
	return true;
}

static void drop_channels(struct mem_postcopy_dest *d)
{
	struct conn *old[MEM_POSTCOPY_CHANNELS];

	pthread_mutex_lock(&d->lock);
	for (unsigned i = 0; i < MEM_POSTCOPY_CHANNELS; i++) {
		old[i] = steal_ptr(d->conns[i]);
		d->wire_bytes += conn_bytes_received(old[i]);
	}
	pthread_mutex_unlock(&d->lock);
	for (unsigned i = 0; i < MEM_POSTCOPY_CHANNELS; i++)
		conn_close(old[i]);
}

static void *manage(void *arg)
{
	struct mem_postcopy_dest *d = arg;

	confine_self(CONFINE_MEMORY); /* and so the thread of each session */
	while (take_channels(d)) {
		struct error why = ERROR_INIT;

		run_session(d, &why);
		drop_channels(d);
		pthread_mutex_lock(&d->lock);
		bool over = d->complete || d->aborted || d->closing;
		pthread_mutex_unlock(&d->lock);
		if (over)
			break;
		d->opt.broken(d->opt.opaque, &why);
	}
	SCOPE_LOCK(&d->lock);
	d->over = true;
	pthread_cond_broadcast(&d->changed);
	return NULL;
}

/* --- interface --- */

static int init_rx(struct mem_postcopy_dest *d, unsigned i, struct error *err)
{
	struct postcopy_rx *rx = &d->rx[i];
	int ret = postcopy_channel_init(&rx->channel, i, d->opt.timeout_ms, d->opt.epoch, err);

	rx->dest = d;
	rx->runs = malloc(MEM_FRAME_RUNS_MAX * sizeof *rx->runs);
	rx->unpacked = malloc(MEM_PAYLOAD_MAX);
	rx->zstd = ZSTD_createDCtx();
	if (ret == 0 && (!rx->runs || !rx->unpacked || !rx->zstd))
		ret = error_errno(err, ENOMEM, "post-copy");
	return ret;
}

static int start_thread(pthread_t *thread, bool *started, void *(*run)(void *), struct mem_postcopy_dest *d,
			struct error *err)
{
	int e = pthread_create(thread, NULL, run, d);

	*started = !e;
	return e ? error_errno(err, e, "post-copy: thread") : 0;
}

int mem_postcopy_dest_create(const struct mem_postcopy_dest_options *opt, struct mem_postcopy_dest **out,
			     struct error *err)
{
	struct mem_postcopy_dest *d = calloc(1, sizeof *d);
	int ret = 0;

	*out = NULL;
	if (!d)
		return error_errno(err, ENOMEM, "post-copy");
	d->opt = *opt;
	pthread_mutex_init(&d->lock, NULL);
	cond_init_monotonic(&d->changed);
	d->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	d->expected = bitmap_alloc(opt->space.npages);
	if (d->wake_fd < 0 || !d->expected)
		ret = error_errno(err, ENOMEM, "post-copy");
	for (unsigned i = 0; i < MEM_POSTCOPY_CHANNELS && ret == 0; i++)
		ret = init_rx(d, i, err);
	if (ret == 0)
		ret = start_thread(&d->manager, &d->manager_started, manage, d, err);
	if (ret == 0)
		ret = start_thread(&d->server, &d->server_started, postcopy_dest_server, d, err);
	if (ret < 0) {
		mem_postcopy_dest_free(d);
		return ret;
	}
	*out = d;
	return 0;
}

void mem_postcopy_dest_add(struct mem_postcopy_dest *d, enum mem_postcopy_channel channel, struct conn *conn)
{
	struct conn *old = conn;

	pthread_mutex_lock(&d->lock);
	if (!d->closing && !d->complete && !d->aborted) {
		old = d->waiting[channel];
		d->waiting[channel] = conn;
		postcopy_dest_cut(d);
	}
	pthread_cond_broadcast(&d->changed);
	pthread_mutex_unlock(&d->lock);
	conn_close(old);
}

int mem_postcopy_dest_begin(struct mem_postcopy_dest *d, uint64_t *missing, struct error *err)
{
	int ret = faults_register(d->opt.faults_fd, &d->opt.space, err);

	if (ret < 0) {
		free(missing);
		return ret;
	}
	SCOPE_LOCK(&d->lock);
	d->missing = missing;
	memcpy(d->expected, missing, BITMAP_WORDS(d->opt.space.npages) * 8);
	d->total_pages = d->missing_pages = bitmap_count(missing, d->opt.space.npages);
	d->begun = true;
	pthread_cond_broadcast(&d->changed);
	postcopy_dest_wake(d);
	return 0;
}

int mem_postcopy_dest_wait(struct mem_postcopy_dest *d, unsigned timeout_ms, struct error *err)
{
	struct timespec until = clock_timespec(clock_now_ns() + timeout_ms * UINT64_C(1000000));

	SCOPE_LOCK(&d->lock);
	while (!d->complete && !d->aborted) {
		if (!timeout_ms)
			pthread_cond_wait(&d->changed, &d->lock);
		else if (pthread_cond_timedwait(&d->changed, &d->lock, &until) == ETIMEDOUT)
			return error_set(err, ETIMEDOUT, "post-copy: %llu pages are missing still",
					 (unsigned long long)d->missing_pages);
	}
	return d->complete ? 0 : error_set(err, ECANCELED, "post-copy was given up");
}

bool mem_postcopy_dest_pending(struct mem_postcopy_dest *d)
{
	SCOPE_LOCK(&d->lock);
	return d->begun && !d->complete;
}

/* Lock held. */
static bool is_waited_for(const struct mem_postcopy_dest *d, uint64_t page)
{
	for (unsigned i = 0; i < d->nfaults; i++)
		if (d->faults[i].page == page)
			return true;
	return d->unnoted;
}

void mem_postcopy_dest_forget(struct mem_postcopy_dest *d, uint64_t first, uint64_t npages)
{
	uint64_t end = first + npages;

	SCOPE_LOCK(&d->lock);
	if (!d->begun || !d->missing_pages)
		return;
	for (uint64_t page = bitmap_next_set(d->missing, end, first); page < end;
	     page = bitmap_next_set(d->missing, end, page + 1)) {
		/* The answer would find it not missing, and nobody would wake who waits. */
		if (is_waited_for(d, page))
			continue;
		bitmap_clear(d->missing, page);
		d->missing_pages--;
	}
	if (!d->missing_pages)
		postcopy_dest_wake(d);
}

void mem_postcopy_dest_stats(struct mem_postcopy_dest *d, struct mem_postcopy_stats *out)
{
	SCOPE_LOCK(&d->lock);
	*out = (struct mem_postcopy_stats){
		.total_pages = d->total_pages,
		.missing_pages = d->missing_pages,
		.wire_bytes = d->wire_bytes,
		.faults = d->latency.count,
		.fault_median_us = fault_latency_median(&d->latency),
		.fault_worst_us = d->latency.worst_us,
		.duplicate_pages = d->duplicate_pages,
		.sessions = d->sessions,
		.connected = d->session,
	};
	for (unsigned i = 0; i < MEM_POSTCOPY_CHANNELS; i++)
		out->wire_bytes += d->conns[i] ? conn_bytes_received(d->conns[i]) : 0;
}

void mem_postcopy_dest_abort(struct mem_postcopy_dest *d)
{
	pthread_mutex_lock(&d->lock);
	bool unregister = d->begun && !d->complete && !d->aborted;
	d->aborted = true;
	postcopy_dest_cut(d);
	pthread_cond_broadcast(&d->changed);
	pthread_mutex_unlock(&d->lock);
	postcopy_dest_wake(d);
	if (unregister)
		faults_unregister(d->opt.faults_fd, &d->opt.space, NULL);
}

void mem_postcopy_dest_free(struct mem_postcopy_dest *d)
{
	if (!d)
		return;
	if (d->manager_started && mem_postcopy_dest_pending(d))
		mem_postcopy_dest_abort(d);

	struct timespec until = clock_timespec(clock_now_ns() + d->opt.timeout_ms * UINT64_C(1000000));

	pthread_mutex_lock(&d->lock);
	/* The source closes once it has heard that nothing is missing. */
	while (d->complete && d->session && !d->over)
		if (pthread_cond_timedwait(&d->changed, &d->lock, &until) == ETIMEDOUT)
			break;
	d->closing = true;
	postcopy_dest_cut(d);
	pthread_cond_broadcast(&d->changed);
	pthread_mutex_unlock(&d->lock);
	if (d->wake_fd >= 0)
		postcopy_dest_wake(d);
	if (d->manager_started)
		pthread_join(d->manager, NULL);
	if (d->server_started)
		pthread_join(d->server, NULL);
	for (unsigned i = 0; i < MEM_POSTCOPY_CHANNELS; i++) {
		conn_close(d->waiting[i]);
		postcopy_channel_release(&d->rx[i].channel);
		free(d->rx[i].runs);
		free(d->rx[i].unpacked);
		ZSTD_freeDCtx(d->rx[i].zstd);
	}
	if (d->wake_fd >= 0)
		close(d->wake_fd);
	free(d->expected);
	free(d->missing);
	free(d->faults);
	pthread_cond_destroy(&d->changed);
	pthread_mutex_destroy(&d->lock);
	free(d);
}
