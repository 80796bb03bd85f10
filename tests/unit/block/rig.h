/* SPDX-License-Identifier: Apache-2.0 */
/* A private folder and a check on what a disk holds, for the block tests. */
#ifndef TESTS_BLOCK_RIG_H
#define TESTS_BLOCK_RIG_H

#include <check.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "block/block.h"
#include "block/open.h"

static char rig_dir[64];

static inline int rig_remove(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	return remove(path);
}

/* On the file system that holds the build: /tmp may be a tmpfs, which has no O_DIRECT. */
static inline void rig_setup(void)
{
	strcpy(rig_dir, "build/tmp.unit.XXXXXX");
	if (!mkdtemp(rig_dir)) {
		strcpy(rig_dir, "/var/tmp/snm-unit.XXXXXX");
		ck_assert_ptr_nonnull(mkdtemp(rig_dir));
	}
}

static inline void rig_teardown(void)
{
	nftw(rig_dir, rig_remove, 8, FTW_DEPTH | FTW_PHYS);
}

static inline const char *rig_path(const char *name)
{
	static char path[4][128];
	static unsigned turn;
	char *p = path[turn++ % 4];
	snprintf(p, sizeof path[0], "%s/%s", rig_dir, name);
	return p;
}

static inline void rig_file(const char *name, uint64_t size)
{
	int fd = open(rig_path(name), O_CREAT | O_EXCL | O_RDWR, 0600);
	ck_assert_int_ge(fd, 0);
	ck_assert_int_eq(ftruncate(fd, (off_t)size), 0);
	close(fd);
}

static inline uint64_t rig_allocated(const char *path)
{
	struct stat st;
	ck_assert_int_eq(stat(path, &st), 0);
	return (uint64_t)st.st_blocks * 512;
}

#define ck_ok(call, err) ck_assert_msg((call) == 0, "%s: %s", #call, (err).message)

static inline void rig_fill(struct block *blk, int byte, uint64_t len, uint64_t offset)
{
	char *buf = malloc(len);
	memset(buf, byte, len);
	ck_assert_int_eq(block_pwrite(blk, buf, len, offset), 0);
	free(buf);
}

static inline void rig_expect(struct block *blk, int byte, uint64_t len, uint64_t offset)
{
	unsigned char *buf = malloc(len);
	memset(buf, ~byte, len);
	ck_assert_int_eq(block_pread(blk, buf, len, offset), 0);
	/* An assertion that holds costs a system call: one for all bytes. */
	uint64_t i = 0;
	while (i < len && buf[i] == (unsigned char)byte)
		i++;
	ck_assert_msg(i == len, "byte at %llu is 0x%02x, not 0x%02x", (unsigned long long)(offset + i),
		      i < len ? buf[i] : 0, (unsigned char)byte);
	free(buf);
}

#endif
