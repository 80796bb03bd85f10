/* SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "host/fsutil.h"
#include "host/ini.h"
#include "host/partial.h"
#include "host/registry.h"
#include "tests/suite.h"

#define UUID   "0b8a4c1e-7d2f-4a36-9c55-3f1e2d4c5b6a"
#define UUID_2 "1b8a4c1e-7d2f-4a36-9c55-3f1e2d4c5b6a"

static char dir[128];
static struct host_config cfg;
static struct error err;

static void setup(void)
{
	snprintf(dir, sizeof dir, "%s/test_partial.XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/var/tmp");
	ck_assert(mkdtemp(dir) != NULL);
	memset(&cfg, 0, sizeof cfg);
	strcpy(cfg.name, "h1");
	snprintf(cfg.state_dir, sizeof cfg.state_dir, "%s/state", dir);
	err = ERROR_INIT;
	ck_assert_int_eq(fs_make_dirs(cfg.state_dir, &err), 0);
	ck_assert_msg(registry_prepare(&cfg, &err) == 0, "%s", err.message);
}

static void teardown(void)
{
	ck_assert_msg(fs_remove_tree(dir, &err) == 0, "%s", err.message);
}

static const char *at(const char *rel)
{
	static char path[4][600];
	static unsigned n;
	n = (n + 1) % 4;
	snprintf(path[n], sizeof path[n], "%s/state/%s", dir, rel);
	return path[n];
}

static void put(const char *rel, size_t bytes)
{
	FILE *f = fopen(at(rel), "w");
	ck_assert_msg(f != NULL, "%s", at(rel));
	for (size_t i = 0; i < bytes; i++)
		fputc('x', f);
	fclose(f);
}

static bool there(const char *rel)
{
	struct stat st;
	return lstat(at(rel), &st) == 0;
}

static struct partial sample(const char *uuid)
{
	struct partial p = {.keep_s = 3600, .ndisks = 1};
	strcpy(p.uuid, uuid);
	strcpy(p.name, "vm1");
	strcpy(p.peer, "hosta");
	p.disks[0] =
		(struct partial_disk){.virtual_bytes = 8192, .cluster_bytes = 65536, .lazy_refcounts = true};
	strcpy(p.disks[0].file, "root.qcow2");
	strcpy(p.disks[0].format, "qcow2");
	strcpy(p.disks[0].compat, "1.1");
	return p;
}

/* incoming/UUID-EPOCH as a dead arrival leaves it */
static void make_arrival(const struct partial *p, unsigned epoch, char rel[REGISTRY_FOLDER_BYTES])
{
	char path[400];
	registry_incoming_rel(p->uuid, epoch, rel);
	ck_assert_int_eq(mkdir(at(rel), 0700), 0);
	static const char *const names[] = {"root.qcow2", "kernel", "vm.ini", "files.json"};
	for (size_t i = 0; i < ARRAY_SIZE(names); i++) {
		snprintf(path, sizeof path, "%s/%s", rel, names[i]);
		put(path, 5000);
	}
	snprintf(path, sizeof path, "%s/run", rel);
	ck_assert_int_eq(mkdir(at(path), 0700), 0);
	int fd = open(at(rel), O_RDONLY | O_DIRECTORY);
	ck_assert_msg(partial_note(fd, p, &err) == 0, "%s", err.message);
	close(fd);
}

START_TEST(images_are_kept_and_nothing_that_could_start)
{
	char rel[REGISTRY_FOLDER_BYTES];
	struct partial p = sample(UUID), got;
	bool kept = false;
	make_arrival(&p, 7, rel);
	int64_t before = (int64_t)time(NULL);
	ck_assert_msg(partial_end_arrival(&cfg, rel, &kept, &err) == 0, "%s", err.message);
	ck_assert(kept);
	ck_assert(!there(rel));
	ck_assert(there("partial/" UUID "/root.qcow2"));
	ck_assert(!there("partial/" UUID "/vm.ini") && !there("partial/" UUID "/kernel") &&
		  !there("partial/" UUID "/files.json") && !there("partial/" UUID "/run"));
	ck_assert_msg(partial_load(&cfg, UUID, &got, &err) == 0, "%s", err.message);
	ck_assert_str_eq(got.name, "vm1");
	ck_assert_str_eq(got.peer, "hosta");
	ck_assert_uint_eq(got.keep_s, 3600);
	ck_assert_uint_eq(got.ndisks, 1);
	ck_assert_str_eq(got.disks[0].file, "root.qcow2");
	ck_assert(got.disks[0].lazy_refcounts && !got.disks[0].extended_l2);
	ck_assert_uint_eq(got.disks[0].virtual_bytes, 8192);
	ck_assert(got.since_s >= before && got.since_s <= (int64_t)time(NULL));
	ck_assert_uint_ge(got.allocated_bytes, 5000);
	/* once more, as a daemon does that was killed after the rename */
	ck_assert_int_eq(partial_end_arrival(&cfg, rel, &kept, &err), 0);
	ck_assert(!kept);
	ck_assert(there("partial/" UUID "/root.qcow2"));
}
END_TEST

START_TEST(a_later_partial_replaces_the_former)
{
	char rel[REGISTRY_FOLDER_BYTES];
	struct partial p = sample(UUID);
	bool kept;
	make_arrival(&p, 7, rel);
	ck_assert_int_eq(partial_end_arrival(&cfg, rel, &kept, &err), 0);
	put("partial/" UUID "/mark", 1);
	make_arrival(&p, 8, rel);
	ck_assert_int_eq(partial_end_arrival(&cfg, rel, &kept, &err), 0);
	ck_assert(kept && !there("partial/" UUID "/mark") && there("partial/" UUID "/root.qcow2"));
}
END_TEST

START_TEST(without_a_note_all_of_it_goes)
{
	static const char *const spoilt[] = {NULL, "no json", "{}", "{\"version\":2}"};
	char rel[REGISTRY_FOLDER_BYTES], path[400];
	struct partial p = sample(UUID);
	bool kept;
	for (size_t i = 0; i < ARRAY_SIZE(spoilt); i++) {
		make_arrival(&p, 7, rel);
		snprintf(path, sizeof path, "%s/partial.json", rel);
		unlink(at(path));
		if (spoilt[i]) {
			FILE *f = fopen(at(path), "w");
			fputs(spoilt[i], f);
			fclose(f);
		}
		ck_assert_int_eq(partial_end_arrival(&cfg, rel, &kept, &err), 0);
		ck_assert(!kept && !there(rel) && !there("partial/" UUID));
	}
	p.keep_s = 0;
	make_arrival(&p, 7, rel);
	ck_assert_int_eq(partial_end_arrival(&cfg, rel, &kept, &err), 0);
	ck_assert(!kept && !there(rel) && !there("partial/" UUID));
	/* a note of another VM */
	p = sample(UUID_2);
	make_arrival(&p, 7, rel);
	char other[REGISTRY_FOLDER_BYTES];
	registry_incoming_rel(UUID, 7, other);
	ck_assert_int_eq(rename(at(rel), at(other)), 0);
	ck_assert_int_eq(partial_end_arrival(&cfg, other, &kept, &err), 0);
	ck_assert(!kept && !there(other) && !there("partial/" UUID) && !there("partial/" UUID_2));
	ck_assert_int_lt(partial_end_arrival(&cfg, "vms/vm1", &kept, &err), 0);
}
END_TEST

START_TEST(a_link_in_place_of_an_image_is_not_kept)
{
	char rel[REGISTRY_FOLDER_BYTES], path[400];
	struct partial p = sample(UUID);
	bool kept;
	make_arrival(&p, 7, rel);
	snprintf(path, sizeof path, "%s/root.qcow2", rel);
	unlink(at(path));
	ck_assert_int_eq(symlink("/etc/passwd", at(path)), 0);
	ck_assert_int_eq(partial_end_arrival(&cfg, rel, &kept, &err), 0);
	ck_assert(!kept && !there(rel) && !there("partial/" UUID));
}
END_TEST

START_TEST(taken_up_it_is_an_arrival_again)
{
	char rel[REGISTRY_FOLDER_BYTES], next[REGISTRY_FOLDER_BYTES], path[400];
	struct partial p = sample(UUID);
	bool kept;
	make_arrival(&p, 7, rel);
	ck_assert_int_eq(partial_end_arrival(&cfg, rel, &kept, &err), 0);
	registry_incoming_rel(UUID, 8, next);
	ck_assert_msg(partial_take(&cfg, UUID, next, &err) == 0, "%s", err.message);
	ck_assert(!there("partial/" UUID));
	snprintf(path, sizeof path, "%s/root.qcow2", next);
	ck_assert(there(path));
	ck_assert_int_eq(partial_take(&cfg, UUID, next, &err), -ENOENT);
	ck_assert_int_eq(partial_load(&cfg, UUID, &p, &err), -ENOENT);
	ck_assert_int_lt(partial_take(&cfg, UUID, "vms/vm1", &err), 0);
	/* and once it has become the VM, nothing speaks of a partial any more */
	ck_assert_msg(registry_publish(&cfg, next, "vm1", &err) == 0, "%s", err.message);
	ck_assert(there("vms/vm1/root.qcow2") && !there("vms/vm1/partial.json"));
}
END_TEST

START_TEST(what_has_expired_is_swept)
{
	char rel[REGISTRY_FOLDER_BYTES];
	struct partial p = sample(UUID), old = sample(UUID_2);
	bool kept;
	make_arrival(&p, 7, rel);
	ck_assert_int_eq(partial_end_arrival(&cfg, rel, &kept, &err), 0);
	make_arrival(&old, 7, rel);
	ck_assert_int_eq(partial_end_arrival(&cfg, rel, &kept, &err), 0);
	int fd = open(at("partial/" UUID_2), O_RDONLY | O_DIRECTORY);
	old.since_s = (int64_t)time(NULL) - 3600;
	ck_assert_int_eq(partial_note(fd, &old, &err), 0);
	close(fd);
	/* interrupted removals, and what nobody can read */
	ck_assert_int_eq(mkdir(at("partial/.gone-12"), 0700), 0);
	put("partial/.gone-12/root.qcow2", 1);
	put("partial/stray", 1);
	ck_assert_uint_eq(partial_sweep(&cfg), 3);
	ck_assert(there("partial/" UUID) && !there("partial/" UUID_2));
	ck_assert(!there("partial/.gone-12") && !there("partial/stray"));
	ck_assert_uint_eq(partial_sweep(&cfg), 0);
	ck_assert(!partial_expired(&p, p.since_s + 3599) && partial_expired(&p, p.since_s + 3600));
	/* a clock that was set back expires nothing */
	p.since_s = 1000;
	ck_assert(!partial_expired(&p, 10));
}
END_TEST

static int age(const char *uuid, int64_t since_s)
{
	struct partial p = sample(uuid);
	char rel[300];
	snprintf(rel, sizeof rel, "partial/%s", uuid);
	int fd = open(at(rel), O_RDONLY | O_DIRECTORY);
	p.since_s = since_s;
	p.keep_s = 100 * 86400;
	int rc = partial_note(fd, &p, &err);
	close(fd);
	return rc;
}

START_TEST(room_is_made_of_the_others)
{
	char rel[REGISTRY_FOLDER_BYTES];
	struct partial p = sample(UUID), q = sample(UUID_2);
	bool kept;
	make_arrival(&p, 7, rel);
	ck_assert_int_eq(partial_end_arrival(&cfg, rel, &kept, &err), 0);
	make_arrival(&q, 7, rel);
	ck_assert_int_eq(partial_end_arrival(&cfg, rel, &kept, &err), 0);
	ck_assert_int_eq(age(UUID, 1000), 0);
	partial_make_room(&cfg, UUID, 1);
	ck_assert(there("partial/" UUID) && there("partial/" UUID_2));
	partial_make_room(&cfg, UUID, UINT64_MAX - 1);
	ck_assert(there("partial/" UUID) && !there("partial/" UUID_2));
}
END_TEST

START_TEST(times_are_read)
{
	static const struct {
		const char *text;
		int rc;
		unsigned seconds;
	} cases[] = {{"0", 0, 0},	  {"30s", 0, 30},
		     {"5m", 0, 300},	  {"2h", 0, 7200},
		     {"1d", 0, 86400},	  {"45", 0, 45},
		     {"", -EINVAL, 0},	  {"m", -EINVAL, 0},
		     {"-1", -EINVAL, 0},  {"5mm", -EINVAL, 0},
		     {"5x", -EINVAL, 0},  {"86401", -EINVAL, 0},
		     {"25h", -EINVAL, 0}, {"99999999999999999999s", -EINVAL, 0}};
	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		unsigned s = 0;
		ck_assert_msg(duration_parse(cases[i].text, 86400, &s) == cases[i].rc, "%s", cases[i].text);
		ck_assert_uint_eq(s, cases[i].seconds);
	}
}
END_TEST

int main(void)
{
	Suite *s = suite_create("partial");
	TCase *tc = tcase_create("partial");
	tcase_add_checked_fixture(tc, setup, teardown);
	tcase_add_test(tc, images_are_kept_and_nothing_that_could_start);
	tcase_add_test(tc, a_later_partial_replaces_the_former);
	tcase_add_test(tc, without_a_note_all_of_it_goes);
	tcase_add_test(tc, a_link_in_place_of_an_image_is_not_kept);
	tcase_add_test(tc, taken_up_it_is_an_arrival_again);
	tcase_add_test(tc, what_has_expired_is_swept);
	tcase_add_test(tc, room_is_made_of_the_others);
	tcase_add_test(tc, times_are_read);
	suite_add_tcase(s, tc);
	return suite_run(s);
}
