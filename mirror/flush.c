/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Flushes. As long as the pass runs, only the local disk has to be durable: if this host dies, the move does.
 * From mirror_flush_remote on, which covers everything before it, a guest's flush goes to both in parallel. A
 * buffered session becomes synchronous there, and what is buffered arrives first.
 */
#include <errno.h>
#include <stdlib.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "mirror/mirror_impl.h"

/* mirror->lock held. */
static void flush_unref(struct mirror_flush *f)
{
	if (--f->refs == 0)
		free(f);
}

static void flush_finish(struct mirror_flush *f, struct mirror_work *work)
{
	mirror_work_done(work, f->req, f->local_result);
	flush_unref(f);
}

static void flush_leave_session(struct mirror_flush *f)
{
	struct session *s = f->session;
	for (struct mirror_flush **p = &s->flushes; *p; p = &(*p)->next)
		if (*p == f) {
			*p = f->next;
			break;
		}
	f->attached = false;
	if (--s->attached == 0)
		pthread_cond_broadcast(&f->m->changed);
}

void mirror_flush_detach(struct mirror_flush *f, struct mirror_work *work)
{
	flush_leave_session(f);
	if (f->local_done)
		flush_finish(f, work);
}

static void local_flushed(struct block_request *req, int result)
{
	struct mirror_flush *f = req->opaque;
	struct mirror *m = f->m;
	struct mirror_work work;
	mirror_work_init(&work);
	pthread_mutex_lock(&m->lock);
	f->local_done = true;
	f->local_result = result;
	if (!f->attached)
		flush_finish(f, &work);
	pthread_mutex_unlock(&m->lock);
	mirror_work_run(m, &work);
}

static void remote_flushed(struct block_request *req, int result)
{
	struct mirror_flush *f = req->opaque;
	struct mirror *m = f->m;
	struct mirror_work work;
	mirror_work_init(&work);
	pthread_mutex_lock(&m->lock);
	f->remote_done = true;
	f->remote_result = result;
	if (result < 0)
		session_fail(f->session, result, &work, "flush");
	else if (f->attached)
		mirror_flush_detach(f, &work);
	f->session->flushing--;
	pthread_cond_broadcast(&m->changed);
	flush_unref(f);
	pthread_mutex_unlock(&m->lock);
	mirror_work_run(m, &work);
}

/* mirror->lock held. */
static struct mirror_flush *flush_create(struct session *s, struct block_request *req)
{
	struct mirror_flush *f = calloc(1, sizeof *f);
	if (!f)
		return NULL;
	f->m = s->m;
	f->session = s;
	f->req = req;
	f->refs = 2; /* whoever asked, the remote */
	f->sent_ns = clock_now_ns();
	f->local = (struct block_request){.op = BLOCK_FLUSH, .done = local_flushed, .opaque = f};
	f->remote = (struct block_request){.op = BLOCK_FLUSH, .done = remote_flushed, .opaque = f};
	s->flushing++;
	s->submitting++;
	return f;
}

/* No lock held. */
static void flush_send(struct session *s, struct mirror_flush *f)
{
	struct mirror *m = s->m;
	bool local = f->req != NULL;
	int rc = local ? block_submit(m->local, &f->local) : 0;
	if (rc)
		mirror_defer_done(m, &f->local, rc);
	rc = atomic_load(&s->dead) ? -ECANCELED : block_submit(s->remote, &f->remote);
	if (rc)
		mirror_defer_done(m, &f->remote, rc);
	pthread_mutex_lock(&m->lock);
	if (--s->submitting == 0)
		pthread_cond_broadcast(&m->changed);
	pthread_mutex_unlock(&m->lock);
}

int mirror_flush_submit(struct mirror *m, struct block_request *req)
{
	struct mirror_flush *f = NULL;
	pthread_mutex_lock(&m->lock);
	struct session *s = m->session;
	bool both = session_usable(s) && s->flush_both;
	if (both && (f = flush_create(s, req))) {
		f->next = s->flushes;
		s->flushes = f;
		f->attached = true;
		s->attached++;
	}
	pthread_mutex_unlock(&m->lock);
	if (!both)
		return block_submit(m->local, req);
	if (!f)
		return -ENOMEM;
	flush_send(s, f);
	return 0;
}

/* mirror->lock held for the three that follow. Why nothing more comes of the session (NULL: there is none),
 * or 0. */
static int session_ended(const struct mirror *m, const struct session *s, struct error *err)
{
	if (session_usable(s) && !s->cancelled)
		return 0;
	if (!s || !s->failed)
		return error_set(err, ECANCELED, "%s: mirror: %s", m->top.label,
				 s ? "cancelled" : "not running");
	error_copy(err, &s->error);
	return s->error.code;
}

/* From now on guests wait for the remote; returns when what they did not wait for has arrived. */
static int become_synchronous(struct session *s, struct error *err)
{
	int rc = 0;
	s->synchronous = true;
	s->drain_ns = clock_now_ns();
	while (s->nbuffered && !(rc = session_ended(s->m, s, err)))
		pthread_cond_wait(&s->m->changed, &s->m->lock);
	s->drain_ns = 0;
	return rc ? rc : session_ended(s->m, s, err);
}

static int flush_and_wait(struct session *s, struct error *err)
{
	struct mirror *m = s->m;
	/* Before the flush: a guest's flush from now on covers what this one does not. */
	s->flush_both = true;
	s->copied_since = false;
	struct mirror_flush *f = flush_create(s, NULL);
	if (!f)
		return error_errno(err, ENOMEM, "%s: mirror: flush", m->top.label);
	pthread_mutex_unlock(&m->lock);
	flush_send(s, f);
	pthread_mutex_lock(&m->lock);
	int rc = 0;
	while (!f->remote_done && !(rc = session_ended(m, s, err)))
		pthread_cond_wait(&m->changed, &m->lock);
	/* its error is the session's */
	if (s->failed)
		rc = session_ended(m, s, err);
	flush_unref(f);
	return rc;
}

int mirror_flush_remote(struct mirror *m, struct error *err)
{
	SCOPE_LOCK(&m->lock);
	struct session *s = m->session;
	int rc = session_ended(m, s, err);
	if (rc)
		return rc;
	s->submitting++; /* keeps the session */
	rc = become_synchronous(s, err);
	if (!rc)
		rc = flush_and_wait(s, err);
	if (--s->submitting == 0)
		pthread_cond_broadcast(&m->changed);
	return rc;
}
