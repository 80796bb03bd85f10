/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/storage-model/disk.h"

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/loop.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/clock.h"

#define LOOP_TRIES 50

/* The thread sanitizer does not see that the kernel orders a ring's submission before its completion. */
#if defined(__SANITIZE_THREAD__)
#define NO_RING true
#else
#define NO_RING false
#endif

const char *disk_kind_name(enum disk_kind kind)
{
	static const char *const names[] = {[DISK_RAW] = "raw",
					    [DISK_RAW_BUFFERED] = "buffered raw",
					    [DISK_LOOP] = "loop device",
					    [DISK_QCOW2] = "qcow2"};
	return names[kind];
}

const char *disk_kind_missing(enum disk_kind kind)
{
	if (kind == DISK_LOOP && access("/dev/loop-control", R_OK | W_OK))
		return "loop devices need root and /dev/loop-control";
	if (kind == DISK_QCOW2 && system("command -v qemu-nbd >/dev/null && command -v qemu-img >/dev/null"))
		return "qcow2 needs qemu-nbd and qemu-img";
	return NULL;
}

/* Goes away by itself with its last user, should the test be killed. */
static void attach_loop(struct disk *d)
{
	int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
	int file = open(d->file, O_RDWR | O_CLOEXEC);
	ck_assert_int_ge(control, 0);
	ck_assert_int_ge(file, 0);
	for (unsigned tries = 0; tries < LOOP_TRIES; tries++) {
		int n = ioctl(control, LOOP_CTL_GET_FREE);
		ck_assert_msg(n >= 0, "a free loop device: %s", strerror(errno));
		snprintf(d->path, sizeof d->path, "/dev/loop%d", n);
		int fd = open(d->path, O_RDWR | O_CLOEXEC);
		struct loop_config config = {.fd = (unsigned)file,
					     .block_size = 512,
					     .info.lo_flags = LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO};
		if (fd >= 0 && ioctl(fd, LOOP_CONFIGURE, &config) == 0) {
			d->loop_fd = fd;
			break;
		}
		/* Somebody else was faster. */
		if (fd >= 0)
			close(fd);
		clock_sleep_ms(10);
	}
	close(file);
	close(control);
	ck_assert_msg(d->loop_fd >= 0, "%s: cannot be attached: %s", d->path, strerror(errno));
}

void disk_create(struct disk *d, enum disk_kind kind, const char *dir, const char *name, uint64_t size_bytes,
		 uint32_t cluster_bytes)
{
	*d = (struct disk){.kind = kind, .dir = dir, .size_bytes = size_bytes, .loop_fd = -1};
	snprintf(d->file, sizeof d->file, "%s/%s", dir, name);
	snprintf(d->path, sizeof d->path, "%s", d->file);
	struct block_image_info like = {.format = kind == DISK_QCOW2 ? BLOCK_FORMAT_QCOW2 : BLOCK_FORMAT_RAW,
					.virtual_bytes = size_bytes,
					.cluster_bytes = cluster_bytes,
					.compat = "1.1"};
	int dirfd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	struct error err = ERROR_INIT;
	ck_assert_msg(block_image_create(dirfd, name, &like, &err) == 0, "%s", err.message);
	close(dirfd);
	if (kind == DISK_LOOP)
		attach_loop(d);
}

void disk_open(struct disk *d)
{
	struct block_open_options opt = {.format = d->kind == DISK_QCOW2 ? BLOCK_FORMAT_QCOW2
									 : BLOCK_FORMAT_RAW,
					 .direct = d->kind != DISK_RAW_BUFFERED,
					 .no_io_uring = NO_RING,
					 .run_dir = d->dir};
	struct error err = ERROR_INIT;
	ck_assert_msg(block_open(d->path, &opt, &d->block, &err) == 0, "%s", err.message);
	ck_assert_uint_eq(d->block->size_bytes, d->size_bytes);
}

void disk_close(struct disk *d)
{
	block_close(d->block);
	d->block = NULL;
}

static uint8_t *buffer(uint64_t len)
{
	void *mem = NULL;
	ck_assert_int_eq(posix_memalign(&mem, 4096, len), 0);
	return mem;
}

uint8_t *disk_content(struct disk *d)
{
	uint8_t *all = buffer(d->size_bytes);
	ck_assert_int_eq(block_pread(d->block, all, d->size_bytes, 0), 0);
	return all;
}

static void run(const char *const argv[])
{
	int status = -1;
	pid_t pid = fork();
	ck_assert_int_ge(pid, 0);
	if (pid == 0) {
		execvp(argv[0], (char *const *)argv);
		_exit(127);
	}
	ck_assert_int_eq(waitpid(pid, &status, 0), pid);
	ck_assert_msg(status == 0, "%s %s: status 0x%x", argv[0], argv[1], (unsigned)status);
}

uint8_t *disk_foreign_content(struct disk *d)
{
	char raw[160];
	snprintf(raw, sizeof raw, "%s", d->path);
	if (d->kind == DISK_QCOW2) {
		snprintf(raw, sizeof raw, "%s.raw", d->file);
		run((const char *const[]){"qemu-img", "check", "-q", "-f", "qcow2", d->file, NULL});
		run((const char *const[]){"qemu-img", "convert", "-f", "qcow2", "-O", "raw", d->file, raw,
					  NULL});
	}
	uint8_t *all = buffer(d->size_bytes);
	int fd = open(raw, O_RDONLY | O_CLOEXEC);
	ck_assert_int_ge(fd, 0);
	for (uint64_t at = 0; at < d->size_bytes;) {
		ssize_t n = pread(fd, all + at, d->size_bytes - at, (off_t)at);
		ck_assert_int_gt(n, 0);
		at += (uint64_t)n;
	}
	close(fd);
	if (d->kind == DISK_QCOW2)
		unlink(raw);
	return all;
}

void disk_remove(struct disk *d)
{
	if (d->loop_fd >= 0)
		close(d->loop_fd);
	unlink(d->file);
}
