/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MEMXFER_YIELD_H
#define MEMXFER_YIELD_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

/*
 * Threads that leave the processors to whoever else wants them (SCHED_IDLE): above all to the guest, which
 * would otherwise stand still for a slice of each of them that runs on its processor. Only for a while, as on
 * a host without a processor to spare they would come to nothing.
 */
#define MEM_YIELD_MS	      250u
#define MEM_YIELD_THREADS_MAX 32u

struct mem_yield {
	pthread_mutex_t lock;
	atomic_bool on;
	uint64_t until_ns; /* 0: it has not begun */
	unsigned n;
	struct {
		pid_t tid;
		int policy; /* its own */
	} threads[MEM_YIELD_THREADS_MAX];
};

void mem_yield_init(struct mem_yield *y);
void mem_yield_destroy(struct mem_yield *y);
/* The calling thread becomes one of them, and ends being one: before it ends itself. A real-time thread does
 * not, nor any where the kernel forbids the way back (CAP_SYS_NICE, or RLIMIT_NICE): those only let others
 * through at each step. */
void mem_yield_join(struct mem_yield *y);
void mem_yield_leave(struct mem_yield *y);
/* What each thread of a stream begins with: a name ("mem send", 0), its filter, and mem_yield_join. */
void mem_stream_thread(struct mem_yield *y, const char *does, unsigned index);
/* All of them yield from here on until mem_yield_end, or until MEM_YIELD_MS after the first beginning. */
void mem_yield_begin(struct mem_yield *y);
void mem_yield_end(struct mem_yield *y);
/* Ends it when the time is up. */
void mem_yield_look(struct mem_yield *y);
/* By one of them, about ten times a millisecond: others go first, too, where the kernel gave it a slice all
 * the same, which it takes back at the next tick only. */
void mem_yield_step(struct mem_yield *y);

#endif
