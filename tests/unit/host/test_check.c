/* SPDX-License-Identifier: Apache-2.0 */
/* Every line of the report of `snmigrate check`, provoked and not. */
#include <check.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "host/check.h"
#include "tests/suite.h"

#define MIB (UINT64_C(1) << 20)
#define GIB (UINT64_C(1) << 30)

static struct check_facts f;
static struct check_line lines[CHECK_LINES_MAX];

static struct kvm_cpuid2 *make_cpu(uint32_t ecx, uint32_t ebx7)
{
	struct kvm_cpuid2 *t = calloc(1, sizeof *t + CPU_TABLE_MAX * sizeof t->entries[0]);
	t->nent = 3;
	t->entries[0] = (struct kvm_cpuid_entry2){
		.function = 0, .ebx = 0x68747541, .edx = 0x69746e65, .ecx = 0x444d4163};
	t->entries[1] = (struct kvm_cpuid_entry2){.function = 1, .ecx = ecx};
	t->entries[2] = (struct kvm_cpuid_entry2){.function = 7, .ebx = ebx7};
	return t;
}

/* Two hosts and a VM for which nothing is in the way. */
static void setup(void)
{
	f = (struct check_facts){.live = true,
				 .answered = true,
				 .protocol = 2,
				 .protocol_min = 1,
				 .protocol_max = 2,
				 .cpus = 2,
				 .memory_bytes = 2 * GIB,
				 .populated_bytes = GIB,
				 .ndisks = 1,
				 .nnets = 1,
				 .disk_free_bytes = 100 * GIB,
				 .disk_write_bytes_per_s = 500000000,
				 .disk_sync_us = 600,
				 .link_bytes_per_s = 1000000000,
				 .round_trip_us = 200,
				 .dirty_known = true,
				 .dirty_bytes_per_s = 1000000,
				 .max_downtime_ms = 50};
	strcpy(f.vm, "vm1");
	strcpy(f.here, "hosta");
	strcpy(f.there, "hostb");
	strcpy(f.state, "running");
	strcpy(f.disks[0].id, "root");
	f.disks[0].allocated_bytes = 10 * GIB;
	strcpy(f.nets[0].id, "lan");
	strcpy(f.nets[0].bridge, "br0");
	f.nets[0].mtu_here = f.nets[0].mtu_there = 1500;
	f.theirs =
		(struct host_facts){.memory_total_bytes = 64 * GIB,
				    .memory_available_bytes = 32 * GIB,
				    .cpus = 8,
				    .load = 0.5,
				    .nnodes = 2,
				    .ecc_controllers = 1,
				    .nodes = {{.cpus = 4, .total_bytes = 32 * GIB, .free_bytes = GIB},
					      {.cpus = 4, .total_bytes = 32 * GIB, .free_bytes = 20 * GIB}},
				    .huge_shmem = "advise"};
	f.own = f.theirs;
	f.guest = (struct check_cpu){.table = make_cpu(1u << 28 | 1, 1u << 5), .tsc_khz = 2400000};
	f.host = (struct check_cpu){.table = make_cpu(1u << 28 | 1, 1u << 5 | 1), .tsc_khz = 2400000};
}

static void teardown(void)
{
	check_facts_free(&f);
}

/* ---- one way each in which a line is no pass ---- */

static void no_vm(void)
{
	strcpy(f.state, "crashed");
	strcpy(f.not_movable, "VM vm1 is crashed: only a running, paused or stopped VM can be moved");
	f.live = false;
}
static void moving(void)
{
	strcpy(f.not_movable, "VM vm1 is already being moved");
}
static void no_trust(void)
{
	f.answered = false;
	strcpy(f.no_answer, "cannot connect to 10.9.0.2:16516: Connection refused");
}
static void old_destination(void)
{
	f.protocol_max = 1;
}
static void old_source(void)
{
	f.protocol_min = 3;
	f.protocol_max = 4;
}
static void no_kvm(void)
{
	free(steal_ptr(f.host.table));
	strcpy(f.cpu_error, "/dev/kvm: No such file or directory");
}
static void lacks(void)
{
	f.host.table->entries[1].ecx = 1;
	f.host.table->entries[2].ebx = 0;
}
static void vendor(void)
{
	memcpy(&f.host.table->entries[0].ebx, "Genu", 4);
}
static void tsc(void)
{
	f.host.tsc_khz = 3000000;
}
static void refused(void)
{
	strcpy(f.refusals[f.nrefusals++], "another VM named vm1 is already on host hostb");
	strcpy(f.refusals[f.nrefusals++], "host hostb takes at most 0 arrivals at once");
}
static void no_memory(void)
{
	f.theirs.memory_available_bytes = 2 * GIB;
}
static void little_memory(void)
{
	f.theirs.memory_available_bytes = 4 * GIB;
}
static void nodes_full(void)
{
	f.theirs.nodes[1].free_bytes = GIB;
}
static void nodes_small(void)
{
	f.theirs.nodes[0].cpus = f.theirs.nodes[1].cpus = 1;
}
static void no_ecc(void)
{
	f.theirs.ecc_controllers = 0;
}
static void bad_ecc(void)
{
	f.theirs.ecc_uncorrected = 3;
}
static void no_huge(void)
{
	strcpy(f.theirs.huge_shmem, "never");
}
static void loaded(void)
{
	f.theirs.load = 20;
}
static void few_cpus(void)
{
	f.theirs.cpus = 1;
}
static void backing(void)
{
	f.disks[0].backing = true;
}
static void no_space(void)
{
	f.disk_free_bytes = 10 * GIB;
}
static void little_space(void)
{
	f.disk_free_bytes = 10 * GIB + 100 * MIB;
}
static void no_disk_speed(void)
{
	f.disk_write_bytes_per_s = 0;
	strcpy(f.disk_error, "its file system has no O_DIRECT");
}
static void slow_sync(void)
{
	f.disk_sync_us = 80000;
}
static void slow_disk(void)
{
	f.disk_write_bytes_per_s = 50000000;
}
static void no_bridge(void)
{
	strcpy(f.nets[0].error, "bridge br0: No such device");
}
static void small_mtu(void)
{
	f.nets[0].mtu_here = 9000;
}
static void clock_ahead(void)
{
	f.clock_offset_ms = 90000;
}
static void clock_behind(void)
{
	f.clock_offset_ms = -5000;
}
static void no_link(void)
{
	f.link_bytes_per_s = 0;
	strcpy(f.link_error, "the peer closed the connection");
}
static void dead_slow(void)
{
	f.link_bytes_per_s = 500000;
}
static void slow(void)
{
	f.link_bytes_per_s = 5000000;
}
static void far_away(void)
{
	f.round_trip_us = 40000;
}
static void dirtier(void)
{
	f.dirty_bytes_per_s = 2000000000;
}
static void dirtier_now(void)
{
	dirtier();
	f.dirty_now = true;
}
static void dirty(void)
{
	f.dirty_bytes_per_s = 600000000;
}

/* clang-format off */
static const struct {
	void (*provoke)(void);
	const char *line;
	enum check_grade grade;
	const char *text, *advice; /* in them */
} provoked[] = {
	{no_vm, "vm", CHECK_FAILURE, "is crashed", "snvm start vm1"},
	{moving, "vm", CHECK_FAILURE, "already being moved", "snmigrate status"},
	{no_trust, "trust", CHECK_FAILURE, "Connection refused", "snmigrated runs on hostb"},
	{old_destination, "versions", CHECK_FAILURE, "1 at most", "upgrade snmigrate on hostb"},
	{old_source, "versions", CHECK_FAILURE, "needs 3", "upgrade snmigrate on hosta"},
	{no_kvm, "cpu", CHECK_FAILURE, "/dev/kvm", "KVM"},
	{lacks, "cpu", CHECK_FAILURE, "lacks 2 features that the guest has seen: avx, avx2", "snmigrate baseline hosta hostb"},
	{vendor, "cpu", CHECK_FAILURE, "AuthenticAMD", "cannot change vendor"},
	{tsc, "tsc", CHECK_FAILURE, "3000000 kHz", "same rate"},
	{refused, "admission", CHECK_FAILURE, "another VM named vm1 is already on host hostb; host hostb takes", "status on hostb"},
	{no_memory, "memory", CHECK_FAILURE, "2048 MiB of memory free, the VM needs 2112", "free memory on hostb"},
	{little_memory, "memory", CHECK_WARNING, "2048 MiB of memory would be left", "swap"},
	{nodes_full, "numa", CHECK_WARNING, "no one of the 2 NUMA nodes", "several nodes"},
	{nodes_small, "numa", CHECK_WARNING, "larger than any of the 2", "does not have to here"},
	{no_ecc, "ecc", CHECK_WARNING, "hostb shows none", "unseen"},
	{bad_ecc, "ecc", CHECK_WARNING, "3 memory errors", "replaced"},
	{no_huge, "huge-pages", CHECK_WARNING, "not on hostb (never)", "echo advise"},
	{loaded, "load", CHECK_WARNING, "20.0 on 8 CPUs", "wait"},
	{few_cpus, "load", CHECK_WARNING, "hostb only 1", "wait for one another"},
	{backing, "backing", CHECK_FAILURE, "disk root has backing files", "--backing"},
	{no_space, "disk-space", CHECK_FAILURE, "10240 MiB of disk free, the VM's disks need 10304", "make room"},
	{little_space, "disk-space", CHECK_WARNING, "36 MiB of disk would be left", "full"},
	{no_disk_speed, "disk-speed", CHECK_WARNING, "no O_DIRECT", "check again"},
	{slow_sync, "disk-speed", CHECK_WARNING, "80 ms", "stops for longer"},
	{slow_disk, "disk-speed", CHECK_WARNING, "writes 50 MB/s", "as fast as that disk"},
	{no_bridge, "bridges", CHECK_FAILURE, "net lan: bridge br0: No such device", "make the bridge on hostb"},
	{small_mtu, "mtu", CHECK_WARNING, "MTU of 9000 here and 1500 on hostb", "ip link set br0 mtu 9000"},
	{clock_ahead, "clock", CHECK_WARNING, "90.0 s ahead", "keep time"},
	{clock_behind, "clock", CHECK_WARNING, "5.0 s behind", "keep time"},
	{no_link, "link", CHECK_WARNING, "not measured: the peer closed", "check again"},
	{dead_slow, "link", CHECK_FAILURE, "0.50 MB/s", "at least 1 MiB/s"},
	{slow, "link", CHECK_WARNING, "5.0 MB/s", "long"},
	{far_away, "link", CHECK_WARNING, "round trip of 40.0 ms", "--mirror buffered"},
	{dirtier, "dirty-rate", CHECK_WARNING, "changed 2000 MB/s", "--max-downtime"},
	{dirtier_now, "dirty-rate", CHECK_WARNING, "the guest changes 2000 MB/s", "--max-downtime"},
	{dirty, "dirty-rate", CHECK_WARNING, "changed 600 MB/s", "several rounds"},
};
/* clang-format on */

static const struct check_line *line_named(unsigned n, const char *name)
{
	for (unsigned i = 0; i < n; i++)
		if (!strcmp(lines[i].name, name))
			return &lines[i];
	return NULL;
}

START_TEST(nothing_is_in_the_way)
{
	unsigned n = check_judge(&f, lines);
	ck_assert_uint_eq(n, 20);
	for (unsigned i = 0; i < n; i++) {
		ck_assert_msg(lines[i].grade == CHECK_PASS && *lines[i].text && !*lines[i].what_to_do,
			      "%s: %s", lines[i].name, lines[i].text);
		/* and each but the prediction can be provoked */
		unsigned cases = 0;
		for (size_t k = 0; k < ARRAY_SIZE(provoked); k++)
			cases += !strcmp(provoked[k].line, lines[i].name);
		ck_assert_msg(cases || !strcmp(lines[i].name, "prediction"), "%s", lines[i].name);
	}
}
END_TEST

START_TEST(each_line_provoked)
{
	provoked[_i].provoke();
	unsigned n = check_judge(&f, lines);
	const struct check_line *l = line_named(n, provoked[_i].line);
	ck_assert_ptr_nonnull(l);
	ck_assert_msg(l->grade == provoked[_i].grade, "%s: %d: %s", l->name, l->grade, l->text);
	ck_assert_msg(strstr(l->text, provoked[_i].text) != NULL, "%s: %s", l->name, l->text);
	ck_assert_msg(strstr(l->what_to_do, provoked[_i].advice) != NULL, "%s: %s", l->name, l->what_to_do);
	/* and no other line with it, but what follows from it */
	for (unsigned i = 0; i < n; i++)
		if (&lines[i] != l && strcmp(lines[i].name, "link") && strcmp(lines[i].name, "dirty-rate"))
			ck_assert_msg(lines[i].grade == CHECK_PASS, "%s also: %s", lines[i].name,
				      lines[i].text);
}
END_TEST

START_TEST(what_is_not_known_is_not_judged)
{
	no_trust();
	ck_assert_uint_eq(check_judge(&f, lines), 2);
	teardown();
	setup();
	no_vm();
	unsigned n = check_judge(&f, lines);
	ck_assert_ptr_null(line_named(n, "cpu"));
	ck_assert_ptr_nonnull(line_named(n, "link"));
	teardown();
	setup();
	f.dirty_known = false;
	n = check_judge(&f, lines);
	ck_assert(strstr(line_named(n, "dirty-rate")->text, "not measured"));
	f.own.ecc_controllers = f.theirs.ecc_controllers = 0;
	n = check_judge(&f, lines);
	ck_assert(strstr(line_named(n, "ecc")->text, "neither"));
}
END_TEST

START_TEST(predictions)
{
	struct check_prediction p, other;
	f.own.load = f.theirs.load = 0;
	check_predict(&f, &p);
	/* 10 GiB at 500 MB/s, read again, 1 GiB at 1 GB/s */
	ck_assert_uint_gt(p.total_ms, 43000);
	ck_assert_uint_lt(p.total_ms, 46000);
	ck_assert_uint_eq(p.downtime_most_ms - p.downtime_least_ms, 50);
	ck_assert_uint_lt(p.downtime_least_ms, 10);
	/* a guest that stands still dirties nothing: the same but for the connections, and what the link
	 * costs once */
	ck_assert_uint_gt(p.quick_ms, 43000);
	ck_assert_uint_lt(p.quick_ms, p.total_ms);
	f.without_storage = true;
	struct check_prediction memory;
	check_predict(&f, &memory);
	ck_assert_uint_gt(memory.quick_ms, 1000);
	ck_assert_uint_lt(memory.quick_ms, 1200);
	f.bandwidth_bytes_per_s = 100000000;
	check_predict(&f, &memory);
	ck_assert_uint_gt(memory.quick_ms, 10000);
	f.without_storage = false;
	f.bandwidth_bytes_per_s = 0;
	/* two that answer slowly, and one without a processor to spare */
	f.dial_us = 1000000;
	check_predict(&f, &other);
	ck_assert_uint_gt(other.fixed_ms, p.fixed_ms + 2000);
	ck_assert_uint_le(other.total_ms - p.total_ms, other.fixed_ms - p.fixed_ms + 1);
	f.dial_us = 0;
	f.theirs.load = 3 * f.theirs.cpus;
	check_predict(&f, &other);
	ck_assert_uint_gt(other.fixed_ms, p.fixed_ms * 5 / 4);
	ck_assert_uint_gt(other.total_ms, p.total_ms + 40000);
	f.theirs.load = 0;
	/* a disk that reads slowly is met twice at the most */
	f.disk_read_bytes_per_s = f.disk_write_bytes_per_s / 2;
	check_predict(&f, &other);
	ck_assert_uint_gt(other.total_ms, p.total_ms * 3 / 2);
	ck_assert_uint_lt(other.total_ms, p.total_ms * 5 / 2);
	f.disk_read_bytes_per_s = 0;
	f.link_bytes_per_s = 100000000;
	struct check_prediction slower;
	check_predict(&f, &slower);
	ck_assert_uint_gt(slower.total_ms, 2 * p.total_ms);
	/* 1 GiB takes 10.7 s; of 90 MB/s each round has to send nine tenths of the one before, until the
	 * guest is slowed */
	f.dirty_bytes_per_s = 90000000;
	check_predict(&f, &p);
	ck_assert_uint_gt(p.total_ms, slower.total_ms + 40000);
	ck_assert_uint_lt(p.total_ms, slower.total_ms + 50000);
	ck_assert_uint_eq(p.quick_ms, slower.quick_ms);
	/* however fast it is */
	f.dirty_bytes_per_s = UINT64_C(4000000000);
	check_predict(&f, &p);
	ck_assert_uint_gt(p.total_ms, slower.total_ms + 40000);
	ck_assert_uint_lt(p.total_ms, slower.total_ms + 60000);
	/* always the same pages: no round has more than these, found in ten seconds and more */
	f.dirty_set_bytes = 8000000;
	check_predict(&f, &p);
	ck_assert_uint_gt(p.total_ms, slower.total_ms + 250);
	ck_assert_uint_lt(p.total_ms, slower.total_ms + 800);
	f.dirty_set_bytes = 0;
	f.link_bytes_per_s = 0;
	check_predict(&f, &p);
	ck_assert_uint_eq(p.total_ms, 0);
	ck_assert_uint_eq(p.quick_ms, 0);
}
END_TEST

/* It has no process to tell what it needs: only what does not depend on that is judged. */
START_TEST(a_stopped_vm_may_be_moved)
{
	strcpy(f.state, "stopped");
	f.live = false;
	unsigned count = check_judge(&f, lines);
	ck_assert_int_eq(line_named(count, "vm")->grade, CHECK_PASS);
	ck_assert(strstr(line_named(count, "vm")->text, "is stopped on hosta"));
}
END_TEST

/* ---- what the other host says is looked at ---- */

#define CPU                                                                                                  \
	"\"cpu\": {\"vendor\": \"x\", \"tsc_khz\": 1, \"tsc_scaling\": true, \"cpuid\": [[0,0,0,0,0,0,0]]}"
#define OWN                                                                                                  \
	"\"own\": {\"memory_total_bytes\": 1, \"memory_available_bytes\": 1, \"cpus\": 1, \"load\": 0.1, "   \
	"\"nodes\": [], \"ecc_controllers\": 0, \"ecc_corrected\": 0, \"ecc_uncorrected\": 0, "              \
	"\"huge_shmem\": \"never\", \"huge_anonymous\": \"\"}"
#define DISK                                                                                                 \
	"\"disk\": {\"free_bytes\": 1, \"kept_bytes\": 0, \"write_bytes_per_s\": 5, \"sync_us\": 7, "        \
	"\"error\": null}"
#define BRIDGES "\"bridges\": [{\"name\": \"br0\", \"error\": null, \"mtu\": 1500}]"
#define REST	"\"program\": \"9\", \"versions\": [1, 2], \"refusals\": [\"no\"]"

static int take(const char *text)
{
	struct error err = ERROR_INIT;
	json_error_t why;
	json_t *o = json_loads(text, 0, &why);
	ck_assert_msg(o != NULL, "%s: %s", text, why.text);
	f.nrefusals = 0;
	int rc = check_take_destination(&f, o, &err);
	json_decref(o);
	return rc;
}

START_TEST(facts_of_the_destination)
{
	ck_assert_int_eq(take("{" REST ", " OWN ", " BRIDGES ", " DISK ", " CPU "}"), 0);
	ck_assert(f.answered && f.host.scales_tsc && f.host.tsc_khz == 1);
	ck_assert_str_eq(f.refusals[0], "no");
	ck_assert_uint_eq(f.disk_sync_us, 7);
	ck_assert_uint_eq(f.nets[0].mtu_there, 1500);
	ck_assert_int_eq(
		take("{" REST ", " OWN ", " BRIDGES ", " DISK ", \"cpu\": null, \"cpu_error\": \"none\"}"),
		0);
}
END_TEST

static const char *const hostile[] = {
	"{}",
	"{\"program\": 7, \"versions\": [1, 2], \"refusals\": [], " OWN ", " BRIDGES ", " DISK ", " CPU "}",
	"{\"program\": \"9\", \"versions\": [2, 1], \"refusals\": [], " OWN ", " BRIDGES ", " DISK ", " CPU
	"}",
	"{\"program\": \"9\", \"versions\": \"x\", \"refusals\": [], " OWN ", " BRIDGES ", " DISK ", " CPU
	"}",
	"{\"program\": \"9\", \"versions\": [1, 2], \"refusals\": [7], " OWN ", " BRIDGES ", " DISK ", " CPU
	"}",
	"{\"program\": \"9\", \"versions\": [1, 2], \"refusals\": "
	"[\"\",\"\",\"\",\"\",\"\",\"\",\"\",\"\",\"\"], " OWN ", " BRIDGES ", " DISK ", " CPU "}",
	"{" REST ", " OWN ", \"bridges\": [], " DISK ", " CPU "}",
	"{" REST ", " OWN ", \"bridges\": [{\"mtu\": -1}], " DISK ", " CPU "}",
	"{" REST ", " OWN ", \"bridges\": [{\"mtu\": 1, \"error\": []}], " DISK ", " CPU "}",
	"{" REST ", " OWN ", " BRIDGES ", \"disk\": {\"free_bytes\": 9223372036854775807}, " CPU "}",
	"{" REST ", " OWN ", " BRIDGES
	", \"disk\": {\"free_bytes\": 1, \"kept_bytes\": 0, \"write_bytes_per_s\": 5, \"sync_us\": 7, "
	"\"read_bytes_per_s\": -1}, " CPU "}",
	"{" REST ", " OWN ", " BRIDGES ", " DISK ", \"cpu\": {}}",
	"{" REST ", " OWN ", " BRIDGES ", " DISK ", \"cpu\": []}",
	"{" REST ", \"own\": [], " BRIDGES ", " DISK ", " CPU "}",
	"{" REST ", \"own\": {\"memory_total_bytes\": 1e300}, " BRIDGES ", " DISK ", " CPU "}",
};

START_TEST(hostile_facts)
{
	f.answered = false;
	ck_assert_int_eq(take(hostile[_i]), -EPROTO);
	ck_assert(!f.answered);
}
END_TEST

START_TEST(facts_of_the_vm)
{
	struct error err = ERROR_INIT;
	json_t *o = json_pack("{s:i, s:i, s:I, s:I, s:[{s:s, s:I, s:b}], s:[{s:s, s:s, s:i}], s:{s:i, "
			      "s:[[i,i,i,i,i,i,i]]}}",
			      "protocol", 2, "cpus", 1, "memory_bytes", (json_int_t)GIB, "populated_bytes",
			      (json_int_t)MIB, "disks", "id", "root", "allocated_bytes", (json_int_t)GIB,
			      "backing", 1, "nets", "id", "lan", "bridge", "br0", "mtu", 1500, "cpu",
			      "tsc_khz", 5, "cpuid", 0, 0, 0, 0, 0, 0, 0);
	ck_assert_ptr_nonnull(o);
	f.live = false;
	ck_assert_msg(check_take_vm(&f, o, &err) == 0, "%s", err.message);
	ck_assert(f.live && f.ndisks == 1 && f.disks[0].backing && f.guest.tsc_khz == 5);
	ck_assert_uint_eq(f.files_bytes, 0); /* as an older program is silent about them */
	json_object_set_new(o, "files_bytes", json_integer(5));
	ck_assert_int_eq(check_take_vm(&f, o, &err), 0);
	ck_assert_uint_eq(f.files_bytes, 5);
	json_object_set_new(o, "files_bytes", json_real(1e300));
	ck_assert_int_eq(check_take_vm(&f, o, &err), -EPROTO);
	json_object_del(o, "files_bytes");
	json_object_set_new(json_array_get(json_object_get(o, "nets"), 0), "bridge", json_string("../x"));
	ck_assert_int_eq(check_take_vm(&f, o, &err), -EPROTO);
	json_decref(o);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("check");
	TCase *tc = tcase_create("check");
	tcase_add_checked_fixture(tc, setup, teardown);
	tcase_add_test(tc, nothing_is_in_the_way);
	tcase_add_loop_test(tc, each_line_provoked, 0, ARRAY_SIZE(provoked));
	tcase_add_test(tc, what_is_not_known_is_not_judged);
	tcase_add_test(tc, predictions);
	tcase_add_test(tc, a_stopped_vm_may_be_moved);
	tcase_add_test(tc, facts_of_the_destination);
	tcase_add_loop_test(tc, hostile_facts, 0, ARRAY_SIZE(hostile));
	tcase_add_test(tc, facts_of_the_vm);
	suite_add_tcase(s, tc);
	return suite_run(s);
}
