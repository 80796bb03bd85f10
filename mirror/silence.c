/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The end of a session by an error or by silence, and the mirror's own thread that watches for the latter.
 *
 * Silence: the oldest request that the remote has not answered is that for longer than the grace (counted
 * from when it became the oldest) while a guest's write waits for as long. A link that is merely busy answers
 * the oldest one all the time; whatever is never answered becomes the oldest.
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

#include "base/clock.h"
#include "base/confine.h"
#include "base/log.h"
#include "mirror/mirror_impl.h"

static struct mirror_op *op_of(struct range_entry *e)
{
	return (struct mirror_op *)(void *)((char *)e - offsetof(struct mirror_op, range));
}

void session_fail(struct session *s, int code, struct mirror_work *work, const char *fmt, ...)
{
	struct mirror *m = s->m;
	if (s->failed)
		return;
	char what[160];
	va_list ap;
	va_start(ap, fmt);
	vsnprintf(what, sizeof what, fmt, ap);
	va_end(ap);
	error_errno(&s->error, code, "%s: mirror: %s", m->top.label, what);
	s->failed = true;
	atomic_store(&s->dead, true);
	s->report = true;
	/* Those that wait for the remote are answered from the local disk, what is buffered is dropped; their
	 * chunks become unsynced. */
	while (s->mirrored)
		mirror_op_detach(s->mirrored, work);
	while (s->flushes)
		mirror_flush_detach(s->flushes, work);
	copy_abandon(s, work);
	verify_release(m, work);
	mirror_bounce_retry(m, work);
	copy_wake(s);
	pthread_cond_broadcast(&m->changed);
	pthread_cond_signal(&m->worker_wake);
}

void mirror_defer_done(struct mirror *m, struct block_request *req, int result)
{
	pthread_mutex_lock(&m->lock);
	req->driver[0] = 0;
	req->driver[1] = (uint64_t)(int64_t)result;
	*m->deferred_tail = req;
	m->deferred_tail = (struct block_request **)(void *)&req->driver[0];
	pthread_cond_signal(&m->worker_wake);
	pthread_mutex_unlock(&m->lock);
}

/* mirror->lock held. When the oldest waiting write arrived; false: none waits. */
static bool guest_waits(const struct mirror *m, uint64_t *since_ns)
{
	for (struct range_entry *e = m->ranges.first; e; e = e->next) {
		if (e->tag != RANGE_OF_OP)
			continue;
		const struct mirror_op *op = op_of(e);
		if (!op->started || op->attached) {
			*since_ns = op->since_ns;
			return true;
		}
	}
	return false;
}

/* A buffered session is for long links: what the fastest reply took is no silence there. */
static uint64_t patience_ns(const struct session *s)
{
	return s->grace_ns + (s->buffered ? s->fastest_ns : 0);
}

/* How long the oldest request has been it, unanswered, counted from `since` at the earliest. */
static uint64_t silent_ns(const struct session *s, uint64_t since, uint64_t now)
{
	uint64_t head = s->outstanding->sent_ns;
	if (s->head_answered_ns > head)
		head = s->head_answered_ns;
	if (head > since)
		since = head;
	return now > since ? now - since : 0;
}

static void check_silence(struct session *s, uint64_t now, struct mirror_work *work)
{
	uint64_t since, silent, grace = patience_ns(s);
	if (s->outstanding && guest_waits(s->m, &since) && (silent = silent_ns(s, since, now)) > grace) {
		session_fail(s, ETIMEDOUT, work, "no reply for %llu ms while the guest waits",
			     (unsigned long long)(silent / 1000000));
		return;
	}
	if (s->outstanding && s->drain_ns &&
	    (silent = silent_ns(s, s->drain_ns, now)) > MIRROR_FLUSH_GRACES * grace) {
		session_fail(s, ETIMEDOUT, work, "no reply for %llu ms to what was buffered",
			     (unsigned long long)(silent / 1000000));
		return;
	}
	for (struct mirror_flush *f = s->flushes; f; f = f->next)
		if (now > f->sent_ns && now - f->sent_ns > MIRROR_FLUSH_GRACES * grace) {
			session_fail(s, ETIMEDOUT, work, "flush: no reply for %llu ms",
				     (unsigned long long)((now - f->sent_ns) / 1000000));
			return;
		}
}

/* mirror->lock held on entry and return. */
static void report_failure(struct mirror *m, struct session *s)
{
	s->report = false;
	s->reporting = true;
	struct error e = s->error;
	pthread_mutex_unlock(&m->lock);
	if (s->failed_cb)
		s->failed_cb(s->opaque, &e);
	else
		log_warn("%s", e.message);
	pthread_mutex_lock(&m->lock);
	s->reporting = false;
	pthread_cond_broadcast(&m->changed);
}

static void run_deferred(struct mirror *m)
{
	struct block_request *req = m->deferred;
	m->deferred = NULL;
	m->deferred_tail = &m->deferred;
	pthread_mutex_unlock(&m->lock);
	while (req) {
		struct block_request *next = (struct block_request *)(uintptr_t)req->driver[0];
		req->done(req, (int)(int64_t)req->driver[1]);
		req = next;
	}
	pthread_mutex_lock(&m->lock);
}

static void wait_a_tick(struct mirror *m, uint64_t tick_ns)
{
	uint64_t at = clock_now_ns() + tick_ns;
	struct timespec ts = clock_timespec(at);
	pthread_cond_timedwait(&m->worker_wake, &m->lock, &ts);
}

static void *worker_main(void *arg)
{
	struct mirror *m = arg;
	uint64_t last = 0;
	pthread_setname_np(pthread_self(), "mirror");
	confine_self(CONFINE_MIRROR);
	pthread_mutex_lock(&m->lock);
	while (!m->worker_quit) {
		struct session *s = m->session;
		if (m->deferred) {
			run_deferred(m);
			continue;
		}
		if (s && s->report) {
			report_failure(m, s);
			continue;
		}
		if (!s || s->failed) {
			last = 0;
			pthread_cond_wait(&m->worker_wake, &m->lock);
			continue;
		}
		uint64_t now = clock_now_ns(), tick = s->grace_ns / 4;
		/* If this thread was held up, so may have been those that take the replies. */
		if (last && now - last > s->grace_ns)
			s->head_answered_ns = now;
		last = now;
		struct mirror_work work;
		mirror_work_init(&work);
		check_silence(s, now, &work);
		verify_check_patience(s, now, &work);
		if (s->failed || work.start || work.send || work.done) {
			pthread_mutex_unlock(&m->lock);
			mirror_work_run(m, &work);
			pthread_mutex_lock(&m->lock);
			continue;
		}
		wait_a_tick(m, tick ? tick : 1000000);
	}
	pthread_mutex_unlock(&m->lock);
	return NULL;
}

int mirror_worker_start(struct mirror *m, struct error *err)
{
	if (m->worker_running)
		return 0;
	sigset_t all, old;
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &old);
	int rc = pthread_create(&m->worker, NULL, worker_main, m);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (rc)
		return error_errno(err, rc, "%s: mirror: thread", m->top.label);
	m->worker_running = true;
	return 0;
}

void mirror_worker_stop(struct mirror *m)
{
	if (!m->worker_running)
		return;
	pthread_mutex_lock(&m->lock);
	m->worker_quit = true;
	pthread_cond_signal(&m->worker_wake);
	pthread_mutex_unlock(&m->lock);
	pthread_join(m->worker, NULL);
	m->worker_running = false;
}
