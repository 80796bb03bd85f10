/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/move_link.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/cond.h"
#include "base/clock.h"
#include "base/confine.h"
#include "base/log.h"

/* Frames waiting for their reader; a peer that sends more than this unasked is broken. */
#define QUEUE_MAX_FRAMES 64

struct move_link {
	struct conn *conn;
	uint64_t epoch;
	unsigned silence_ms;
	void (*failed)(void *opaque, const struct error *why);
	int (*frame)(void *opaque, const struct frame *frame, struct error *err);
	void *opaque;

	pthread_mutex_t lock;
	pthread_cond_t changed;
	struct frame queue[QUEUE_MAX_FRAMES];
	unsigned head, count;
	bool is_failed, closing;
	bool rehearsed; /* as the peer said */
	struct error why;

	pthread_mutex_t send_lock;
	pthread_t reader, beater;
	bool reader_started, beater_started;
};

void move_link_fail(struct move_link *l, const struct error *why)
{
	pthread_mutex_lock(&l->lock);
	bool first = !l->is_failed;
	bool tell = first && !l->closing;
	if (first) {
		l->is_failed = true;
		l->why = *why;
		if (!l->why.code)
			l->why.code = -EIO;
	}
	pthread_cond_broadcast(&l->changed);
	pthread_mutex_unlock(&l->lock);
	if (first)
		conn_shutdown(l->conn);
	if (tell && l->failed)
		l->failed(l->opaque, why);
}

bool move_link_failed(struct move_link *l, struct error *why)
{
	SCOPE_LOCK(&l->lock);
	if (l->is_failed)
		error_copy(why, &l->why);
	return l->is_failed;
}

bool move_link_rehearsed(struct move_link *l)
{
	SCOPE_LOCK(&l->lock);
	return l->rehearsed;
}

struct conn *move_link_conn(struct move_link *l)
{
	return l->conn;
}

int move_link_send(struct move_link *l, enum frame_type type, json_t *json, struct error *err)
{
	struct error e = ERROR_INIT;
	if (move_link_failed(l, &e)) {
		error_copy(err, &e);
		return e.code;
	}
	pthread_mutex_lock(&l->send_lock);
	int rc = frame_send_json(l->conn, type, l->epoch, json, l->silence_ms, &e);
	pthread_mutex_unlock(&l->send_lock);
	if (rc < 0) {
		error_prefix(&e, "control channel: send %s", frame_type_name(type));
		move_link_fail(l, &e);
		/* the reader may have known a better reason */
		move_link_failed(l, &e);
		error_copy(err, &e);
		return e.code;
	}
	return 0;
}

int move_link_send_bytes(struct move_link *l, enum frame_type type, const void *buf, uint32_t len,
			 struct error *err)
{
	struct error e = ERROR_INIT;
	if (move_link_failed(l, &e)) {
		error_copy(err, &e);
		return e.code;
	}
	pthread_mutex_lock(&l->send_lock);
	int rc = frame_send_bytes(l->conn, type, l->epoch, buf, len, l->silence_ms, &e);
	pthread_mutex_unlock(&l->send_lock);
	if (rc < 0) {
		error_prefix(&e, "control channel: send %s", frame_type_name(type));
		move_link_fail(l, &e);
		move_link_failed(l, &e);
		error_copy(err, &e);
		return e.code;
	}
	return 0;
}

static void *beat_thread(void *arg)
{
	struct move_link *l = arg;
	unsigned every = l->silence_ms / 4 < 1000 ? l->silence_ms / 4 : 1000;
	if (every < 50)
		every = 50;
	confine_self(CONFINE_LINK);
	pthread_mutex_lock(&l->lock);
	while (!l->is_failed && !l->closing) {
		uint64_t at = clock_now_ns() + every * UINT64_C(1000000);
		struct timespec until = clock_timespec(at);
		pthread_cond_timedwait(&l->changed, &l->lock, &until);
		if (l->is_failed || l->closing)
			break;
		if (clock_now_ns() < at)
			continue;
		pthread_mutex_unlock(&l->lock);
		move_link_send(l, FRAME_BEAT, NULL, NULL);
		pthread_mutex_lock(&l->lock);
	}
	pthread_mutex_unlock(&l->lock);
	return NULL;
}

/* 0: consumed or queued (ownership taken); negative: fails the channel. */
static int take_frame(struct move_link *l, struct frame *f, struct error *err)
{
	if (f->epoch != l->epoch)
		return error_set(err, EPROTO, "control channel: %s of epoch %llu in a move of epoch %llu",
				 frame_type_name(f->type), (unsigned long long)f->epoch,
				 (unsigned long long)l->epoch);
	switch (f->type) {
	case FRAME_BEAT:
		return 0;
	case FRAME_ABORT: {
		const char *s = f->json ? json_string_value(json_object_get(f->json, "reason")) : NULL;
		pthread_mutex_lock(&l->lock);
		l->rehearsed = json_is_true(json_object_get(f->json, "rehearsed"));
		pthread_mutex_unlock(&l->lock);
		return error_set(err, ECONNABORTED, "the other host ended the move: %s",
				 s ? s : "no reason given");
	}
	case FRAME_FILE:
	case FRAME_HASH_ASK:
	case FRAME_HASHES:
		if (l->frame)
			return l->frame(l->opaque, f, err);
		return error_set(err, EPROTO, "control channel: unexpected %s", frame_type_name(f->type));
	default:
		break;
	}
	SCOPE_LOCK(&l->lock);
	if (l->count == QUEUE_MAX_FRAMES)
		return error_set(err, EPROTO, "control channel: too many frames at once");
	l->queue[(l->head + l->count++) % QUEUE_MAX_FRAMES] = *f;
	memset(f, 0, sizeof *f);
	pthread_cond_broadcast(&l->changed);
	return 0;
}

static void *read_thread(void *arg)
{
	struct move_link *l = arg;
	confine_self(CONFINE_LINK);
	for (;;) {
		struct frame f = {0};
		struct error e = ERROR_INIT;
		int rc = frame_read(l->conn, l->silence_ms, &f, &e);
		if (rc == -ETIMEDOUT)
			error_set(&e, ETIMEDOUT, "control channel: silent for %u ms", l->silence_ms);
		else if (rc == -ENODATA)
			error_set(&e, ECONNRESET, "control channel: the other host closed the connection");
		if (!rc)
			rc = take_frame(l, &f, &e);
		frame_release(&f);
		if (rc) {
			if (!e.code)
				error_set(&e, rc, "control channel");
			move_link_fail(l, &e);
			return NULL;
		}
	}
}

int move_link_wait(struct move_link *l, uint32_t mask, unsigned timeout_ms, struct frame *out,
		   struct error *err)
{
	uint64_t deadline = timeout_ms ? clock_now_ns() + timeout_ms * UINT64_C(1000000) : 0;
	struct error e = ERROR_INIT;
	pthread_mutex_lock(&l->lock);
	for (;;) {
		/* What arrived before the failure still counts: a RUNNING followed by a reset is a RUNNING.
		 */
		if (l->count) {
			struct frame f = l->queue[l->head];
			if (mask & (UINT32_C(1) << f.type)) {
				*out = f;
				l->head = (l->head + 1) % QUEUE_MAX_FRAMES;
				l->count--;
				pthread_mutex_unlock(&l->lock);
				return 0;
			}
			pthread_mutex_unlock(&l->lock);
			error_set(&e, EPROTO, "control channel: unexpected %s", frame_type_name(f.type));
			move_link_fail(l, &e);
			error_copy(err, &e);
			return e.code;
		}
		if (l->is_failed) {
			error_copy(err, &l->why);
			int code = l->why.code;
			pthread_mutex_unlock(&l->lock);
			return code;
		}
		if (!deadline) {
			pthread_cond_wait(&l->changed, &l->lock);
			continue;
		}
		if (clock_now_ns() >= deadline) {
			pthread_mutex_unlock(&l->lock);
			return error_set(err, ETIMEDOUT, "control channel: no answer within %u ms",
					 timeout_ms);
		}
		struct timespec until = clock_timespec(deadline);
		pthread_cond_timedwait(&l->changed, &l->lock, &until);
	}
}

int move_link_start(const struct move_link_options *opt, struct move_link **out, struct error *err)
{
	struct move_link *l = calloc(1, sizeof *l);
	if (!l) {
		conn_close(opt->conn);
		return error_errno(err, ENOMEM, "control channel");
	}
	l->conn = opt->conn;
	l->epoch = opt->epoch;
	l->silence_ms = opt->silence_ms;
	l->failed = opt->failed;
	l->frame = opt->frame;
	l->opaque = opt->opaque;
	pthread_mutex_init(&l->lock, NULL);
	pthread_mutex_init(&l->send_lock, NULL);
	cond_init_monotonic(&l->changed);
	int rc = pthread_create(&l->reader, NULL, read_thread, l);
	if (!rc) {
		l->reader_started = true;
		rc = pthread_create(&l->beater, NULL, beat_thread, l);
		l->beater_started = !rc;
	}
	if (rc) {
		l->closing = true;
		move_link_free(l);
		return error_errno(err, rc, "control channel: thread");
	}
	*out = l;
	return 0;
}

void move_link_free(struct move_link *l)
{
	if (!l)
		return;
	pthread_mutex_lock(&l->lock);
	l->closing = true;
	pthread_cond_broadcast(&l->changed);
	pthread_mutex_unlock(&l->lock);
	if (l->beater_started)
		pthread_join(l->beater, NULL);
	conn_shutdown(l->conn);
	if (l->reader_started)
		pthread_join(l->reader, NULL);
	conn_close(l->conn);
	while (l->count) {
		frame_release(&l->queue[l->head]);
		l->head = (l->head + 1) % QUEUE_MAX_FRAMES;
		l->count--;
	}
	pthread_cond_destroy(&l->changed);
	pthread_mutex_destroy(&l->lock);
	pthread_mutex_destroy(&l->send_lock);
	free(l);
}
