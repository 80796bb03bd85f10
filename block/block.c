/* SPDX-License-Identifier: Apache-2.0 */
#include "block/block.h"

#include <errno.h>
#include <pthread.h>

#include "base/bytes.h"

/* What the blocking helpers ask for in one request when the driver names no limit. */
#define SYNC_PIECE_BYTES (UINT64_C(16) << 20)

static int check_iov(const struct block_request *req)
{
	uint64_t sum = 0;
	if (req->niov < 1 || !req->iov)
		return -EINVAL;
	for (int i = 0; i < req->niov; i++) {
		if (req->iov[i].iov_len > req->len_bytes - sum)
			return -EINVAL;
		sum += req->iov[i].iov_len;
	}
	return sum == req->len_bytes ? 0 : -EINVAL;
}

static int check_request(const struct block *blk, const struct block_request *req)
{
	if (req->op == BLOCK_FLUSH)
		return 0;
	const struct block_limits *lim = &blk->limits;
	bool changes = req->op != BLOCK_READ;
	if (changes && lim->read_only)
		return -EPERM;
	uint32_t mask = lim->request_alignment ? lim->request_alignment - 1 : 0;
	if (req->len_bytes == 0 || ((req->offset_bytes | req->len_bytes) & mask))
		return -EINVAL;
	if (!range_fits(req->offset_bytes, req->len_bytes, blk->size_bytes))
		return req->op == BLOCK_WRITE || req->op == BLOCK_WRITE_ZEROES ? -ENOSPC : -EINVAL;
	switch (req->op) {
	case BLOCK_READ:
	case BLOCK_WRITE:
		if (lim->max_transfer_bytes && req->len_bytes > lim->max_transfer_bytes)
			return -EINVAL;
		return check_iov(req);
	case BLOCK_WRITE_ZEROES:
	case BLOCK_DISCARD:
		if (lim->max_zeroes_bytes && req->len_bytes > lim->max_zeroes_bytes)
			return -EINVAL;
		return 0;
	default:
		return -EINVAL;
	}
}

int block_submit(struct block *blk, struct block_request *req)
{
	int rc = check_request(blk, req);
	return rc ? rc : blk->ops->submit(blk, req);
}

int block_extents(struct block *blk, uint64_t offset_bytes, uint64_t len_bytes, struct block_extent *ext,
		  unsigned *n, struct error *err)
{
	if (!*n || !len_bytes || !range_fits(offset_bytes, len_bytes, blk->size_bytes))
		return error_set(err, EINVAL, "%s: extents of %llu bytes at %llu: out of range", blk->label,
				 (unsigned long long)len_bytes, (unsigned long long)offset_bytes);
	if (blk->ops->extents)
		return blk->ops->extents(blk, offset_bytes, len_bytes, ext, n, err);
	ext[0] = (struct block_extent){.len_bytes = len_bytes};
	*n = 1;
	return 0;
}

void block_drop_cache(struct block *blk, uint64_t offset_bytes, uint64_t len_bytes)
{
	if (blk->ops->drop_cache)
		blk->ops->drop_cache(blk, offset_bytes, len_bytes);
}

void block_close(struct block *blk)
{
	if (blk)
		blk->ops->close(blk);
}

struct waiter {
	struct block_request req;
	pthread_mutex_t lock;
	pthread_cond_t cond;
	bool done;
	int result;
};

static void waiter_done(struct block_request *req, int result)
{
	struct waiter *w = req->opaque;
	pthread_mutex_lock(&w->lock);
	w->result = result;
	w->done = true;
	pthread_cond_signal(&w->cond);
	pthread_mutex_unlock(&w->lock);
}

static int submit_and_wait(struct block *blk, enum block_op op, unsigned flags, uint64_t offset_bytes,
			   uint64_t len_bytes, void *buf)
{
	struct iovec iov = {.iov_base = buf, .iov_len = len_bytes};
	struct waiter w = {
		.req = {.op = op,
			.flags = flags,
			.offset_bytes = offset_bytes,
			.len_bytes = len_bytes,
			.iov = buf ? &iov : NULL,
			.niov = buf ? 1 : 0,
			.done = waiter_done},
		.lock = PTHREAD_MUTEX_INITIALIZER,
		.cond = PTHREAD_COND_INITIALIZER,
	};
	w.req.opaque = &w;
	int rc = block_submit(blk, &w.req);
	if (rc == 0) {
		pthread_mutex_lock(&w.lock);
		while (!w.done)
			pthread_cond_wait(&w.cond, &w.lock);
		pthread_mutex_unlock(&w.lock);
		rc = w.result;
	}
	pthread_cond_destroy(&w.cond);
	pthread_mutex_destroy(&w.lock);
	return rc;
}

static int in_pieces(struct block *blk, enum block_op op, unsigned flags, uint64_t offset_bytes,
		     uint64_t len_bytes, char *buf, uint64_t piece_bytes)
{
	uint32_t align = blk->limits.request_alignment ? blk->limits.request_alignment : 1;
	piece_bytes -= piece_bytes % align;
	while (len_bytes) {
		uint64_t n = len_bytes < piece_bytes ? len_bytes : piece_bytes;
		int rc = submit_and_wait(blk, op, flags, offset_bytes, n, buf);
		if (rc)
			return rc;
		offset_bytes += n;
		len_bytes -= n;
		if (buf)
			buf += n;
	}
	return 0;
}

static uint64_t transfer_piece(const struct block *blk)
{
	uint32_t max = blk->limits.max_transfer_bytes;
	return max && max < SYNC_PIECE_BYTES ? max : SYNC_PIECE_BYTES;
}

static uint64_t zeroes_piece(const struct block *blk)
{
	return blk->limits.max_zeroes_bytes ? blk->limits.max_zeroes_bytes : UINT64_MAX;
}

int block_pread(struct block *blk, void *buf, uint64_t len_bytes, uint64_t offset_bytes)
{
	return in_pieces(blk, BLOCK_READ, 0, offset_bytes, len_bytes, buf, transfer_piece(blk));
}

int block_pwrite(struct block *blk, const void *buf, uint64_t len_bytes, uint64_t offset_bytes)
{
	return in_pieces(blk, BLOCK_WRITE, 0, offset_bytes, len_bytes, (char *)(uintptr_t)buf,
			 transfer_piece(blk));
}

int block_zero(struct block *blk, uint64_t offset_bytes, uint64_t len_bytes, unsigned flags)
{
	return in_pieces(blk, BLOCK_WRITE_ZEROES, flags, offset_bytes, len_bytes, NULL, zeroes_piece(blk));
}

int block_discard(struct block *blk, uint64_t offset_bytes, uint64_t len_bytes)
{
	return in_pieces(blk, BLOCK_DISCARD, 0, offset_bytes, len_bytes, NULL, zeroes_piece(blk));
}

int block_flush(struct block *blk)
{
	return submit_and_wait(blk, BLOCK_FLUSH, 0, 0, 0, NULL);
}
