/* SPDX-License-Identifier: Apache-2.0 */
#ifndef BASE_RATE_LIMIT_H
#define BASE_RATE_LIMIT_H

#include <pthread.h>
#include <stdint.h>

/*
 * A bandwidth that several senders share and that may change at any time. A sender asks how long to wait,
 * sleeps, asks again, and takes what it then sends: a virtual-scheduling leaky bucket (GCRA, ITU-T I.371).
 * What was taken too early is paid by whoever comes next, so that the average holds.
 *
 * All calls from any thread.
 */
struct rate_limit {
	pthread_mutex_t lock;
	uint64_t bytes_per_s; /* 0: unlimited */
	uint64_t free_ns;     /* CLOCK_MONOTONIC: when what was taken has passed */
};

void rate_limit_init(struct rate_limit *rl, uint64_t bytes_per_s);
void rate_limit_destroy(struct rate_limit *rl);
/* What is still to be waited for shrinks or grows with the new rate. */
void rate_limit_set(struct rate_limit *rl, uint64_t bytes_per_s);
uint64_t rate_limit_get(struct rate_limit *rl);

/* Nanoseconds until something may be sent, 0 = now. NULL is unlimited. */
uint64_t rate_limit_wait_ns(struct rate_limit *rl);
void rate_limit_take(struct rate_limit *rl, uint64_t bytes);
/* For what cannot wait (a guest's own writes): others wait for it, but never longer than half a second, so
 * that they go on, if slowly, when this alone fills the bandwidth. */
void rate_limit_take_urgent(struct rate_limit *rl, uint64_t bytes);

#endif
