/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Private to the mirror. mirror.c: lifecycle and the filter block; map.c: chunk states; base/range_lock.c:
 * order of overlapping requests; write.c: guest writes, zeroes and discards; queue.c: their way to the
 * remote; flush.c: flushes; copy.c: the pass; silence.c: failure of a session, and the thread that watches
 * it; verify.c, verify_lock.c, verify_count.c: the comparison with the remote's content; proof.c, hash.c:
 * what is compared.
 *
 * One mutex a mirror (mirror->lock) guards everything but buffers on their way; it is never held over I/O, an
 * allocation of data, a copy of data, or a callback of somebody else. What becomes possible under the lock is
 * collected in a struct mirror_work and done by mirror_work_run after it is released.
 *
 * While a session runs, every change of the local disk and every chunk copy holds a range of the range lock
 * from its start until both disks are done with it. So: a chunk's state does not change under a write (but by
 * a failure), "unsynced -> copying waits for local writes in flight", "a write to a chunk being copied waits
 * for the copy" and "overlapping requests are ordered" are one mechanism.
 *
 * In a buffered session a guest's write gives its range back when the local disk has it. What the remote is
 * still to get is ordered by a second lock, session->order, which is entered by whoever holds the local
 * range, over the same bytes, before that is given back: so in the order in which the local disk took them.
 * Nobody who holds a range of the second waits for one of the first: what has that range may wait for room in
 * the buffer, which is full of what waits in the second.
 */
#ifndef MIRROR_IMPL_H
#define MIRROR_IMPL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "base/range_lock.h"
#include "block/block.h"
#include "mirror/mirror.h"
#include "mirror/proof.h"

/* A piece: what is copied at once is what a guest's write may have to wait for. Large disks have larger
 * chunks, so that the map and what others keep for each chunk stays small. */
#define MIRROR_CHUNK_DEFAULT_BYTES (256u << 10)
#define MIRROR_CHUNKS_DEFAULT_MAX  (1u << 20)
#define MIRROR_CHUNK_MIN_BYTES	   4096u
#define MIRROR_CHUNK_MAX_BYTES	   (256u << 20)
/* Largest piece sent to the remote. Small, as the grace is the longest time between two replies: 256 KiB take
 * 21 ms at 100 Mbit/s. */
#define MIRROR_PIECE_BYTES	(256u << 10)
#define MIRROR_ZERO_PIECE_BYTES (4u << 20)
#define MIRROR_TRANSFER_BYTES	(16u << 20) /* largest guest request */
/* Of a buffer, what is on its way at a time: the copy's pieces get their share of a link that a guest fills.
 */
#define MIRROR_WINDOW_SHARE	 8
#define MIRROR_REQUESTS_DEFAULT	 32
#define MIRROR_REQUESTS_MAX	 128
#define MIRROR_GRACE_DEFAULT_MS	 50
#define MIRROR_FLUSH_GRACES	 20
#define MIRROR_SECTOR_BYTES	 512u
#define MIRROR_SCAN_CHUNKS	 4096u
#define MIRROR_EXTENTS_PER_QUERY 32

/* Tags of the entries in mirror->ranges. */
enum { RANGE_OF_OP, RANGE_OF_COPY, RANGE_OF_VERIFY };

/* --- map: mirror->lock held throughout --- */
/* Chunks that are looked at without the range lock, and those of them written meanwhile. */
struct chunk_watch {
	struct chunk_watch *next;
	uint64_t first, n;
	uint64_t *dirty; /* by chunk - first */
};

struct chunk_map {
	uint64_t size_bytes, nchunks, synced_bytes, nsynced;
	uint64_t unsynced_bytes; /* what chunk_map_unsync took back, summed up */
	uint32_t chunk_bytes;
	unsigned shift;
	uint64_t *synced, *copying;
	uint64_t *verified, verified_bytes, nverified; /* the remote's content agreed */
	struct proof *proof;			       /* from the first verification on */
	struct chunk_watch *watches;
	uint64_t *touched; /* the remote may hold something other than what it began with */
	/* chunks looked at for holes without the range lock, and those of them written meanwhile */
	uint64_t scan_first, scan_n;
	uint64_t scan_dirty[MIRROR_SCAN_CHUNKS / 64];
};
int chunk_map_create(uint64_t size_bytes, uint32_t chunk_bytes, struct chunk_map **out);
void chunk_map_free(struct chunk_map *map); /* NULL is fine */
uint64_t chunk_map_len(const struct chunk_map *map, uint64_t chunk);
void chunk_map_set_synced(struct chunk_map *map, uint64_t chunk);
void chunk_map_set_verified(struct chunk_map *map, uint64_t chunk);
void chunk_map_forget_verified(struct chunk_map *map); /* of all chunks */
/* True if a chunk of the range was synced. It is not verified either. */
bool chunk_map_unsync(struct chunk_map *map, uint64_t offset_bytes, uint64_t len_bytes);
void chunk_map_touch(struct chunk_map *map, uint64_t offset_bytes, uint64_t len_bytes);
bool chunk_map_all_synced(const struct chunk_map *map);
/* The first chunk at or after `from`, then from the beginning, that is neither synced nor being copied. */
bool chunk_map_next_unsynced(const struct chunk_map *map, uint64_t from, uint64_t *chunk);
/* Cuts [*offset, end) to its next run of synced chunks, at most max_bytes long; false if there is none. */
bool chunk_map_next_run(const struct chunk_map *map, uint64_t *offset_bytes, uint64_t end_bytes,
			uint64_t max_bytes, uint64_t *len_bytes);
/* Something in the range changes or will. */
void chunk_map_mark_scan(struct chunk_map *map, uint64_t offset_bytes, uint64_t len_bytes);
/* The watch's dirty bits are clear. */
void chunk_map_watch(struct chunk_map *map, struct chunk_watch *w);
void chunk_map_unwatch(struct chunk_map *map, struct chunk_watch *w);

/* --- requests to the remote --- */
struct mirror_work;
struct session;

enum piece_state {
	PIECE_PLANNED,
	PIECE_WAITING, /* in session->order behind one that overlaps */
	PIECE_QUEUED,  /* its turn, but the window is full */
	PIECE_SENT,
	PIECE_ENDED
};

struct remote_piece {
	struct remote_piece *prev, *next; /* session->outstanding in order of sending, or session->unsent */
	struct remote_piece *next_send;	  /* mirror_work.send */
	enum piece_state state;		  /* of an operation's piece */
	struct range_entry order;	  /* of an operation's piece in a buffered session */
	size_t first_hash;		  /* in the operation's write_hashes */
	struct session *session;
	struct block_request req;
	struct iovec iov;
	uint64_t sent_ns;
	void *owner;
	/* mirror->lock held; the piece is off the list. The owner may be freed by it. */
	void (*arrived)(struct remote_piece *piece, int result, struct mirror_work *work);
};
/* mirror->lock held. Call before block_submit to the remote. */
void remote_piece_register(struct session *s, struct remote_piece *piece);
/* What it costs of the link. */
uint64_t remote_piece_wire_bytes(const struct remote_piece *piece);
/* No lock held. Hands a registered piece to the remote, or its error to the mirror's thread. */
void remote_piece_send(struct remote_piece *piece);

/* --- guest requests --- */
struct mirror_op {
	struct mirror *m;
	struct block_request *req; /* the guest's; its driver[] links and carries the result when done */
	struct range_entry range;
	struct mirror_op *next;	 /* in mirror_work.start or mirror->bounce_wait */
	struct session *session; /* that has it on its list: the remote is to get it or to answer */
	struct mirror_op *prev_mirrored, *next_mirrored;
	struct block_request local;
	struct iovec local_iov;
	uint8_t *bounce;
	uint64_t bounce_bytes; /* charged to the budget */
	uint64_t since_ns;     /* arrival */
	uint64_t mirrored_bytes;
	uint64_t session_id; /* that the pieces were planned for */
	struct remote_piece *pieces;
	unsigned npieces, pending_remote, refs;
	struct mirror_hash *write_hashes; /* of the pieces' parts in each chunk; NULL: not counted */
	uint64_t write_seed;
	unsigned write_shift;
	bool counted;  /* a chunk is verified */
	bool started;  /* holds range and bounce */
	bool attached; /* counted in session->attached: the guest waits for the remote */
	bool sent;     /* the remote may have got it, or may get it */
	bool local_done;
	int result; /* of the local disk: what the guest gets */
};

struct mirror_flush {
	struct mirror_flush *next; /* session->flushes */
	struct mirror *m;
	struct session *session;
	struct block_request *req; /* the guest's; NULL: mirror_flush_remote */
	struct block_request local, remote;
	uint64_t sent_ns;
	bool local_done, remote_done;
	bool attached; /* on session->flushes: waits for the remote */
	int local_result, remote_result;
	unsigned refs;
};

/* --- the pass --- */
enum copy_state {
	COPY_IDLE,
	COPY_WAITING,
	COPY_GRANTED,
	COPY_READING,
	COPY_READ,
	COPY_QUEUED,
	COPY_SENT,
	COPY_ANSWERED
};

struct copy_job {
	struct copy_job *next; /* events or send queue of the session */
	struct session *session;
	struct range_entry range;
	struct range_entry order; /* the same in a buffered session's second lock */
	enum copy_state state;
	bool holds;	/* the range, and the chunk's copying bit */
	bool untouched; /* the remote's chunk still holds what it began with */
	bool ordered;	/* order is in there */
	int result;
	uint64_t chunk, cursor, end; /* bytes */
	uint64_t piece_bytes;	     /* under way */
	struct block_extent extents[MIRROR_EXTENTS_PER_QUERY];
	unsigned nextents, extent;
	uint64_t extent_left;
	uint8_t *buf;
	struct block_request read;
	struct iovec read_iov;
	struct remote_piece piece;
};

struct copy_queue {
	struct copy_job *first, **tail;
};

struct session {
	struct mirror *m;
	uint64_t id;
	struct block *remote;
	uint64_t grace_ns;
	uint64_t buffer_bytes; /* budget of the bounce buffers */
	bool buffered;	       /* guests' writes do not wait for the remote */
	bool remote_is_zero, remote_has_backing;
	struct rate_limit *bandwidth;
	void (*failed_cb)(void *opaque, const struct error *err);
	void *opaque;
	atomic_bool dead; /* failed, for those without the lock */

	/* mirror->lock */
	bool go, failed, stopping, cancelled;
	bool held;		/* the pass */
	bool report, reporting; /* failed_cb is due, is running */
	struct error error;
	unsigned submitting; /* threads between registering and having submitted to the remote */
	unsigned attached;   /* guest requests that wait for the remote */
	struct remote_piece *outstanding, *outstanding_last;
	uint64_t head_answered_ns; /* when the oldest outstanding request was last answered */
	uint64_t fastest_ns;	   /* shortest time to a reply */
	struct mirror_flush *flushes;
	unsigned flushing; /* flushes that the remote has not answered */
	bool flush_both;   /* mirror_flush_remote was called */
	bool copied_since; /* and something was copied since */
	bool announced;	   /* the pass came through once */
	bool synchronous;  /* buffered no more: mirror_flush_remote was called */
	uint64_t drain_ns; /* since when it waits for what is buffered; 0: it does not */

	/* guests' changes that the remote is to get or to answer; see queue.c */
	struct mirror_op *mirrored;
	unsigned nbuffered;			   /* those of them that no guest waits for */
	struct range_lock *order;		   /* NULL unless buffered */
	struct remote_piece *unsent, *unsent_last; /* PIECE_QUEUED */
	uint64_t sent_bytes, window_bytes;	   /* of what no guest waits for */

	/* the pass; see copy.c */
	pthread_t copy_thread;
	pthread_cond_t copy_wake;
	struct copy_job *jobs;
	uint8_t *copy_buffers; /* a piece for each job */
	size_t copy_buffers_bytes;
	unsigned njobs, active, reading, writing;
	unsigned limit, good, bad; /* window; replies in a row that say so */
	uint64_t guest_ns;	   /* when the guest changed its disk last */
	enum mirror_yield yield;
	unsigned guest_depth_x16; /* its writes under way, smoothed, in sixteenths */
	uint32_t piece_bytes, align;
	uint64_t cursor, scanned, min_latency_ns;
	struct copy_queue events, queued;
	bool first_copied;
};

struct mirror {
	struct block top; /* first */
	struct block *local;
	pthread_mutex_t control; /* start, stop */
	pthread_mutex_t lock;	 /* what follows */
	pthread_cond_t changed;	 /* for waiters outside I/O paths */
	pthread_cond_t worker_wake;
	pthread_t worker;
	bool worker_running, worker_quit;
	uint64_t passing; /* changes of the local disk that passed through without the range lock */
	struct chunk_map *map;
	struct session *session;
	struct verify *verify; /* under way */
	uint64_t session_ids;
	struct range_lock ranges;
	uint64_t bounce_used;
	struct mirror_op *bounce_wait, **bounce_wait_tail;
	struct block_request *deferred, **deferred_tail; /* refused requests whose done() is due */
	struct mirror_stats stats;
};

struct mirror_work {
	struct mirror_op *start, **start_tail;
	struct remote_piece *send, **send_tail; /* each counted in session->submitting */
	struct block_request *done;		/* guest requests, linked by driver[0], result in driver[1] */
};
static inline void mirror_work_init(struct mirror_work *w)
{
	w->start = NULL;
	w->start_tail = &w->start;
	w->send = NULL;
	w->send_tail = &w->send;
	w->done = NULL;
}
/* No lock held. Not from inside a guest's submit if something may be done: only what starts, then. */
void mirror_work_run(struct mirror *m, struct mirror_work *w);
void mirror_work_done(struct mirror_work *w, struct block_request *req, int result);
/* Any context: req->done(req, result) from the mirror's thread. req's driver[] must be free. */
void mirror_defer_done(struct mirror *m, struct block_request *req, int result);

/* mirror->lock held for all that follow, except where said. */
static inline bool session_usable(const struct session *s)
{
	return s && !s->failed && !s->stopping;
}
/* write.c */
int mirror_write_submit(struct mirror *m, struct block_request *req); /* no lock held */
void mirror_op_activate(struct mirror_op *op, struct mirror_work *work);
/* The session ended: its chunks become unsynced, what was not sent is dropped. */
void mirror_op_detach(struct mirror_op *op, struct mirror_work *work);
/* One of its pieces needs to be waited for no more. May free the operation. */
void mirror_op_progress(struct remote_piece *piece, struct mirror_work *work);
/* mirror_stop: what no guest waits for and was not sent is dropped, its chunks are unsynced. */
void mirror_drop_buffered(struct session *s, struct mirror_work *work);
/* Hands ranges granted to their owners. */
void mirror_granted(struct mirror *m, struct range_entry *granted, struct mirror_work *work);
void mirror_bounce_retry(struct mirror *m, struct mirror_work *work);
/* queue.c */
int remote_queue_create(struct session *s); /* no lock held */
void remote_queue_free(struct session *s);  /* no lock held */
/* A piece's turn comes when what overlaps it and came before was answered. */
void remote_queue_add(struct session *s, struct remote_piece *piece, struct mirror_work *work);
/* The piece was answered, or is dropped without having been sent. */
void remote_queue_remove(struct remote_piece *piece, struct mirror_work *work);
/* Sends what the window has room for. */
void remote_queue_pump(struct session *s, struct mirror_work *work);
/* The holder of a chunk's range takes its turn as well: true at once, else by copy_ordered or verify_ordered.
 */
bool remote_order_enter(struct session *s, const struct range_entry *range, struct range_entry *e);
/* What a comparison waits for in a chunk is not held up by the window. */
void remote_queue_hurry(struct session *s, const struct range_entry *range, struct mirror_work *work);
void remote_order_remove(struct session *s, struct range_entry *e, struct mirror_work *work);
void remote_queue_send(struct mirror *m, struct mirror_work *work); /* no lock held */
/* flush.c */
int mirror_flush_submit(struct mirror *m, struct block_request *req); /* no lock held */
void mirror_flush_detach(struct mirror_flush *f, struct mirror_work *work);
/* silence.c */
void session_fail(struct session *s, int code, struct mirror_work *work, const char *fmt, ...)
	__attribute__((format(printf, 4, 5)));
int mirror_worker_start(struct mirror *m, struct error *err); /* no lock held */
void mirror_worker_stop(struct mirror *m);		      /* no lock held */
/* verify.c */
void verify_granted(struct range_entry *e, struct mirror_work *work);
void verify_ordered(struct range_entry *e);
/* Gives back the ranges that a verification holds. */
void verify_release(struct mirror *m, struct mirror_work *work);
/* Gives back what is compared while the guest has waited for it for the grace. */
void verify_check_patience(struct session *s, uint64_t now, struct mirror_work *work);
/* What goes to verified chunks is counted: planned, hashed (no lock held; 0 or -ENOMEM), counted. */
void verify_plan_op(struct mirror_op *op);
int verify_hash_op(struct mirror_op *op);
void verify_count_piece(const struct remote_piece *piece);
/* copy.c */
int copy_create(struct session *s, unsigned requests, struct error *err); /* no lock held */
void copy_free(struct session *s);					  /* no lock held */
void copy_granted(struct copy_job *job);
void copy_ordered(struct copy_job *job);
/* Gives chunks and ranges back; I/O in flight goes on into the jobs' buffers. */
void copy_abandon(struct session *s, struct mirror_work *work);
void copy_wake(struct session *s);
/* The guest has added a change of its disk to the ranges. mirror->lock held. */
void copy_guest_writes(struct session *s);

#endif
