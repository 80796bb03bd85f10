/* SPDX-License-Identifier: Apache-2.0 */
/* Private to the raw driver: raw.c opens, raw_io.c has what both engines share, uring.c and threads.c are the
 * engines. */
#ifndef BLOCK_RAW_H
#define BLOCK_RAW_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "base/error.h"
#include "block/block.h"
#include "block/open.h"

struct raw_pool;
struct raw_uring;

struct raw_disk {
	struct block block; /* first */
	int fd;
	enum block_format lock_as;
	bool is_device;
	uint64_t file_bytes; /* of a regular file when it was opened: an end before that is an error */
	bool direct;
	atomic_bool fenced;  /* block_share_fence */
	uint32_t align;	     /* of offsets, lengths and memory for O_DIRECT; 1 when buffered */
	uint32_t zero_align; /* of fallocate and BLKZEROOUT: logical block of a device, else 1 */
	atomic_bool can_punch;
	atomic_bool can_zero_range;
	/* One read-modify-write at a time. An aligned write never shares a block with one of these unless the
	 * two overlap, which the caller excludes. */
	pthread_mutex_t rmw_lock;
	struct raw_pool *pool;
	struct raw_uring *ring; /* NULL: the pool does everything */
	/* The stretch of data that was found last: to find its end again may cost a walk of the file's pages
	 * (tmpfs) or its transaction's commit (ZFS). At worst it is stale, and a hole is read as data. */
	pthread_mutex_t data_lock;
	uint64_t data_at, data_end;
	atomic_uint inflight;
	pthread_mutex_t idle_lock;
	pthread_cond_t idle_cond;
};

/* One request on its way; the caller's iov is copied so that a short transfer can move it on. */
struct raw_op {
	struct raw_op *next;
	struct raw_disk *disk;
	struct block_request *req;
	uint64_t offset_bytes; /* of what remains, on the file; widened to the alignment for a bounced read */
	uint64_t left_bytes;
	void *bounce;
	uint64_t bounce_offset_bytes; /* file offset of bounce[0] */
	bool rmw;		      /* write that must be a read-modify-write, in the pool */
	int first, niov;	      /* iov[first .. niov) is what remains */
	struct iovec iov[];
};

/* 0, or -ENOMEM. */
int raw_op_create(struct raw_disk *disk, struct block_request *req, struct raw_op **out);
/* Accounts for a transfer that returned n (or a negative errno). True: finished, *result set. False: what
 * remains must be submitted again. */
bool raw_op_advance(struct raw_op *op, ssize_t n, int *result);
/* Copies a bounced read out, calls done(), frees, wakes a waiting close. No lock may be held. */
void raw_op_complete(struct raw_op *op, int result);
/* Runs the whole operation in this thread and completes it. */
void raw_op_run(struct raw_op *op);
int raw_flush_sync(struct raw_disk *disk);
int raw_extents(struct block *blk, uint64_t offset_bytes, uint64_t len_bytes, struct block_extent *ext,
		unsigned *n, struct error *err);

int raw_pool_create(unsigned nthreads, struct raw_pool **out, struct error *err);
void raw_pool_submit(struct raw_pool *pool, struct raw_op *op);
void raw_pool_free(struct raw_pool *pool); /* the queue must be empty; NULL is fine */

/* -ENOSYS, -EPERM and the like where the kernel does not let us: use the pool. */
int raw_uring_create(struct raw_disk *disk, struct raw_uring **out, struct error *err);
void raw_uring_submit(struct raw_uring *ring, struct raw_op *op);
void raw_uring_free(struct raw_uring *ring); /* nothing in flight; NULL is fine */

/* Takes the lock of open.h on fd: the whole file for raw, a range that QEMU's own locks leave alone
 * otherwise. -EBUSY names the path. */
int block_lock_fd(int fd, const char *path, enum block_format format, bool read_only, struct error *err);
void block_unlock_fd(int fd, enum block_format format);
int raw_open(const char *path, const struct block_open_options *opt, struct block **out, struct error *err);

#endif
