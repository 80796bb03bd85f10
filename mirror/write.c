/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Guest writes, zeroes and discards.
 *
 * arrival -> (range) -> activate: planned by chunk state -> (bounce budget) -> start: bounced, sent to one or
 * both disks -> finish: range released, guest answered. What only the remote still holds lives on after that
 * until its late replies are in.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "mirror/mirror_impl.h"

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
		mirror_op_start(op);
	}
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
			verify_granted(e);
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

static void op_leave_session(struct mirror_op *op, struct session *s)
{
	op->attached = false;
	if (--s->attached == 0)
		pthread_cond_broadcast(&op->m->changed);
}

void mirror_op_detach(struct mirror_op *op, struct mirror_work *work)
{
	op_leave_session(op, op->pieces[0].session);
	unsync_pieces(op);
	if (op->local_done)
		op_finish(op, work);
}

static void op_piece_arrived(struct remote_piece *piece, int result, struct mirror_work *work)
{
	struct mirror_op *op = piece->owner;
	struct session *s = piece->session;
	op->pending_remote--;
	if (op->attached && result < 0) {
		session_fail(s, result, work, "%s of %llu bytes at %llu",
			     op->req->op == BLOCK_WRITE ? "write" : "write-zeroes",
			     (unsigned long long)piece->req.len_bytes,
			     (unsigned long long)piece->req.offset_bytes);
	} else if (op->attached && op->pending_remote == 0) {
		op_leave_session(op, s);
		op->m->stats.mirrored_bytes += op->mirrored_bytes;
		if (op->local_done)
			op_finish(op, work);
	}
	op_unref(op, work);
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

static unsigned plan_pieces(struct mirror_op *op, const struct session *s, struct remote_piece *out)
{
	uint64_t at = op->range.offset_bytes, end = at + op->range.len_bytes, len;
	unsigned n = 0;
	while (chunk_map_next_run(op->m->map, &at, end, piece_limit(op, s), &len)) {
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

static bool bounce_fits(const struct mirror *m, uint64_t bytes)
{
	return m->bounce_used == 0 || m->bounce_used + bytes <= MIRROR_BOUNCE_BYTES;
}

/* Plans by the chunks' states, which stay as they are while the range is held (but for a failure). False: no
 * room for the bounce. */
static bool op_plan(struct mirror_op *op)
{
	struct mirror *m = op->m;
	struct session *s = m->session;
	unsigned n = session_usable(s) ? plan_pieces(op, s, NULL) : 0;
	if (n && has_data(op) && !bounce_fits(m, op->range.len_bytes))
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
	if (has_data(op)) {
		op->bounce_bytes = op->range.len_bytes;
		m->bounce_used += op->bounce_bytes;
	}
	return true;
}

void mirror_op_activate(struct mirror_op *op, struct mirror_work *work)
{
	struct mirror *m = op->m;
	/* In order: nobody overtakes those who wait for the budget already. */
	if ((m->bounce_wait && has_data(op) && session_usable(m->session)) || !op_plan(op)) {
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
	if (posix_memalign(&mem, 4096, op->range.len_bytes))
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

/* The session to which the pieces now belong, or NULL: it ended since they were planned. */
static struct session *op_attach(struct mirror_op *op, bool have_memory)
{
	struct mirror *m = op->m;
	pthread_mutex_lock(&m->lock);
	struct session *s = m->session;
	if (!have_memory || !session_usable(s) || s->id != op->session_id) {
		op_go_local(op);
		s = NULL;
	} else {
		for (unsigned i = 0; i < op->npieces; i++) {
			struct remote_piece *piece = &op->pieces[i];
			chunk_map_touch(m->map, piece->req.offset_bytes, piece->req.len_bytes);
			remote_piece_register(s, piece);
			rate_limit_take_urgent(s->bandwidth, remote_piece_wire_bytes(piece));
		}
		verify_count_op(op);
		op->pending_remote = op->npieces;
		op->refs += op->npieces;
		op->attached = op->sent = true;
		s->attached++;
		s->submitting++;
	}
	pthread_mutex_unlock(&m->lock);
	return s;
}

void mirror_op_start(struct mirror_op *op)
{
	struct mirror *m = op->m;
	struct session *s = NULL;
	unsigned npieces = op->npieces;
	if (npieces)
		s = op_attach(op, (!has_data(op) || fill_bounce(op) == 0) && verify_hash_op(op) == 0);
	op->local = (struct block_request){
		.op = op->req->op,
		.flags = op->req->flags,
		.offset_bytes = op->range.offset_bytes,
		.len_bytes = op->range.len_bytes,
		.iov = op->req->iov,
		.niov = op->req->niov,
		.done = op_local_done,
		.opaque = op,
	};
	if (s && has_data(op)) {
		op->local_iov = (struct iovec){.iov_base = op->bounce, .iov_len = op->range.len_bytes};
		op->local.iov = &op->local_iov;
		op->local.niov = 1;
	}
	struct remote_piece *pieces = op->pieces;
	int rc = block_submit(m->local, &op->local);
	if (rc)
		mirror_defer_done(m, &op->local, rc);
	/* Without pieces under way the operation may be gone now. */
	if (!s)
		return;
	for (unsigned i = 0; i < npieces; i++)
		remote_piece_send(&pieces[i]);
	pthread_mutex_lock(&m->lock);
	if (--s->submitting == 0)
		pthread_cond_broadcast(&m->changed);
	pthread_mutex_unlock(&m->lock);
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
	op->since_ns = clock_now_ns();
	chunk_map_mark_scan(m->map, req->offset_bytes, req->len_bytes);
	if (range_lock_add(&m->ranges, &op->range))
		mirror_op_activate(op, &work);
	pthread_mutex_unlock(&m->lock);
	mirror_work_run(m, &work);
	return 0;
}
