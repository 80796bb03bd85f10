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

/* Of the bounce buffers of a mirror's guest writes under way. */
#define MIRROR_BUFFER_DEFAULT_BYTES (UINT64_C(64) << 20)
#define MIRROR_BUFFER_MIN_BYTES	    (UINT64_C(1) << 20)
#define MIRROR_BUFFER_MAX_BYTES	    (UINT64_C(16) << 30)

/* What the pass leaves to a guest that writes meanwhile: the few pieces at a time that it notices least;
 * that, or more of them to a guest with many writes under way; nothing. */
enum mirror_yield { MIRROR_YIELD_BALANCED, MIRROR_YIELD_MOST, MIRROR_YIELD_NOTHING };

struct mirror_options {
	struct block *remote; /* taken over by the mirror from a successful start until it ended */
	bool remote_is_zero;  /* created by this move: holes are skipped */
	/* The pass does not begin before mirror_release_pass: first mirror_verify finds out what the remote
	 * has. */
	bool hold_pass;
	/* Created by this move over the same backing content as the local disk's: what the local image does
	 * not have itself is skipped, its holes are written as zeroes. Not together with remote_is_zero. */
	bool remote_has_backing;
	bool keep_map; /* go on after a failure with a new connection to the same remote: synced chunks stay
			  synced */
	uint32_t chunk_bytes;	     /* power of two; 0 = 256 KiB, or more where that were over 2^20 chunks */
	unsigned requests_in_flight; /* 0 = default 32 */
	enum mirror_yield yield;
	/*
	 * 0 = default 50: then a silent remote makes the chunk unsynced and ends the session. Silent: its
	 * oldest unanswered request is the oldest for that long while a guest's write waits for as long; a
	 * link that is only busy keeps answering. A guest's flush gets 20 times that, and so does the
	 * draining of a buffered session. Without anybody who waits, the remote's own timeouts rule.
	 */
	unsigned write_grace_ms;
	/* A guest's write to a synced chunk is answered when the local disk has it, and its copy to the
	 * remote is queued. Overlapping writes reach the remote in the order in which the local disk got
	 * them. Ends with mirror_flush_remote: from then on guests wait for both. A session that breaks
	 * leaves the chunks of what is queued or unanswered unsynced. The grace is longer by the fastest
	 * reply seen. */
	bool buffered;
	/* 0 = the default. Guests' mirrored writes under way take it; a write that finds no room waits for
	 * it. One that is larger goes alone. */
	uint64_t buffer_bytes;
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
	uint64_t verified_bytes; /* synced, and the remote's content agreed; falls as synced_bytes */
	uint64_t unsynced_bytes; /* synced chunks that a failure made unsynced, to copy again; summed up */
	/* guest writes that were not waited for and that the remote has not answered: now, and at most */
	uint64_t buffered_bytes, buffered_bytes_max;
	bool all_synced;
	bool failed;
	bool local_failed; /* a read of the local disk did it: another session would meet the same */
};

/* Starts the pass; guest I/O goes on during the call. */
int mirror_start(struct mirror *m, const struct mirror_options *opt, struct error *err);
/* Waits until all chunks are synced (0), failure, or timeout (-ETIMEDOUT; 0 = for ever), or mirror_cancel
 * (-ECANCELED). */
int mirror_wait_synced(struct mirror *m, unsigned timeout_ms, struct error *err);
/* Makes a buffered session synchronous and waits until everything buffered has arrived. Then flushes the
 * remote after the pass; later guest flushes go to both (until then the local disk is enough: if this host
 * dies, so does the move). */
int mirror_flush_remote(struct mirror *m, struct error *err);
struct mirror_hash {
	uint64_t low, high;
};

/* The hashes of n chunks of a block from `first` on, with a few reads in flight; blocks. A chunk that is a
 * hole counts as zeroes and is not read. XXH3-128 with the seed. */
int mirror_hash_block(struct block *blk, uint32_t chunk_bytes, uint64_t seed, uint64_t first, unsigned n,
		      struct mirror_hash *out, struct error *err);

#define MIRROR_VERIFY_CHUNKS 16384u /* most chunks that are asked for at a time */

struct mirror_verify_options {
	/*
	 * The remote holds something of an earlier session, and the pass is held: chunks that agree count as
	 * synced and verified; the others are copied later. Otherwise (proof): all chunks must be synced,
	 * those not verified yet are compared, and one that differs is an error.
	 */
	bool adopt;
	uint64_t seed; /* one for all calls with a map; else nothing counts as verified any more */
	/*
	 * From threads of the verification, at most 3 at a time; blocks. The hashes of n chunks from
	 * first_chunk on, as mirror_hash_block makes them from the remote's media, of what it had
	 * acknowledged before the call. From then on the remote counts what is written to those chunks
	 * (mirror/proof.h).
	 */
	int (*remote_hashes)(void *opaque, uint64_t first_chunk, unsigned n, struct mirror_hash *out,
			     struct error *err);
	void *opaque;
};

struct mirror_verify_result {
	uint64_t chunks;	      /* looked at */
	uint64_t agreed, differed;    /* of these */
	uint64_t retried;	      /* times that a chunk was looked at again, as the guest wrote to it */
	uint64_t bytes_read;	      /* of this side's data, holes apart */
	uint64_t bad_offset, bad_len; /* with -EILSEQ: the first range that differs */
	struct mirror_hash root;      /* over the hashes of all chunks; 0: they are not all verified */
};

/*
 * Compares chunks with the remote's while the guest runs on; blocks, and holds up a guest's write to a chunk
 * that is written all the time only, at most for the grace. One at a time; mirror_stop waits for it.
 *
 * 0; -EILSEQ: chunks differ (proof); -EAGAIN: a chunk became unsynced: wait for the pass and call again;
 * -ECANCELED; what ended the session; what remote_hashes or a local read returned.
 */
int mirror_verify(struct mirror *m, const struct mirror_verify_options *opt, struct mirror_verify_result *out,
		  struct error *err);
/* What the handover compares: with the guest's I/O quiesced and a mirror that is verified. */
#define MIRROR_SUM_GROUPS 1024u
struct mirror_sums {
	struct mirror_hash root;  /* over the hashes of all chunks when they were compared */
	struct mirror_hash total; /* of what was written since; the groups' sum */
	uint64_t writes;	  /* how many were counted */
	unsigned n;		  /* groups to which something was written, in order */
	struct {
		uint32_t group;
		struct mirror_hash sum;
	} groups[MIRROR_SUM_GROUPS];
};
/* False: not all is verified. Takes microseconds: everything is kept up to date. */
bool mirror_sums(struct mirror *m, struct mirror_sums *out);
/* Begins a pass that was held. */
void mirror_release_pass(struct mirror *m);
/* True when every chunk is synced and verified. */
bool mirror_is_verified(struct mirror *m);

/* With guest I/O quiesced: true when every chunk is synced, nothing is in flight, and nothing was copied
 * after the last mirror_flush_remote, if there was one. */
bool mirror_is_consistent(struct mirror *m);
/* Ends mirroring (waits for mirrored writes that a guest waits for; what is buffered and was not sent is
 * dropped, its chunks become unsynced), closes the remote, which waits for its late replies. The filter
 * passes through again; it goes on noting what is written, for a start with keep_map. Idempotent.
 */
void mirror_stop(struct mirror *m);
void mirror_cancel(struct mirror *m); /* any thread; mirror_stop still needed */
void mirror_stats(struct mirror *m, struct mirror_stats *out);

#endif
