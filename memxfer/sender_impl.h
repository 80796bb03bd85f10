/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MEMXFER_SENDER_IMPL_H
#define MEMXFER_SENDER_IMPL_H

#include <pthread.h>
#include <stdatomic.h>

#include "memxfer/stream_tx.h"
#include "memxfer/yield.h"

/*
 * Private to sender*.c. Each stream has a writer thread, which does the jobs that precopy and finish post,
 * and a reader thread for what the destination answers. Everything below `lock` is under it.
 */
enum mem_job { JOB_NONE, JOB_ROUND, JOB_ANNOUNCE, JOB_FINAL };

struct mem_worker {
	struct mem_sender *sender;
	struct mem_tx tx; /* the writer's */
	pthread_t writer, reader;
	bool writer_started, reader_started;
	uint64_t final_first, final_end; /* pages; set before JOB_FINAL is posted */
	uint64_t reply_sequence;	 /* the reader's */
	uint64_t drain_ns;		 /* of the round's last bytes, the round trip not counted */

	uint64_t jobs_done;
	uint64_t beats_sent, beats_answered;
	uint64_t beat_waits_since_ns; /* 0 = every beat is answered */
	uint64_t burst_beat;	      /* that follows a burst which is measured; 0 = none */
	uint64_t burst_ns, burst_bytes;
	bool ended, acked;
};

struct mem_sender {
	struct mem_sender_options opt;
	struct conn *streams[MEM_STREAMS_MAX];
	struct mem_worker workers[MEM_STREAMS_MAX];
	struct mem_tx_counters counters;
	struct idle_cpu idle_cpu;
	struct mem_yield yield; /* both threads of each stream, while the guest runs */
	struct page_hashes *hashes;
	struct delta_cache *deltas; /* NULL: none are sent */
	uint64_t *dirty;	    /* the round's; a region's words are its stream's while a job runs */
	uint64_t *announced;	    /* of these, what the destination knows to come later; NULL: none, ever */
	uint64_t *fresh;	    /* what is being announced */
	bool later;    /* JOB_FINAL names the pages only, and leaves in `dirty` those that it named */
	bool tracking; /* the coordinator's, like what follows */
	uint64_t started_ns;
	double rate; /* data bytes a second, end to end */
	double rate_weight;
	uint64_t collect_ns, round_trip_ns;
	struct mem_pace pace;
	unsigned rounds_before; /* the pre-copy that is under way began */
	bool limit_hit;		/* by it */

	atomic_bool stop;
	_Atomic uint64_t total_pages, round_pages, dirty_rate, predicted_us, sent_before, final_collect_us;
	_Atomic unsigned round;

	pthread_mutex_t lock;
	pthread_cond_t work;	/* a job was posted, or exit */
	pthread_cond_t changed; /* a job was done, an answer came, something failed */
	enum mem_job job;
	uint64_t jobs_posted;
	bool exiting;
	struct error failure; /* the first */
	double burst_rate;    /* of what waited for its bandwidth; 0 = nothing did */
	/* mem_sender_stats' moving average */
	uint64_t stat_ns, stat_pages;
	double stat_rate;
};

/* Keeps the first failure and ends all streams. The reason that the destination gives is better than the
 * broken connection that goes with it, so that is waited for a moment. */
void mem_sender_fail(struct mem_sender *s, unsigned stream, const struct error *err);
void *mem_sender_writer(void *worker);
void *mem_sender_reader(void *worker);
void mem_deadline(struct timespec *ts, unsigned ms);

#endif
