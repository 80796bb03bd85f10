/* SPDX-License-Identifier: Apache-2.0 */
/* interface: memory transfer, between memxfer and vmm */
#ifndef MEMXFER_MEMXFER_H
#define MEMXFER_MEMXFER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "base/rate_limit.h"
#include "memxfer/pace.h"
#include "net/conn.h"

#define MEM_PAGE_BYTES	 4096u
#define MEM_REGION_BYTES (2u << 20) /* a region belongs to one stream for the whole migration */
#define MEM_STREAMS_MAX	 16

/* auto: where packing costs a stream less time than it saves on the wire, judged anew all the time. */
enum mem_compress { MEM_COMPRESS_OFF, MEM_COMPRESS_AUTO, MEM_COMPRESS_ALWAYS };

/* Guest RAM as one flat memfd: page i is at byte i * MEM_PAGE_BYTES of the mapping and the fd (not the
 * guest-physical address). */
struct mem_space {
	int fd; /* memfd; holes found with SEEK_DATA/SEEK_HOLE */
	uint8_t *base;
	uint64_t npages;
};

/* Where dirty pages come from: KVM's log or-ed with the VMM's own writes; tests plug fakes in. */
struct dirty_source {
	void *opaque;
	/* Starts tracking: from now on every page written is reported. All pages count as dirty
	 * (INITIALLY_SET). */
	int (*start)(void *opaque, struct error *err);
	/*
	 * Ors the dirty bits of the whole space into bitmap (page i = bit i) and, for manual protect, does
	 * not clear them in the log: clear() does, in pieces, just before sending.
	 */
	int (*collect)(void *opaque, uint64_t *bitmap, struct error *err);
	/* Write-protects / clears pages [first, first+n) again where bitmap has a bit; first and n multiples
	 * of 64 except at the end; bitmap is that of the whole space, so page `first` is bit `first` of it.
	 * Called BEFORE the page is read. Any thread, may run in parallel for different ranges. */
	int (*clear)(void *opaque, uint64_t first_page, uint64_t npages, const uint64_t *bitmap,
		     struct error *err);
	int (*stop)(void *opaque);
};

/* Slows the guest down. Called by the thread that runs the rounds. */
struct guest_brake {
	void *opaque;
	/* 1: as fast as it goes. Not below 1 - slow_max_percent / 100. */
	void (*set_speed)(void *opaque, double speed);
};

struct mem_sender_options {
	struct mem_space space;
	struct dirty_source dirty;
	struct conn **streams; /* stays the caller's; shut down with conn_shutdown to end a blocked sender */
	unsigned nstreams;
	enum mem_compress compress;
	int zstd_level; /* unless off; negative = --fast, not 0 */
	unsigned downtime_target_ms;
	unsigned max_rounds;  /* then no more, whatever remains; 0 = none */
	unsigned max_time_ms; /* likewise; looked at between rounds, as a broken-off round would be paid with
			       * downtime */
	struct guest_brake brake;  /* needed if slow_max_percent is not 0 */
	unsigned slow_max_percent; /* memxfer/pace.h, like shrink */
	double shrink;		   /* 0 = 1 */
	/* of former copies, for deltas; 0: none, as when the receiver was not started with `deltas` */
	uint64_t delta_cache_bytes;
	struct mem_pause_costs pause;
	unsigned timeout_ms; /* silence on a stream that ends the migration */
	bool guest_stands;   /* all the time: nobody here is to be let through */
	struct rate_limit
		*bandwidth; /* NULL: none. Of the rounds, not of the last one, for which the guest waits */
	uint64_t epoch;
};

struct mem_stats { /* snapshot; any thread */
	unsigned round;
	uint64_t total_bytes;	  /* populated guest memory at the start */
	uint64_t remaining_bytes; /* still dirty in this round */
	uint64_t round_bytes; /* dirty when this round began: what the guest wrote during the former one */
	uint64_t sent_pages, zero_pages, hole_pages;
	uint64_t unchanged_pages;	   /* dirtied, but as the destination has them: not sent */
	uint64_t delta_pages, delta_bytes; /* of sent_pages: as what changed of them, and its length */
	uint64_t wire_bytes;
	uint64_t rate_bytes_per_s, dirty_bytes_per_s;
	uint64_t predicted_downtime_us; /* after the last round */
	uint64_t final_collect_us;	/* of mem_sender_finish: the last look at the dirty log */
};

struct mem_sender;
int mem_sender_create(const struct mem_sender_options *opt, struct mem_sender **out, struct error *err);
/* Runs pre-copy rounds until the predicted downtime fits its target, or a limit is hit; *limit_hit tells. The
 * guest may have been slowed, and still is when this returns, also with an error: the caller gives it its
 * speed back. Returns -ECANCELED after mem_sender_cancel. Tracking stays on. Blocking. May be called again
 * when the pause that followed came to nothing. */
int mem_sender_precopy(struct mem_sender *s, bool *limit_hit, struct error *err);
/* At least one round more after mem_sender_precopy, within its limits: for what was written during other
 * work. */
int mem_sender_catch_up(struct mem_sender *s, bool *limit_hit, struct error *err);
/* Between rounds: what a pause is found to cost now. */
void mem_sender_pause_costs(struct mem_sender *s, const struct mem_pause_costs *costs);
/* Guest paused, devices drained, state saved: sends what is dirty, spread over all streams, ends each stream
 * with a barrier frame that carries page counts, and waits until the receiver acknowledged every stream (one
 * byte frame back). */
int mem_sender_finish(struct mem_sender *s, struct error *err);
/*
 * After pre-copy: tells the destination what is dirty now, so that it makes room while the guest runs. What
 * is left for the pause is then what was written since. Rounds may follow, as after mem_sender_precopy.
 */
int mem_sender_announce_later(struct mem_sender *s, struct error *err);
/* As mem_sender_finish, but what is dirty is only named: it comes by post-copy (memxfer/postcopy.h), and what
 * the destination has of it is void. *later, one bit a page, stays the sender's; *npages are set. The
 * receiver must have been started with `postcopy`. */
int mem_sender_finish_later(struct mem_sender *s, const uint64_t **later, uint64_t *npages,
			    struct error *err);
void mem_sender_cancel(struct mem_sender *s); /* any thread */
void mem_sender_stats(struct mem_sender *s, struct mem_stats *out);
void mem_sender_free(struct mem_sender *s); /* stops tracking */

struct mem_prefault;
struct mem_receiver_options {
	struct mem_space space;
	struct conn **streams;
	unsigned nstreams;
	unsigned timeout_ms;
	uint64_t epoch;
	bool postcopy;		       /* frames may name pages that come later */
	struct mem_prefault *prefault; /* NULL: none. Outlives the receiver */
	bool deltas;		       /* frames may carry what changed of a page */
};
struct mem_receiver;
/*
 * Starts a thread a stream. Never writes outside space, whatever arrives. The space must read as zeroes at
 * the start (faulted in or not): a zero page or hole that arrives for a page never written is a no-op.
 */
int mem_receiver_start(const struct mem_receiver_options *opt, struct mem_receiver **out, struct error *err);
/* Waits until every stream has seen its barrier (0) or failed. */
int mem_receiver_wait(struct mem_receiver *r, struct error *err);
/* After that: the pages that come later, one bit each, or NULL if there are none. The caller's to free. */
uint64_t *mem_receiver_take_later(struct mem_receiver *r);
void mem_receiver_stats(struct mem_receiver *r, struct mem_stats *out);
void mem_receiver_free(struct mem_receiver *r); /* shuts the streams down and joins */

/*
 * Faults in the regions of guest memory that the source reports, by threads of its own, and by the receiver
 * where data come before they do. Nothing else is touched, and what is there stays.
 */
struct mem_prefault_options {
	struct mem_space space;
	const uint64_t *regions; /* one bit each; copied */
	uint64_t nregions;
	unsigned nthreads; /* 0: by the number of processors, at most 8 */
	unsigned delay_ms; /* not before; a region whose data come earlier gets single pages then */
	bool huge;	   /* as huge pages if there are any: not where pages may be freed singly later */
};
struct mem_prefault;
int mem_prefault_start(const struct mem_prefault_options *opt, struct mem_prefault **out, struct error *err);
/* Until all is faulted in, or it failed. */
int mem_prefault_wait(struct mem_prefault *p, struct error *err);
/* At once: after it no thread of its own touches the memory. What failed before is told here, too. */
int mem_prefault_stop(struct mem_prefault *p, struct error *err);
void mem_prefault_free(struct mem_prefault *p); /* after the receiver that was given it; NULL is fine */

/* Populated 2 MiB regions of the space by SEEK_DATA. */
int mem_populated_regions(const struct mem_space *space, uint64_t *region_bitmap, struct error *err);

#endif
