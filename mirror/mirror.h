/* SPDX-License-Identifier: Apache-2.0 */
/* interface: one-pass copy with write mirroring, between mirror and vmm */
#ifndef MIRROR_MIRROR_H
#define MIRROR_MIRROR_H

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "base/rate_limit.h"
#include "block/block.h"

/*
 * A filter block over a local disk. Without a mirror it passes requests through. With one running, the rules
 * of docs/design.md hold: a map of chunks unsynced -> copying -> synced, guest writes to synced chunks go to
 * both sides.
 */
struct mirror;

/* `local` stays the caller's and must outlive the mirror. *top is the block that the guest's device submits
 * to; it is part of the mirror. */
int mirror_create(struct block *local, struct mirror **out, struct block **top, struct error *err);
void mirror_free(struct mirror *m);

struct mirror_options {
	struct block *remote; /* taken over by the mirror from a successful start until it ended */
	bool remote_is_zero;  /* created by this move: holes are skipped */
	bool keep_map; /* go on after a failure with a new connection to the same remote: synced chunks stay
			  synced */
	uint32_t chunk_bytes;	     /* 0 = default 1 MiB; power of two */
	unsigned requests_in_flight; /* 0 = default 16 */
	/*
	 * 0 = default 50: then a silent remote makes the chunk unsynced and ends the session. Silent: its
	 * oldest unanswered request is the oldest for that long while a guest's write waits for as long; a
	 * link that is only busy keeps answering. A guest's flush gets 20 times that. Without a guest that
	 * waits, the remote's own timeouts rule.
	 */
	unsigned write_grace_ms;
	/* NULL: none. The copy keeps to it; a guest's writes count, but are not held back. The caller's, and
	 * longer there than the session. */
	struct rate_limit *bandwidth;
	/* Called once a session from a thread of the mirror when the remote failed or went silent, before
	 * mirror_stop returns; the guest runs on locally. Must not call mirror_start or mirror_stop. */
	void (*failed)(void *opaque, const struct error *err);
	void *opaque;
};

struct mirror_stats {
	uint64_t total_bytes;  /* virtual size */
	uint64_t synced_bytes; /* never falls but by a failure */
	uint64_t data_bytes_copied, zero_bytes_copied, hole_bytes_skipped;
	uint64_t mirrored_bytes; /* guest writes that went to both */
	bool all_synced;
	bool failed;
};

/* Starts the pass; guest I/O goes on during the call. */
int mirror_start(struct mirror *m, const struct mirror_options *opt, struct error *err);
/* Waits until all chunks are synced (0), failure, or timeout (-ETIMEDOUT; 0 = for ever), or mirror_cancel
 * (-ECANCELED). */
int mirror_wait_synced(struct mirror *m, unsigned timeout_ms, struct error *err);
/* Flushes the remote after the pass; later guest flushes go to both (until then the local disk is enough: if
 * this host dies, so does the move). */
int mirror_flush_remote(struct mirror *m, struct error *err);
/* With guest I/O quiesced: true when every chunk is synced, nothing is in flight, and nothing was copied
 * after the last mirror_flush_remote, if there was one. */
bool mirror_is_consistent(struct mirror *m);
/* Ends mirroring (waits for mirrored writes in flight), closes the remote, which waits for its late replies.
 * The filter passes through again; it goes on noting what is written, for a start with keep_map. Idempotent.
 */
void mirror_stop(struct mirror *m);
void mirror_cancel(struct mirror *m); /* any thread; mirror_stop still needed */
void mirror_stats(struct mirror *m, struct mirror_stats *out);

#endif
