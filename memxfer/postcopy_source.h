/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MEMXFER_POSTCOPY_SOURCE_H
#define MEMXFER_POSTCOPY_SOURCE_H

#include <pthread.h>
#include <stdatomic.h>

#include "memxfer/postcopy_channel.h"
#include "memxfer/stream_tx.h"

/* Private to postcopy_source*.c. */
struct mem_postcopy_source {
	struct mem_postcopy_source_options opt;
	struct postcopy_channel faults, push; /* for reading alone */
	struct mem_tx tx[MEM_POSTCOPY_CHANNELS];
	pthread_mutex_t faults_lock; /* of tx[FAULTS]: its thread, and the pusher's beats */
	struct mem_tx_counters counters;
	struct idle_cpu idle_cpu;
	pthread_t manager, faulter, pusher;
	bool manager_started, faulter_started, pusher_started;
	struct mem_run *runs, *wanted_runs; /* the manager's and the faulter's */

	uint64_t *pages;	/* that may be asked for; set once, by _begin */
	uint64_t *pending;	/* of this session: not taken yet. Words are taken atomically */
	uint64_t *taken;	/* the pusher's: what goes into the next frame */
	uint64_t *wanted;	/* the faulter's, likewise */
	_Atomic uint64_t pivot; /* the last fault's page */
	_Atomic uint64_t faults_seen;
	_Atomic unsigned faults_waiting; /* being answered: the pusher steps aside */
	atomic_bool session_over;

	pthread_mutex_t lock; /* of what follows */
	pthread_cond_t changed;
	struct conn *conns[MEM_POSTCOPY_CHANNELS];
	struct mem_postcopy_status status;
	struct error broken; /* the session's end */
	struct error failure;
	uint64_t total_pages, wire_before;
	unsigned sessions;
	bool connected;
	/* written under lock */
	atomic_bool begun;
	atomic_bool listed; /* the destination has told what it lacks */
	atomic_bool done;   /* ... which is nothing */
	atomic_bool cancelled;
	bool over; /* the manager has ended */
};

/* Ends the session for this reason, if it is the first. */
void postcopy_source_break(struct mem_postcopy_source *s, const struct error *why);
/* postcopy_source_push.c: the threads of a session. */
void *postcopy_source_faults(void *source);
void *postcopy_source_push(void *source);

#endif
