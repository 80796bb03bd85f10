/* SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "host/facts.h"
#include "host/fsutil.h"
#include "tests/suite.h"

static char dir[128];
static struct error err;

static void setup(void)
{
	snprintf(dir, sizeof dir, "%s/test_facts.XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/var/tmp");
	ck_assert(mkdtemp(dir) != NULL);
	err = ERROR_INIT;
}

static void teardown(void)
{
	ck_assert_int_eq(fs_remove_tree(dir, &err), 0);
}

static void put(const char *rel, const char *text)
{
	char path[400];
	snprintf(path, sizeof path, "%s%s", dir, rel);
	*strrchr(path, '/') = '\0';
	ck_assert_int_eq(fs_make_dirs(path, &err), 0);
	snprintf(path, sizeof path, "%s%s", dir, rel);
	CLEANUP_FILE FILE *f = fopen(path, "w");
	ck_assert_ptr_nonnull(f);
	fputs(text, f);
}

START_TEST(a_host_with_everything)
{
	struct host_facts f, again;
	put("/proc/meminfo", "MemTotal:       16384 kB\nMemFree: 1 kB\nMemAvailable:    8192 kB\n");
	put("/proc/loadavg", "1.25 0.50 0.10 1/100 200\n");
	put("/sys/devices/system/cpu/online", "0-3,8-11\n");
	put("/sys/devices/system/node/node0/meminfo", "Node 0 MemTotal:       8192 kB\nNode 0 MemFree:       "
						      "  1024 kB\nNode 0 FilePages:        512 kB\n");
	put("/sys/devices/system/node/node0/cpulist", "0-3\n");
	put("/sys/devices/system/node/node1/meminfo", "Node 1 MemTotal: 8192 kB\n");
	put("/sys/devices/system/node/node1/cpulist", "8-11\n");
	put("/sys/devices/system/node/possible", "0-1\n");
	put("/sys/devices/system/edac/mc/mc0/ce_count", "5\n");
	put("/sys/devices/system/edac/mc/mc0/ue_count", "1\n");
	put("/sys/devices/system/edac/mc/mc1/ce_count", "2\n");
	put("/sys/kernel/mm/transparent_hugepage/shmem_enabled",
	    "always within_size [advise] never deny force\n");
	put("/sys/kernel/mm/transparent_hugepage/enabled", "[always] madvise never\n");
	host_facts_collect(dir, &f);
	ck_assert_uint_eq(f.memory_total_bytes, 16 << 20);
	ck_assert_uint_eq(f.memory_available_bytes, 8 << 20);
	ck_assert_uint_eq(f.cpus, 8);
	ck_assert(f.load > 1.2 && f.load < 1.3);
	ck_assert_uint_eq(f.nnodes, 2);
	ck_assert_uint_eq(f.nodes[0].cpus + f.nodes[1].cpus, 8);
	ck_assert_uint_eq(f.nodes[0].free_bytes + f.nodes[1].free_bytes, 1536 << 10);
	ck_assert_uint_eq(f.ecc_controllers, 2);
	ck_assert_uint_eq(f.ecc_corrected, 7);
	ck_assert_uint_eq(f.ecc_uncorrected, 1);
	ck_assert_str_eq(f.huge_shmem, "advise");
	ck_assert_str_eq(f.huge_anonymous, "always");
	json_t *o = host_facts_to_json(&f);
	ck_assert_msg(host_facts_from_json(o, &again, &err) == 0, "%s", err.message);
	ck_assert(!memcmp(&f, &again, sizeof f));
	json_decref(o);
}
END_TEST

START_TEST(a_host_with_nothing)
{
	struct host_facts f, again;
	host_facts_collect(dir, &f);
	ck_assert_uint_eq(f.nnodes, 0);
	ck_assert_str_eq(f.huge_shmem, "");
	json_t *o = host_facts_to_json(&f);
	ck_assert_int_eq(host_facts_from_json(o, &again, &err), 0);
	json_decref(o);
	/* this one has memory and processors */
	host_facts_collect("", &f);
	ck_assert_uint_gt(f.memory_total_bytes, 0);
	ck_assert_uint_gt(f.cpus, 0);
}
END_TEST

static const char *const hostile[] = {"{\"memory_available_bytes\": 5}",
				      "{\"nodes\": 7}",
				      "{\"load\": -1}",
				      "{\"load\": \"x\"}",
				      "{\"cpus\": 1.5}",
				      "{\"cpus\": 70000}",
				      "{\"huge_shmem\": \"Always\"}",
				      "{\"huge_shmem\": \"aaaaaaaaaaaaaaaa\"}",
				      "{\"nodes\": [{}]}",
				      "{\"ecc_controllers\": -1}",
				      "{\"nodes\": [1]}"};

/* One field of a sound object replaced. */
START_TEST(hostile_facts)
{
	struct host_facts f = {.huge_shmem = "never", .nnodes = 1}, out;
	json_t *o = host_facts_to_json(&f), *bad = json_loads(hostile[_i], 0, NULL);
	ck_assert_ptr_nonnull(bad);
	json_object_update(o, bad);
	if (_i == 0)
		json_object_del(o, "memory_total_bytes");
	ck_assert_int_eq(host_facts_from_json(o, &out, &err), -EPROTO);
	json_decref(bad);
	json_decref(o);
}
END_TEST

START_TEST(disk_speed)
{
	struct disk_speed s;
	int rc = facts_disk_speed(dir, &s, &err);
	if (rc == -EOPNOTSUPP || rc == -ENOSPC) {
		printf("skipped: %s\n", err.message);
		return;
	}
	ck_assert_msg(rc == 0, "%s", err.message);
	ck_assert_uint_gt(s.write_bytes_per_s, 0);
	ck_assert_uint_gt(s.read_bytes_per_s, 0);
	ck_assert_uint_gt(s.sync_us, 0);
	/* nothing stays but the lock */
	char path[200];
	snprintf(path, sizeof path, "%s/check.lock", dir);
	ck_assert_int_eq(unlink(path), 0);
	ck_assert_int_eq(rmdir(dir), 0);
	ck_assert_int_eq(facts_disk_speed(dir, &s, &err), -ENOENT);
	ck_assert_int_eq(mkdir(dir, 0700), 0);
}
END_TEST

START_TEST(interfaces)
{
	ck_assert_uint_gt(facts_interface_mtu("lo"), 0);
	ck_assert_uint_eq(facts_interface_mtu("snm-none"), 0);
	ck_assert_uint_eq(facts_interface_mtu("../net/lo"), 0);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("facts");
	TCase *tc = tcase_create("facts");
	tcase_add_checked_fixture(tc, setup, teardown);
	tcase_add_test(tc, a_host_with_everything);
	tcase_add_test(tc, a_host_with_nothing);
	tcase_add_loop_test(tc, hostile_facts, 0, ARRAY_SIZE(hostile));
	tcase_add_test(tc, disk_speed);
	tcase_add_test(tc, interfaces);
	suite_add_tcase(s, tc);
	return suite_run(s);
}
