/* SPDX-License-Identifier: Apache-2.0 */
/* interface: what opens and creates disks */
#ifndef BLOCK_OPEN_H
#define BLOCK_OPEN_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/error.h"
#include "block/block.h"

enum block_format { BLOCK_FORMAT_RAW, BLOCK_FORMAT_QCOW2 };

const char *block_format_name(enum block_format format);
/* 0, or -EINVAL for an unknown name. */
int block_format_parse(const char *name, enum block_format *format);

#define BLOCK_BACKING_MAX	 8
#define BLOCK_BACKING_NAME_BYTES 1024

struct block_open_options {
	enum block_format format;
	bool read_only;
	bool direct;	     /* O_DIRECT where the file system has it */
	bool no_io_uring;    /* the thread-pool fallback (also by environment SNM_NO_IO_URING=1) */
	const char *label;   /* for messages; NULL: the path */
	const char *run_dir; /* qcow2: folder for qemu-nbd's private socket; needed for qcow2 */
	/* qcow2: what is below it, nearest first, each opened read-only. Their formats are what the image
	 * above says. */
	const char *const *backing;
	unsigned nbacking;
	/* raw: another host may use it still. Without a lock, and writes are refused (-ESHUTDOWN), until
	 * block_share_lock and block_share_unfence. */
	bool shared;
	bool as_backing;     /* raw, read_only: others may have it open as a backing file */
	uint64_t size_bytes; /* raw block device: only so much of its beginning is the disk; 0 = all */
};

/*
 * Opens a regular file or block device. Takes an exclusive OFD lock on it (shared when read_only) so that two
 * VMs never open one image; -EBUSY names the path. qcow2 starts a qemu-nbd child (PR_SET_PDEATHSIG, and in
 * this process's cgroup) on a private Unix socket and drives it through the NBD client; the child ends at
 * close. A qcow2 image with an external data file, or a backing file that `backing` does not name, is
 * refused (-ENOTSUP): no name that an image contains is ever followed. A block device that is opened for
 * writing must not be in use otherwise (mounted, swap). May block; any thread.
 */
int block_open(const char *path, const struct block_open_options *opt, struct block **out, struct error *err);

/*
 * A raw disk that goes from one process to another, perhaps of another host, while both have it open. Fence
 * and unlock with nothing in flight; a disk that was locked by its open may be unlocked and locked again.
 * Others than raw disks: -ENOTSUP, and nothing.
 */
void block_share_fence(struct block *blk); /* writes, zeroes and discards fail from now on: -ESHUTDOWN */
void block_share_unfence(struct block *blk);
int block_share_lock(struct block *blk, struct error *err); /* -EBUSY: somebody else has it */
void block_share_unlock(struct block *blk);
/* Whether it is read and written with O_DIRECT. */
bool block_is_direct(const struct block *blk);

/* What qemu-img or fstat say of an image. */
struct block_image_info {
	enum block_format format;
	uint64_t virtual_bytes;
	uint64_t allocated_bytes; /* st_blocks * 512 of the file; 0 for a block device */
	uint32_t cluster_bytes;	  /* qcow2 only, as the four that follow */
	char compat[8];		  /* "0.10" or "1.1" */
	uint32_t refcount_bits;
	bool lazy_refcounts;
	bool extended_l2;
	bool zstd;				     /* of compressed clusters */
	bool has_backing;			     /* or an external data file */
	char backing_name[BLOCK_BACKING_NAME_BYTES]; /* as the image says, not to be trusted; "" = none */
	enum block_format backing_format;
	bool is_block_device;
	uint64_t file_bytes;	/* length of the file */
	uint64_t inode, device; /* of the file */
};

/* Runs qemu-img info/check for qcow2 (bounded in time). A truncated or corrupt qcow2 is -EINVAL with the
 * reason. Works while the image is in use (-U) when in_use is set. */
int block_image_info(const char *path, enum block_format format, bool in_use, struct block_image_info *info,
		     struct error *err);

/*
 * Creates an image with O_EXCL (openat(dirfd, name)), size virtual_bytes, shape as in `like`, mode 0600, and
 * syncs file and folder entry. raw: sparse. qcow2: qemu-img create with cluster size, compat, lazy refcounts,
 * extended L2, refcount width and compression type of `like`, and its backing_name, as text, if there is one
 * (nobody looks whether that file is there). -EEXIST if the name is there. Nothing stays after a failure.
 */
int block_image_create(int dirfd, const char *name, const struct block_image_info *like, struct error *err);

/*
 * SHA-256 over the SHA-256 of each 1 MiB of what the disk reads as: two files with the same content have the
 * same, whatever their format. Holes are not read. stop, if not NULL, ends it with -ECANCELED once it returns
 * true.
 */
#define BLOCK_CONTENT_HEX_CHARS 64
int block_content_hash(struct block *blk, bool (*stop)(void *opaque), void *opaque,
		       char hex[BLOCK_CONTENT_HEX_CHARS + 1], struct error *err);

#endif
