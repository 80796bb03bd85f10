/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MEMXFER_POSTCOPY_DEST_H
#define MEMXFER_POSTCOPY_DEST_H

#include <pthread.h>
#include <stdatomic.h>
#include <zstd.h>

#include "memxfer/fault_latency.h"
#include "memxfer/postcopy_channel.h"

/* Private to postcopy_dest*.c. */

/* A page that somebody waits for. */
struct postcopy_fault {
	uint64_t page, since_ns;
};

/* What one channel of a session is read with. */
struct postcopy_rx {
	struct mem_postcopy_dest *dest;
	struct postcopy_channel channel; /* pages are read, other frames written */
	struct mem_run *runs;
	uint8_t *unpacked;
	ZSTD_DCtx *zstd;
	struct error error; /* of the thread that reads it */
};

struct mem_postcopy_dest {
	struct mem_postcopy_dest_options opt;
	struct postcopy_rx rx[MEM_POSTCOPY_CHANNELS];
	pthread_t manager, server;
	bool manager_started, server_started;
	int wake_fd; /* for the server: look again */

	pthread_mutex_t lock; /* of what follows */
	pthread_cond_t changed;
	uint64_t *expected; /* every page that was missing at the begin */
	uint64_t *missing;
	uint64_t total_pages, missing_pages;
	struct postcopy_fault *faults; /* outstanding */
	unsigned nfaults, faults_room;
	struct fault_latency latency;
	uint64_t duplicate_pages;
	struct conn *waiting[MEM_POSTCOPY_CHANNELS]; /* for their session */
	struct conn *conns[MEM_POSTCOPY_CHANNELS];   /* of the session */
	uint64_t wire_bytes;
	unsigned sessions;
	bool session; /* one runs */
	bool greeted; /* the server has told the source what is missing */
	bool writing; /* the server is inside a connection */
	bool unnoted; /* there was no memory to note a fault: who waits for what is not known */
	bool begun, complete, aborted, closing;
	bool over; /* the manager has ended */
};

void postcopy_dest_wake(struct mem_postcopy_dest *d);
/* Ends the session, if there is one. Lock held. */
void postcopy_dest_cut(struct mem_postcopy_dest *d);
/* postcopy_dest_server.c: the thread that hears of faults, and the only one that writes to the source. */
void *postcopy_dest_server(void *dest);

#endif
