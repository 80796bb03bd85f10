/* SPDX-License-Identifier: Apache-2.0 */
/* What is written all the time is compared while it is held: see verify_impl.h. */
#include "base/cleanup.h"
#include "base/clock.h"
#include "mirror/verify_impl.h"

static bool overlap(const struct range_entry *a, const struct range_entry *b)
{
	return a->offset_bytes < b->offset_bytes + b->len_bytes &&
	       b->offset_bytes < a->offset_bytes + a->len_bytes;
}

/* --- mirror->lock held --- */

void verify_granted(struct range_entry *e, struct mirror_work *work)
{
	struct verify_lock *l = container_of(e, struct verify_lock, range);
	struct session *s = l->v->s;
	const struct chunk_map *map = l->v->map;
	l->state = VERIFY_LOCK_HELD;
	l->since_ns = clock_now_ns();
	l->waits = 0;
	for (unsigned i = 0; s->order && i < l->n; i++) {
		const struct range_entry chunk = {.offset_bytes = (l->first + i) << map->shift,
						  .len_bytes = chunk_map_len(map, l->first + i),
						  .tag = RANGE_OF_VERIFY};
		l->turns[i].lock = l;
		if (!remote_order_enter(s, &chunk, &l->turns[i].entry)) {
			l->waits++;
			remote_queue_hurry(s, &chunk, work);
		}
	}
	pthread_cond_broadcast(&l->v->m->changed);
}

void verify_ordered(struct range_entry *e)
{
	struct verify_lock *l = container_of(e, struct verify_turn, entry)->lock;
	if (--l->waits)
		return;
	l->since_ns = clock_now_ns();
	pthread_cond_broadcast(&l->v->m->changed);
}

static void give_range(struct verify_lock *l, struct mirror_work *work)
{
	struct mirror *m = l->v->m;
	mirror_granted(m, range_lock_remove(&m->ranges, &l->range), work);
}

static void give(struct verify_lock *l, struct mirror_work *work)
{
	struct session *s = l->v->s;
	enum verify_lock_state was = l->state;
	if (was == VERIFY_LOCK_FREE)
		return;
	l->state = VERIFY_LOCK_FREE;
	pthread_cond_broadcast(&l->v->m->changed);
	for (unsigned i = 0; was != VERIFY_LOCK_ASKED && s->order && i < l->n; i++)
		remote_order_remove(s, &l->turns[i].entry, work);
	if (was != VERIFY_LOCK_HALF)
		give_range(l, work);
}

void verify_release(struct mirror *m, struct mirror_work *work)
{
	for (unsigned i = 0; m->verify && i < m->verify->nlocks; i++)
		give(&m->verify->locks[i], work);
}

bool verify_lock_holds(const struct verify_lock *l)
{
	return l->state != VERIFY_LOCK_FREE && l->state != VERIFY_LOCK_ASKED && !l->waits;
}

bool verify_lock_before(const struct verify *v, uint64_t offset_bytes, uint64_t len_bytes)
{
	const struct range_entry e = {.offset_bytes = offset_bytes, .len_bytes = len_bytes};
	for (unsigned i = 0; i < v->nlocks; i++)
		if (v->locks[i].state == VERIFY_LOCK_HALF && overlap(&v->locks[i].range, &e))
			return true;
	return false;
}

/* Somebody's write waits for it. Without the range it is the remote that is held up: a write waits for that
 * when the session is synchronous by now, or its buffer is full of what comes after the comparison. */
static bool waited_for(const struct session *s, const struct verify_lock *l)
{
	if (l->state == VERIFY_LOCK_HALF) {
		if (l->waits)
			return false; /* for what came before it, as others would */
		if (s->m->bounce_wait && !s->outstanding)
			return true;
		/* The copy of a chunk that failed meanwhile has guests wait behind it. */
		const struct range_entry *e = s->m->ranges.first;
		while (e && (!overlap(e, &l->range) || !(s->synchronous || e->tag == RANGE_OF_COPY)))
			e = e->next;
		return e != NULL;
	}
	for (const struct range_entry *e = l->range.next; e; e = e->next)
		if (e->nwaits && overlap(e, &l->range))
			return true;
	return false;
}

void verify_check_patience(struct session *s, uint64_t now, struct mirror_work *work)
{
	struct verify *v = s->m->verify;
	for (unsigned i = 0; v && i < v->nlocks; i++) {
		struct verify_lock *l = &v->locks[i];
		if (l->state == VERIFY_LOCK_FREE || l->state == VERIFY_LOCK_ASKED)
			continue;
		/* A little more for one that never gets there otherwise; and, in a buffered session, the
		 * question takes a round trip. */
		uint64_t patience = s->grace_ns * (1 + l->tries / 5) + (s->buffered ? 3 * s->fastest_ns : 0);
		if (now > l->since_ns && now - l->since_ns > patience && waited_for(s, l))
			give(l, work);
	}
}

/* --- no lock held --- */

int verify_lock_take(struct verify_lock *l, uint64_t first, unsigned n, struct error *err)
{
	struct verify *v = l->v;
	struct mirror *m = v->m;
	struct mirror_work work;
	uint64_t last = first + n - 1, from = first << v->map->shift;
	mirror_work_init(&work);
	pthread_mutex_lock(&m->lock);
	l->first = first;
	l->n = n;
	l->range = (struct range_entry){.offset_bytes = from,
					.len_bytes =
						(last << v->map->shift) + chunk_map_len(v->map, last) - from,
					.tag = RANGE_OF_VERIFY};
	int rc = verify_usable(v, err);
	if (!rc) {
		l->state = VERIFY_LOCK_ASKED;
		if (range_lock_add(&m->ranges, &l->range))
			verify_granted(&l->range, &work);
	}
	/* What it waits for may be in there. */
	pthread_mutex_unlock(&m->lock);
	mirror_work_run(m, &work);
	pthread_mutex_lock(&m->lock);
	while (!rc && !(rc = verify_usable(v, err)) && l->state == VERIFY_LOCK_ASKED)
		pthread_cond_wait(&m->changed, &m->lock);
	pthread_mutex_unlock(&m->lock);
	return rc;
}

int verify_lock_remote(struct verify_lock *l, struct error *err)
{
	struct mirror *m = l->v->m;
	struct mirror_work work;
	int rc;
	mirror_work_init(&work);
	pthread_mutex_lock(&m->lock);
	if (l->v->s->order && l->state == VERIFY_LOCK_HELD) {
		l->state = VERIFY_LOCK_HALF;
		give_range(l, &work);
	}
	pthread_mutex_unlock(&m->lock);
	mirror_work_run(m, &work);
	pthread_mutex_lock(&m->lock);
	while (!(rc = verify_usable(l->v, err)) && l->state == VERIFY_LOCK_HALF && l->waits)
		pthread_cond_wait(&m->changed, &m->lock);
	pthread_mutex_unlock(&m->lock);
	return rc;
}

void verify_lock_give(struct verify_lock *l)
{
	struct mirror_work work;
	mirror_work_init(&work);
	pthread_mutex_lock(&l->v->m->lock);
	give(l, &work);
	pthread_mutex_unlock(&l->v->m->lock);
	mirror_work_run(l->v->m, &work);
}
