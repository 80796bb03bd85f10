/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MEMXFER_STREAM_DELTA_H
#define MEMXFER_STREAM_DELTA_H

#include "memxfer/codec.h"
#include "memxfer/delta_cache.h"
#include "memxfer/delta_policy.h"

/* Private to the sending half of a stream (memxfer/stream_tx.h): pages that go as deltas, in frames of their
 * own beside those of whole pages. */
struct mem_tx_delta {
	struct delta_cache *cache; /* of all streams; NULL: no deltas */
	struct delta_policy policy;
	uint32_t nruns, len;
	struct mem_run last; /* as mem_tx's */
	uint8_t *head, *payload;
	uint64_t sent_before, send_ns_before; /* the stream's, at the round's begin */
};

struct mem_tx;
/* cache may be NULL. */
int mem_tx_delta_init(struct mem_tx *tx, struct delta_cache *cache, struct error *err);
void mem_tx_delta_release(struct mem_tx *tx);
/* A round begins: judges whether it uses deltas. Not the last one, which goes on as the one before. */
void mem_tx_delta_round(struct mem_tx *tx);
/* All of the round is in place; the last of it took so long after the last send, the round trip not counted.
 */
void mem_tx_delta_arrived(struct mem_tx *tx, uint64_t drain_ns);
/* A whole page took so much of its frame. */
void mem_tx_delta_whole(struct mem_tx *tx, double page_bytes);
/* `copy` is how the page is to be. 1: it goes as a delta; 0: it has to go whole. */
int mem_tx_delta_page(struct mem_tx *tx, uint64_t page, const uint8_t *copy, struct error *err);
/* Those pages go some other way. */
void mem_tx_delta_forget(struct mem_tx *tx, uint64_t first, uint64_t npages);
int mem_tx_delta_flush(struct mem_tx *tx, struct error *err);

#endif
