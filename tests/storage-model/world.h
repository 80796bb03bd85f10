/* SPDX-License-Identifier: Apache-2.0 */
/* One seed: two disks, the mirror between them, a guest, and the sessions that connect them. */
#ifndef TESTS_STORAGE_MODEL_WORLD_H
#define TESTS_STORAGE_MODEL_WORLD_H

#include <stdatomic.h>

#include "base/rate_limit.h"
#include "mirror/mirror.h"
#include "mirror/witness.h"
#include "nbd/nbd.h"
#include "tests/storage-model/disk.h"
#include "tests/storage-model/guest.h"
#include "tests/storage-model/model.h"
#include "tests/storage-model/shaky.h"
#include "tests/storage-model/wire.h"

#define WIRES_MAX 4
#define HANG_S	  150

enum fault {
	FAULT_NONE,
	FAULT_CUT,	      /* the connection ends in the middle of a message */
	FAULT_SILENT,	      /* nothing arrives any more */
	FAULT_SILENT_REPLIES, /* requests are executed, replies get lost */
	FAULT_REMOTE_ERROR,
	FAULT_SERVER_STOPPED, /* the fence of the destination */
	FAULT_STOP,	      /* the source ends the session itself */
	FAULT_LOCAL_READ,
	FAULT_LOCAL_WRITE, /* the guest sees it, the session goes on */
	FAULTS
};

/* How a session follows another. */
enum start {
	START_FIRST,
	START_KEEP_MAP,
	START_OVER,  /* nothing is known of the destination */
	START_ADOPT, /* what the destination has is compared first */
	STARTS
};

struct world {
	unsigned seed, rng;
	char dir[64];
	struct model model;
	struct guest guest;
	struct disk local, remote;
	struct shaky *local_shaky, *remote_shaky;
	struct mirror *mirror;
	struct block *top;
	struct rate_limit rate;

	/* the plan */
	bool tcp, remote_is_zero, slow, proof;
	unsigned connections, faults_left, handovers;
	uint32_t chunk_bytes;
	uint64_t bytes_per_ms; /* of a slow link's slowest connection */

	/* the session */
	bool open, stop_wanted, mirror_is_new;
	struct witness *witness; /* as long as the map */
	uint64_t witness_seed;
	struct nbd_server *server;
	struct wire *wires[WIRES_MAX], *old_wires[WIRES_MAX];
	enum fault fault;
	uint64_t fault_at_ns;
	atomic_uint failed_calls;
	char why[200];

	/* for the summary */
	unsigned sessions, broken, buffered, handovers_done, settles;
	unsigned faults[FAULTS], starts[STARTS], proofs;
};

unsigned world_random(struct world *w, unsigned below);
/* From `least` to `most`, small ones as often as large ones. */
uint64_t world_random_log(struct world *w, uint64_t least, uint64_t most);

const char *fault_name(enum fault fault);
/* session.c */
void session_open(struct world *w, enum start how);
/* As a source does it that lost its link, and the destination that is asked for a new one. */
void session_end(struct world *w);
/* The destination takes no more from the source: its part of a COMMIT. */
void session_fence(struct world *w);
/* Until all is synced (true), or the session broke. */
bool session_sync(struct world *w);
bool session_flush(struct world *w);
/* The destination's content agrees (true), or the session broke. */
bool session_verify(struct world *w);
/* With the guest quiesced and all verified: what was written since agrees too. */
void session_compare_sums(struct world *w);
void session_forget_witness(struct world *w);
void session_local_error(struct world *w);
void session_forget_wires(struct world *w);

/* run.c */
void run_seed(unsigned seed);

#endif
