/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MIRROR_WITNESS_H
#define MIRROR_WITNESS_H

#include <stdint.h>

#include "base/error.h"
#include "block/block.h"
#include "mirror/mirror.h"
#include "mirror/proof.h"

/*
 * The destination's side of a verification: hashes of what its media hold, and sums of what came later. Any
 * thread.
 */
struct witness;

/* `blk` stays the caller's and must outlive the witness. chunk_bytes: a power of two. */
int witness_create(struct block *blk, uint32_t chunk_bytes, uint64_t seed, struct witness **out,
		   struct error *err);
void witness_free(struct witness *w); /* NULL is fine */
/* Chunks [first, first+n) count what is written to them from now on. What the block completed is made
 * durable, dropped from the cache, read again and hashed. Blocks. */
int witness_hashes(struct witness *w, uint64_t first, unsigned n, struct mirror_hash *out, struct error *err);
/* Ends a witness_hashes under way soon (-ECANCELED), and all that come. Any thread; NULL is fine. */
void witness_cancel(struct witness *w);
/* A change that arrived, before the block has it; data: of a write, NULL for zeroes and discards. */
void witness_observe(struct witness *w, uint64_t offset_bytes, uint64_t len_bytes, const void *data);
/* Over all chunks; 0 while a chunk was never asked for. Reads the whole table: not while a guest waits. Kept
 * for witness_compare. */
struct mirror_hash witness_root(struct witness *w);
/* -EILSEQ, naming the range, where the sums are not those of the source, or its root is not the last that
 * witness_root gave. */
int witness_compare(struct witness *w, const struct mirror_sums *sums, struct error *err);
/* What was read again so far (holes count), and what was counted. */
void witness_stats(struct witness *w, uint64_t *hashed_bytes, uint64_t *writes);

#endif
