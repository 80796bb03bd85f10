/* SPDX-License-Identifier: Apache-2.0 */
/* The pass between two qcow2 overlays of the same base: what is below is neither read nor sent. */
#include <check.h>
#include <ftw.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "tests/suite.h"
#include "tests/unit/mirror/rig.h"

#define SIZE	   (64 * MIB)
#define BASE_BYTES (32 * MIB)

static char dir[64], base[96];

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	return remove(path);
}

static void setup(void)
{
	strcpy(dir, "/tmp/mirror-backing.XXXXXX");
	ck_assert_ptr_nonnull(mkdtemp(dir));
	snprintf(base, sizeof base, "%s/base", dir);
	rig_make_file(base, SIZE);
	rig_fill(base, 0, BASE_BYTES, 1);
}

static void teardown(void)
{
	nftw(dir, remove_one, 8, FTW_DEPTH | FTW_PHYS);
}

static struct block *overlay(const char *name)
{
	struct error err = ERROR_INIT;
	struct block_image_info like = {.format = BLOCK_FORMAT_QCOW2,
					.virtual_bytes = SIZE,
					.backing_name = "base",
					.backing_format = BLOCK_FORMAT_RAW};
	char path[160];
	snprintf(path, sizeof path, "%s/%s", dir, name);
	int fd = open(dir, O_RDONLY | O_DIRECTORY);
	ck_assert_msg(block_image_create(fd, name, &like, &err) == 0, "%s", err.message);
	close(fd);
	const char *const below[] = {base};
	struct block_open_options opt = {
		.format = BLOCK_FORMAT_QCOW2, .label = name, .run_dir = dir, .backing = below, .nbacking = 1};
	struct block *blk = NULL;
	ck_assert_msg(block_open(path, &opt, &blk, &err) == 0, "%s", err.message);
	return blk;
}

static void expect_same(struct block *a, struct block *b)
{
	char *x = malloc(MIB), *y = malloc(MIB);
	for (uint64_t at = 0; at < SIZE; at += MIB) {
		ck_assert_int_eq(block_pread(a, x, MIB, at), 0);
		ck_assert_int_eq(block_pread(b, y, MIB, at), 0);
		ck_assert_msg(memcmp(x, y, MIB) == 0, "the disks differ in the MiB at %llu",
			      (unsigned long long)at);
	}
	free(x);
	free(y);
}

START_TEST(only_what_the_overlay_has_is_copied)
{
	struct error err = ERROR_INIT;
	struct block *local = overlay("local"), *remote = overlay("remote");
	char *buf = malloc(MIB);
	memset(buf, 0x5a, MIB);
	/* data over data, over nothing; part of a cluster; zeroes over data */
	ck_assert_int_eq(block_pwrite(local, buf, MIB, 3 * MIB), 0);
	ck_assert_int_eq(block_pwrite(local, buf, MIB, BASE_BYTES + 8 * MIB), 0);
	ck_assert_int_eq(block_pwrite(local, buf, 4096, 10 * MIB + 4096), 0);
	ck_assert_int_eq(block_discard(local, 20 * MIB, 2 * MIB), 0);
	struct mirror *m;
	struct block *top;
	ck_assert_msg(mirror_create(local, &m, &top, &err) == 0, "%s", err.message);
	struct faulty *wire = faulty_create(remote, "remote");
	struct mirror_options opt = {.remote = &wire->block,
				     .remote_has_backing = true,
				     .chunk_bytes = 64 * KIB,
				     .write_grace_ms = PATIENT_MS};
	ck_assert_msg(mirror_start(m, &opt, &err) == 0, "%s", err.message);
	/* a guest writes meanwhile, less than a cluster */
	ck_assert_int_eq(block_pwrite(top, buf, 512, 25 * MIB), 0);
	ck_assert_msg(mirror_wait_synced(m, 30000, &err) == 0, "%s", err.message);
	ck_assert_int_eq(block_pwrite(top, buf, 512, 26 * MIB), 0);
	struct mirror_stats st;
	mirror_stats(m, &st);
	/* two MiB, two clusters of parts at most */
	ck_assert_uint_ge(st.data_bytes_copied, 2 * MIB + 64 * KIB);
	ck_assert_uint_le(st.data_bytes_copied, 2 * MIB + 128 * KIB);
	ck_assert_uint_eq(st.zero_bytes_copied, 2 * MIB);
	expect_same(local, remote);
	mirror_stop(m);
	mirror_free(m);
	block_close(local);
	char path[160];
	struct stat image;
	snprintf(path, sizeof path, "%s/remote", dir);
	ck_assert_int_eq(stat(path, &image), 0);
	ck_assert_uint_lt((uint64_t)image.st_blocks * 512, 4 * MIB);
	free(buf);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("backing");
	TCase *t = tcase_create("backing");
	tcase_add_checked_fixture(t, setup, teardown);
	tcase_set_timeout(t, 60);
	tcase_add_test(t, only_what_the_overlay_has_is_copied);
	suite_add_tcase(s, t);
	return suite_run(s);
}
