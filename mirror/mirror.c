/* SPDX-License-Identifier: Apache-2.0 */
#include "mirror/mirror.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/cond.h"
#include "base/log.h"
#include "mirror/mirror_impl.h"

/* --- the filter block --- */

static int top_submit(struct block *blk, struct block_request *req)
{
	struct mirror *m = (struct mirror *)blk;
	switch (req->op) {
	case BLOCK_READ:
		return block_submit(m->local, req);
	case BLOCK_FLUSH:
		return mirror_flush_submit(m, req);
	default:
		return mirror_write_submit(m, req);
	}
}

static int top_extents(struct block *blk, uint64_t offset_bytes, uint64_t len_bytes, struct block_extent *ext,
		       unsigned *n, struct error *err)
{
	return block_extents(((struct mirror *)blk)->local, offset_bytes, len_bytes, ext, n, err);
}

/* The filter is freed with its mirror. */
static void top_close(struct block *blk)
{
	(void)blk;
}

static const struct block_ops top_ops = {
	.name = "mirror",
	.submit = top_submit,
	.extents = top_extents,
	.close = top_close,
};

int mirror_create(struct block *local, struct mirror **out, struct block **top, struct error *err)
{
	struct mirror *m = calloc(1, sizeof *m);
	if (!m)
		return error_errno(err, ENOMEM, "%s: mirror", local->label);
	m->local = local;
	m->top.ops = &top_ops;
	m->top.size_bytes = local->size_bytes;
	m->top.limits = local->limits;
	memcpy(m->top.label, local->label, sizeof m->top.label);
	struct block_limits *lim = &m->top.limits;
	/* What a remote may be picky about: known now, as limits do not change under a guest. */
	if (lim->request_alignment < MIRROR_SECTOR_BYTES && m->top.size_bytes % MIRROR_SECTOR_BYTES == 0)
		lim->request_alignment = MIRROR_SECTOR_BYTES;
	if (!lim->max_transfer_bytes || lim->max_transfer_bytes > MIRROR_TRANSFER_BYTES)
		lim->max_transfer_bytes = MIRROR_TRANSFER_BYTES;
	lim->max_transfer_bytes -= lim->max_transfer_bytes % lim->request_alignment;
	pthread_mutex_init(&m->control, NULL);
	pthread_mutex_init(&m->lock, NULL);
	cond_init_monotonic(&m->changed);
	cond_init_monotonic(&m->worker_wake);
	m->bounce_wait_tail = &m->bounce_wait;
	m->deferred_tail = &m->deferred;
	m->stats.total_bytes = m->top.size_bytes;
	*out = m;
	*top = &m->top;
	return 0;
}

void mirror_free(struct mirror *m)
{
	if (!m)
		return;
	mirror_stop(m);
	pthread_mutex_lock(&m->lock);
	while (m->passing)
		pthread_cond_wait(&m->changed, &m->lock);
	pthread_mutex_unlock(&m->lock);
	mirror_worker_stop(m);
	chunk_map_free(m->map);
	pthread_cond_destroy(&m->changed);
	pthread_cond_destroy(&m->worker_wake);
	pthread_mutex_destroy(&m->lock);
	pthread_mutex_destroy(&m->control);
	free(m);
}

/* --- start --- */

static uint32_t alignment(const struct block *blk)
{
	return blk->limits.request_alignment ? blk->limits.request_alignment : 1;
}

static int check_options(const struct mirror *m, const struct mirror_options *opt, uint32_t chunk_bytes,
			 struct error *err)
{
	const struct block *remote = opt->remote;
	const char *label = m->top.label;
	if (!remote)
		return error_set(err, EINVAL, "%s: mirror: no remote", label);
	if (remote->size_bytes != m->top.size_bytes)
		return error_set(err, EINVAL, "%s: mirror: %llu bytes here, %llu at the remote", label,
				 (unsigned long long)m->top.size_bytes,
				 (unsigned long long)remote->size_bytes);
	if (remote->limits.read_only)
		return error_set(err, EROFS, "%s: mirror: the remote is read-only", label);
	if (alignment(remote) > m->top.limits.request_alignment)
		return error_set(err, EINVAL, "%s: mirror: the remote's alignment of %u bytes is above %u",
				 label, alignment(remote), m->top.limits.request_alignment);
	if (chunk_bytes < MIRROR_CHUNK_MIN_BYTES || chunk_bytes > MIRROR_CHUNK_MAX_BYTES ||
	    (chunk_bytes & (chunk_bytes - 1)))
		return error_set(err, EINVAL, "%s: mirror: chunks of %u bytes", label, chunk_bytes);
	if (opt->requests_in_flight > MIRROR_REQUESTS_MAX)
		return error_set(err, EINVAL, "%s: mirror: %u requests in flight, at most %d are possible",
				 label, opt->requests_in_flight, MIRROR_REQUESTS_MAX);
	if (opt->buffer_bytes &&
	    (opt->buffer_bytes < MIRROR_BUFFER_MIN_BYTES || opt->buffer_bytes > MIRROR_BUFFER_MAX_BYTES))
		return error_set(err, EINVAL, "%s: mirror: a buffer of %llu bytes", label,
				 (unsigned long long)opt->buffer_bytes);
	return 0;
}

static uint32_t chunk_size(const struct mirror *m)
{
	uint32_t n = MIRROR_CHUNK_DEFAULT_BYTES;
	while (n < MIRROR_CHUNK_MAX_BYTES && m->top.size_bytes / n > MIRROR_CHUNKS_DEFAULT_MAX)
		n *= 2;
	return n;
}

static uint32_t piece_size(const struct session *s)
{
	uint32_t n = MIRROR_PIECE_BYTES;
	uint32_t local = s->m->top.limits.max_transfer_bytes, remote = s->remote->limits.max_transfer_bytes;
	if (local && local < n)
		n = local;
	if (remote && remote < n)
		n = remote;
	return n - n % s->align;
}

static void session_free(struct session *s)
{
	remote_queue_free(s);
	copy_free(s);
	free(s);
}

static int session_create(struct mirror *m, const struct mirror_options *opt, struct session **out,
			  struct error *err)
{
	struct session *s = calloc(1, sizeof *s);
	if (!s)
		return error_errno(err, ENOMEM, "%s: mirror", m->top.label);
	s->m = m;
	s->remote = opt->remote;
	s->grace_ns =
		(opt->write_grace_ms ? opt->write_grace_ms : MIRROR_GRACE_DEFAULT_MS) * UINT64_C(1000000);
	s->remote_is_zero = opt->remote_is_zero;
	s->held = opt->hold_pass;
	s->remote_has_backing = opt->remote_has_backing;
	s->buffer_bytes = opt->buffer_bytes ? opt->buffer_bytes : MIRROR_BUFFER_DEFAULT_BYTES;
	s->buffered = opt->buffered;
	s->bandwidth = opt->bandwidth;
	s->yield = opt->yield;
	s->failed_cb = opt->failed;
	s->opaque = opt->opaque;
	atomic_init(&s->dead, false);
	s->align = m->top.limits.request_alignment;
	s->piece_bytes = piece_size(s);
	if (!s->piece_bytes) {
		free(s);
		return error_set(err, EINVAL, "%s: mirror: the remote's largest transfer is below one sector",
				 m->top.label);
	}
	if (remote_queue_create(s)) {
		free(s);
		return error_errno(err, ENOMEM, "%s: mirror", m->top.label);
	}
	int rc = copy_create(s, opt->requests_in_flight ? opt->requests_in_flight : MIRROR_REQUESTS_DEFAULT,
			     err);
	if (rc) {
		session_free(s);
		return rc;
	}
	*out = s;
	return 0;
}

/* The chunk map for a new session: the old one where it is to be kept. */
static int prepare_map(struct mirror *m, const struct mirror_options *opt, uint32_t chunk_bytes,
		       struct chunk_map **out, struct error *err)
{
	bool keep = opt->keep_map && m->map;
	if (keep && opt->chunk_bytes && m->map->chunk_bytes != opt->chunk_bytes)
		return error_set(err, EINVAL, "%s: mirror: the map that is kept has chunks of %u bytes",
				 m->top.label, m->map->chunk_bytes);
	*out = keep ? m->map : NULL;
	if (!keep && chunk_map_create(m->top.size_bytes, chunk_bytes, out))
		return error_errno(err, ENOMEM, "%s: mirror: map", m->top.label);
	return 0;
}

int mirror_start(struct mirror *m, const struct mirror_options *opt, struct error *err)
{
	uint32_t chunk_bytes = opt->chunk_bytes ? opt->chunk_bytes : chunk_size(m);
	SCOPE_LOCK(&m->control);
	/* Only start and stop, under control, change m->session and m->map. */
	if (m->session)
		return error_set(err, EBUSY, "%s: mirror: running already", m->top.label);
	struct chunk_map *map = NULL;
	struct session *s = NULL;
	int rc = check_options(m, opt, chunk_bytes, err);
	if (!rc)
		rc = mirror_worker_start(m, err);
	if (!rc)
		rc = prepare_map(m, opt, chunk_bytes, &map, err);
	if (!rc)
		rc = session_create(m, opt, &s, err);
	if (rc) {
		if (map != m->map)
			chunk_map_free(map);
		return rc;
	}
	pthread_mutex_lock(&m->lock);
	struct chunk_map *old = m->map != map ? m->map : NULL;
	if (m->map != map) {
		m->stats = (struct mirror_stats){.total_bytes = m->top.size_bytes};
		m->map = map;
	}
	s->id = ++m->session_ids;
	s->head_answered_ns = clock_now_ns();
	s->go = true;
	m->session = s;
	copy_wake(s);
	pthread_cond_signal(&m->worker_wake);
	pthread_mutex_unlock(&m->lock);
	chunk_map_free(old);
	return 0;
}

/* --- waiting, judging, stopping --- */

static bool all_synced(const struct session *s)
{
	return s->announced && chunk_map_all_synced(s->m->map);
}

int mirror_wait_synced(struct mirror *m, unsigned timeout_ms, struct error *err)
{
	uint64_t until = clock_now_ns() + timeout_ms * UINT64_C(1000000);
	struct timespec ts = clock_timespec(until);
	int rc = 0;
	SCOPE_LOCK(&m->lock);
	struct session *s = m->session;
	if (!s)
		return error_set(err, ECANCELED, "%s: mirror: not running", m->top.label);
	s->submitting++; /* keeps the session */
	while (session_usable(s) && !s->cancelled && !all_synced(s) && rc != ETIMEDOUT)
		rc = timeout_ms ? pthread_cond_timedwait(&m->changed, &m->lock, &ts)
				: pthread_cond_wait(&m->changed, &m->lock);
	if (s->failed) {
		error_copy(err, &s->error);
		rc = s->error.code;
	} else if (s->stopping || s->cancelled) {
		rc = error_set(err, ECANCELED, "%s: mirror: cancelled", m->top.label);
	} else if (all_synced(s)) {
		rc = 0;
	} else {
		rc = error_set(err, ETIMEDOUT, "%s: mirror: not synced within %u ms", m->top.label,
			       timeout_ms);
	}
	if (--s->submitting == 0)
		pthread_cond_broadcast(&m->changed);
	return rc;
}

bool mirror_is_consistent(struct mirror *m)
{
	SCOPE_LOCK(&m->lock);
	const struct session *s = m->session;
	return session_usable(s) && chunk_map_all_synced(m->map) && !m->ranges.first && !m->passing &&
	       !s->outstanding && !s->mirrored && !s->flushes && !(s->flush_both && s->copied_since);
}

void mirror_cancel(struct mirror *m)
{
	SCOPE_LOCK(&m->lock);
	struct session *s = m->session;
	if (!s)
		return;
	s->cancelled = true;
	copy_wake(s);
	pthread_cond_broadcast(&m->changed);
}

void mirror_stop(struct mirror *m)
{
	SCOPE_LOCK(&m->control);
	pthread_mutex_lock(&m->lock);
	struct session *s = m->session;
	if (!s) {
		pthread_mutex_unlock(&m->lock);
		return;
	}
	struct mirror_work work;
	mirror_work_init(&work);
	s->stopping = true;
	mirror_drop_buffered(s, &work);
	copy_wake(s);
	pthread_cond_broadcast(&m->changed);
	pthread_mutex_unlock(&m->lock);
	mirror_work_run(m, &work);
	pthread_mutex_lock(&m->lock);
	while (s->attached)
		pthread_cond_wait(&m->changed, &m->lock);
	pthread_mutex_unlock(&m->lock);
	pthread_join(s->copy_thread, NULL);
	pthread_mutex_lock(&m->lock);
	while (s->submitting || s->report || s->reporting)
		pthread_cond_wait(&m->changed, &m->lock);
	m->session = NULL;
	pthread_mutex_unlock(&m->lock);
	block_close(s->remote);
	/* What the remote refused may still be on its way through the mirror's thread. */
	pthread_mutex_lock(&m->lock);
	while (s->outstanding || s->flushing)
		pthread_cond_wait(&m->changed, &m->lock);
	pthread_mutex_unlock(&m->lock);
	session_free(s);
}

void mirror_stats(struct mirror *m, struct mirror_stats *out)
{
	SCOPE_LOCK(&m->lock);
	*out = m->stats;
	if (m->map) {
		out->synced_bytes = m->map->synced_bytes;
		out->verified_bytes = m->map->verified_bytes;
		out->unsynced_bytes = m->map->unsynced_bytes;
		out->all_synced = m->session && all_synced(m->session);
	}
	out->failed = m->session && m->session->failed;
}
