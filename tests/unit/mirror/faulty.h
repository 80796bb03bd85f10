/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A block over a real one that delays, reorders, limits the rate, fails, or falls silent; and that counts
 * overlapping requests in flight, which its user has to prevent.
 */
#ifndef TESTS_UNIT_MIRROR_FAULTY_H
#define TESTS_UNIT_MIRROR_FAULTY_H

#include <check.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/cond.h"
#include "block/block.h"

enum silence {
	SILENCE_NONE,
	SILENCE_BEFORE,
	SILENCE_AFTER
}; /* never executed, or executed without a reply */

struct faulty_item {
	struct faulty_item *next, *prev;
	struct faulty_item *all_next, **all_prev;
	struct faulty *f;
	struct block_request *req, child;
	uint64_t due_ns;
	bool executed;
	int result;
};

struct faulty {
	struct block block; /* first */
	struct block *inner;
	pthread_t thread;
	pthread_mutex_t lock;
	pthread_cond_t wake;
	struct faulty_item *queue; /* not executed, or executed and to be answered; unordered */
	struct faulty_item *all;
	uint64_t delay_ns, delay_max_ns; /* fixed, and random up to */
	uint64_t bytes_per_ms;		 /* 0: unlimited */
	uint64_t last_due_ns;
	unsigned seed;
	unsigned ninflight, nexecuting;
	bool closing;
	/* what the test sets and reads, under lock or before use */
	enum silence silence;
	bool silence_flush_only;
	long silent_after; /* -1: never */
	enum silence silent_after_kind;
	int error;	  /* every change from now on */
	long error_after; /* -1: never */
	int error_op;	  /* only this op fails; -1: all but reads */
	int refuse;	  /* submit returns it */
	atomic_int extents_error;
	bool count_overlaps;
	unsigned overlaps, requests[8];
	uint64_t inflight_bytes, inflight_bytes_max, read_bytes;
	uint64_t *held_log;
};

static inline bool faulty_changes(const struct block_request *r)
{
	return r->op != BLOCK_READ && r->op != BLOCK_FLUSH;
}

static inline void faulty_complete(struct faulty_item *it)
{
	struct faulty *f = it->f;
	struct block_request *req = it->req;
	int result = it->result;
	pthread_mutex_lock(&f->lock);
	if (it->all_next)
		it->all_next->all_prev = it->all_prev;
	*it->all_prev = it->all_next;
	f->inflight_bytes -= req->len_bytes;
	pthread_mutex_unlock(&f->lock);
	free(it);
	req->done(req, result);
	pthread_mutex_lock(&f->lock);
	f->ninflight--;
	pthread_cond_broadcast(&f->wake);
	pthread_mutex_unlock(&f->lock);
}

static inline void faulty_executed(struct block_request *child, int result)
{
	struct faulty_item *it = child->opaque;
	struct faulty *f = it->f;
	pthread_mutex_lock(&f->lock);
	it->executed = true;
	it->result = result;
	it->due_ns = 0;
	it->next = f->queue;
	f->queue = it;
	f->nexecuting--;
	pthread_cond_broadcast(&f->wake);
	pthread_mutex_unlock(&f->lock);
}

/* lock held */
static inline bool faulty_is_due(const struct faulty *f, const struct faulty_item *it, uint64_t now,
				 bool *never)
{
	enum silence kind = f->silence;
	if (f->silence_flush_only && it->req->op != BLOCK_FLUSH)
		kind = SILENCE_NONE;
	if (kind == SILENCE_BEFORE || (kind == SILENCE_AFTER && it->executed)) {
		*never = true;
		return false;
	}
	*never = false;
	return it->due_ns <= now;
}

static inline void *faulty_main(void *arg)
{
	struct faulty *f = arg;
	pthread_mutex_lock(&f->lock);
	for (;;) {
		uint64_t now = clock_now_ns(), first = UINT64_MAX;
		struct faulty_item **p = &f->queue, *it = NULL;
		for (; *p; p = &(*p)->next) {
			bool never;
			if (faulty_is_due(f, *p, now, &never)) {
				it = *p;
				*p = it->next;
				break;
			}
			if (!never && (*p)->due_ns < first)
				first = (*p)->due_ns;
		}
		if (it && it->executed) {
			pthread_mutex_unlock(&f->lock);
			faulty_complete(it);
			pthread_mutex_lock(&f->lock);
			continue;
		}
		if (it) {
			bool fails = f->error && faulty_changes(it->req) &&
				     (f->error_op < 0 || f->error_op == (int)it->req->op);
			f->nexecuting++;
			int error = f->error;
			pthread_mutex_unlock(&f->lock);
			it->child = *it->req;
			it->child.done = faulty_executed;
			it->child.opaque = it;
			int rc = fails ? error : block_submit(f->inner, &it->child);
			if (rc)
				faulty_executed(&it->child, rc);
			pthread_mutex_lock(&f->lock);
			continue;
		}
		if (f->closing && !f->ninflight)
			break;
		if (first == UINT64_MAX) {
			pthread_cond_wait(&f->wake, &f->lock);
		} else {
			struct timespec ts = {.tv_sec = (time_t)(first / 1000000000),
					      .tv_nsec = (long)(first % 1000000000)};
			pthread_cond_timedwait(&f->wake, &f->lock, &ts);
		}
	}
	pthread_mutex_unlock(&f->lock);
	return NULL;
}

static inline int faulty_submit(struct block *blk, struct block_request *req)
{
	struct faulty *f = (struct faulty *)blk;
	struct faulty_item *it = calloc(1, sizeof *it);
	uint64_t now = clock_now_ns();
	ck_assert_ptr_nonnull(it);
	it->f = f;
	it->req = req;
	pthread_mutex_lock(&f->lock);
	if (f->refuse) {
		int rc = f->refuse;
		pthread_mutex_unlock(&f->lock);
		free(it);
		return rc;
	}
	f->requests[req->op]++;
	if (req->op == BLOCK_READ)
		f->read_bytes += req->len_bytes;
	if (f->count_overlaps && faulty_changes(req))
		for (struct faulty_item *o = f->all; o; o = o->all_next)
			if (faulty_changes(o->req) &&
			    o->req->offset_bytes < req->offset_bytes + req->len_bytes &&
			    req->offset_bytes < o->req->offset_bytes + o->req->len_bytes)
				f->overlaps++;
	if (f->silent_after > 0 && faulty_changes(req) && --f->silent_after == 0)
		f->silence = f->silent_after_kind;
	if (f->error_after > 0 && faulty_changes(req) && --f->error_after == 0)
		f->error = -EIO;
	it->due_ns = now + f->delay_ns;
	if (f->delay_max_ns)
		it->due_ns += (uint64_t)rand_r(&f->seed) % f->delay_max_ns;
	if (f->bytes_per_ms) {
		if (f->last_due_ns < now)
			f->last_due_ns = now;
		f->last_due_ns += req->len_bytes * 1000000 / f->bytes_per_ms;
		it->due_ns = f->last_due_ns + f->delay_ns;
	}
	it->all_next = f->all;
	it->all_prev = &f->all;
	if (f->all)
		f->all->all_prev = &it->all_next;
	f->all = it;
	it->next = f->queue;
	f->queue = it;
	f->ninflight++;
	f->inflight_bytes += req->len_bytes;
	if (f->inflight_bytes > f->inflight_bytes_max)
		f->inflight_bytes_max = f->inflight_bytes;
	pthread_cond_broadcast(&f->wake);
	pthread_mutex_unlock(&f->lock);
	return 0;
}

static inline int faulty_extents(struct block *blk, uint64_t off, uint64_t len, struct block_extent *ext,
				 unsigned *n, struct error *err)
{
	struct faulty *f = (struct faulty *)blk;
	int rc = atomic_load(&f->extents_error);
	return rc ? error_errno(err, rc, "%s: extents", blk->label)
		  : block_extents(f->inner, off, len, ext, n, err);
}

static inline void faulty_say(struct faulty *f, enum silence silence)
{
	pthread_mutex_lock(&f->lock);
	f->silence = silence;
	f->silent_after = -1;
	pthread_cond_broadcast(&f->wake);
	pthread_mutex_unlock(&f->lock);
}

static inline void faulty_set_error(struct faulty *f, int error, int op)
{
	pthread_mutex_lock(&f->lock);
	f->error = error;
	f->error_op = op;
	pthread_mutex_unlock(&f->lock);
}

static inline void faulty_refuse(struct faulty *f, int rc)
{
	pthread_mutex_lock(&f->lock);
	f->refuse = rc;
	pthread_mutex_unlock(&f->lock);
}

static inline unsigned faulty_count(struct faulty *f, enum block_op op)
{
	pthread_mutex_lock(&f->lock);
	unsigned n = f->requests[op];
	pthread_mutex_unlock(&f->lock);
	return n;
}

static inline unsigned faulty_inflight(struct faulty *f)
{
	pthread_mutex_lock(&f->lock);
	unsigned n = f->ninflight;
	pthread_mutex_unlock(&f->lock);
	return n;
}

/* What it was silent about is executed and answered late, as by a link that comes back. */
static inline void faulty_close(struct block *blk)
{
	struct faulty *f = (struct faulty *)blk;
	faulty_say(f, SILENCE_NONE);
	pthread_mutex_lock(&f->lock);
	f->closing = true;
	pthread_cond_broadcast(&f->wake);
	pthread_mutex_unlock(&f->lock);
	pthread_join(f->thread, NULL);
	block_close(f->inner);
	ck_assert_uint_eq(f->overlaps, 0);
	pthread_mutex_destroy(&f->lock);
	pthread_cond_destroy(&f->wake);
	free(f);
}

static const struct block_ops faulty_ops = {
	.name = "faulty", .submit = faulty_submit, .extents = faulty_extents, .close = faulty_close};

/* inner is taken over. */
static inline struct faulty *faulty_create(struct block *inner, const char *label)
{
	struct faulty *f = calloc(1, sizeof *f);
	ck_assert_ptr_nonnull(f);
	f->inner = inner;
	f->block.ops = &faulty_ops;
	f->block.size_bytes = inner->size_bytes;
	f->block.limits = inner->limits;
	snprintf(f->block.label, sizeof f->block.label, "%s", label);
	f->silent_after = f->error_after = -1;
	f->error_op = -1;
	f->count_overlaps = true;
	pthread_mutex_init(&f->lock, NULL);
	cond_init_monotonic(&f->wake);
	ck_assert_int_eq(pthread_create(&f->thread, NULL, faulty_main, f), 0);
	return f;
}

#endif
