/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The way of guests' changes to the remote.
 *
 * In a synchronous session the local range orders them, and a piece is sent at once. In a buffered one, the
 * range is given back before the remote has the piece, so overlapping pieces take their turn in
 * session->order: one range lock for the chunks that share a bucket, as a list of everything in a full buffer
 * would be too long to be searched at each write. What is overwritten before it was sent is never sent: a
 * sector that the guest writes again and again costs the link one write a round trip. Nothing looks at the
 * remote before all has arrived, so no other order needs to be kept.
 */
#include <errno.h>
#include <stdlib.h>

#include "base/cleanup.h"
#include "mirror/mirror_impl.h"

#define ORDER_BUCKETS 1024u

static struct remote_piece *piece_of(struct range_entry *e)
{
	return container_of(e, struct remote_piece, order);
}

int remote_queue_create(struct session *s)
{
	if (!s->buffered)
		return 0;
	s->window_bytes = s->buffer_bytes / MIRROR_WINDOW_SHARE;
	s->order = calloc(ORDER_BUCKETS, sizeof *s->order);
	return s->order ? 0 : -ENOMEM;
}

void remote_queue_free(struct session *s)
{
	free(s->order);
}

/* An entry never crosses a chunk. */
static struct range_lock *bucket(struct session *s, uint64_t offset_bytes)
{
	return &s->order[(offset_bytes >> s->m->map->shift) % ORDER_BUCKETS];
}

static bool overlap(const struct range_entry *a, const struct range_entry *b)
{
	return a->offset_bytes < b->offset_bytes + b->len_bytes &&
	       b->offset_bytes < a->offset_bytes + a->len_bytes;
}

/* The last turn of a comparison that meets it. */
static struct range_entry *last_turn(struct session *s, const struct range_entry *range)
{
	struct range_entry *e = s->m->verify ? bucket(s, range->offset_bytes)->last : NULL;
	while (e && (e->tag != RANGE_OF_VERIFY || !overlap(e, range)))
		e = e->prev;
	return e;
}

/* Of one whose turn it is: by its guest, or a comparison. */
static bool waited_for(struct session *s, const struct remote_piece *piece)
{
	const struct mirror_op *op = piece->owner;
	return op->attached || last_turn(s, &piece->order);
}

/* --- sending --- */

static void send_piece(struct session *s, struct remote_piece *piece, struct mirror_work *work)
{
	uint64_t bytes = remote_piece_wire_bytes(piece);
	piece->state = PIECE_SENT;
	s->sent_bytes += bytes;
	s->submitting++;
	verify_count_piece(piece);
	remote_piece_register(s, piece);
	rate_limit_take_urgent(s->bandwidth, bytes);
	piece->next_send = NULL;
	*work->send_tail = piece;
	work->send_tail = &piece->next_send;
}

void remote_queue_send(struct mirror *m, struct mirror_work *work)
{
	struct session *s = NULL;
	unsigned n = 0;
	while (work->send) {
		struct remote_piece *piece = work->send;
		work->send = piece->next_send;
		s = piece->session;
		n++;
		remote_piece_send(piece); /* may be answered and freed now */
	}
	work->send_tail = &work->send;
	if (!n)
		return;
	pthread_mutex_lock(&m->lock);
	s->submitting -= n;
	if (!s->submitting)
		pthread_cond_broadcast(&m->changed);
	pthread_mutex_unlock(&m->lock);
}

static void unqueue(struct session *s, struct remote_piece *piece)
{
	if (piece->prev)
		piece->prev->next = piece->next;
	else
		s->unsent = piece->next;
	if (piece->next)
		piece->next->prev = piece->prev;
	else
		s->unsent_last = piece->prev;
}

void remote_queue_pump(struct session *s, struct mirror_work *work)
{
	struct remote_piece *piece;
	while (!s->failed && !s->stopping && (piece = s->unsent) &&
	       (!s->sent_bytes || s->sent_bytes + remote_piece_wire_bytes(piece) <= s->window_bytes)) {
		unqueue(s, piece);
		send_piece(s, piece, work);
	}
}

/* Its turn. One that somebody waits for overtakes those that nobody waits for. */
static void piece_ready(struct session *s, struct remote_piece *piece, struct mirror_work *work)
{
	if (waited_for(s, piece)) {
		send_piece(s, piece, work);
		return;
	}
	piece->state = PIECE_QUEUED;
	piece->next = NULL;
	piece->prev = s->unsent_last;
	if (s->unsent_last)
		s->unsent_last->next = piece;
	else
		s->unsent = piece;
	s->unsent_last = piece;
}

/* --- order --- */

void remote_order_remove(struct session *s, struct range_entry *e, struct mirror_work *work)
{
	if (!s->order)
		return;
	struct range_entry *granted = range_lock_remove(bucket(s, e->offset_bytes), e);
	/* Of a session that failed, everything that waits is given up. */
	while (granted && !s->failed) {
		struct range_entry *g = granted;
		granted = g->next_granted;
		if (g->tag == RANGE_OF_COPY)
			copy_ordered(container_of(g, struct copy_job, order));
		else if (g->tag == RANGE_OF_VERIFY)
			verify_ordered(g);
		else
			piece_ready(s, piece_of(g), work);
	}
	remote_queue_pump(s, work);
}

bool remote_order_enter(struct session *s, const struct range_entry *range, struct range_entry *e)
{
	*e = (struct range_entry){
		.offset_bytes = range->offset_bytes, .len_bytes = range->len_bytes, .tag = range->tag};
	return !s->order || range_lock_add(bucket(s, e->offset_bytes), e);
}

void remote_queue_hurry(struct session *s, const struct range_entry *range, struct mirror_work *work)
{
	for (struct range_entry *e = bucket(s, range->offset_bytes)->first; e; e = e->next)
		if (e->tag == RANGE_OF_OP && overlap(range, e) && piece_of(e)->state == PIECE_QUEUED) {
			unqueue(s, piece_of(e));
			send_piece(s, piece_of(e), work);
		}
}

/* What the new piece overwrites altogether is dropped, unless it may have left, or is compared first. */
static void supersede(struct session *s, const struct remote_piece *piece, struct mirror_work *work)
{
	uint64_t begin = piece->req.offset_bytes, end = begin + piece->req.len_bytes;
	const struct range_entry *turn =
		last_turn(s, &(struct range_entry){.offset_bytes = begin, .len_bytes = end - begin});
	for (struct range_entry *e = turn ? turn->next : bucket(s, begin)->first, *next; e; e = next) {
		next = e->next;
		if (e->tag != RANGE_OF_OP || e->offset_bytes < begin || e->offset_bytes + e->len_bytes > end)
			continue;
		struct remote_piece *old = piece_of(e);
		if (old->state == PIECE_SENT)
			continue;
		struct mirror_op *op = old->owner;
		if (old->req.op == BLOCK_WRITE) {
			op->mirrored_bytes -= old->req.len_bytes;
			s->m->stats.buffered_bytes -= old->req.len_bytes;
		}
		remote_queue_remove(old, work);
		mirror_op_progress(old, work);
	}
}

void remote_queue_add(struct session *s, struct remote_piece *piece, struct mirror_work *work)
{
	piece->session = s;
	if (!s->order) {
		send_piece(s, piece, work);
		return;
	}
	supersede(s, piece, work);
	piece->order = (struct range_entry){.offset_bytes = piece->req.offset_bytes,
					    .len_bytes = piece->req.len_bytes,
					    .tag = RANGE_OF_OP};
	piece->state = PIECE_WAITING;
	if (range_lock_add(bucket(s, piece->order.offset_bytes), &piece->order))
		piece_ready(s, piece, work);
}

void remote_queue_remove(struct remote_piece *piece, struct mirror_work *work)
{
	struct session *s = piece->session;
	if (piece->state == PIECE_QUEUED)
		unqueue(s, piece);
	if (piece->state == PIECE_SENT)
		s->sent_bytes -= remote_piece_wire_bytes(piece);
	piece->state = PIECE_ENDED;
	remote_order_remove(s, &piece->order, work);
}
