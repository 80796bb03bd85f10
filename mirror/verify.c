/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The comparison of both sides' content, while the guest runs on.
 *
 * Chunks are watched while both sides hash them: what had a change in flight there, or gets one until the
 * answer is in, is no judgement and looked at again. So no change was under way, on either side, from before
 * the remote was asked until it answered: both hashed the same bytes, and both count what is written later
 * from the same point on (mirror/proof.h). What is written all the time is compared at last while it is held
 * by the range lock, but never for longer than a guest's write may wait for a remote.
 *
 * Each range is one worker's from its hashes here to the answer from there: with three of them one reads here
 * while the remote reads another's.
 */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "base/bitmap.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "base/confine.h"
#include "base/fault.h"
#include "base/log.h"
#include "mirror/verify_impl.h"

#define VERIFY_SWEEPS	    3			 /* without the lock */
#define VERIFY_BATCH_BYTES  (UINT64_C(32) << 20) /* of data in a range */
#define VERIFY_LATER_BYTES  (UINT64_C(4) << 20)	 /* of a range that is looked at again */
#define VERIFY_LOCKED_BYTES (UINT64_C(1) << 20)	 /* read while a write of the guest may wait for it */
#define VERIFY_TRIES	    20			 /* under the lock */

struct verify_range {
	struct chunk_watch watch;
	uint64_t first, dirty[MIRROR_VERIFY_CHUNKS / 64];
	unsigned n;
	struct verify_lock *lock; /* NULL: they are watched only */
	struct mirror_hash local[MIRROR_VERIFY_CHUNKS], remote[MIRROR_VERIFY_CHUNKS];
};

/* --- one range --- */

int verify_usable(struct verify *v, struct error *err)
{
	const struct session *s = v->s;
	if (s->failed) {
		error_copy(err, &s->error);
		return s->error.code;
	}
	if (s->stopping || s->cancelled)
		return error_set(err, ECANCELED, "%s: mirror: cancelled", v->m->top.label);
	if (v->err.code) {
		error_copy(err, &v->err);
		return v->err.code;
	}
	return 0;
}

static bool eligible(const struct verify *v, uint64_t chunk)
{
	bool synced = bitmap_test(v->map->synced, chunk);
	return v->opt->adopt ? !synced : synced && !bitmap_test(v->map->copying, chunk);
}

static int begin_range(struct verify *v, struct verify_range *r, struct error *err)
{
	struct mirror *m = v->m;
	memset(r->dirty, 0, sizeof r->dirty);
	r->watch = (struct chunk_watch){.first = r->first, .n = r->n, .dirty = r->dirty};
	SCOPE_LOCK(&m->lock);
	int rc = verify_usable(v, err);
	if (rc)
		return rc;
	chunk_map_watch(v->map, &r->watch);
	for (const struct range_entry *e = m->ranges.first; e; e = e->next)
		if (e->tag != RANGE_OF_VERIFY)
			chunk_map_mark_scan(v->map, e->offset_bytes, e->len_bytes);
	for (const struct remote_piece *p = v->s->outstanding; p; p = p->next)
		chunk_map_mark_scan(v->map, p->req.offset_bytes, p->req.len_bytes);
	for (const struct mirror_op *op = v->s->mirrored; op; op = op->next_mirrored)
		chunk_map_mark_scan(v->map, op->range.offset_bytes, op->range.len_bytes);
	for (unsigned i = 0; i < r->n; i++) {
		if (!eligible(v, r->first + i))
			bitmap_set(r->dirty, i);
		proof_begin(v->proof, r->first + i);
	}
	return 0;
}

/* mirror->lock held for those that follow. */
static void adopt_chunk(struct verify *v, const struct verify_range *r, unsigned i,
			const struct mirror_hash *zeroes)
{
	uint64_t chunk = r->first + i;
	if (!eligible(v, chunk))
		return;
	/* Nothing was sent there since it was hashed: the pass is held, and the chunk not synced. */
	bool dirty = bitmap_test(r->dirty, i);
	if (!dirty && mirror_hash_equal(&r->remote[i], zeroes))
		bitmap_clear(v->map->touched, chunk);
	if (dirty || !mirror_hash_equal(&r->local[i], &r->remote[i])) {
		v->res.differed++;
		return;
	}
	v->res.agreed++;
	proof_set(v->proof, chunk, &r->local[i]);
	chunk_map_set_synced(v->map, chunk);
	chunk_map_set_verified(v->map, chunk);
}

static bool prove_chunk(struct verify *v, const struct verify_range *r, unsigned i)
{
	uint64_t chunk = r->first + i;
	if (!eligible(v, chunk)) {
		v->unsynced = true;
	} else if (r->lock ? !verify_lock_holds(r->lock) : bitmap_test(r->dirty, i)) {
		v->res.retried++;
		bitmap_set(v->again, chunk);
	} else if (mirror_hash_equal(&r->local[i], &r->remote[i])) {
		v->res.agreed++;
		proof_set(v->proof, chunk, &r->local[i]);
		chunk_map_set_verified(v->map, chunk);
	} else {
		v->res.differed++;
		return false;
	}
	return true;
}

static int disagree(struct verify *v, const struct verify_range *r, unsigned first_bad, struct error *err)
{
	unsigned n = 1;
	while (first_bad + n < r->n && !bitmap_test(r->dirty, first_bad + n) &&
	       !mirror_hash_equal(&r->local[first_bad + n], &r->remote[first_bad + n]))
		n++;
	uint64_t last = r->first + first_bad + n - 1;
	v->res.bad_offset = (r->first + first_bad) << v->map->shift;
	v->res.bad_len = (last << v->map->shift) + chunk_map_len(v->map, last) - v->res.bad_offset;
	return error_set(err, EILSEQ,
			 "%s: the destination's content differs from the source's within bytes %llu to %llu",
			 v->m->top.label, (unsigned long long)v->res.bad_offset,
			 (unsigned long long)(v->res.bad_offset + v->res.bad_len - 1));
}

static int judge(struct verify *v, struct verify_range *r, struct error *err)
{
	struct mirror_hash zeroes = {0}, last = {0};
	if (v->opt->adopt) {
		uint64_t last_len = chunk_map_len(v->map, r->first + r->n - 1);
		zeroes = mirror_hash_zeroes(v->opt->seed, v->map->chunk_bytes);
		last = mirror_hash_zeroes(v->opt->seed, last_len);
	}
	SCOPE_LOCK(&v->m->lock);
	int rc = verify_usable(v, err);
	for (unsigned i = 0; i < r->n && !rc; i++) {
		if (v->opt->adopt)
			adopt_chunk(v, r, i, i == r->n - 1 ? &last : &zeroes);
		else if (!prove_chunk(v, r, i))
			rc = disagree(v, r, i, err);
	}
	return rc;
}

static int compare(struct verify *v, struct verify_range *r, struct error *err)
{
	int rc = begin_range(v, r, err);
	if (rc)
		return rc;
	rc = mirror_hash_block(v->m->local, v->map->chunk_bytes, v->opt->seed, r->first, r->n, r->local, err);
	if (rc)
		error_prefix(err, "verification");
	if (!rc && fault_point("in-verify"))
		rc = error_set(err, EIO, "fault point in-verify");
	if (!rc && r->lock)
		rc = verify_lock_remote(r->lock, err);
	if (!rc)
		rc = v->opt->remote_hashes(v->opt->opaque, r->first, r->n, r->remote, err);
	if (!rc)
		rc = judge(v, r, err);
	pthread_mutex_lock(&v->m->lock);
	chunk_map_unwatch(v->map, &r->watch);
	pthread_mutex_unlock(&v->m->lock);
	return rc;
}

/* --- under the range lock --- */

static bool marked_again(struct verify *v, const struct verify_range *r)
{
	SCOPE_LOCK(&v->m->lock);
	return bitmap_next_set(v->again, r->first + r->n, r->first) < r->first + r->n;
}

static int compare_locked(struct verify *v, struct verify_range *r, struct error *err)
{
	struct verify_lock *l = r->lock;
	for (l->tries = 0; l->tries < VERIFY_TRIES; l->tries++) {
		pthread_mutex_lock(&v->m->lock);
		bitmap_clear_range(v->again, r->first, r->n);
		pthread_mutex_unlock(&v->m->lock);
		int rc = verify_lock_take(l, r->first, r->n, err);
		if (!rc)
			rc = compare(v, r, err);
		verify_lock_give(l);
		if (rc || !marked_again(v, r))
			return rc;
	}
	return error_set(err, EBUSY,
			 "%s: the content at %llu could not be compared: the destination took longer than a "
			 "guest's write may wait, %d times",
			 v->m->top.label, (unsigned long long)(r->first << v->map->shift), VERIFY_TRIES);
}

/* --- sweeps --- */

/* As many chunks of [first, first+n) as hold no more data than a range may; what they hold. */
static unsigned within_budget(const struct verify *v, uint64_t first, unsigned n, uint64_t *data_bytes)
{
	uint64_t at = first << v->map->shift, end = at + ((uint64_t)n << v->map->shift), data = 0;
	if (end > v->map->size_bytes)
		end = v->map->size_bytes;
	while (at < end && data < v->batch_bytes) {
		struct block_extent x[MIRROR_EXTENTS_PER_QUERY];
		unsigned nx = MIRROR_EXTENTS_PER_QUERY;
		if (block_extents(v->m->local, at, end - at, x, &nx, NULL) || !nx)
			break; /* reading meets the error */
		for (unsigned i = 0; i < nx && at < end && data < v->batch_bytes; i++) {
			uint64_t len = x[i].len_bytes < end - at ? x[i].len_bytes : end - at;
			if (!x[i].hole && !x[i].zero) {
				if (len > v->batch_bytes - data)
					len = v->batch_bytes - data;
				data += len;
			}
			at += len;
		}
	}
	*data_bytes = data;
	if (at == first << v->map->shift)
		return 1;
	uint64_t chunks = ((at - 1) >> v->map->shift) - first + 1;
	return chunks < n ? (unsigned)chunks : n;
}

static bool take_range(struct verify *v, struct verify_range *r)
{
	uint64_t nchunks = v->map->nchunks, data;
	SCOPE_LOCK(&v->take);
	r->first = bitmap_next_set(v->todo, nchunks, v->cursor);
	if (r->first >= nchunks)
		return false;
	uint64_t limit = nchunks - r->first < v->batch_chunks ? nchunks : r->first + v->batch_chunks;
	r->n = (unsigned)(bitmap_next_clear(v->todo, limit, r->first) - r->first);
	r->n = within_budget(v, r->first, r->n, &data);
	v->cursor = r->first + r->n;
	pthread_mutex_lock(&v->m->lock);
	v->res.bytes_read += data;
	pthread_mutex_unlock(&v->m->lock);
	return true;
}

static void end_with(struct verify *v, const struct error *err)
{
	SCOPE_LOCK(&v->m->lock);
	if (!v->err.code)
		v->err = *err;
}

static struct verify_lock *new_lock(struct verify *v)
{
	SCOPE_LOCK(&v->m->lock);
	struct verify_lock *l = &v->locks[v->nlocks];
	*l = (struct verify_lock){.v = v};
	v->nlocks++;
	return l;
}

static void *sweep_main(void *arg)
{
	struct verify *v = arg;
	struct error err = ERROR_INIT;
	pthread_setname_np(pthread_self(), "mirror-verify");
	confine_self(CONFINE_MIRROR);
	struct verify_range *r = calloc(1, sizeof *r);
	if (!r) {
		error_errno(&err, ENOMEM, "%s: verification", v->m->top.label);
		end_with(v, &err);
		return NULL;
	}
	if (v->locked)
		r->lock = new_lock(v);
	while (take_range(v, r))
		if (r->lock ? compare_locked(v, r, &err) : compare(v, r, &err)) {
			end_with(v, &err);
			break;
		}
	free(r);
	return NULL;
}

static int sweep(struct verify *v, struct error *err)
{
	/* A guest that waits for the remote as well has one range at a time taken from it. */
	unsigned n = 0, most = v->locked && !v->s->buffered ? 1 : VERIFY_WORKERS;
	pthread_t threads[VERIFY_WORKERS];
	sigset_t all, old;
	v->cursor = 0;
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &old);
	while (n < most && pthread_create(&threads[n], NULL, sweep_main, v) == 0)
		n++;
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	for (unsigned i = 0; i < n; i++)
		pthread_join(threads[i], NULL);
	if (!n)
		return error_set(err, EAGAIN, "%s: verification: thread", v->m->top.label);
	SCOPE_LOCK(&v->m->lock);
	return verify_usable(v, err);
}

/* --- the whole --- */

static void swap_sweeps(struct verify *v)
{
	uint64_t *done = v->todo;
	v->todo = v->again;
	v->again = done;
	bitmap_clear_range(v->again, 0, v->map->nchunks);
}

static int run_sweeps(struct verify *v, struct error *err)
{
	int rc = sweep(v, err);
	/* What changed meanwhile is copied anyway. */
	if (rc || v->opt->adopt)
		return rc;
	v->batch_bytes = VERIFY_LATER_BYTES;
	for (unsigned i = 1; i < VERIFY_SWEEPS && !rc; i++) {
		swap_sweeps(v);
		rc = sweep(v, err);
	}
	if (rc)
		return rc;
	swap_sweeps(v);
	v->locked = true;
	v->batch_bytes = VERIFY_LOCKED_BYTES;
	v->batch_chunks = v->s->order ? VERIFY_LOCKED_CHUNKS : 1;
	rc = sweep(v, err);
	if (!rc && v->unsynced)
		rc = error_set(err, EAGAIN, "%s: verification: not all is synced", v->m->top.label);
	return rc;
}

/* mirror->lock held. */
static void choose(struct verify *v)
{
	struct chunk_map *map = v->map;
	if (v->opt->adopt) {
		/* From now on the map says what the remote has. */
		bitmap_set_range(map->touched, 0, map->nchunks);
		v->s->remote_is_zero = true;
	}
	for (uint64_t c = 0; c < map->nchunks; c++)
		if (v->opt->adopt ? !bitmap_test(map->synced, c) : !bitmap_test(map->verified, c)) {
			bitmap_set(v->todo, c);
			v->res.chunks++;
		}
}

static int begin(struct verify *v, struct error *err)
{
	struct mirror *m = v->m;
	struct proof *fresh = NULL, *old = NULL;
	uint64_t nchunks = v->map->nchunks;
	v->todo = bitmap_alloc(nchunks + 1);
	v->again = bitmap_alloc(nchunks + 1);
	if (!v->todo || !v->again ||
	    proof_create(v->map->size_bytes, v->map->chunk_bytes, v->opt->seed, &fresh))
		return error_errno(err, ENOMEM, "%s: verification", m->top.label);
	pthread_mutex_lock(&m->lock);
	/* Changes that passed through before the session was there hold no range. */
	int rc;
	while (!(rc = verify_usable(v, err)) && m->passing)
		pthread_cond_wait(&m->changed, &m->lock);
	if (!rc && v->opt->adopt && !v->s->held)
		rc = error_set(err, EINVAL, "%s: verification: the pass is not held", m->top.label);
	if (!rc) {
		if (!v->map->proof || v->map->proof->seed != v->opt->seed) {
			chunk_map_forget_verified(v->map);
			old = v->map->proof;
			v->map->proof = steal_ptr(fresh);
		}
		v->proof = v->map->proof;
		choose(v);
	}
	pthread_mutex_unlock(&m->lock);
	proof_free(fresh);
	proof_free(old);
	return rc;
}

static bool all_verified(const struct chunk_map *map)
{
	return chunk_map_all_synced(map) && map->nverified == map->nchunks;
}

int mirror_verify(struct mirror *m, const struct mirror_verify_options *opt, struct mirror_verify_result *out,
		  struct error *err)
{
	struct verify v = {
		.m = m, .opt = opt, .batch_bytes = VERIFY_BATCH_BYTES, .batch_chunks = MIRROR_VERIFY_CHUNKS};
	struct error why = ERROR_INIT;
	*out = (struct mirror_verify_result){0};
	pthread_mutex_lock(&m->lock);
	if (!m->session || m->verify) {
		bool running = m->verify != NULL;
		pthread_mutex_unlock(&m->lock);
		return error_set(err, running ? EBUSY : ECANCELED, "%s: verification: %s", m->top.label,
				 running ? "one is under way" : "the mirror is not running");
	}
	m->verify = &v;
	v.s = m->session;
	v.map = m->map;
	v.s->submitting++; /* keeps the session */
	pthread_mutex_unlock(&m->lock);
	pthread_mutex_init(&v.take, NULL);
	int rc = begin(&v, &why);
	if (!rc)
		rc = run_sweeps(&v, &why);
	free(v.todo);
	free(v.again);
	pthread_mutex_destroy(&v.take);
	pthread_mutex_lock(&m->lock);
	bool all = !rc && all_verified(v.map);
	pthread_mutex_unlock(&m->lock);
	/* The hashes are changed by verifications alone. */
	if (all)
		v.res.root = v.proof->root = proof_root(v.proof);
	*out = v.res;
	pthread_mutex_lock(&m->lock);
	m->verify = NULL;
	if (--v.s->submitting == 0)
		pthread_cond_broadcast(&m->changed);
	pthread_mutex_unlock(&m->lock);
	if (rc)
		error_copy(err, &why);
	return rc;
}

bool mirror_is_verified(struct mirror *m)
{
	SCOPE_LOCK(&m->lock);
	return m->session && all_verified(m->map);
}

bool mirror_sums(struct mirror *m, struct mirror_sums *out)
{
	SCOPE_LOCK(&m->lock);
	out->n = 0;
	if (!m->session || !all_verified(m->map) || !m->map->proof)
		return false;
	const struct proof *p = m->map->proof;
	out->root = p->root;
	out->total = p->total;
	out->writes = p->writes;
	for (uint32_t g = 0; g < p->ngroups; g++)
		if (p->groups[g].low || p->groups[g].high) {
			out->groups[out->n].group = g;
			out->groups[out->n++].sum = p->groups[g];
		}
	return true;
}

void mirror_release_pass(struct mirror *m)
{
	SCOPE_LOCK(&m->lock);
	if (!m->session)
		return;
	m->session->held = false;
	copy_wake(m->session);
}
