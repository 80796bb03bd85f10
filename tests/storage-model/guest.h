/* SPDX-License-Identifier: Apache-2.0 */
/* A guest that reads and changes its disk at random, several requests at a time. */
#ifndef TESTS_STORAGE_MODEL_GUEST_H
#define TESTS_STORAGE_MODEL_GUEST_H

#include <stdatomic.h>

#include "block/block.h"
#include "tests/storage-model/model.h"

#define GUEST_DEPTH_MAX	  16
#define GUEST_REQUEST_MAX (2u << 20)

struct guest_options {
	unsigned seed, depth;
	unsigned pace_us;		/* between requests; 0: as fast as they are answered */
	unsigned largest_bytes;		/* of a request */
	unsigned overlaps_per_1000;	/* changes that may overlap others in flight */
	unsigned wild_per_1000;		/* writes whose buffer is changed under way */
	uint64_t hot_offset, hot_bytes; /* half of the requests go there */
	bool from_callback;  /* the next request is submitted by the callback that answers the last one */
	bool errors_allowed; /* local ones are injected */
};

struct guest_slot {
	struct guest *guest;
	struct block_request req;
	struct iovec iov[3];
	uint8_t *buf;
	size_t op;
	bool busy;
};

struct guest {
	struct guest_options opt;
	struct model *model;
	struct block *disk;
	struct guest_slot slots[GUEST_DEPTH_MAX];
	pthread_t thread;
	pthread_cond_t wake; /* with model->lock */
	bool running, quit;
	unsigned in_flight;
	atomic_uint_fast64_t answered;
	unsigned errors;
};

void guest_create(struct guest *g, struct model *m, const struct guest_options *opt);
void guest_run(struct guest *g, struct block *disk);
/* Nothing is in flight afterwards. */
void guest_quiesce(struct guest *g);
/* Until it got so many more answers. */
void guest_wait_answers(struct guest *g, unsigned n);
void guest_destroy(struct guest *g);

#endif
