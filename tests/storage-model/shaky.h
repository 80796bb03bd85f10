/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A block over a real one that answers late, fails once, and watches its user: that no two changes in flight
 * overlap, that nothing comes while it is fenced, and what is durable, if its disk kept only what was
 * flushed.
 */
#ifndef TESTS_STORAGE_MODEL_SHAKY_H
#define TESTS_STORAGE_MODEL_SHAKY_H

#include <pthread.h>
#include <stdbool.h>

#include "block/block.h"

struct shaky_item;

struct shaky {
	struct block block; /* first */
	struct block *below;
	pthread_t thread;
	pthread_mutex_t lock; /* what follows */
	pthread_cond_t wake;
	struct shaky_item *items;
	unsigned ninflight, seed, delay_max_us;
	bool closing, fenced, count_overlaps;
	/* One failure: of the n-th request of a kind from now on; 0: none. */
	unsigned fail_after, fail_ops; /* a mask of 1 << enum block_op */
	int fail_code;
	bool fail_late; /* it is executed before it fails */
	unsigned failures, overlaps, while_fenced;
	/* every change, before the disk gets it */
	void (*observe)(void *opaque, const struct block_request *req);
	void *opaque;
	uint64_t changed, durable; /* changes are numbered as they are done */
	uint64_t *sector_changed;  /* the number of its last change, 0 once that is durable by itself */
};

/* below stays the caller's. */
struct shaky *shaky_create(struct block *below, unsigned seed);
/* Nothing may be in flight. */
void shaky_free(struct shaky *s);
void shaky_fail_once(struct shaky *s, unsigned after, unsigned ops, int code, bool late);
void shaky_delay(struct shaky *s, unsigned max_us);
/* Fenced: nothing may be in flight, and nothing may come. */
void shaky_fence(struct shaky *s, bool fenced);
void shaky_observe(struct shaky *s, void (*observe)(void *opaque, const struct block_request *req),
		   void *opaque);
/* True if all changes that it answered are flushed. */
bool shaky_all_durable(struct shaky *s);
/* Its last change would be lost with the host's power. */
bool shaky_is_volatile(struct shaky *s, uint64_t sector);
unsigned shaky_failures(struct shaky *s);

#endif
