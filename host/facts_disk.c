/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "host/facts.h"

#define CHUNK_BYTES  (1u << 20)
#define TOTAL_BYTES  (64u << 20)
#define TIME_MS	     500
#define ROOM_BYTES   (UINT64_C(512) << 20)
#define SMALL_BYTES  4096
#define SMALL_WRITES 5
#define LOCK_NAME    "check.lock"

static int open_file(const char *folder, int flags, struct error *err)
{
	int fd = open(folder, O_TMPFILE | O_RDWR | O_CLOEXEC | flags, 0600);
	if (fd < 0 && errno == EINVAL)
		return error_set(err, EOPNOTSUPP, "%s: its file system has no O_DIRECT", folder);
	return fd < 0 ? error_errno(err, errno, "%s", folder) : fd;
}

/* What write_much wrote; O_DIRECT, so from the medium. */
static int read_again(int fd, void *buf, uint64_t *bytes_per_s, struct error *err)
{
	uint64_t begin = clock_now_us(), done = 0, until = begin + TIME_MS * 1000;
	while (done < TOTAL_BYTES && clock_now_us() < until) {
		ssize_t n = pread(fd, buf, CHUNK_BYTES, (off_t)done);
		if (n < 0)
			return error_errno(err, errno, "a trial read of %u bytes", CHUNK_BYTES);
		if (!n)
			break;
		done += (uint64_t)n;
	}
	*bytes_per_s = done * 1000000 / (clock_now_us() - begin + 1);
	return 0;
}

static int write_much(int fd, const void *buf, uint64_t *bytes_per_s, struct error *err)
{
	uint64_t begin = clock_now_us(), done = 0, until = begin + TIME_MS * 1000;
	while (done < TOTAL_BYTES && clock_now_us() < until) {
		if (pwrite(fd, buf, CHUNK_BYTES, (off_t)done) != CHUNK_BYTES)
			return error_errno(err, errno ? errno : EIO, "a trial write of %u bytes",
					   CHUNK_BYTES);
		done += CHUNK_BYTES;
	}
	if (fdatasync(fd))
		return error_errno(err, errno, "a trial write");
	*bytes_per_s = done * 1000000 / (clock_now_us() - begin + 1);
	return 0;
}

/* The median of a few: one may hit the file system's own journal. */
static int write_small(const char *folder, const void *buf, uint64_t *sync_us, struct error *err)
{
	CLEANUP_FD int fd = open_file(folder, O_DIRECT | O_DSYNC, err);
	if (fd < 0)
		return fd;
	uint64_t us[SMALL_WRITES];
	for (unsigned i = 0; i < SMALL_WRITES; i++) {
		uint64_t begin = clock_now_us();
		if (pwrite(fd, buf, SMALL_BYTES, 0) != SMALL_BYTES)
			return error_errno(err, errno ? errno : EIO, "a trial write of %u bytes",
					   SMALL_BYTES);
		uint64_t took = clock_now_us() - begin;
		unsigned at = i;
		for (; at && us[at - 1] > took; at--)
			us[at] = us[at - 1];
		us[at] = took;
	}
	*sync_us = us[SMALL_WRITES / 2];
	return 0;
}

int facts_disk_speed(const char *folder, struct disk_speed *out, struct error *err)
{
	char path[PATH_MAX + 16];
	struct statvfs fs;
	*out = (struct disk_speed){0};
	if (statvfs(folder, &fs))
		return error_errno(err, errno, "%s", folder);
	if ((uint64_t)fs.f_bavail * fs.f_frsize < ROOM_BYTES)
		return error_set(err, ENOSPC, "%s: too little room for a trial", folder);
	snprintf(path, sizeof path, "%s/" LOCK_NAME, folder);
	CLEANUP_FD int lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (lock < 0)
		return error_errno(err, errno, "%s", path);
	if (flock(lock, LOCK_EX | LOCK_NB))
		return error_set(err, EBUSY, "%s: another trial is under way", folder);
	CLEANUP_FD int fd = open_file(folder, O_DIRECT, err);
	if (fd < 0)
		return fd;
	CLEANUP_FREE void *buf = aligned_alloc(SMALL_BYTES, CHUNK_BYTES);
	if (!buf)
		return error_errno(err, ENOMEM, "trial");
	/* no zeroes: some storage does not write those */
	uint32_t x = 0x9e3779b9u;
	for (size_t i = 0; i < CHUNK_BYTES / sizeof x; i++)
		((uint32_t *)buf)[i] = x = x * 1664525u + 1013904223u;
	int rc = write_much(fd, buf, &out->write_bytes_per_s, err);
	if (!rc)
		rc = write_small(folder, buf, &out->sync_us, err);
	return rc ? rc : read_again(fd, buf, &out->read_bytes_per_s, err);
}
