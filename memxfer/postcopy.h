/* SPDX-License-Identifier: Apache-2.0 */
/* interface: post-copy, between memxfer and vmm */
#ifndef MEMXFER_POSTCOPY_H
#define MEMXFER_POSTCOPY_H

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "memxfer/memxfer.h"
#include "net/conn.h"

/*
 * The guest runs at the destination while its last pages are still at the source. A session is two channels:
 * one for pages that somebody waits for, one for all others, which are pushed from where the last fault was,
 * both ways. A session that breaks costs nothing: the source connects a new one, the destination says what it
 * lacks. Each page is taken from the source once a session at most.
 *
 * The threads here touch guest memory only at the source, where it is at rest; at the destination pages come
 * in by userfaultfd alone, and what is there already is never written.
 */
enum mem_postcopy_channel { MEM_POSTCOPY_FAULTS, MEM_POSTCOPY_PUSH, MEM_POSTCOPY_CHANNELS };

struct mem_postcopy_stats { /* snapshot; any thread */
	uint64_t total_pages, missing_pages;
	uint64_t sent_pages; /* source: data and zero pages, over all sessions */
	uint64_t wire_bytes;
	uint64_t faults, fault_median_us, fault_worst_us; /* the destination's word */
	uint64_t duplicate_pages;			  /* came although they were there */
	unsigned sessions;
	bool connected;
};

/* --- source --- */

struct mem_postcopy_source;
struct mem_postcopy_source_options {
	struct mem_space space;
	struct conn *channels[MEM_POSTCOPY_CHANNELS]; /* the first session's; taken over */
	enum mem_compress compress;		      /* of what is pushed */
	int zstd_level;
	unsigned timeout_ms; /* silence on a channel that ends a session */
	struct rate_limit *bandwidth;
	uint64_t epoch;
	/*
	 * A session ended, for this reason. From a thread of this module; may take as long as it wants, but
	 * has to return soon after mem_postcopy_source_cancel (which calls nothing). 0: the channels of a new
	 * session, taken over; 1: the destination has every page; negative: there will be no other session.
	 */
	int (*again)(void *opaque, const struct error *why, struct conn *channels[MEM_POSTCOPY_CHANNELS],
		     struct error *err);
	void *opaque;
};
/* Makes everything, and opens the first session; nothing is served before _begin. */
int mem_postcopy_source_create(const struct mem_postcopy_source_options *opt,
			       struct mem_postcopy_source **out, struct error *err);
/* Guest memory is at rest; pages whose bits are set (copied) may be asked for. */
void mem_postcopy_source_begin(struct mem_postcopy_source *s, const uint64_t *pages);
/* Waits until the destination has all of them (0), or there is no way any more. -ECANCELED after cancel. */
int mem_postcopy_source_wait(struct mem_postcopy_source *s, struct error *err);
void mem_postcopy_source_stats(struct mem_postcopy_source *s, struct mem_postcopy_stats *out);
void mem_postcopy_source_cancel(struct mem_postcopy_source *s); /* any thread */
void mem_postcopy_source_free(struct mem_postcopy_source *s);	/* NULL is fine */

/* --- destination --- */

/*
 * A userfaultfd that serves kernel accesses (KVM's, reads of a file into guest memory) too. To be opened
 * before the KVM machine is made: a process that is killed closes its descriptors in ascending order, and KVM
 * waits for its own faults when it goes.
 */
int mem_postcopy_open_faults(int *fd, struct error *err);

/*
 * Before anything is in the space: it gets no huge pages. Freeing a part of one may clear it instead, and a
 * kernel before 6.4 may gather pages with holes between them to one; nobody would wait for what is missing.
 */
int mem_postcopy_small_pages(const struct mem_space *space, struct error *err);

struct mem_postcopy_dest;
struct mem_postcopy_dest_options {
	struct mem_space space;
	int faults_fd; /* stays the caller's */
	unsigned timeout_ms;
	uint64_t epoch;
	/* A session ended, for this reason; another is waited for. From a thread of this module. */
	void (*broken)(void *opaque, const struct error *why);
	void *opaque;
};
/* Threads and tables; takes channels from now on. */
int mem_postcopy_dest_create(const struct mem_postcopy_dest_options *opt, struct mem_postcopy_dest **out,
			     struct error *err);
/* A connection of the source, taken over. A running session ends: its successor is there. Any thread. */
void mem_postcopy_dest_add(struct mem_postcopy_dest *d, enum mem_postcopy_channel channel, struct conn *conn);
/* Those pages are missing, and no hole in the file is touched yet: from here on who touches one waits for it.
 * Takes the bitmap over (on error too). */
int mem_postcopy_dest_begin(struct mem_postcopy_dest *d, uint64_t *missing, struct error *err);
/* Waits until every page is there: 0, or -ECANCELED after abort. timeout_ms 0: for ever; else -ETIMEDOUT. */
int mem_postcopy_dest_wait(struct mem_postcopy_dest *d, unsigned timeout_ms, struct error *err);
/* begun, and not every page is there */
bool mem_postcopy_dest_pending(struct mem_postcopy_dest *d);
/*
 * The guest has given these pages back and does not want what the source has of them: those that nobody waits
 * for are not missing any more. They may come all the same, before or after: what comes never replaces what
 * is there. To be called before the pages are taken out of the space. Any thread.
 */
void mem_postcopy_dest_forget(struct mem_postcopy_dest *d, uint64_t first, uint64_t npages);
void mem_postcopy_dest_stats(struct mem_postcopy_dest *d, struct mem_postcopy_stats *out);
/*
 * Nobody will run this memory: who waits for a page reads zeroes. Only for a guest that never ran; one that
 * did has to end with its process. Any thread.
 */
void mem_postcopy_dest_abort(struct mem_postcopy_dest *d);
/* After all is there the source gets a moment to hear of it. NULL is fine. */
void mem_postcopy_dest_free(struct mem_postcopy_dest *d);

#endif
