/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/storage-model/shaky.h"

#include <check.h>
#include <errno.h>
#include <stdlib.h>

#include "base/clock.h"
#include "base/cond.h"

#define SHAKY_SECTOR_BYTES 512u

struct shaky_item {
	struct shaky_item *next, **prev;
	struct shaky *s;
	struct block_request *req, child;
	uint64_t due_ns, changed_before; /* a flush covers what was done when it began */
	bool waits, fails;
};

static bool changes(const struct block_request *req)
{
	return req->op != BLOCK_READ && req->op != BLOCK_FLUSH;
}

/* lock held */
static void note_change(struct shaky *s, const struct block_request *req, bool durable)
{
	uint64_t first = req->offset_bytes / SHAKY_SECTOR_BYTES;
	uint64_t end = (req->offset_bytes + req->len_bytes) / SHAKY_SECTOR_BYTES;
	if (!durable)
		s->changed++;
	for (uint64_t i = first; i < end; i++)
		s->sector_changed[i] = durable ? 0 : s->changed;
}

static void item_done(struct shaky_item *it, int result)
{
	struct shaky *s = it->s;
	struct block_request *req = it->req;
	pthread_mutex_lock(&s->lock);
	if (!result && req->op == BLOCK_FLUSH && it->changed_before > s->durable)
		s->durable = it->changed_before;
	if (changes(req))
		note_change(s, req, !result && req->flags & BLOCK_REQ_FUA);
	if (it->next)
		it->next->prev = it->prev;
	*it->prev = it->next;
	bool last = --s->ninflight == 0;
	if (last)
		pthread_cond_broadcast(&s->wake);
	pthread_mutex_unlock(&s->lock);
	free(it);
	req->done(req, result);
}

static void executed(struct block_request *child, int result)
{
	struct shaky_item *it = child->opaque;
	item_done(it, it->fails ? it->s->fail_code : result);
}

static void execute(struct shaky_item *it)
{
	it->child = *it->req;
	it->child.done = executed;
	it->child.opaque = it;
	if (it->fails && !it->s->fail_late) {
		item_done(it, it->s->fail_code);
		return;
	}
	int rc = block_submit(it->s->below, &it->child);
	if (rc)
		item_done(it, rc);
}

static void *shaky_main(void *arg)
{
	struct shaky *s = arg;
	pthread_mutex_lock(&s->lock);
	while (!s->closing) {
		uint64_t now = clock_now_ns(), first = UINT64_MAX;
		struct shaky_item *due = NULL;
		for (struct shaky_item *it = s->items; it && !due; it = it->next) {
			if (it->waits && it->due_ns <= now)
				due = it;
			else if (it->waits && it->due_ns < first)
				first = it->due_ns;
		}
		if (due) {
			due->waits = false;
			due->changed_before = s->changed;
			pthread_mutex_unlock(&s->lock);
			execute(due);
			pthread_mutex_lock(&s->lock);
		} else if (first == UINT64_MAX) {
			pthread_cond_wait(&s->wake, &s->lock);
		} else {
			struct timespec ts = clock_timespec(first);
			pthread_cond_timedwait(&s->wake, &s->lock, &ts);
		}
	}
	pthread_mutex_unlock(&s->lock);
	return NULL;
}

static void watch(struct shaky *s, const struct block_request *req)
{
	s->while_fenced += s->fenced;
	for (const struct shaky_item *o = s->items; s->count_overlaps && changes(req) && o; o = o->next)
		if (changes(o->req) && o->req->offset_bytes < req->offset_bytes + req->len_bytes &&
		    req->offset_bytes < o->req->offset_bytes + o->req->len_bytes)
			s->overlaps++;
}

static void tell_observer(struct shaky *s, const struct block_request *req)
{
	pthread_mutex_lock(&s->lock);
	void (*observe)(void *opaque, const struct block_request *req) = s->observe;
	void *opaque = s->opaque;
	pthread_mutex_unlock(&s->lock);
	if (observe && changes(req))
		observe(opaque, req);
}

static int shaky_submit(struct block *blk, struct block_request *req)
{
	struct shaky *s = (struct shaky *)blk;
	struct shaky_item *it = calloc(1, sizeof *it);
	if (!it)
		return -ENOMEM;
	it->s = s;
	it->req = req;
	tell_observer(s, req);
	pthread_mutex_lock(&s->lock);
	watch(s, req);
	if (s->fail_after && s->fail_ops & 1u << req->op && --s->fail_after == 0) {
		it->fails = true;
		s->failures++;
	}
	it->waits = it->fails || s->delay_max_us;
	it->due_ns = clock_now_ns();
	if (s->delay_max_us)
		it->due_ns += (uint64_t)rand_r(&s->seed) % s->delay_max_us * 1000;
	it->changed_before = s->changed;
	it->next = s->items;
	it->prev = &s->items;
	if (s->items)
		s->items->prev = &it->next;
	s->items = it;
	s->ninflight++;
	bool now = !it->waits;
	if (!now)
		pthread_cond_broadcast(&s->wake);
	pthread_mutex_unlock(&s->lock);
	if (!now)
		return 0;
	it->child = *req;
	it->child.done = executed;
	it->child.opaque = it;
	int rc = block_submit(s->below, &it->child);
	if (rc) {
		pthread_mutex_lock(&s->lock);
		if (it->next)
			it->next->prev = it->prev;
		*it->prev = it->next;
		s->ninflight--;
		pthread_mutex_unlock(&s->lock);
		free(it);
	}
	return rc;
}

static int shaky_extents(struct block *blk, uint64_t offset, uint64_t len, struct block_extent *ext,
			 unsigned *n, struct error *err)
{
	return block_extents(((struct shaky *)blk)->below, offset, len, ext, n, err);
}

static void shaky_close(struct block *blk)
{
	(void)blk;
}

static const struct block_ops shaky_ops = {
	.name = "shaky", .submit = shaky_submit, .extents = shaky_extents, .close = shaky_close};

struct shaky *shaky_create(struct block *below, unsigned seed)
{
	struct shaky *s = calloc(1, sizeof *s);
	ck_assert_ptr_nonnull(s);
	s->below = below;
	s->seed = seed;
	s->block = *below;
	s->block.ops = &shaky_ops;
	s->sector_changed = calloc(below->size_bytes / SHAKY_SECTOR_BYTES, sizeof *s->sector_changed);
	ck_assert_ptr_nonnull(s->sector_changed);
	pthread_mutex_init(&s->lock, NULL);
	cond_init_monotonic(&s->wake);
	ck_assert_int_eq(pthread_create(&s->thread, NULL, shaky_main, s), 0);
	return s;
}

void shaky_free(struct shaky *s)
{
	pthread_mutex_lock(&s->lock);
	while (s->ninflight)
		pthread_cond_wait(&s->wake, &s->lock);
	s->closing = true;
	pthread_cond_broadcast(&s->wake);
	pthread_mutex_unlock(&s->lock);
	pthread_join(s->thread, NULL);
	pthread_mutex_destroy(&s->lock);
	pthread_cond_destroy(&s->wake);
	free(s->sector_changed);
	free(s);
}

void shaky_fail_once(struct shaky *s, unsigned after, unsigned ops, int code, bool late)
{
	pthread_mutex_lock(&s->lock);
	s->fail_after = after;
	s->fail_ops = ops;
	s->fail_code = code;
	s->fail_late = late;
	pthread_mutex_unlock(&s->lock);
}

void shaky_delay(struct shaky *s, unsigned max_us)
{
	pthread_mutex_lock(&s->lock);
	s->delay_max_us = max_us;
	pthread_mutex_unlock(&s->lock);
}

void shaky_observe(struct shaky *s, void (*observe)(void *opaque, const struct block_request *req),
		   void *opaque)
{
	pthread_mutex_lock(&s->lock);
	s->observe = observe;
	s->opaque = opaque;
	pthread_mutex_unlock(&s->lock);
}

void shaky_fence(struct shaky *s, bool fenced)
{
	pthread_mutex_lock(&s->lock);
	s->while_fenced += fenced ? s->ninflight : 0;
	s->fenced = fenced;
	pthread_mutex_unlock(&s->lock);
}

bool shaky_all_durable(struct shaky *s)
{
	pthread_mutex_lock(&s->lock);
	bool all = s->durable == s->changed;
	pthread_mutex_unlock(&s->lock);
	return all;
}

unsigned shaky_failures(struct shaky *s)
{
	pthread_mutex_lock(&s->lock);
	unsigned n = s->failures;
	pthread_mutex_unlock(&s->lock);
	return n;
}

bool shaky_is_volatile(struct shaky *s, uint64_t sector)
{
	pthread_mutex_lock(&s->lock);
	bool is = s->sector_changed[sector] > s->durable;
	pthread_mutex_unlock(&s->lock);
	return is;
}
