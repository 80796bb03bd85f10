/* SPDX-License-Identifier: Apache-2.0 */
/* Private to the comparison: verify.c compares, verify_lock.c holds what the guest writes all the time,
 * verify_count.c sums up what it writes after that. */
#ifndef MIRROR_VERIFY_IMPL_H
#define MIRROR_VERIFY_IMPL_H

#include "mirror/mirror_impl.h"

#define VERIFY_WORKERS	     3
#define VERIFY_LOCKED_CHUNKS 16u /* held at a time */

struct verify_lock;
struct verify_turn {
	struct range_entry entry;
	struct verify_lock *lock;
};

enum verify_lock_state {
	VERIFY_LOCK_FREE,
	VERIFY_LOCK_ASKED, /* for the range */
	VERIFY_LOCK_HELD,
	VERIFY_LOCK_HALF, /* the range is given back, the turns are not */
};

/*
 * Chunks that are compared under the range lock; mirror->lock held. In a buffered session it is held for as
 * long as the local disk is read, no longer, and from then on each chunk's turn in session->order: what the
 * guest writes meanwhile is queued behind it, what it wrote before is at the remote when it is asked.
 */
struct verify_lock {
	struct verify *v;
	enum verify_lock_state state;
	uint64_t first; /* chunk */
	unsigned n, tries;
	struct range_entry range;
	struct verify_turn turns[VERIFY_LOCKED_CHUNKS];
	unsigned waits;	   /* turns that have not come */
	uint64_t since_ns; /* that it holds somebody up */
};

struct verify {
	struct mirror *m;
	struct session *s;
	const struct mirror_verify_options *opt;
	struct chunk_map *map;
	struct proof *proof;

	pthread_mutex_t take; /* todo, cursor */
	uint64_t *todo, cursor;
	uint64_t batch_bytes;
	unsigned batch_chunks;
	bool locked; /* the sweep is */

	/* mirror->lock */
	uint64_t *again;
	bool unsynced; /* a chunk is */
	struct mirror_verify_result res;
	struct error err;
	struct verify_lock locks[VERIFY_WORKERS];
	unsigned nlocks; /* taken by workers */
};

/* mirror->lock held. 0, or why no judgement is possible. */
int verify_usable(struct verify *v, struct error *err);

/* No lock held, all but the last two. Waits for n chunks; they may be taken back at any time (patience, the
 * end of the session): verify_lock_holds tells. */
int verify_lock_take(struct verify_lock *l, uint64_t first, unsigned n, struct error *err);
/* The local disk was read: waits until the remote has what came before. */
int verify_lock_remote(struct verify_lock *l, struct error *err);
void verify_lock_give(struct verify_lock *l);
bool verify_lock_holds(const struct verify_lock *l);
/* Whether what is planned now for these bytes comes behind a comparison that is under way. */
bool verify_lock_before(const struct verify *v, uint64_t offset_bytes, uint64_t len_bytes);

#endif
