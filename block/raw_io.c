/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "block/raw.h"

#define ZERO_PIECE_BYTES (1u << 20)

static uint64_t align_down(uint64_t v, uint32_t align)
{
	return v - v % align;
}

static uint64_t align_up(uint64_t v, uint32_t align)
{
	return align_down(v + align - 1, align);
}

static bool iov_aligned(const struct iovec *iov, int niov, uint32_t align)
{
	for (int i = 0; i < niov; i++)
		if (((uintptr_t)iov[i].iov_base | iov[i].iov_len) % align)
			return false;
	return true;
}

static void iov_gather(void *to, const struct iovec *iov, int niov)
{
	char *p = to;
	for (int i = 0; i < niov; i++) {
		memcpy(p, iov[i].iov_base, iov[i].iov_len);
		p += iov[i].iov_len;
	}
}

static void iov_scatter(const struct iovec *iov, int niov, const void *from)
{
	const char *p = from;
	for (int i = 0; i < niov; i++) {
		memcpy(iov[i].iov_base, p, iov[i].iov_len);
		p += iov[i].iov_len;
	}
}

/* O_DIRECT wants memory, offsets and lengths aligned: decides how this transfer gets there. */
static int prepare_direct(struct raw_op *op)
{
	struct raw_disk *disk = op->disk;
	struct block_request *req = op->req;
	bool range_aligned = (req->offset_bytes | req->len_bytes) % disk->align == 0;
	if (range_aligned && iov_aligned(req->iov, req->niov, disk->align))
		return 0;
	if (req->op == BLOCK_WRITE && !range_aligned) {
		op->rmw = true;
		return 0;
	}
	uint64_t begin = align_down(req->offset_bytes, disk->align);
	uint64_t end = align_up(req->offset_bytes + req->len_bytes, disk->align);
	if (posix_memalign(&op->bounce, disk->align < 4096 ? 4096 : disk->align, end - begin))
		return -ENOMEM;
	if (req->op == BLOCK_WRITE)
		iov_gather(op->bounce, req->iov, req->niov);
	op->bounce_offset_bytes = begin;
	op->offset_bytes = begin;
	op->left_bytes = end - begin;
	op->niov = 1;
	op->iov[0] = (struct iovec){.iov_base = op->bounce, .iov_len = end - begin};
	return 0;
}

int raw_op_create(struct raw_disk *disk, struct block_request *req, struct raw_op **out)
{
	bool transfer = req->op == BLOCK_READ || req->op == BLOCK_WRITE;
	int niov = transfer ? req->niov : 0;
	struct raw_op *op = malloc(sizeof *op + (size_t)niov * sizeof op->iov[0]);
	if (!op)
		return -ENOMEM;
	*op = (struct raw_op){.disk = disk,
			      .req = req,
			      .offset_bytes = req->offset_bytes,
			      .left_bytes = req->len_bytes,
			      .niov = niov};
	if (transfer)
		memcpy(op->iov, req->iov, (size_t)niov * sizeof op->iov[0]);
	if (transfer && disk->align > 1) {
		int rc = prepare_direct(op);
		if (rc) {
			free(op);
			return rc;
		}
	}
	*out = op;
	return 0;
}

static void skip_iov(struct raw_op *op, size_t n)
{
	while (n && op->first < op->niov) {
		struct iovec *v = &op->iov[op->first];
		if (n < v->iov_len) {
			v->iov_base = (char *)v->iov_base + n;
			v->iov_len -= n;
			return;
		}
		n -= v->iov_len;
		op->first++;
	}
}

bool raw_op_advance(struct raw_op *op, ssize_t n, int *result)
{
	if (n == -EINTR || n == -EAGAIN)
		return false;
	if (n < 0) {
		*result = (int)n;
		return true;
	}
	if (op->req->op != BLOCK_READ && op->req->op != BLOCK_WRITE) {
		*result = 0;
		return true;
	}
	if ((uint64_t)n > op->left_bytes) {
		*result = -EIO;
		return true;
	}
	op->offset_bytes += (uint64_t)n;
	op->left_bytes -= (uint64_t)n;
	*result = 0;
	if (!op->left_bytes)
		return true;
	skip_iov(op, (size_t)n);
	if (op->req->op == BLOCK_WRITE) {
		*result = -EIO;
		return n == 0;
	}
	/* The end of the file, which under O_DIRECT shows as a count that is no multiple: the rest reads as
	 * zero. */
	if (n == 0 || n % op->disk->align) {
		if (op->offset_bytes < op->disk->file_bytes) {
			*result =
				-EIO; /* somebody cut the file: that its data reads as zero would be a lie */
			return true;
		}
		for (int i = op->first; i < op->niov; i++)
			memset(op->iov[i].iov_base, 0, op->iov[i].iov_len);
		return true;
	}
	return false;
}

void raw_op_complete(struct raw_op *op, int result)
{
	struct raw_disk *disk = op->disk;
	struct block_request *req = op->req;
	if (op->bounce) {
		if (req->op == BLOCK_READ && result == 0)
			iov_scatter(req->iov, req->niov,
				    (char *)op->bounce + (req->offset_bytes - op->bounce_offset_bytes));
		free(op->bounce);
	}
	free(op);
	req->done(req, result);
	if (atomic_fetch_sub(&disk->inflight, 1) == 1) {
		pthread_mutex_lock(&disk->idle_lock);
		pthread_cond_broadcast(&disk->idle_cond);
		pthread_mutex_unlock(&disk->idle_lock);
	}
}

static int pread_full(const struct raw_disk *disk, char *buf, size_t len, uint64_t offset)
{
	while (len) {
		ssize_t n = pread(disk->fd, buf, len, (off_t)offset);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		buf += n;
		len -= (size_t)n;
		offset += (uint64_t)n;
		if (n == 0 || (size_t)n % disk->align) {
			if (offset < disk->file_bytes)
				return -EIO;
			memset(buf, 0, len);
			return 0;
		}
	}
	return 0;
}

static int pwrite_full(int fd, const char *buf, size_t len, uint64_t offset, int rwf)
{
	while (len) {
		struct iovec iov = {.iov_base = (void *)(uintptr_t)buf, .iov_len = len};
		ssize_t n = pwritev2(fd, &iov, 1, (off_t)offset, rwf);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n ? -errno : -EIO;
		buf += n;
		len -= (size_t)n;
		offset += (uint64_t)n;
	}
	return 0;
}

/* Writes [offset, offset+len) from iov under O_DIRECT, whole blocks at a time. iov NULL: zeroes. */
static int write_unaligned(struct raw_disk *disk, const struct iovec *iov, int niov, uint64_t offset,
			   size_t len, int rwf)
{
	uint64_t begin = align_down(offset, disk->align), end = align_up(offset + len, disk->align);
	size_t window = end - begin;
	void *mem = NULL;
	if (posix_memalign(&mem, disk->align < 4096 ? 4096 : disk->align, window))
		return -ENOMEM;
	CLEANUP_FREE char *buf = mem;
	SCOPE_LOCK(&disk->rmw_lock);
	int rc = 0;
	if (offset != begin)
		rc = pread_full(disk, buf, disk->align, begin);
	uint64_t tail = end - disk->align;
	if (rc == 0 && offset + len != end && (tail != begin || offset == begin))
		rc = pread_full(disk, buf + (tail - begin), disk->align, tail);
	if (rc)
		return rc;
	if (iov)
		iov_gather(buf + (offset - begin), iov, niov);
	else
		memset(buf + (offset - begin), 0, len);
	rc = pwrite_full(disk->fd, buf, window, begin, rwf);
	/* A file whose size is no multiple of the alignment must not grow beyond the disk's size. */
	if (rc == 0 && !disk->is_device && end > disk->block.size_bytes &&
	    ftruncate(disk->fd, (off_t)disk->block.size_bytes))
		rc = -errno;
	return rc;
}

static int zero_by_writing(struct raw_disk *disk, uint64_t offset, uint64_t len)
{
	if (!len)
		return 0;
	uint32_t align = disk->align;
	uint64_t begin = align_up(offset, align), end = align_down(offset + len, align);
	if (begin >= end)
		return align > 1 ? write_unaligned(disk, NULL, 0, offset, len, 0) : -EINVAL;
	int rc = 0;
	if (begin > offset)
		rc = write_unaligned(disk, NULL, 0, offset, begin - offset, 0);
	if (rc == 0 && offset + len > end)
		rc = write_unaligned(disk, NULL, 0, end, offset + len - end, 0);
	if (rc)
		return rc;
	size_t piece = end - begin < ZERO_PIECE_BYTES ? end - begin : ZERO_PIECE_BYTES;
	void *mem = NULL;
	if (posix_memalign(&mem, 4096, piece))
		return -ENOMEM;
	CLEANUP_FREE char *zeroes = mem;
	memset(zeroes, 0, piece);
	while (rc == 0 && begin < end) {
		size_t n = end - begin < piece ? end - begin : piece;
		rc = pwrite_full(disk->fd, zeroes, n, begin, 0);
		begin += n;
	}
	return rc;
}

static int try_fallocate(struct raw_disk *disk, atomic_bool *can, int mode, uint64_t offset, uint64_t len)
{
	if (!atomic_load_explicit(can, memory_order_relaxed))
		return -EOPNOTSUPP;
	int rc;
	do
		rc = fallocate(disk->fd, mode | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)len);
	while (rc < 0 && errno == EINTR);
	if (rc == 0)
		return 0;
	if (errno == EOPNOTSUPP || errno == ENOSYS || errno == ENODEV) {
		atomic_store(can, false);
		return -EOPNOTSUPP;
	}
	return -errno;
}

/*
 * Zeroes whole logical blocks without sending them. Both calls guarantee zeroes afterwards, on block devices
 * too: there PUNCH_HOLE is a zero-out that may unmap and fails where it cannot be offloaded. BLKDISCARD
 * promises nothing of the sort, so it is not used.
 */
static int zero_by_kernel(struct raw_disk *disk, uint64_t offset, uint64_t len, bool unmap, bool no_fallback)
{
	int rc = -EOPNOTSUPP;
	if (unmap)
		rc = try_fallocate(disk, &disk->can_punch, FALLOC_FL_PUNCH_HOLE, offset, len);
	/* On a device ZERO_RANGE and BLKZEROOUT write the zeroes where the device cannot: slow, so not if the
	 * caller would rather know. */
	if (rc == -EOPNOTSUPP && !(disk->is_device && no_fallback))
		rc = try_fallocate(disk, &disk->can_zero_range, FALLOC_FL_ZERO_RANGE, offset, len);
	if (rc == -EOPNOTSUPP && disk->is_device && !no_fallback) {
		uint64_t range[2] = {offset, len};
		rc = ioctl(disk->fd, BLKZEROOUT, range) ? -EOPNOTSUPP : 0;
	}
	return rc;
}

static void remember_data(struct raw_disk *disk, uint64_t at, uint64_t end)
{
	SCOPE_LOCK(&disk->data_lock);
	disk->data_at = at;
	disk->data_end = end;
}

/* The end of the data that is known to be at pos; 0: none is. */
static uint64_t known_data_end(struct raw_disk *disk, uint64_t pos)
{
	SCOPE_LOCK(&disk->data_lock);
	return pos >= disk->data_at && pos < disk->data_end ? disk->data_end : 0;
}

static int run_zeroes(struct raw_disk *disk, const struct block_request *req)
{
	bool unmap = req->op == BLOCK_DISCARD || (req->flags & BLOCK_REQ_MAY_UNMAP);
	bool no_fallback = req->op == BLOCK_WRITE_ZEROES && (req->flags & BLOCK_REQ_NO_FALLBACK);
	uint64_t offset = req->offset_bytes, end = offset + req->len_bytes;
	uint64_t mid = align_up(offset, disk->zero_align), mid_end = align_down(end, disk->zero_align);
	int rc = 0;
	if (mid < mid_end) {
		rc = zero_by_kernel(disk, mid, mid_end - mid, unmap, no_fallback);
		if (rc == -EOPNOTSUPP && !no_fallback)
			rc = zero_by_writing(disk, mid, mid_end - mid);
		if (rc == 0 && mid > offset)
			rc = zero_by_writing(disk, offset, mid - offset);
		if (rc == 0 && end > mid_end)
			rc = zero_by_writing(disk, mid_end, end - mid_end);
	} else {
		rc = zero_by_writing(disk, offset, end - offset);
	}
	remember_data(disk, 0, 0);
	if (rc == 0 && (req->flags & BLOCK_REQ_FUA))
		rc = raw_flush_sync(disk);
	return rc;
}

int raw_flush_sync(struct raw_disk *disk)
{
	int rc;
	do
		rc = fdatasync(disk->fd);
	while (rc < 0 && errno == EINTR);
	return rc ? -errno : 0;
}

static int run_transfer(struct raw_op *op)
{
	struct block_request *req = op->req;
	int rwf = req->op == BLOCK_WRITE && (req->flags & BLOCK_REQ_FUA) ? RWF_DSYNC : 0;
	if (op->rmw)
		return write_unaligned(op->disk, op->iov, op->niov, op->offset_bytes, op->left_bytes, rwf);
	int result = 0;
	for (;;) {
		int niov = op->niov - op->first;
		if (niov > 1024)
			niov = 1024; /* IOV_MAX; the rest counts as a short transfer */
		ssize_t n = req->op == BLOCK_READ
				    ? preadv(op->disk->fd, op->iov + op->first, niov, (off_t)op->offset_bytes)
				    : pwritev2(op->disk->fd, op->iov + op->first, niov,
					       (off_t)op->offset_bytes, rwf);
		if (raw_op_advance(op, n < 0 ? -errno : n, &result))
			return result;
	}
}

void raw_op_run(struct raw_op *op)
{
	int rc;
	switch (op->req->op) {
	case BLOCK_READ:
	case BLOCK_WRITE:
		rc = run_transfer(op);
		break;
	case BLOCK_FLUSH:
		rc = raw_flush_sync(op->disk);
		break;
	default:
		rc = run_zeroes(op->disk, op->req);
	}
	raw_op_complete(op, rc);
}

/* What was cut off a file is no hole: reading it says what it is. */
static bool was_cut(const struct raw_disk *disk)
{
	struct stat st;
	return fstat(disk->fd, &st) || (uint64_t)st.st_size < disk->file_bytes;
}

int raw_extents(struct block *blk, uint64_t offset_bytes, uint64_t len_bytes, struct block_extent *ext,
		unsigned *n, struct error *err)
{
	struct raw_disk *disk = (struct raw_disk *)blk;
	uint64_t pos = offset_bytes, end = offset_bytes + len_bytes;
	unsigned count = 0;
	if (disk->is_device) {
		ext[0] = (struct block_extent){.len_bytes = len_bytes};
		*n = 1;
		return 0;
	}
	while (pos < end && count < *n) {
		uint64_t data_end = known_data_end(disk, pos);
		if (data_end) {
			data_end = data_end < end ? data_end : end;
			ext[count++] = (struct block_extent){.len_bytes = data_end - pos};
			pos = data_end;
			continue;
		}
		/* lseek moves a file position that nobody uses: all transfers name their offset. */
		off_t data = lseek(disk->fd, (off_t)pos, SEEK_DATA);
		uint64_t data_at;
		if (data >= 0)
			data_at = (uint64_t)data;
		else if (errno == ENXIO)
			data_at = was_cut(disk) ? pos : end; /* only a hole to the end of the file */
		else if (errno == EINVAL || errno == EOPNOTSUPP)
			data_at = pos; /* no sparse files here */
		else
			return error_errno(err, errno, "%s: SEEK_DATA at %llu", blk->label,
					   (unsigned long long)pos);
		if (data_at > pos) {
			if (data_at > end)
				data_at = end;
			ext[count++] =
				(struct block_extent){.len_bytes = data_at - pos, .hole = true, .zero = true};
			pos = data_at;
			continue;
		}
		off_t hole = lseek(disk->fd, (off_t)pos, SEEK_HOLE);
		uint64_t hole_at = hole > (off_t)pos ? (uint64_t)hole : end;
		remember_data(disk, pos, hole_at);
		if (hole_at > end)
			hole_at = end;
		ext[count++] = (struct block_extent){.len_bytes = hole_at - pos};
		pos = hole_at;
	}
	*n = count;
	return 0;
}
