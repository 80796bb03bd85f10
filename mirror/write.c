/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Guest writes, zeroes and discards.
 *
 * arrival -> (range) -> activate: planned by chunk state -> (bounce budget) -> start: bounced, sent to one or
 * both disks -> finish: range released, guest answered. What only the remote still is to get, in a buffered
 * session, or holds, after a failure, lives on after that until its late replies are in: by then the guest's
 * request is gone.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "mirror/mirror_impl.h"

#define BOUNCE_ALIGN 4096u

static void op_start(struct mirror_op *op, struct mirror_work *work);

static struct mirror_op *op_of(struct range_entry *e)
{
	return (struct mirror_op *)(void *)((char *)e - offsetof(struct mirror_op, range));
}

/* --- work collected under the lock --- */

static struct block_request *request_next(struct block_request *req)
{
	return (struct block_request *)(uintptr_t)req->driver[0];
}

void mirror_work_done(struct mirror_work *w, struct block_request *req, int result)
{
	req->driver[0] = (uintptr_t)w->done;
	req->driver[1] = (uint64_t)(int64_t)result;
	w->done = req;
}

static void work_start(struct mirror_work *w, struct mirror_op *op)
{
	op->next = NULL;
	*w->start_tail = op;
	w->start_tail = &op->next;
}

void mirror_work_run(struct mirror *m, struct mirror_work *w)
{
	/* Starting first: those are still the guest's, so the mirror lives; after the last done() it may not.
	 */
	while (w->start) {
		struct mirror_op *op = w->start;
		w->start = op->next;
		if (!w->start)
			w->start_tail = &w->start;
		op_start(op, w);
	}
	remote_queue_send(m, w);
	while (w->done) {
		struct block_request *req = w->done;
		w->done = request_next(req);
		req->done(req, (int)(int64_t)req->driver[1]);
	}
}

void mirror_granted(struct mirror *m, struct range_entry *granted, struct mirror_work *work)
{
	while (granted) {
		struct range_entry *e = granted;
		granted = e->next_granted;
		if (e->tag == RANGE_OF_COPY)
			copy_granted(
				(struct copy_job *)(void *)((char *)e - offsetof(struct copy_job, range)));
		else if (e->tag == RANGE_OF_VERIFY)
			verify_granted(e, work);
		else
			mirror_op_activate(op_of(e), work);
	}
}

/* --- life of an operation; mirror->lock held unless said otherwise --- */

static void op_unref(struct mirror_op *op, struct mirror_work *work)
{
	struct mirror *m = op->m;
	if (--op->refs)
		return;
	m->bounce_used -= op->bounce_bytes;
	bool freed = op->bounce_bytes != 0;
	free(op->bounce);
	free(op->write_hashes);
	free(op->pieces);
	free(op);
	if (freed)
		mirror_bounce_retry(m, work);
}

static void unsync_pieces(struct mirror_op *op)
{
	struct mirror *m = op->m;
	bool any = false;
	if (!m->map)
		return;
	for (unsigned i = 0; i < op->npieces; i++)
		any |= chunk_map_unsync(m->map, op->pieces[i].req.offset_bytes, op->pieces[i].req.len_bytes);
	if (any && m->session)
		copy_wake(m->session);
}

/* Both disks are done with it, or the local one is and the remote is not waited for. */
static void op_finish(struct mirror_op *op, struct mirror_work *work)
{
	struct mirror *m = op->m;
	/* Nobody knows what the local disk holds now, and the remote may have taken the write. */
	if (op->result && op->sent)
		unsync_pieces(op);
	mirror_granted(m, range_lock_remove(&m->ranges, &op->range), work);
	mirror_work_done(work, op->req, op->result);
	op_unref(op, work);
}

static void op_join_session(struct mirror_op *op, struct session *s)
{
	struct mirror_stats *st = &op->m->stats;
	op->session = s;
	op->prev_mirrored = NULL;
	op->next_mirrored = s->mirrored;
	if (s->mirrored)
		s->mirrored->prev_mirrored = op;
	s->mirrored = op;
	op->sent = true;
	if (!s->buffered || s->synchronous) {
		op->attached = true;
		s->attached++;
		return;
	}
	s->nbuffered++;
	st->buffered_bytes += op->mirrored_bytes;
	if (st->buffered_bytes > st->buffered_bytes_max)
		st->buffered_bytes_max = st->buffered_bytes;
}

static void op_leave_session(struct mirror_op *op)
{
	struct session *s = op->session;
	if (op->prev_mirrored)
		op->prev_mirrored->next_mirrored = op->next_mirrored;
	else
		s->mirrored = op->next_mirrored;
	if (op->next_mirrored)
		op->next_mirrored->prev_mirrored = op->prev_mirrored;
	if (!op->attached)
		op->m->stats.buffered_bytes -= op->mirrored_bytes;
	if ((op->attached ? --s->attached : --s->nbuffered) == 0)
		pthread_cond_broadcast(&op->m->changed);
	op->session = NULL;
	op->attached = false;
}

static bool piece_unsent(const struct remote_piece *piece)
{
	return piece->state == PIECE_WAITING || piece->state == PIECE_QUEUED;
}

void mirror_op_detach(struct mirror_op *op, struct mirror_work *work)
{
	bool finish = op->attached && op->local_done;
	op->refs++;
	op_leave_session(op);
	unsync_pieces(op);
	for (unsigned i = 0; i < op->npieces; i++)
		if (piece_unsent(&op->pieces[i])) {
			remote_queue_remove(&op->pieces[i], work);
			mirror_op_progress(&op->pieces[i], work);
		}
	if (finish)
		op_finish(op, work);
	op_unref(op, work);
}

void mirror_drop_buffered(struct session *s, struct mirror_work *work)
{
	for (struct mirror_op *op = s->mirrored, *next; op; op = next) {
		next = op->next_mirrored;
		if (op->attached)
			continue;
		op->refs++;
		for (unsigned i = 0; i < op->npieces; i++) {
			struct remote_piece *piece = &op->pieces[i];
			if (!piece_unsent(piece))
				continue;
			chunk_map_unsync(s->m->map, piece->req.offset_bytes, piece->req.len_bytes);
			remote_queue_remove(piece, work);
			mirror_op_progress(piece, work);
		}
		op_unref(op, work);
	}
	mirror_bounce_retry(s->m, work);
}

void mirror_op_progress(struct remote_piece *piece, struct mirror_work *work)
{
	struct mirror_op *op = piece->owner;
	op->pending_remote--;
	if (op->session && op->pending_remote == 0) {
		bool finish = op->attached && op->local_done;
		op->m->stats.mirrored_bytes += op->mirrored_bytes;
		op_leave_session(op);
		if (finish)
			op_finish(op, work);
	}
	op_unref(op, work);
}

static void op_piece_arrived(struct remote_piece *piece, int result, struct mirror_work *work)
{
	struct mirror_op *op = piece->owner;
	struct session *s = piece->session;
	remote_queue_remove(piece, work);
	if (result < 0 && op->session) {
		/* Of a session that is being stopped, what nobody waits for is copied again. */
		if (s->stopping && !op->attached)
			chunk_map_unsync(op->m->map, piece->req.offset_bytes, piece->req.len_bytes);
		else
			session_fail(s, result, work, "%s of %llu bytes at %llu",
				     piece->req.op == BLOCK_WRITE ? "write" : "write-zeroes",
				     (unsigned long long)piece->req.len_bytes,
				     (unsigned long long)piece->req.offset_bytes);
	}
	mirror_op_progress(piece, work);
	remote_queue_pump(s, work);
}

static void op_local_done(struct block_request *child, int result)
{
	struct mirror_op *op = child->opaque;
	struct mirror *m = op->m;
	struct mirror_work work;
	mirror_work_init(&work);
	pthread_mutex_lock(&m->lock);
	op->local_done = true;
	op->result = result;
	if (!op->attached)
		op_finish(op, &work);
	pthread_mutex_unlock(&m->lock);
	mirror_work_run(m, &work);
}

/* --- planning --- */

static bool has_data(const struct mirror_op *op)
{
	return op->req->op == BLOCK_WRITE;
}

static uint64_t piece_limit(const struct mirror_op *op, const struct session *s)
{
	if (has_data(op))
		return s->piece_bytes;
	uint64_t max = s->remote->limits.max_zeroes_bytes;
	max = max && max < MIRROR_ZERO_PIECE_BYTES ? max : MIRROR_ZERO_PIECE_BYTES;
	return max > s->align ? max - max % s->align : s->align;
}

/* The order of a buffered session is kept by chunk. */
static uint64_t within_chunk(const struct chunk_map *map, uint64_t at, uint64_t len)
{
	uint64_t left = map->chunk_bytes - (at & (map->chunk_bytes - 1));
	return len < left ? len : left;
}

static unsigned plan_pieces(struct mirror_op *op, const struct session *s, struct remote_piece *out)
{
	uint64_t at = op->range.offset_bytes, end = at + op->range.len_bytes, len;
	unsigned n = 0;
	while (chunk_map_next_run(op->m->map, &at, end, piece_limit(op, s), &len)) {
		if (s->order)
			len = within_chunk(op->m->map, at, len);
		if (out) {
			struct block_request *req = &out[n].req;
			req->op = has_data(op) ? BLOCK_WRITE : BLOCK_WRITE_ZEROES;
			req->flags = op->req->flags & BLOCK_REQ_FUA;
			/* A discard is write-zeroes that may unmap, so that both sides read the same. */
			if (!has_data(op) &&
			    (op->req->op == BLOCK_DISCARD || op->req->flags & BLOCK_REQ_MAY_UNMAP))
				req->flags |= BLOCK_REQ_MAY_UNMAP;
			req->offset_bytes = at;
			req->len_bytes = len;
			out[n].owner = op;
			out[n].arrived = op_piece_arrived;
			if (has_data(op))
				op->mirrored_bytes += len;
		}
		n++;
		at += len;
	}
	return n;
}

/* The local disk alone gets it: synced chunks are so no more. */
static void op_go_local(struct mirror_op *op)
{
	struct mirror *m = op->m;
	op->npieces = 0;
	op->mirrored_bytes = 0;
	if (m->map && chunk_map_unsync(m->map, op->range.offset_bytes, op->range.len_bytes) && m->session)
		copy_wake(m->session);
}

/* What it takes of the budget. Buffered, what is queued is many and may be small, so it counts whole. */
static uint64_t bounce_cost(const struct mirror_op *op, const struct session *s, unsigned npieces)
{
	uint64_t bytes = has_data(op) ? op->range.len_bytes : 0;
	if (!s->buffered || !npieces)
		return npieces ? bytes : 0;
	uint64_t pages = (bytes + BOUNCE_ALIGN - 1) / BOUNCE_ALIGN * BOUNCE_ALIGN;
	return pages + sizeof *op + npieces * sizeof *op->pieces;
}

static bool bounce_fits(const struct mirror *m, const struct session *s, uint64_t bytes)
{
	return m->bounce_used == 0 || m->bounce_used + bytes <= s->buffer_bytes;
}

/* Plans by the chunks' states, which stay as they are while the range is held (but for a failure). False: no
 * room for the bounce. */
static bool op_plan(struct mirror_op *op)
{
	struct mirror *m = op->m;
	struct session *s = m->session;
	unsigned n = session_usable(s) ? plan_pieces(op, s, NULL) : 0;
	uint64_t cost = n ? bounce_cost(op, s, n) : 0;
	if (cost && !bounce_fits(m, s, cost))
		return false;
	if (n)
		op->pieces = calloc(n, sizeof *op->pieces);
	if (!op->pieces) {
		/* Short of memory, the chunks are copied again later. */
		if (n || !session_usable(s))
			op_go_local(op);
		return true;
	}
	op->npieces = plan_pieces(op, s, op->pieces);
	op->session_id = s->id;
	verify_plan_op(op);
	op->bounce_bytes = cost;
	m->bounce_used += cost;
	return true;
}

void mirror_op_activate(struct mirror_op *op, struct mirror_work *work)
{
	struct mirror *m = op->m;
	struct session *s = m->session;
	/* In order: nobody overtakes those who wait for the budget already. */
	if ((m->bounce_wait && session_usable(s) && (has_data(op) || s->buffered)) || !op_plan(op)) {
		op->next = NULL;
		*m->bounce_wait_tail = op;
		m->bounce_wait_tail = &op->next;
		return;
	}
	op->started = true;
	work_start(work, op);
}

void mirror_bounce_retry(struct mirror *m, struct mirror_work *work)
{
	struct mirror_op *op;
	while ((op = m->bounce_wait) && op_plan(op)) {
		m->bounce_wait = op->next;
		if (!m->bounce_wait)
			m->bounce_wait_tail = &m->bounce_wait;
		op->started = true;
		work_start(work, op);
	}
}

/* --- starting; no lock held --- */

static int fill_bounce(struct mirror_op *op)
{
	void *mem = NULL;
	if (posix_memalign(&mem, BOUNCE_ALIGN, op->range.len_bytes))
		return -ENOMEM;
	op->bounce = mem;
	uint8_t *p = op->bounce;
	for (int i = 0; i < op->req->niov; i++) {
		memcpy(p, op->req->iov[i].iov_base, op->req->iov[i].iov_len);
		p += op->req->iov[i].iov_len;
	}
	for (unsigned i = 0; i < op->npieces; i++) {
		struct remote_piece *piece = &op->pieces[i];
		piece->iov = (struct iovec){.iov_base = op->bounce +
							(piece->req.offset_bytes - op->range.offset_bytes),
					    .iov_len = piece->req.len_bytes};
		piece->req.iov = &piece->iov;
		piece->req.niov = 1;
	}
	return 0;
}

/* True: the pieces belong to the session now, and those whose turn it is are in work->send. False: it ended
 * since they were planned. */
static bool op_attach(struct mirror_op *op, bool have_memory, struct mirror_work *work)
{
	struct mirror *m = op->m;
	pthread_mutex_lock(&m->lock);
	struct session *s = m->session;
	bool usable = have_memory && session_usable(s) && s->id == op->session_id;
	if (usable) {
		op->pending_remote = op->npieces;
		op->refs += op->npieces;
		op_join_session(op, s);
		for (unsigned i = 0; i < op->npieces; i++) {
			struct remote_piece *piece = &op->pieces[i];
			chunk_map_touch(m->map, piece->req.offset_bytes, piece->req.len_bytes);
			remote_queue_add(s, piece, work);
		}
		remote_queue_pump(s, work);
	} else {
		op_go_local(op);
	}
	pthread_mutex_unlock(&m->lock);
	return usable;
}

static void op_start(struct mirror_op *op, struct mirror_work *work)
{
	struct mirror *m = op->m;
	bool mirrored =
		op->npieces &&
		op_attach(op, (!has_data(op) || fill_bounce(op) == 0) && verify_hash_op(op) == 0, work);
	op->local = (struct block_request){
		.op = op->req->op,
		.flags = op->req->flags & ~(unsigned)BLOCK_REQ_MAY_WAIT, /* the guest, not we */
		.offset_bytes = op->range.offset_bytes,
		.len_bytes = op->range.len_bytes,
		.iov = op->req->iov,
		.niov = op->req->niov,
		.done = op_local_done,
		.opaque = op,
	};
	if (mirrored && has_data(op)) {
		op->local_iov = (struct iovec){.iov_base = op->bounce, .iov_len = op->range.len_bytes};
		op->local.iov = &op->local_iov;
		op->local.niov = 1;
	}
	int rc = block_submit(m->local, &op->local);
	if (rc)
		mirror_defer_done(m, &op->local, rc);
	/* The operation may be gone now. */
	remote_queue_send(m, work);
}

/* --- arrival --- */

static void passed(struct block_request *child, int result)
{
	struct mirror_op *op = child->opaque;
	struct mirror *m = op->m;
	struct block_request *req = op->req;
	pthread_mutex_lock(&m->lock);
	if (--m->passing == 0)
		pthread_cond_broadcast(&m->changed);
	pthread_mutex_unlock(&m->lock);
	free(op);
	req->done(req, result);
}

/* Without a session: counted only, for a pass that starts meanwhile. */
static int pass_through(struct mirror_op *op)
{
	struct mirror *m = op->m;
	op->local = *op->req;
	op->local.done = passed;
	op->local.opaque = op;
	int rc = block_submit(m->local, &op->local);
	if (rc == 0)
		return 0;
	pthread_mutex_lock(&m->lock);
	if (--m->passing == 0)
		pthread_cond_broadcast(&m->changed);
	pthread_mutex_unlock(&m->lock);
	free(op);
	return rc;
}

int mirror_write_submit(struct mirror *m, struct block_request *req)
{
	struct mirror_op *op = calloc(1, sizeof *op);
	if (!op)
		return -ENOMEM;
	op->m = m;
	op->req = req;
	op->refs = 1;
	op->range.offset_bytes = req->offset_bytes;
	op->range.len_bytes = req->len_bytes;
	struct mirror_work work;
	mirror_work_init(&work);
	pthread_mutex_lock(&m->lock);
	if (!m->session) {
		op_go_local(op);
		m->passing++;
		pthread_mutex_unlock(&m->lock);
		return pass_through(op);
	}
	chunk_map_mark_scan(m->map, req->offset_bytes, req->len_bytes);
	bool granted = range_lock_add(&m->ranges, &op->range);
	copy_guest_writes(m->session);
	op->since_ns = m->session->guest_ns;
	if (granted)
		mirror_op_activate(op, &work);
	pthread_mutex_unlock(&m->lock);
	mirror_work_run(m, &work);
	return 0;
}
