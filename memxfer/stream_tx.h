/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MEMXFER_STREAM_TX_H
#define MEMXFER_STREAM_TX_H

#include <stdatomic.h>
#include <zstd.h>

#include "memxfer/codec.h"
#include "memxfer/compress_policy.h"
#include "memxfer/idle_cpu.h"
#include "memxfer/page_hashes.h"
#include "memxfer/stream_delta.h"
#include "memxfer/yield.h"

/* What all streams of a sender add to; read by mem_sender_stats. */
struct mem_tx_counters {
	_Atomic uint64_t data_pages, zero_pages, hole_pages, unchanged_pages, delta_pages, delta_bytes;
	_Atomic int64_t remaining_pages;
};

/* The sending half of one stream: collects runs and pages into a frame, packs and sends it. One thread. */
struct mem_tx {
	struct conn *conn;
	const struct mem_space *space;
	struct mem_tx_counters *counters;
	const atomic_bool *stop;
	unsigned index, timeout_ms;
	struct rate_limit *bandwidth;
	int zstd_level;
	uint64_t epoch, sequence;
	uint32_t round;
	bool final;
	struct mem_totals totals;
	uint64_t last_send_ns;
	uint64_t send_ns, sent_bytes; /* in all: inside sends, and their bytes */

	uint32_t nruns, ndata;
	struct mem_run last; /* the run being extended; encoded when the next begins */
	uint8_t *head;	     /* header and runs */
	uint8_t *payload, *packed;
	ZSTD_CCtx *zstd;
	struct idle_cpu *idle_cpu;
	struct page_hashes *hashes; /* NULL: none are kept, and `round` stays 1 */
	struct mem_yield *yield;    /* NULL: goes on as it is */
	uint64_t *naming;	    /* mem_tx_later: its bitmap */
	struct compress_policy policy;
	struct mem_tx_delta delta;
};

int mem_tx_init(struct mem_tx *tx, const struct mem_sender_options *opt, unsigned index,
		struct mem_tx_counters *counters, const atomic_bool *stop, struct idle_cpu *idle_cpu,
		struct page_hashes *hashes, struct error *err);
void mem_tx_release(struct mem_tx *tx);
/* On a new connection: nothing is collected, numbers begin anew. */
void mem_tx_restart(struct mem_tx *tx, struct conn *conn);
/* Adds the pages of [first, first+n) whose bits are set; sends frames as they fill. The dirty log of the
 * range was cleared before. */
int mem_tx_pages(struct mem_tx *tx, const uint64_t *bitmap, uint64_t first, uint64_t npages,
		 struct error *err);
/* Names those pages as coming later; holes among them are sent as such and their bits cleared. */
int mem_tx_later(struct mem_tx *tx, uint64_t *bitmap, uint64_t first, uint64_t npages, struct error *err);
int mem_tx_flush(struct mem_tx *tx, struct error *err);
/* Sends head, which has room for the header before its runs, and the payload. */
int mem_tx_frame(struct mem_tx *tx, struct mem_header *h, uint8_t *head, const void *payload,
		 struct error *err);
/* Sends what is collected, then a frame without pages. */
int mem_tx_control(struct mem_tx *tx, enum mem_frame_type type, const void *payload, uint32_t len,
		   struct error *err);

#endif
