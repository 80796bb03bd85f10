/* SPDX-License-Identifier: Apache-2.0 */
#include "block/raw.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"

#define SECTOR_BYTES	  512
#define POOL_THREADS	  8 /* when the pool is the engine */
#define POOL_SIDE_THREADS 2 /* beside a ring: zeroes, discards and read-modify-write */

/* Far beyond QEMU's lock bytes (100 to 300 and a few), which its own processes need on a qcow2 of ours. */
#define LOCK_OFFSET INT64_C(0x4000000000000000)

/* How long an open waits for a lock. A ring holds its file a moment longer than the process that was killed.
 */
#define LOCK_WAIT_MS 500

static struct flock lock_range(enum block_format format, short type)
{
	return (struct flock){
		.l_type = type,
		.l_whence = SEEK_SET,
		.l_start = format == BLOCK_FORMAT_RAW ? 0 : LOCK_OFFSET,
		.l_len = format == BLOCK_FORMAT_RAW ? 0 : 1,
	};
}

int block_lock_fd(int fd, const char *path, enum block_format format, bool read_only, struct error *err)
{
	uint64_t deadline = clock_now_ms() + LOCK_WAIT_MS;
	for (;;) {
		struct flock lock = lock_range(format, read_only ? F_RDLCK : F_WRLCK);
		if (fcntl(fd, F_OFD_SETLK, &lock) == 0)
			return 0;
		if (errno != EAGAIN && errno != EACCES)
			return error_errno(err, errno, "%s: lock", path);
		if (clock_now_ms() >= deadline)
			return error_set(err, EBUSY, "%s: in use by another process (locked)", path);
		clock_sleep_ms(20);
	}
}

void block_unlock_fd(int fd, enum block_format format)
{
	struct flock lock = lock_range(format, F_UNLCK);
	fcntl(fd, F_OFD_SETLK, &lock);
}

/* An idle disk answers a small transfer sooner than two threads are woken. Beside others it would wait in a
 * row with them, and its submitter's next requests with it. */
#define AT_ONCE_BYTES 16384u
static bool at_once(const struct block_request *req, unsigned others)
{
	return (req->flags & (BLOCK_REQ_MAY_WAIT | BLOCK_REQ_FUA)) == BLOCK_REQ_MAY_WAIT && !others &&
	       req->len_bytes <= AT_ONCE_BYTES && (req->op == BLOCK_READ || req->op == BLOCK_WRITE);
}

static int raw_submit(struct block *blk, struct block_request *req)
{
	struct raw_disk *disk = (struct raw_disk *)blk;
	struct raw_op *op;
	bool changes = req->op != BLOCK_READ && req->op != BLOCK_FLUSH;
	if (changes && atomic_load(&disk->fenced))
		return -ESHUTDOWN;
	int rc = raw_op_create(disk, req, &op);
	if (rc)
		return rc;
	unsigned others = atomic_fetch_add(&disk->inflight, 1);
	bool pool_only = op->rmw || req->op == BLOCK_WRITE_ZEROES || req->op == BLOCK_DISCARD;
	if (!pool_only && at_once(req, others))
		raw_op_run(op);
	else if (disk->ring && !pool_only)
		raw_uring_submit(disk->ring, op);
	else
		raw_pool_submit(disk->pool, op);
	return 0;
}

static void raw_drop_cache(struct block *blk, uint64_t offset_bytes, uint64_t len_bytes)
{
	struct raw_disk *disk = (struct raw_disk *)blk;
	posix_fadvise(disk->fd, (off_t)offset_bytes, (off_t)len_bytes, POSIX_FADV_DONTNEED);
}

static void raw_close(struct block *blk)
{
	struct raw_disk *disk = (struct raw_disk *)blk;
	pthread_mutex_lock(&disk->idle_lock);
	while (atomic_load(&disk->inflight))
		pthread_cond_wait(&disk->idle_cond, &disk->idle_lock);
	pthread_mutex_unlock(&disk->idle_lock);
	raw_uring_free(disk->ring);
	raw_pool_free(disk->pool);
	/* The kernel tears a ring down in its own time, and its registered file with it. */
	block_unlock_fd(disk->fd, disk->lock_as);
	close(disk->fd);
	pthread_mutex_destroy(&disk->rmw_lock);
	pthread_mutex_destroy(&disk->idle_lock);
	pthread_mutex_destroy(&disk->data_lock);
	pthread_cond_destroy(&disk->idle_cond);
	free(disk);
}

static const struct block_ops raw_ops = {
	.name = "raw",
	.submit = raw_submit,
	.extents = raw_extents,
	.drop_cache = raw_drop_cache,
	.close = raw_close,
};

static struct raw_disk *raw_of(const struct block *blk)
{
	return blk->ops == &raw_ops ? (struct raw_disk *)(uintptr_t)blk : NULL;
}

void block_share_fence(struct block *blk)
{
	struct raw_disk *disk = raw_of(blk);
	if (disk)
		atomic_store(&disk->fenced, true);
}

void block_share_unfence(struct block *blk)
{
	struct raw_disk *disk = raw_of(blk);
	if (disk)
		atomic_store(&disk->fenced, false);
}

int block_share_lock(struct block *blk, struct error *err)
{
	struct raw_disk *disk = raw_of(blk);
	if (!disk)
		return error_set(err, ENOTSUP, "%s: not a raw disk", blk->label);
	return block_lock_fd(disk->fd, blk->label, disk->lock_as, blk->limits.read_only, err);
}

void block_share_unlock(struct block *blk)
{
	struct raw_disk *disk = raw_of(blk);
	if (disk)
		block_unlock_fd(disk->fd, disk->lock_as);
}

bool block_is_direct(const struct block *blk)
{
	const struct raw_disk *disk = raw_of(blk);
	return disk && disk->direct;
}

static uint32_t direct_alignment(int fd, uint32_t device_block)
{
	uint32_t align = device_block > 1 ? device_block : 4096;
#ifdef STATX_DIOALIGN
	struct statx stx;
	if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &stx) == 0 && (stx.stx_mask & STATX_DIOALIGN) &&
	    stx.stx_dio_offset_align) {
		align = stx.stx_dio_offset_align;
		if (stx.stx_dio_mem_align > align)
			align = stx.stx_dio_mem_align;
	}
#endif
	return align;
}

static int open_fd(const char *path, const struct block_open_options *opt, bool *direct, struct error *err)
{
	int flags = (opt->read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC | O_NONBLOCK | O_NOCTTY;
	struct stat st;
	/* Of a block device the kernel knows whether it is mounted or held otherwise. */
	if (!opt->read_only && stat(path, &st) == 0 && S_ISBLK(st.st_mode))
		flags |= O_EXCL;
	int fd = -1;
	*direct = opt->direct;
	if (opt->direct) {
		fd = open(path, flags | O_DIRECT);
		if (fd < 0 && errno == EINVAL)
			*direct = false; /* no O_DIRECT on this file system */
	}
	if (!*direct)
		fd = open(path, flags);
	if (fd < 0 && errno == EBUSY)
		return error_set(err, EBUSY, "%s: the block device is in use (mounted, or held by another)",
				 path);
	if (fd < 0)
		return error_errno(err, errno, "%s: open", path);
	return fd;
}

int raw_open(const char *path, const struct block_open_options *opt, struct block **out, struct error *err)
{
	bool direct;
	CLEANUP_FD int fd = open_fd(path, opt, &direct, err);
	if (fd < 0)
		return fd;
	struct stat st;
	if (fstat(fd, &st))
		return error_errno(err, errno, "%s: stat", path);
	uint64_t size = 0;
	uint32_t device_block = 1;
	if (S_ISREG(st.st_mode)) {
		size = ((uint64_t)st.st_size + SECTOR_BYTES - 1) / SECTOR_BYTES * SECTOR_BYTES;
	} else if (S_ISBLK(st.st_mode)) {
		int block_bytes = 0, read_only = 0;
		if (ioctl(fd, BLKGETSIZE64, &size) || ioctl(fd, BLKSSZGET, &block_bytes))
			return error_errno(err, errno, "%s: size of the block device", path);
		if (!opt->read_only && ioctl(fd, BLKROGET, &read_only) == 0 && read_only)
			return error_set(err, EROFS, "%s: the block device is read-only", path);
		if (block_bytes >= SECTOR_BYTES && block_bytes <= 65536 && !(block_bytes & (block_bytes - 1)))
			device_block = (uint32_t)block_bytes;
		if (opt->size_bytes > size)
			return error_set(err, ENOSPC, "%s: the block device has %llu bytes, the disk %llu",
					 path, (unsigned long long)size, (unsigned long long)opt->size_bytes);
		if (opt->size_bytes)
			size = opt->size_bytes;
	} else {
		return error_set(err, EINVAL, "%s: neither a regular file nor a block device", path);
	}
	/* O_NONBLOCK was for the open of a FIFO or tty by mistake; io_uring would take it for no waiting. */
	int fl = fcntl(fd, F_GETFL);
	if (fl < 0 || fcntl(fd, F_SETFL, fl & ~O_NONBLOCK))
		return error_errno(err, errno, "%s: fcntl", path);
	enum block_format lock_as = opt->read_only && opt->as_backing ? BLOCK_FORMAT_QCOW2 : BLOCK_FORMAT_RAW;
	int rc = opt->shared ? 0 : block_lock_fd(fd, path, lock_as, opt->read_only, err);
	if (rc)
		return rc;

	struct raw_disk *disk = calloc(1, sizeof *disk);
	if (!disk)
		return error_errno(err, ENOMEM, "%s", path);
	disk->block.ops = &raw_ops;
	disk->block.size_bytes = size;
	disk->block.limits = (struct block_limits){
		.request_alignment = 1, .read_only = opt->read_only, .can_multi_conn = true};
	snprintf(disk->block.label, sizeof disk->block.label, "%s", opt->label ? opt->label : path);
	disk->fd = steal_fd(&fd);
	disk->lock_as = lock_as;
	disk->is_device = S_ISBLK(st.st_mode);
	disk->file_bytes = disk->is_device ? 0 : (uint64_t)st.st_size;
	disk->direct = direct;
	atomic_init(&disk->fenced, opt->shared);
	disk->align = direct ? direct_alignment(disk->fd, device_block) : 1;
	disk->zero_align = device_block;
	atomic_init(&disk->can_punch, true);
	atomic_init(&disk->can_zero_range, true);
	atomic_init(&disk->inflight, 0);
	pthread_mutex_init(&disk->rmw_lock, NULL);
	pthread_mutex_init(&disk->idle_lock, NULL);
	pthread_mutex_init(&disk->data_lock, NULL);
	pthread_cond_init(&disk->idle_cond, NULL);

	const char *no_ring = getenv("SNM_NO_IO_URING");
	bool want_ring = !opt->no_io_uring && !(no_ring && strcmp(no_ring, "0") != 0);
	struct error ring_err = ERROR_INIT;
	if (want_ring && raw_uring_create(disk, &disk->ring, &ring_err))
		log_info("%s: no io_uring (%s): using threads", disk->block.label, ring_err.message);
	rc = raw_pool_create(disk->ring ? POOL_SIDE_THREADS : POOL_THREADS, &disk->pool, err);
	if (rc) {
		raw_close(&disk->block);
		return error_prefix(err, "%s", path);
	}
	*out = &disk->block;
	return 0;
}
