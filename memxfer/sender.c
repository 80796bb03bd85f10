/* SPDX-License-Identifier: Apache-2.0 */
/* Rounds: when the next one begins, and when what is left is small enough to stop the guest for. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bitmap.h"
#include "base/clock.h"
#include "base/cond.h"
#include "base/log.h"
#include "memxfer/holes.h"
#include "memxfer/sender_impl.h"

/* So often, or until there is so little, is announced what comes later. */
#define ANNOUNCE_PASSES	   4
#define ANNOUNCE_FEW_PAGES 256
/* A round with fewer pages says nothing about the rate. */
#define RATE_SAMPLE_PAGES 256
/* Bytes of history that the rate's average holds. */
#define RATE_HISTORY_BYTES (256.0 * (1 << 20))
#define STAT_INTERVAL_NS   UINT64_C(200000000)

static bool valid(const struct mem_sender_options *o, struct error *err)
{
	if (!o->nstreams || o->nstreams > MEM_STREAMS_MAX)
		error_set(err, EINVAL, "memory transfer: %u streams; 1 to %u are possible", o->nstreams,
			  MEM_STREAMS_MAX);
	else if (!o->space.npages || !o->space.base || o->space.fd < 0)
		error_set(err, EINVAL, "memory transfer: no guest memory");
	else if (o->slow_max_percent > 99 || (o->slow_max_percent && !o->brake.set_speed))
		error_set(err, EINVAL, "memory transfer: the guest cannot be slowed by %u %%",
			  o->slow_max_percent);
	else if (o->compress != MEM_COMPRESS_OFF &&
		 (!o->zstd_level || o->zstd_level > ZSTD_maxCLevel() || o->zstd_level < ZSTD_minCLevel()))
		error_set(err, EINVAL, "memory transfer: compression level %d is not between %d and %d, or 0",
			  o->zstd_level, ZSTD_minCLevel(), ZSTD_maxCLevel());
	else
		return true;
	return false;
}

int mem_sender_create(const struct mem_sender_options *opt, struct mem_sender **out, struct error *err)
{
	struct mem_sender *s;
	int ret = 0;

	*out = NULL;
	if (!valid(opt, err))
		return -EINVAL;
	s = calloc(1, sizeof *s);
	if (!s)
		return error_errno(err, ENOMEM, "memory transfer");
	s->opt = *opt;
	memcpy(s->streams, opt->streams, opt->nstreams * sizeof *opt->streams);
	s->opt.streams = s->streams;
	mem_pace_init(&s->pace, &(struct mem_pace_options){
					.budget_us = opt->downtime_target_ms * UINT64_C(1000),
					.max_rounds = opt->max_rounds,
					.max_time_ms = opt->max_time_ms,
					.slow_max_percent = opt->slow_max_percent,
					.shrink = opt->shrink > 0 ? opt->shrink : 1,
				});
	pthread_mutex_init(&s->lock, NULL);
	cond_init_monotonic(&s->work);
	cond_init_monotonic(&s->changed);
	idle_cpu_init(&s->idle_cpu);
	mem_yield_init(&s->yield);
	if (!opt->guest_stands)
		mem_yield_begin(&s->yield); /* its threads begin with it */
	for (unsigned i = 0; i < opt->nstreams; i++)
		s->sent_before += conn_bytes_sent(opt->streams[i]);
	s->dirty = bitmap_alloc(opt->space.npages);
	if (!s->dirty)
		ret = error_errno(err, ENOMEM, "memory transfer: bitmap");
	if (ret == 0)
		ret = page_hashes_create(opt->space.npages, &s->hashes, err);
	if (ret == 0 && opt->delta_cache_bytes)
		ret = delta_cache_create(opt->delta_cache_bytes, opt->space.npages, opt->nstreams, &s->deltas,
					 err);
	for (unsigned i = 0; i < opt->nstreams && ret == 0; i++) {
		s->workers[i].sender = s;
		ret = mem_tx_init(&s->workers[i].tx, &s->opt, i, &s->counters, &s->stop, &s->idle_cpu,
				  s->hashes, err);
		if (ret == 0)
			ret = mem_tx_delta_init(&s->workers[i].tx, s->deltas, err);
		s->workers[i].tx.yield = &s->yield;
	}
	for (unsigned i = 0; i < opt->nstreams && ret == 0; i++) {
		struct mem_worker *w = &s->workers[i];

		ret = -pthread_create(&w->writer, NULL, mem_sender_writer, w);
		w->writer_started = ret == 0;
		if (ret == 0)
			ret = -pthread_create(&w->reader, NULL, mem_sender_reader, w);
		w->reader_started = ret == 0;
		if (ret < 0)
			error_errno(err, ret, "memory transfer: thread");
	}
	if (ret < 0) {
		mem_sender_free(s);
		return ret;
	}
	*out = s;
	return 0;
}

static int failure(struct mem_sender *s, struct error *err)
{
	int code;

	pthread_mutex_lock(&s->lock);
	code = s->failure.code;
	if (code)
		error_copy(err, &s->failure);
	pthread_mutex_unlock(&s->lock);
	return code;
}

/* Lock held. Streams that yield may not even get as far as seeing that their time is up. */
static void wait_for_change(struct mem_sender *s)
{
	struct timespec until;

	if (!s->yield.on) {
		pthread_cond_wait(&s->changed, &s->lock);
		return;
	}
	mem_deadline(&until, MEM_YIELD_MS);
	pthread_cond_timedwait(&s->changed, &s->lock, &until);
	mem_yield_look(&s->yield);
}

/* Posts a job to all streams and waits until each is done with it; a failed stream is done soon, as all
 * connections are shut down then. */
static int run_job(struct mem_sender *s, enum mem_job job, struct error *err)
{
	pthread_mutex_lock(&s->lock);
	s->job = job;
	s->jobs_posted++;
	pthread_cond_broadcast(&s->work);
	for (unsigned i = 0; i < s->opt.nstreams;) {
		if (s->workers[i].jobs_done == s->jobs_posted)
			i++;
		else
			wait_for_change(s);
	}
	pthread_mutex_unlock(&s->lock);
	return failure(s, err);
}

/* End-to-end rate of data, averaged with the weight of the bytes that a round moved. */
static void measure_rate(struct mem_sender *s, uint64_t data_pages, uint64_t all_pages, uint64_t ns)
{
	double seconds = (double)(ns ? ns : 1) / 1e9;
	double bytes = (double)data_pages * MEM_PAGE_BYTES, weight;

	if (data_pages < RATE_SAMPLE_PAGES) {
		if (s->rate <= 0 && all_pages >= RATE_SAMPLE_PAGES)
			s->rate = (double)all_pages * MEM_PAGE_BYTES / seconds;
		return;
	}
	if (s->rate_weight <= 0) {
		s->rate = bytes / seconds;
		s->rate_weight = bytes;
		return;
	}
	s->rate_weight =
		s->rate_weight + bytes < RATE_HISTORY_BYTES ? s->rate_weight + bytes : RATE_HISTORY_BYTES;
	weight = bytes / s->rate_weight;
	s->rate += (bytes / seconds - s->rate) * (weight < 1 ? weight : 1);
}

static int collect(struct mem_sender *s, uint64_t *npages, struct error *err)
{
	uint64_t before = clock_now_ns();
	int ret = s->opt.dirty.collect(s->opt.dirty.opaque, s->dirty, err);

	if (ret < 0)
		return error_prefix(err, "memory transfer: dirty pages");
	*npages = bitmap_count(s->dirty, s->opt.space.npages);
	s->collect_ns = clock_now_ns() - before;
	return 0;
}

static void set_remaining(struct mem_sender *s, uint64_t npages)
{
	atomic_store(&s->round_pages, npages);
	atomic_store(&s->counters.remaining_pages, (int64_t)npages);
}

static int begin(struct mem_sender *s, struct error *err)
{
	uint64_t populated;
	int ret = s->opt.dirty.start(s->opt.dirty.opaque, err);

	if (ret < 0)
		return error_prefix(err, "memory transfer: dirty tracking");
	s->tracking = true;
	s->started_ns = clock_now_ns();
	ret = mem_populated_pages(&s->opt.space, &populated, err);
	if (ret < 0)
		return ret;
	atomic_store(&s->total_pages, populated);
	set_remaining(s, populated);
	bitmap_set_range(s->dirty, 0, s->opt.space.npages);
	return 0;
}

static uint64_t since_ms(uint64_t then_ns, uint64_t now_ns)
{
	return (now_ns - then_ns) / 1000000;
}

/* What the dirty log has become since it was looked at last, at then_ns. */
static void measure_dirty_rate(struct mem_sender *s, uint64_t npages, uint64_t then_ns, uint64_t now_ns)
{
	uint64_t rate = (uint64_t)((double)npages * MEM_PAGE_BYTES * 1e9 / (double)(now_ns - then_ns + 1));
	uint64_t before = atomic_load(&s->dirty_rate);

	atomic_store(&s->dirty_rate, atomic_load(&s->round) == 1 ? rate : (before + rate) / 2);
}

/* Of the last round: it waits for no bandwidth, which the others do. */
static double last_rate(struct mem_sender *s)
{
	pthread_mutex_lock(&s->lock);
	double burst = s->burst_rate;
	pthread_mutex_unlock(&s->lock);
	bool limited = s->opt.bandwidth && rate_limit_get(s->opt.bandwidth);
	return limited && burst > s->rate ? burst : s->rate;
}

/* The round that began at `began_ns` with so many dirty pages left `dirty` of them. */
static enum mem_pace_verdict judge(struct mem_sender *s, uint64_t began_ns, uint64_t now_ns, uint64_t began,
				   uint64_t dirty)
{
	struct mem_prediction p = {
		.dirty_bytes = dirty * MEM_PAGE_BYTES,
		.dirty_bytes_per_s = (double)atomic_load(&s->dirty_rate),
		.rate_bytes_per_s = last_rate(s),
		.collect_us = s->collect_ns / 1000,
		.round_trip_us = s->round_trip_ns / 1000,
		.pause = s->opt.pause,
	};
	struct mem_pace_round r = {
		.rounds = atomic_load(&s->round) - s->rounds_before,
		.elapsed_ms = since_ms(s->started_ns, now_ns),
		.ns = now_ns - began_ns,
		.began_bytes = began * MEM_PAGE_BYTES,
		.left_bytes = p.dirty_bytes,
		.rate_bytes_per_s = p.rate_bytes_per_s,
	};
	double speed = s->pace.speed;

	r.predicted_us = mem_predict_us(&p, &r.fixed_us);
	atomic_store(&s->predicted_us, r.predicted_us);
	enum mem_pace_verdict verdict = mem_pace_next(&s->pace, &r);
	if (s->pace.speed < speed || s->pace.speed > speed)
		s->opt.brake.set_speed(s->opt.brake.opaque, s->pace.speed);
	log_debug("memory round %u: %llu ms, %llu pages became %llu, downtime of %llu us, speed %.2f",
		  atomic_load(&s->round), (unsigned long long)(r.ns / 1000000), (unsigned long long)began,
		  (unsigned long long)dirty, (unsigned long long)r.predicted_us, s->pace.speed);
	return verdict;
}

static int one_round(struct mem_sender *s, uint64_t *collected_ns, enum mem_pace_verdict *verdict,
		     struct error *err)
{
	uint64_t data = atomic_load(&s->counters.data_pages), zero = atomic_load(&s->counters.zero_pages);
	uint64_t began = atomic_load(&s->round_pages), before = clock_now_ns(), dirty;
	int ret = run_job(s, JOB_ROUND, err);
	uint64_t now = clock_now_ns();

	if (ret < 0)
		return ret;
	data = atomic_load(&s->counters.data_pages) - data;
	zero = atomic_load(&s->counters.zero_pages) - zero;
	measure_rate(s, data, data + zero, now - before);
	ret = collect(s, &dirty, err);
	if (ret < 0)
		return ret;
	measure_dirty_rate(s, dirty, *collected_ns, now);
	*collected_ns = now;
	set_remaining(s, dirty);
	*verdict = judge(s, before, now, began, dirty);
	return 0;
}

/* once: there are to be no more rounds than this one. */
static int precopy(struct mem_sender *s, bool once, bool *limit_hit, struct error *err)
{
	enum mem_pace_verdict verdict = MEM_PACE_ON;
	uint64_t collected_ns, since;
	int ret = failure(s, err);

	*limit_hit = false;
	/* Again after a pause that came to nothing: what was written since joins what remained. */
	if (ret == 0 && s->tracking) {
		ret = collect(s, &since, err);
		if (ret == 0)
			set_remaining(s, since);
	} else if (ret == 0) {
		ret = begin(s, err);
	}
	mem_pace_again(&s->pace);
	if (s->pace.speed < 1)
		s->opt.brake.set_speed(s->opt.brake.opaque, s->pace.speed);
	if (!s->opt.guest_stands)
		mem_yield_begin(&s->yield);
	for (collected_ns = clock_now_ns(); ret == 0 && verdict == MEM_PACE_ON;) {
		atomic_fetch_add(&s->round, 1);
		ret = one_round(s, &collected_ns, &verdict, err);
		if (once && verdict == MEM_PACE_ON)
			verdict = MEM_PACE_OVER;
	}
	mem_yield_end(&s->yield); /* whatever comes next, the guest may be waiting for it */
	*limit_hit = s->limit_hit = verdict == MEM_PACE_OVER;
	return ret;
}

int mem_sender_precopy(struct mem_sender *s, bool *limit_hit, struct error *err)
{
	s->rounds_before = atomic_load(&s->round);
	return precopy(s, false, limit_hit, err);
}

int mem_sender_catch_up(struct mem_sender *s, bool *limit_hit, struct error *err)
{
	return precopy(s, s->limit_hit, limit_hit, err);
}

void mem_sender_pause_costs(struct mem_sender *s, const struct mem_pause_costs *costs)
{
	s->opt.pause = *costs;
}

/* Splits the dirty pages evenly among the streams, at words of the bitmap. */
static void stripe(struct mem_sender *s, uint64_t dirty)
{
	uint64_t nwords = BITMAP_WORDS(s->opt.space.npages), word = 0, given = 0;

	for (unsigned i = 0; i < s->opt.nstreams; i++) {
		uint64_t upto = dirty * (i + 1) / s->opt.nstreams;
		struct mem_worker *w = &s->workers[i];

		w->final_first = word * 64;
		while (word < nwords && (given < upto || i == s->opt.nstreams - 1))
			given += (uint64_t)__builtin_popcountll(s->dirty[word++]);
		w->final_end = word * 64 < s->opt.space.npages ? word * 64 : s->opt.space.npages;
		if (w->final_first > w->final_end)
			w->final_first = w->final_end;
	}
}

static int finish(struct mem_sender *s, struct error *err)
{
	uint64_t dirty;
	int ret = failure(s, err);

	if (ret < 0)
		return ret;
	if (!s->tracking)
		return error_set(err, EINVAL, "memory transfer: finish before pre-copy");
	ret = collect(s, &dirty, err);
	if (ret < 0)
		return ret;
	atomic_store(&s->final_collect_us, s->collect_ns / 1000);
	set_remaining(s, dirty);
	atomic_fetch_add(&s->round, 1);
	/* What has been announced need not be named again. */
	for (uint64_t w = 0; s->later && s->announced && w < BITMAP_WORDS(s->opt.space.npages); w++)
		s->dirty[w] &= ~s->announced[w];
	if (s->later)
		dirty = bitmap_count(s->dirty, s->opt.space.npages);
	stripe(s, dirty);
	return run_job(s, JOB_FINAL, err);
}

/* What is dirty and has not been announced yet, into `fresh`: how many pages. */
static uint64_t find_fresh(struct mem_sender *s)
{
	for (uint64_t w = 0; w < BITMAP_WORDS(s->opt.space.npages); w++)
		s->fresh[w] = s->dirty[w] & ~s->announced[w];
	return bitmap_count(s->fresh, s->opt.space.npages);
}

int mem_sender_announce_later(struct mem_sender *s, struct error *err)
{
	uint64_t dirty, fresh = UINT64_MAX;
	int ret = failure(s, err);

	if (!s->announced)
		s->announced = bitmap_alloc(s->opt.space.npages);
	if (!s->fresh)
		s->fresh = bitmap_alloc(s->opt.space.npages);
	if (ret == 0 && (!s->announced || !s->fresh))
		ret = error_errno(err, ENOMEM, "memory transfer: bitmap");
	/* The guest goes on meanwhile: what it wrote while the destination made room is far less. */
	for (unsigned pass = 0; ret == 0 && pass < ANNOUNCE_PASSES && fresh > ANNOUNCE_FEW_PAGES; pass++) {
		ret = collect(s, &dirty, err);
		if (ret < 0)
			break;
		fresh = find_fresh(s);
		ret = run_job(s, JOB_ANNOUNCE, err);
		for (uint64_t w = 0; ret == 0 && w < BITMAP_WORDS(s->opt.space.npages); w++)
			s->announced[w] |= s->fresh[w];
	}
	return ret;
}

int mem_sender_finish_later(struct mem_sender *s, const uint64_t **later, uint64_t *npages, struct error *err)
{
	int ret;

	s->later = true;
	ret = finish(s, err);
	for (uint64_t w = 0; ret == 0 && s->announced && w < BITMAP_WORDS(s->opt.space.npages); w++)
		s->dirty[w] |= s->announced[w];
	if (ret == 0) {
		*later = s->dirty;
		*npages = bitmap_count(s->dirty, s->opt.space.npages);
	}
	return ret;
}

int mem_sender_finish(struct mem_sender *s, struct error *err)
{
	int ret = finish(s, err);

	if (ret == 0)
		bitmap_clear_range(s->dirty, 0, s->opt.space.npages);
	return ret;
}

void mem_sender_cancel(struct mem_sender *s)
{
	struct error err = ERROR_INIT;

	error_set(&err, ECANCELED, "memory transfer was cancelled");
	mem_sender_fail(s, 0, &err);
}

void mem_sender_stats(struct mem_sender *s, struct mem_stats *out)
{
	int64_t remaining = atomic_load(&s->counters.remaining_pages);
	uint64_t now = clock_now_ns(), wire = 0;

	*out = (struct mem_stats){
		.round = atomic_load(&s->round),
		.total_bytes = atomic_load(&s->total_pages) * MEM_PAGE_BYTES,
		.remaining_bytes = remaining > 0 ? (uint64_t)remaining * MEM_PAGE_BYTES : 0,
		.round_bytes = atomic_load(&s->round_pages) * MEM_PAGE_BYTES,
		.sent_pages = atomic_load(&s->counters.data_pages),
		.zero_pages = atomic_load(&s->counters.zero_pages),
		.hole_pages = atomic_load(&s->counters.hole_pages),
		.unchanged_pages = atomic_load(&s->counters.unchanged_pages),
		.delta_pages = atomic_load(&s->counters.delta_pages),
		.delta_bytes = atomic_load(&s->counters.delta_bytes),
		.dirty_bytes_per_s = atomic_load(&s->dirty_rate),
		.predicted_downtime_us = atomic_load(&s->predicted_us),
		.final_collect_us = atomic_load(&s->final_collect_us),
	};
	for (unsigned i = 0; i < s->opt.nstreams; i++)
		wire += conn_bytes_sent(s->streams[i]);
	out->wire_bytes = wire - atomic_load(&s->sent_before);
	pthread_mutex_lock(&s->lock);
	if (!s->stat_ns) {
		s->stat_ns = now;
		s->stat_pages = out->sent_pages;
	} else if (now - s->stat_ns >= STAT_INTERVAL_NS) {
		double sample = (double)(out->sent_pages - s->stat_pages) * MEM_PAGE_BYTES * 1e9 /
				(double)(now - s->stat_ns);

		s->stat_rate = s->stat_rate > 0 ? s->stat_rate + (sample - s->stat_rate) * 0.3 : sample;
		s->stat_ns = now;
		s->stat_pages = out->sent_pages;
	}
	out->rate_bytes_per_s = (uint64_t)s->stat_rate;
	pthread_mutex_unlock(&s->lock);
}

void mem_sender_free(struct mem_sender *s)
{
	if (!s)
		return;
	atomic_store(&s->stop, true);
	mem_yield_end(&s->yield);
	pthread_mutex_lock(&s->lock);
	s->exiting = true;
	pthread_cond_broadcast(&s->work);
	pthread_cond_broadcast(&s->changed);
	pthread_mutex_unlock(&s->lock);
	for (unsigned i = 0; i < s->opt.nstreams; i++)
		conn_shutdown(s->streams[i]);
	for (unsigned i = 0; i < s->opt.nstreams; i++) {
		if (s->workers[i].writer_started)
			pthread_join(s->workers[i].writer, NULL);
		if (s->workers[i].reader_started)
			pthread_join(s->workers[i].reader, NULL);
		mem_tx_release(&s->workers[i].tx);
	}
	if (s->tracking)
		s->opt.dirty.stop(s->opt.dirty.opaque);
	free(s->dirty);
	free(s->announced);
	free(s->fresh);
	page_hashes_free(s->hashes);
	delta_cache_free(s->deltas);
	idle_cpu_release(&s->idle_cpu);
	mem_yield_destroy(&s->yield);
	pthread_cond_destroy(&s->work);
	pthread_cond_destroy(&s->changed);
	pthread_mutex_destroy(&s->lock);
	free(s);
}
