/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>

#include "base/clock.h"
#include "mirror/mirror_impl.h"

#define NBD_REQUEST_BYTES 28

static void piece_done(struct block_request *req, int result)
{
	struct remote_piece *piece = req->opaque;
	struct session *s = piece->session;
	struct mirror *m = s->m;
	struct mirror_work work;
	mirror_work_init(&work);
	uint64_t now = clock_now_ns();
	pthread_mutex_lock(&m->lock);
	if (piece->prev)
		piece->prev->next = piece->next;
	else
		s->outstanding = piece->next;
	if (piece->next)
		piece->next->prev = piece->prev;
	else
		s->outstanding_last = piece->prev;
	if (!piece->prev)
		s->head_answered_ns = now;
	if (result >= 0 && (!s->fastest_ns || now - piece->sent_ns < s->fastest_ns))
		s->fastest_ns = now - piece->sent_ns;
	piece->arrived(piece, result, &work);
	if (!s->outstanding)
		pthread_cond_broadcast(&m->changed);
	pthread_mutex_unlock(&m->lock);
	mirror_work_run(m, &work);
}

uint64_t remote_piece_wire_bytes(const struct remote_piece *piece)
{
	return NBD_REQUEST_BYTES + (piece->req.op == BLOCK_WRITE ? piece->req.len_bytes : 0);
}

void remote_piece_register(struct session *s, struct remote_piece *piece)
{
	piece->session = s;
	piece->req.done = piece_done;
	piece->req.opaque = piece;
	piece->sent_ns = clock_now_ns();
	piece->next = NULL;
	piece->prev = s->outstanding_last;
	if (s->outstanding_last)
		s->outstanding_last->next = piece;
	else
		s->outstanding = piece;
	s->outstanding_last = piece;
}

void remote_piece_send(struct remote_piece *piece)
{
	struct session *s = piece->session;
	/* A session that failed meanwhile gets no further request. */
	int rc = atomic_load(&s->dead) ? -ECANCELED : block_submit(s->remote, &piece->req);
	if (rc)
		mirror_defer_done(s->m, &piece->req, rc);
}
