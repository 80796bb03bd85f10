/* SPDX-License-Identifier: Apache-2.0 */
/* The two threads of a sending stream. */
#include <errno.h>
#include <string.h>
#include <time.h>

#include "base/bitmap.h"
#include "base/clock.h"
#include "memxfer/sender_impl.h"

/* How long a broken connection waits for the destination's own words. */
#define REASON_WAIT_MS	  500
#define BEAT_MAX_MS	  1000u
#define BEAT_MIN_MS	  10u
#define BANDWIDTH_LOOK_MS 50u /* so often a changed bandwidth is seen */
#define BURST_LEAST_BYTES (512u << 10)
#define BURST_WEIGHT	  0.2

void mem_deadline(struct timespec *ts, unsigned ms)
{
	clock_gettime(CLOCK_MONOTONIC, ts);
	ts->tv_sec += ms / 1000;
	ts->tv_nsec += (long)(ms % 1000) * 1000000;
	if (ts->tv_nsec >= 1000000000) {
		ts->tv_sec++;
		ts->tv_nsec -= 1000000000;
	}
}

static bool is_broken_connection(int code)
{
	return code == -ECONNRESET || code == -ENODATA || code == -EPIPE || code == -ESHUTDOWN ||
	       code == -ENOTCONN;
}

void mem_sender_fail(struct mem_sender *s, unsigned stream, const struct error *err)
{
	struct timespec until;

	mem_deadline(&until, REASON_WAIT_MS);
	pthread_mutex_lock(&s->lock);
	while (is_broken_connection(err->code) && !error_is_set(&s->failure) && !s->exiting &&
	       pthread_cond_timedwait(&s->changed, &s->lock, &until) == 0)
		;
	if (!error_is_set(&s->failure)) {
		s->failure = *err;
		if (err->code != -ECANCELED)
			error_prefix(&s->failure, "memory stream %u", stream);
	}
	atomic_store(&s->stop, true);
	pthread_cond_broadcast(&s->changed);
	pthread_mutex_unlock(&s->lock);
	for (unsigned i = 0; i < s->opt.nstreams; i++)
		conn_shutdown(s->streams[i]);
}

static unsigned beat_interval_ms(const struct mem_sender *s)
{
	unsigned ms = s->opt.timeout_ms / 4;

	if (!s->opt.timeout_ms || ms > BEAT_MAX_MS)
		return BEAT_MAX_MS;
	return ms < BEAT_MIN_MS ? BEAT_MIN_MS : ms;
}

static int send_beat(struct mem_worker *w, struct error *err)
{
	struct mem_sender *s = w->sender;

	pthread_mutex_lock(&s->lock);
	w->beats_sent++;
	if (!w->beat_waits_since_ns)
		w->beat_waits_since_ns = clock_now_ns();
	pthread_mutex_unlock(&s->lock);
	return mem_tx_control(&w->tx, MEM_FRAME_BEAT, NULL, 0, err);
}

/* Sends a beat and waits for the answer: everything before it is then in the destination's memory, and the
 * time that took is the true one, sockets' buffers included. The shortest counts as the
 * round trip. */
static int drain(struct mem_worker *w, struct error *err)
{
	struct mem_sender *s = w->sender;
	uint64_t before = clock_now_ns(), wanted;
	struct timespec until;
	int ret = send_beat(w, err);

	if (ret < 0)
		return ret;
	mem_deadline(&until, s->opt.timeout_ms ? s->opt.timeout_ms : 3600000);
	pthread_mutex_lock(&s->lock);
	wanted = w->beats_sent;
	while (w->beats_answered < wanted && !error_is_set(&s->failure) && ret == 0) {
		if (pthread_cond_timedwait(&s->changed, &s->lock, &until) == ETIMEDOUT)
			ret = error_set(err, ETIMEDOUT, "the destination answered nothing for %u ms",
					s->opt.timeout_ms);
	}
	if (ret == 0 && error_is_set(&s->failure))
		ret = error_set(err, ECANCELED, "memory transfer was stopped");
	uint64_t took = clock_now_ns() - before;
	if (ret == 0 && (!s->round_trip_ns || took < s->round_trip_ns))
		s->round_trip_ns = took;
	w->drain_ns = took - (took < s->round_trip_ns ? took : s->round_trip_ns);
	pthread_mutex_unlock(&s->lock);
	return ret;
}

/* In steps, as the bandwidth may change and the transfer end meanwhile; the destination hears of us all the
 * same. */
static int wait_for_bandwidth(struct mem_worker *w, uint64_t quiet_ns, struct error *err)
{
	struct mem_sender *s = w->sender;
	uint64_t ns;

	while ((ns = rate_limit_wait_ns(s->opt.bandwidth)) > 0) {
		if (atomic_load_explicit(&s->stop, memory_order_relaxed))
			return error_set(err, ECANCELED, "memory transfer was stopped");
		if (clock_now_ns() - w->tx.last_send_ns > quiet_ns) {
			int ret = send_beat(w, err);

			if (ret < 0)
				return ret;
		}
		clock_sleep_ms(ns < BANDWIDTH_LOOK_MS * UINT64_C(1000000) ? (unsigned)(ns / 1000000) + 1
									  : BANDWIDTH_LOOK_MS);
	}
	return 0;
}

/*
 * What waited for its bandwidth finds an idle link. How long it takes to arrive, which the answer to a beat
 * behind it tells, is how fast the last round will go, which waits for none. `pages` were sent since
 * begin_ns.
 */
static int measure_burst(struct mem_worker *w, uint64_t begin_ns, uint64_t pages, struct error *err)
{
	struct mem_sender *s = w->sender;

	pthread_mutex_lock(&s->lock);
	bool wanted = !w->burst_beat && pages * MEM_PAGE_BYTES >= BURST_LEAST_BYTES;
	if (wanted) {
		w->burst_beat = w->beats_sent + 1;
		w->burst_ns = begin_ns;
		w->burst_bytes = pages * MEM_PAGE_BYTES;
	}
	pthread_mutex_unlock(&s->lock);
	return wanted ? send_beat(w, err) : 0;
}

/* A beat was answered. s->lock held. */
static void burst_arrived(struct mem_worker *w)
{
	struct mem_sender *s = w->sender;
	uint64_t took = clock_now_ns() - w->burst_ns;

	if (!w->burst_beat || w->beats_answered < w->burst_beat)
		return;
	w->burst_beat = 0;
	if (took <= s->round_trip_ns)
		return;
	double rate = (double)w->burst_bytes * 1e9 / (double)(took - s->round_trip_ns);
	s->burst_rate = s->burst_rate > 0 ? s->burst_rate + (rate - s->burst_rate) * BURST_WEIGHT : rate;
}

static int do_round(struct mem_worker *w, struct error *err)
{
	struct mem_sender *s = w->sender;
	uint64_t nregions = MEM_REGIONS(s->opt.space.npages),
		 quiet_ns = beat_interval_ms(s) * UINT64_C(1000000);
	int ret;

	w->tx.round = atomic_load(&s->round);
	mem_tx_delta_round(&w->tx);
	for (uint64_t r = w->tx.index; r < nregions; r += s->opt.nstreams) {
		uint64_t first = r * MEM_REGION_PAGES;
		uint64_t n = s->opt.space.npages - first < MEM_REGION_PAGES ? s->opt.space.npages - first
									    : MEM_REGION_PAGES;

		if (bitmap_next_set(s->dirty, first + n, first) == first + n)
			continue;
		if (atomic_load_explicit(&s->stop, memory_order_relaxed))
			return error_set(err, ECANCELED, "memory transfer was stopped");
		bool waited = rate_limit_wait_ns(s->opt.bandwidth) > 0;
		ret = wait_for_bandwidth(w, quiet_ns, err);
		uint64_t begin_ns = clock_now_ns(), pages = w->tx.totals.data_pages;
		if (ret == 0)
			ret = s->opt.dirty.clear(s->opt.dirty.opaque, first, n, s->dirty, err);
		if (ret == 0)
			ret = mem_tx_pages(&w->tx, s->dirty, first, n, err);
		if (ret == 0 && waited)
			ret = measure_burst(w, begin_ns, w->tx.totals.data_pages - pages, err);
		if (ret < 0)
			return ret;
		bitmap_clear_range(s->dirty, first, n);
		if (s->announced)
			bitmap_clear_range(s->announced, first, n);
		/* Long stretches of zeroes make few frames, unchanged pages none: the destination must hear
		 * of us all the same. */
		if (clock_now_ns() - w->tx.last_send_ns > quiet_ns) {
			ret = send_beat(w, err);
			if (ret < 0)
				return ret;
		}
	}
	ret = drain(w, err);
	mem_tx_delta_arrived(&w->tx, w->drain_ns);
	/* The first round leaves a backlog; once more, for the round trip alone. */
	return ret == 0 && w->tx.round == 1 ? drain(w, err) : ret;
}

/* Done when the destination has made room. */
static int do_announce(struct mem_worker *w, struct error *err)
{
	struct mem_sender *s = w->sender;
	uint64_t npages = s->opt.space.npages;
	int ret = 0;

	for (uint64_t r = w->tx.index; r < MEM_REGIONS(npages) && ret == 0; r += s->opt.nstreams) {
		uint64_t first = r * MEM_REGION_PAGES;
		uint64_t n = npages - first < MEM_REGION_PAGES ? npages - first : MEM_REGION_PAGES;

		ret = mem_tx_later(&w->tx, s->fresh, first, n, err);
	}
	if (ret == 0)
		ret = mem_tx_flush(&w->tx, err);
	return ret < 0 ? ret : drain(w, err);
}

static int do_final(struct mem_worker *w, struct error *err)
{
	struct mem_sender *s = w->sender;
	uint8_t totals[MEM_TOTALS_BYTES];
	struct timespec until;
	int ret = mem_tx_control(&w->tx, MEM_FRAME_BARRIER, NULL, 0, err);

	if (ret < 0)
		return ret;
	w->tx.round = atomic_load(&s->round);
	w->tx.final = true;
	ret = s->later ? mem_tx_later(&w->tx, s->dirty, w->final_first, w->final_end - w->final_first, err)
		       : mem_tx_pages(&w->tx, s->dirty, w->final_first, w->final_end - w->final_first, err);
	if (ret == 0)
		ret = mem_tx_flush(&w->tx, err);
	if (ret < 0)
		return ret;
	mem_totals_encode(totals, &w->tx.totals);
	pthread_mutex_lock(&s->lock);
	w->ended = true;
	pthread_mutex_unlock(&s->lock);
	ret = mem_tx_control(&w->tx, MEM_FRAME_END, totals, sizeof totals, err);
	if (ret < 0)
		return ret;
	mem_deadline(&until, s->opt.timeout_ms ? s->opt.timeout_ms : 3600000);
	pthread_mutex_lock(&s->lock);
	while (!w->acked && !error_is_set(&s->failure) && ret == 0) {
		if (pthread_cond_timedwait(&s->changed, &s->lock, &until) == ETIMEDOUT)
			ret = error_set(err, ETIMEDOUT,
					"the destination did not acknowledge the end within %u ms",
					s->opt.timeout_ms);
	}
	if (ret == 0 && !w->acked)
		ret = error_set(err, ECANCELED, "memory transfer was stopped");
	pthread_mutex_unlock(&s->lock);
	return ret;
}

/* An idle stream keeps beating, and notices a destination that does not answer. */
static int beat_while_idle(struct mem_worker *w, struct error *err)
{
	struct mem_sender *s = w->sender;
	uint64_t since;
	bool ended;

	pthread_mutex_lock(&s->lock);
	since = w->beat_waits_since_ns;
	ended = w->ended || error_is_set(&s->failure);
	pthread_mutex_unlock(&s->lock);
	if (ended)
		return 0;
	if (s->opt.timeout_ms && since && clock_now_ns() - since > s->opt.timeout_ms * UINT64_C(1000000))
		return error_set(err, ETIMEDOUT, "the destination answered nothing for %u ms",
				 s->opt.timeout_ms);
	return send_beat(w, err);
}

static void write_jobs(struct mem_worker *w)
{
	struct mem_sender *s = w->sender;
	uint64_t seen = 0;

	for (;;) {
		struct error err = ERROR_INIT;
		enum mem_job job = JOB_NONE;
		struct timespec until;
		int ret;

		mem_deadline(&until, beat_interval_ms(s));
		pthread_mutex_lock(&s->lock);
		while (s->jobs_posted == seen && !s->exiting &&
		       pthread_cond_timedwait(&s->work, &s->lock, &until) == 0)
			;
		if (s->exiting) {
			pthread_mutex_unlock(&s->lock);
			return;
		}
		if (s->jobs_posted != seen)
			job = s->job;
		seen = s->jobs_posted;
		pthread_mutex_unlock(&s->lock);
		if (job == JOB_ROUND)
			ret = do_round(w, &err);
		else if (job == JOB_ANNOUNCE)
			ret = do_announce(w, &err);
		else if (job == JOB_FINAL)
			ret = do_final(w, &err);
		else
			ret = beat_while_idle(w, &err);
		if (ret < 0)
			mem_sender_fail(s, w->tx.index, &err);
		if (job == JOB_NONE)
			continue;
		pthread_mutex_lock(&s->lock);
		w->jobs_done = seen;
		pthread_cond_broadcast(&s->changed);
		pthread_mutex_unlock(&s->lock);
	}
}

void *mem_sender_writer(void *arg)
{
	struct mem_worker *w = arg;

	mem_stream_thread(&w->sender->yield, "mem send", w->tx.index);
	write_jobs(w);
	mem_yield_leave(&w->sender->yield);
	return NULL;
}

static int read_reply(struct mem_worker *w, struct mem_header *h, uint8_t body[MEM_SENTENCE_MAX],
		      struct error *err)
{
	struct mem_sender *s = w->sender;
	uint8_t raw[MEM_HEADER_BYTES];
	int ret = conn_read_full(s->streams[w->tx.index], raw, sizeof raw, 0, err);

	if (ret == 0)
		ret = mem_header_decode(raw, h, err);
	if (ret < 0)
		return ret;
	if (h->type != MEM_FRAME_BEAT && h->type != MEM_FRAME_ACK && h->type != MEM_FRAME_ERROR)
		return error_set(err, EPROTO, "the destination sent a frame of type %s",
				 mem_frame_name(h->type));
	if (h->stream != w->tx.index || h->epoch != s->opt.epoch || h->sequence != w->reply_sequence++)
		return error_set(err, EPROTO, "the destination answered for another stream, epoch or time");
	ret = conn_read_full(s->streams[w->tx.index], body, h->wire_len, s->opt.timeout_ms, err);
	if (ret < 0)
		return ret;
	if (mem_body_sum(NULL, 0, body, h->wire_len) != h->body_sum)
		return error_set(err, EBADMSG, "the destination's answer: checksum does not match");
	return 0;
}

static void read_replies(struct mem_worker *w)
{
	struct mem_sender *s = w->sender;

	for (;;) {
		uint8_t body[MEM_SENTENCE_MAX];
		struct error err = ERROR_INIT;
		struct mem_header h;
		int ret = read_reply(w, &h, body, &err);

		if (ret == 0 && h.type == MEM_FRAME_ERROR) {
			for (uint32_t i = 0; i < h.wire_len; i++) {
				if (body[i] < ' ' || body[i] == 0x7f)
					body[i] = '?';
			}
			ret = error_set(&err, EREMOTEIO, "the destination says: %.*s", (int)h.wire_len, body);
		}
		if (ret < 0) {
			mem_sender_fail(s, w->tx.index, &err);
			return;
		}
		pthread_mutex_lock(&s->lock);
		if (h.type == MEM_FRAME_ACK && w->ended) {
			w->acked = true;
		} else if (h.type == MEM_FRAME_ACK) {
			ret = error_set(&err, EPROTO, "the destination acknowledged an end before it came");
		} else {
			w->beats_answered++;
			burst_arrived(w);
			w->beat_waits_since_ns = w->beats_answered < w->beats_sent ? clock_now_ns() : 0;
		}
		pthread_cond_broadcast(&s->changed);
		pthread_mutex_unlock(&s->lock);
		if (ret < 0)
			mem_sender_fail(s, w->tx.index, &err);
		if (ret < 0 || h.type == MEM_FRAME_ACK)
			return;
	}
}

void *mem_sender_reader(void *arg)
{
	struct mem_worker *w = arg;

	mem_stream_thread(&w->sender->yield, "mem answers", w->tx.index);
	read_replies(w);
	mem_yield_leave(&w->sender->yield);
	return NULL;
}
