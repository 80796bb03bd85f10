/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/storage-model/guest.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/cond.h"

#define HANG_MS	    60000
#define RANGE_TRIES 16

static __thread bool submitting;

static unsigned number(struct guest *g, unsigned below)
{
	return (unsigned)rand_r(&g->opt.seed) % below;
}

/* --- choosing; model->lock held --- */

static uint64_t random_len(struct guest *g)
{
	/* each power of two as often */
	unsigned shifts = 0;
	while (SECTOR_BYTES << (shifts + 1) <= g->opt.largest_bytes)
		shifts++;
	uint64_t largest = (uint64_t)SECTOR_BYTES << number(g, shifts + 1);
	return (1 + number(g, (unsigned)(largest / SECTOR_BYTES))) * SECTOR_BYTES;
}

static uint64_t random_range(struct guest *g, uint64_t *len)
{
	uint64_t size = g->disk->size_bytes, base = 0;
	*len = random_len(g);
	if (number(g, 2)) {
		base = g->opt.hot_offset;
		size = g->opt.hot_bytes;
		if (*len > size / 2)
			*len = (size / 2) & ~(uint64_t)(SECTOR_BYTES - 1);
	}
	uint64_t sectors = (size - *len) / SECTOR_BYTES;
	uint64_t at =
		sectors ? ((uint64_t)rand_r(&g->opt.seed) << 16 ^ (uint64_t)rand_r(&g->opt.seed)) % sectors
			: 0;
	return base + at * SECTOR_BYTES;
}

static enum block_op random_op(struct guest *g)
{
	unsigned n = number(g, 100);
	return n < 48	? BLOCK_WRITE
	       : n < 72 ? BLOCK_READ
	       : n < 81 ? BLOCK_WRITE_ZEROES
	       : n < 91 ? BLOCK_DISCARD
			: BLOCK_FLUSH;
}

static unsigned random_flags(struct guest *g, enum block_op op)
{
	if (op == BLOCK_READ || op == BLOCK_FLUSH)
		return 0;
	unsigned flags = number(g, 16) ? 0 : BLOCK_REQ_FUA;
	if (op == BLOCK_WRITE_ZEROES && number(g, 2))
		flags |= BLOCK_REQ_MAY_UNMAP;
	return flags;
}

static void split(struct guest *g, struct guest_slot *slot, uint64_t len)
{
	unsigned n = 0;
	uint64_t at = 0;
	while (at < len) {
		uint64_t piece = len - at;
		if (n < 2 && piece > SECTOR_BYTES && number(g, 2))
			piece = (1 + number(g, (unsigned)(piece / SECTOR_BYTES - 1))) * SECTOR_BYTES;
		slot->iov[n++] = (struct iovec){.iov_base = slot->buf + at, .iov_len = piece};
		at += piece;
	}
	slot->req.iov = slot->iov;
	slot->req.niov = (int)n;
}

static void request_done(struct block_request *req, int result);

/* Fills the slot with a request. */
static void prepare(struct guest *g, struct guest_slot *slot)
{
	enum block_op op = random_op(g);
	unsigned flags = random_flags(g, op);
	bool overlap = number(g, 1000) < g->opt.overlaps_per_1000;
	/* In a callback the slot may be in use again before the buffer could be changed. */
	bool wild = op == BLOCK_WRITE && !g->opt.from_callback && number(g, 1000) < g->opt.wild_per_1000;
	uint64_t len = 0, at = 0;
	for (unsigned tries = 0; op != BLOCK_FLUSH && tries < RANGE_TRIES; tries++) {
		at = random_range(g, &len);
		if (op == BLOCK_READ || overlap || !model_has_changes_in_flight(g->model, at, len))
			break;
		len = 0;
	}
	if (!len) {
		op = BLOCK_FLUSH;
		flags = 0;
		at = 0;
	}
	slot->op = model_submit(g->model, op, flags, at, len, wild && len);
	slot->req = (struct block_request){.op = op,
					   .flags = flags,
					   .offset_bytes = at,
					   .len_bytes = len,
					   .done = request_done,
					   .opaque = slot};
	if (op == BLOCK_READ || op == BLOCK_WRITE)
		split(g, slot, len);
	slot->busy = true;
	g->in_flight++;
}

/* --- going --- */

static void submit(struct block *disk, struct guest_slot *slot, uint32_t write_number, bool wild)
{
	uint64_t len = slot->req.len_bytes, offset = slot->req.offset_bytes;
	if (slot->req.op == BLOCK_WRITE)
		model_fill(slot->buf, offset, len, write_number);
	else if (slot->req.op == BLOCK_READ)
		memset(slot->buf, 0xee, len);
	submitting = true;
	int rc = block_submit(disk, &slot->req);
	submitting = false;
	if (rc) {
		request_done(&slot->req, rc);
		return;
	}
	if (wild)
		memset(slot->buf, 0x5a, len / 2 > SECTOR_BYTES ? len / 2 : SECTOR_BYTES);
}

/* model->lock held; dropped for the submission. */
static void prepare_and_submit(struct guest *g, struct guest_slot *slot)
{
	prepare(g, slot);
	const struct model_op *o = &g->model->ops[slot->op];
	uint32_t write_number = o->number;
	bool wild = o->wild;
	struct block *disk = g->disk;
	pthread_mutex_unlock(&g->model->lock);
	submit(disk, slot, write_number, wild);
	pthread_mutex_lock(&g->model->lock);
}

static void request_done(struct block_request *req, int result)
{
	struct guest_slot *slot = req->opaque;
	struct guest *g = slot->guest;
	struct model *m = g->model;
	if (submitting)
		model_fail(m, req->offset_bytes, req->len_bytes,
			   "a request was answered from inside its submission");
	pthread_mutex_lock(&m->lock);
	if (!slot->busy)
		model_fail(m, req->offset_bytes, req->len_bytes, "a request was answered twice");
	model_done(m, slot->op, result, slot->buf);
	g->errors += result < 0;
	if (result < 0 && !g->opt.errors_allowed)
		model_fail(m, req->offset_bytes, req->len_bytes, "the guest got error %d", result);
	slot->busy = false;
	g->in_flight--;
	atomic_fetch_add(&g->answered, 1);
	if (g->opt.from_callback && g->running)
		prepare_and_submit(g, slot);
	else
		pthread_cond_broadcast(&g->wake);
	pthread_mutex_unlock(&m->lock);
}

static struct guest_slot *idle_slot(struct guest *g)
{
	for (unsigned i = 0; g->running && i < g->opt.depth; i++)
		if (!g->slots[i].busy)
			return &g->slots[i];
	return NULL;
}

static void *guest_main(void *arg)
{
	struct guest *g = arg;
	pthread_mutex_lock(&g->model->lock);
	while (!g->quit) {
		struct guest_slot *slot = idle_slot(g);
		if (!slot) {
			pthread_cond_wait(&g->wake, &g->model->lock);
			continue;
		}
		prepare_and_submit(g, slot);
		if (g->opt.pace_us) {
			unsigned us = number(g, 2 * g->opt.pace_us);
			pthread_mutex_unlock(&g->model->lock);
			struct timespec ts = {.tv_nsec = (long)us * 1000};
			nanosleep(&ts, NULL);
			pthread_mutex_lock(&g->model->lock);
		}
	}
	pthread_mutex_unlock(&g->model->lock);
	return NULL;
}

void guest_create(struct guest *g, struct model *m, const struct guest_options *opt)
{
	memset(g, 0, sizeof *g);
	g->opt = *opt;
	g->model = m;
	atomic_init(&g->answered, 0);
	cond_init_monotonic(&g->wake);
	for (unsigned i = 0; i < opt->depth; i++) {
		void *mem = NULL;
		ck_assert_int_eq(posix_memalign(&mem, 4096, GUEST_REQUEST_MAX), 0);
		g->slots[i].buf = mem;
		g->slots[i].guest = g;
	}
	ck_assert_int_eq(pthread_create(&g->thread, NULL, guest_main, g), 0);
}

void guest_run(struct guest *g, struct block *disk)
{
	pthread_mutex_lock(&g->model->lock);
	g->disk = disk;
	g->running = true;
	pthread_cond_broadcast(&g->wake);
	pthread_mutex_unlock(&g->model->lock);
}

static void wait_until(struct guest *g, uint64_t answered, bool quiet, const char *what)
{
	uint64_t until = clock_now_ns() + HANG_MS * UINT64_C(1000000), last = 0;
	pthread_mutex_lock(&g->model->lock);
	while (quiet ? g->in_flight != 0 : atomic_load(&g->answered) < answered) {
		uint64_t now = clock_now_ns(), n = atomic_load(&g->answered);
		if (n != last)
			until = now + HANG_MS * UINT64_C(1000000);
		last = n;
		if (now > until) {
			for (unsigned i = 0; i < g->opt.depth; i++)
				if (g->slots[i].busy)
					model_fail(g->model, g->slots[i].req.offset_bytes,
						   g->slots[i].req.len_bytes, "%s: a request is not answered",
						   what);
			model_fail(g->model, 0, g->disk->size_bytes, "%s: the guest does nothing", what);
		}
		struct timespec ts = clock_timespec(now + 10000000);
		pthread_cond_timedwait(&g->wake, &g->model->lock, &ts);
	}
	pthread_mutex_unlock(&g->model->lock);
}

void guest_quiesce(struct guest *g)
{
	pthread_mutex_lock(&g->model->lock);
	g->running = false;
	pthread_mutex_unlock(&g->model->lock);
	wait_until(g, 0, true, "quiesce");
}

void guest_wait_answers(struct guest *g, unsigned n)
{
	wait_until(g, atomic_load(&g->answered) + n, false, "run");
}

void guest_destroy(struct guest *g)
{
	guest_quiesce(g);
	pthread_mutex_lock(&g->model->lock);
	g->quit = true;
	pthread_cond_broadcast(&g->wake);
	pthread_mutex_unlock(&g->model->lock);
	pthread_join(g->thread, NULL);
	for (unsigned i = 0; i < g->opt.depth; i++)
		free(g->slots[i].buf);
	pthread_cond_destroy(&g->wake);
}
