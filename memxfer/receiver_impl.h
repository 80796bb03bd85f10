/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MEMXFER_RECEIVER_IMPL_H
#define MEMXFER_RECEIVER_IMPL_H

#include <pthread.h>
#include <stdatomic.h>
#include <sys/uio.h>
#include <xxhash.h>
#include <zstd.h>

#include "memxfer/codec.h"
#include "memxfer/yield.h"

/* Private to receiver*.c. */

struct mem_rx {
	struct mem_receiver *receiver;
	unsigned index;
	pthread_t thread;
	bool started;
	uint64_t sequence, reply_sequence;
	struct mem_totals totals;
	bool past_barrier;
	uint8_t *table, *packed, *unpacked;
	struct mem_run *runs;
	/* Where the frame's data pages belong, pages that follow one another as one; the second is used up
	 * by reading. */
	struct iovec target[MEM_FRAME_PAGES_MAX], reading[MEM_FRAME_PAGES_MAX];
	bool any_region; /* the last that data landed in */
	uint64_t region;
	XXH3_state_t *sum;
	ZSTD_DCtx *zstd;
};

struct mem_receiver {
	struct mem_receiver_options opt;
	struct conn *streams[MEM_STREAMS_MAX];
	struct mem_rx rx[MEM_STREAMS_MAX];
	/* Pages that this receiver wrote: for others zero is what they are already. Words are shared between
	 * streams after the barrier, hence atomic. */
	uint64_t *written;
	uint64_t *later; /* NULL: not agreed. Pages that post-copy brings; likewise */
	atomic_bool any_later;
	_Atomic uint64_t data_pages, zero_pages, hole_pages;
	_Atomic unsigned round;
	struct mem_yield yield; /* the streams' threads, while the guest runs at the source */

	pthread_mutex_t lock;
	pthread_cond_t changed;
	unsigned at_barrier, done;
	bool stopping;
	struct error failure; /* the first */
};

int mem_rx_alloc(struct mem_rx *rx, struct error *err);
void mem_rx_release(struct mem_rx *rx);
/* The rest of a frame, or a part of it: -ECONNRESET if it ends there. */
int mem_rx_readv(struct mem_rx *rx, struct iovec *iov, int niov, struct error *err);
int mem_rx_check_sum(const struct mem_header *h, uint64_t sum, struct error *err);
/* Whether a frame with pages may come here: those of the last round after the barrier, all others before. */
int mem_rx_check_place(const struct mem_rx *rx, const struct mem_header *h, struct error *err);
/* Reads the runs of such a frame, and checks them before anything of its payload is used. */
int mem_rx_read_runs(struct mem_rx *rx, const struct mem_header *h, struct error *err);
/* The runs and the payload of a PAGES frame, from the stream into memory. */
int mem_rx_pages(struct mem_rx *rx, const struct mem_header *h, struct error *err);
/* The same of a DELTA frame (receiver_delta.c). */
int mem_rx_deltas(struct mem_rx *rx, const struct mem_header *h, struct error *err);

static inline bool mem_rx_is_written(const struct mem_receiver *r, uint64_t page)
{
	return __atomic_load_n(&r->written[page / 64], __ATOMIC_RELAXED) >> (page % 64) & 1;
}

static inline bool mem_rx_is_later(const struct mem_receiver *r, uint64_t page)
{
	return r->later && __atomic_load_n(&r->later[page / 64], __ATOMIC_RELAXED) >> (page % 64) & 1;
}

#endif
