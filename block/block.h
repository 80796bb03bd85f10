/* SPDX-License-Identifier: Apache-2.0 */
/* interface: agreed between block, nbd, mirror and vmm */
#ifndef BLOCK_BLOCK_H
#define BLOCK_BLOCK_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "base/error.h"

/*
 * A disk: an array of bytes behind an ops table. All I/O is asynchronous; offsets and lengths are bytes and
 * must be multiples of limits.request_alignment (512 or 1; a driver does read-modify-write itself if it needs
 * more).
 *
 * Requests in flight that overlap are undefined unless they are all reads: the caller orders them.
 */
enum block_op {
	BLOCK_READ,
	BLOCK_WRITE,
	BLOCK_FLUSH,	    /* offset, len unused. Completed writes are durable when it completes */
	BLOCK_WRITE_ZEROES, /* len up to limits.max_zeroes_bytes (0 = any) */
	BLOCK_DISCARD,	    /* afterwards the range reads as zero: write-zeroes that may unmap */
};

enum {
	BLOCK_REQ_FUA = 1 << 0,	      /* write, zeroes, discard: durable when it completes */
	BLOCK_REQ_MAY_UNMAP = 1 << 1, /* write-zeroes may deallocate */
	BLOCK_REQ_NO_FALLBACK =
		1 << 2, /* write-zeroes: fail with ENOTSUP rather than write zero bytes slowly */
	/* The submitter holds no lock and has nothing better to do: the driver may do it at once, and call done()
	 * from inside block_submit. */
	BLOCK_REQ_MAY_WAIT = 1 << 3,
};

struct block;

/*
 * Owned by the caller, untouched from submit until done() is called. The buffers must stay valid as long.
 * done() is called exactly once, from the driver's completion thread (never from inside block_submit unless
 * BLOCK_REQ_MAY_WAIT allows it, never with driver locks held), with result 0 or a negative errno. done() may submit further requests to any
 * block; it must not wait for one.
 */
struct block_request {
	enum block_op op;
	unsigned flags;
	uint64_t offset_bytes;
	uint64_t len_bytes;
	struct iovec *iov; /* read, write: sums up to len_bytes; may be modified by the driver */
	int niov;
	void (*done)(struct block_request *req, int result);
	void *opaque; /* the caller's */

	/* the driver's own while in flight */
	uint64_t driver[6];
};

struct block_extent {
	uint64_t len_bytes;
	bool hole;    /* not allocated; reads as zero */
	bool zero;    /* reads as zero */
	bool backing; /* not allocated in this image: what it reads as comes from below */
};

struct block_limits {
	uint32_t request_alignment;  /* power of two, at least 1 */
	uint32_t max_transfer_bytes; /* largest read or write, 0 = none; larger ones are the caller's to split
				      */
	uint64_t max_zeroes_bytes;   /* largest zeroes or discard, 0 = none */
	bool read_only;
	bool can_multi_conn; /* a flush on one connection covers writes completed on all */
};

struct block_ops {
	const char *name;
	/* Any thread. Returns 0 and later calls done(), or a negative errno and never calls done(). Queues in
	 * the driver without limit; may block briefly for a lock, never for I/O. */
	int (*submit)(struct block *blk, struct block_request *req);
	/* Any thread, may block on I/O. Fills up to *n extents that follow one another from offset_bytes,
	 * covering at most len_bytes and at least one byte; sets *n. NULL: everything is data. */
	int (*extents)(struct block *blk, uint64_t offset_bytes, uint64_t len_bytes, struct block_extent *ext,
		       unsigned *n, struct error *err);
	/* Any thread, may block. What a page cache keeps of the range is dropped where it is durable, so that
	 * it is read from the media next. NULL: there is no cache. */
	void (*drop_cache)(struct block *blk, uint64_t offset_bytes, uint64_t len_bytes);
	/* Waits for requests in flight, closes, frees. Called once, no request may come after. */
	void (*close)(struct block *blk);
};

/* Drivers embed this as their first member. */
struct block {
	const struct block_ops *ops;
	uint64_t size_bytes;
	struct block_limits limits;
	char label[96]; /* for messages: "disk root" */
};

/* Checks range, alignment, read-only and the transfer limit (-EINVAL, -EPERM, -ENOSPC beyond the end), then
 * submits. */
int block_submit(struct block *blk, struct block_request *req);
/* As the op; without one, a single data extent. */
int block_extents(struct block *blk, uint64_t offset_bytes, uint64_t len_bytes, struct block_extent *ext,
		  unsigned *n, struct error *err);
/* As the op. */
void block_drop_cache(struct block *blk, uint64_t offset_bytes, uint64_t len_bytes);
/* NULL is fine. */
void block_close(struct block *blk);

/* Blocking helpers over submit; not from a completion callback. 0 or negative errno. They split at the
 * limits. */
int block_pread(struct block *blk, void *buf, uint64_t len_bytes, uint64_t offset_bytes);
int block_pwrite(struct block *blk, const void *buf, uint64_t len_bytes, uint64_t offset_bytes);
int block_zero(struct block *blk, uint64_t offset_bytes, uint64_t len_bytes, unsigned flags);
int block_discard(struct block *blk, uint64_t offset_bytes, uint64_t len_bytes);
int block_flush(struct block *blk);

#endif
