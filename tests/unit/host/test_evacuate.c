/* SPDX-License-Identifier: Apache-2.0 */
/* How a plan ends, as scripts see it; and maintenance, which outlives everything but "off". */
#include <check.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "host/check.h"
#include "host/daemon.h"
#include "host/evacuate.h"
#include "host/exit.h"
#include "host/journal.h"
#include "host/maintenance.h"
#include "tests/suite.h"

#define VMS 4

/* clang-format off */
static const struct {
	enum run_kind kind;
	enum run_state vms[VMS];
	int exits[VMS];
	bool cancelled;
	unsigned others;
	const char *result;
	int exit;
	const char *reason;
} ends[] = {
	{RUN_EVACUATION, {RUN_MOVED, RUN_MOVED, RUN_MOVED, RUN_MOVED}, {0}, false, 0, "moved", EXIT_MOVED, "4 moved, 0 stay"},
	{RUN_EVACUATION, {RUN_MOVED, RUN_OFF, RUN_OFF, RUN_MOVED}, {0}, false, 0, "moved", EXIT_MOVED, "2 moved, 0 stay, 2 not running"},
	{RUN_EVACUATION, {RUN_MOVED, RUN_MOVED, RUN_MOVED, RUN_MOVED}, {0, EXIT_NOT_CLEANED}, false, 0, "moved", EXIT_NOT_CLEANED,
	 "4 moved, 0 stay, 1 of those moved not cleaned up here"},
	{RUN_EVACUATION, {RUN_MOVED, RUN_STAYS, RUN_FAILED, RUN_MOVED}, {0}, false, 0, "incomplete", EXIT_FAILED, "2 moved, 2 stay"},
	/* one that a person cancelled, without the plan */
	{RUN_EVACUATION, {RUN_MOVED, RUN_CANCELLED, RUN_MOVED, RUN_MOVED}, {0}, false, 0, "incomplete", EXIT_FAILED, "3 moved, 1 stay"},
	{RUN_EVACUATION, {RUN_MOVED, RUN_CANCELLED, RUN_MOVED, RUN_MOVED}, {0}, true, 0, "cancelled", EXIT_CANCELLED, "3 moved, 1 stay"},
	/* it came too late to keep anything here */
	{RUN_EVACUATION, {RUN_MOVED, RUN_MOVED, RUN_MOVED, RUN_MOVED}, {0}, true, 0, "moved", EXIT_MOVED, "4 moved, 0 stay"},
	{RUN_EVACUATION, {RUN_MOVED, RUN_MOVED, RUN_MOVED, RUN_MOVED}, {0}, false, 1, "incomplete", EXIT_FAILED,
	 "4 moved, 0 stay, 1 started or arrived here meanwhile"},
	{RUN_RETURN, {RUN_MOVED, RUN_MOVED, RUN_MOVED, RUN_MOVED}, {0}, false, 3, "moved", EXIT_MOVED, "4 moved, 0 stay"},
	{RUN_EVACUATION, {RUN_MOVED, RUN_IN_DOUBT, RUN_STAYS, RUN_MOVED}, {0}, true, 0, "in-doubt", EXIT_IN_DOUBT, "2 moved, 1 stay, 1 in doubt"},
	{RUN_EVACUATION, {RUN_MOVED, RUN_IN_DOUBT, RUN_CRASHED, RUN_MOVED}, {0}, false, 0, "crashed", EXIT_CRASHED,
	 "2 moved, 0 stay, 1 in doubt, 1 crashed"},
};
/* clang-format on */

START_TEST(a_plan_ends)
{
	struct run *run = run_new(VMS);
	ck_assert_ptr_nonnull(run);
	run->kind = ends[_i].kind;
	run->cancelled = ends[_i].cancelled;
	for (unsigned i = 0; i < VMS; i++) {
		run->vms[i].state = ends[_i].vms[i];
		run->vms[i].exit = ends[_i].exits[i];
	}
	run_conclude(run, ends[_i].others);
	ck_assert_str_eq(run->result, ends[_i].result);
	ck_assert_int_eq(run->exit, ends[_i].exit);
	ck_assert_str_eq(run->reason, ends[_i].reason);
	run_release(run);
}
END_TEST

START_TEST(names_of_states)
{
	enum run_state state;
	for (int i = RUN_WAITING; i <= RUN_CRASHED; i++) {
		ck_assert_int_eq(run_state_parse(run_state_name((enum run_state)i), &state), 0);
		ck_assert_int_eq((int)state, i);
		ck_assert_int_eq(run_state_is_final(state), i > RUN_MOVING);
	}
	ck_assert_int_eq(run_state_parse("gone", &state), -EINVAL);
}
END_TEST

START_TEST(as_json)
{
	struct host_config cfg = {.name = "hosta"};
	struct daemon d = {.cfg = &cfg};
	struct run *run = run_new(2);
	strcpy(run->vms[0].name, "vm1");
	strcpy(run->vms[0].reason, "fits \xff");
	run->vms[0].state = RUN_MOVED;
	run->begun_ms = 1000;
	run->vms[0].begun_ms = 1500;
	run->vms[0].ended_ms = 4000;
	run->vms[1].state = RUN_MOVING;
	run->vms[1].percent = 31;
	json_t *o = run_to_json(&d, run), *vms = json_object_get(o, "vms");
	ck_assert_ptr_nonnull(o);
	ck_assert(json_is_null(json_object_get(o, "exit")) &&
		  json_is_null(json_object_get(o, "predicted_ms")));
	json_t *vm = json_array_get(vms, 0);
	ck_assert_int_eq(json_integer_value(json_object_get(vm, "begin_ms")), 500);
	ck_assert_int_eq(json_integer_value(json_object_get(vm, "end_ms")), 3000);
	ck_assert(json_is_null(json_object_get(vm, "percent")));
	vm = json_array_get(vms, 1);
	ck_assert(json_number_value(json_object_get(vm, "percent")) > 30);
	ck_assert(json_is_null(json_object_get(vm, "end_ms")) &&
		  json_is_null(json_object_get(vm, "begin_ms")));
	json_decref(o);
	run_release(run);
}
END_TEST

/* A move of 100 MB of disk and 50 of memory that took so long, beside others. */
static json_t *row(const char *uuid, double total_ms, double others)
{
	return json_pack("{s:s, s:f, s:f, s:i, s:i, s:i, s:i, s:i}", "uuid", uuid, "total_ms", total_ms,
			 "others", others, "disk_bytes", 120000000, "mirrored_bytes", 20000000,
			 "populated_bytes", 50000000, "dirty_bytes_per_s", 0, "disks", 2);
}

START_TEST(earlier_moves_teach)
{
	struct check_facts *f = calloc(1, sizeof *f);
	struct check_prediction p;
	ck_assert_ptr_nonnull(f);
	f->live = true;
	f->link_bytes_per_s = 10000000;
	f->dial_us = 5000;
	f->ndisks = 2;
	f->disks[0].allocated_bytes = 100000000;
	f->populated_bytes = 50000000;
	check_predict(f, &p);
	double fixed = (double)p.fixed_ms, all = (double)p.total_ms, shared = all - fixed;
	json_t *rows = json_array();
	ck_assert_double_eq_tol(run_factor_from(rows, "u", f), 1, 0.001);
	ck_assert_double_eq_tol(run_factor_from(NULL, "u", f), 1, 0.001);
	/* others', the one in the middle */
	json_array_append_new(rows, row("a", all, 0));
	json_array_append_new(rows, row("b", 3 * all, 0));
	json_array_append_new(rows, row("c", 2 * all, 0));
	ck_assert_double_eq_tol(run_factor_from(rows, "u", f), 2, 0.001);
	/* its own count more than any number of those, and what ran beside it is taken out */
	json_array_insert_new(rows, 0, row("u", fixed + 2 * shared, 1));
	ck_assert_double_eq_tol(run_factor_from(rows, "u", f), 1, 0.001);
	/* a guest that dirties is slow in its own history, too, and is not counted twice */
	f->dirty_known = true;
	f->dirty_bytes_per_s = 5000000;
	check_predict(f, &p);
	ck_assert_uint_gt(p.total_ms, (uint64_t)all);
	json_array_insert_new(rows, 0, row("u", (double)p.total_ms, 0));
	json_array_remove(rows, 1);
	ck_assert_double_eq_tol(run_factor_from(rows, "u", f), 1, 0.001);
	/* nonsense is bounded */
	json_array_insert_new(rows, 0, row("u", 1e18, 0));
	json_array_insert_new(rows, 0, row("u", 1e18, 0));
	ck_assert_double_eq_tol(run_factor_from(rows, "u", f), 20, 0.001);
	json_decref(rows);
	free(f);
}
END_TEST

START_TEST(maintenance_is_a_file)
{
	struct host_config cfg = {.name = "hosta"};
	struct error err = ERROR_INIT;
	char dir[] = "/tmp/snm-maintenance.XXXXXX", path[64];
	ck_assert_ptr_nonnull(mkdtemp(dir));
	snprintf(cfg.state_dir, sizeof cfg.state_dir, "%s", dir);
	snprintf(path, sizeof path, "%s/maintenance", dir);
	ck_assert(!maintenance_is_on(&cfg));
	ck_assert_int_eq(maintenance_check(&cfg, &err), 0);
	ck_assert_int_eq(maintenance_set(&cfg, false, &err), 0);
	for (int i = 0; i < 2; i++) {
		ck_assert_int_eq(maintenance_set(&cfg, true, &err), 0);
		ck_assert(maintenance_is_on(&cfg));
	}
	ck_assert_int_eq(maintenance_check(&cfg, &err), -EPERM);
	ck_assert_ptr_nonnull(strstr(err.message, "host hosta is in maintenance"));
	ck_assert_int_eq(maintenance_set(&cfg, false, &err), 0);
	ck_assert(!maintenance_is_on(&cfg));
	/* whatever is there by that name counts, and a folder that cannot be looked into */
	ck_assert_int_eq(symlink("nowhere", path), 0);
	ck_assert(maintenance_is_on(&cfg));
	ck_assert_int_eq(maintenance_set(&cfg, false, &err), 0);
	ck_assert(!maintenance_is_on(&cfg));
	rmdir(dir);
	ck_assert(maintenance_is_on(&cfg));
	ck_assert_int_eq(maintenance_set(&cfg, true, &err), -ENOENT);
}
END_TEST

static void moved(struct journal *j, const char *direction, const char *uuid, const char *peer, int begun_ms,
		  int ended_ms, const char *purpose)
{
	char details[100];
	snprintf(details, sizeof details, "{\"total_ms\":%d%s%s%s}", ended_ms - begun_ms,
		 purpose ? ",\"purpose\":\"" : "", purpose ? purpose : "", purpose ? "\"" : "");
	struct journal_statement q = {
		.sql = "INSERT INTO move (direction, uuid, name, peer, epoch, last_epoch, begun_ms, "
		       "ended_ms, "
		       "result, details) VALUES (?1, ?2, ?2, ?3, ?4, ?4, ?4, ?5, 'moved', ?6)",
		.params =
			json_pack("[s, s, s, i, i, s]", direction, uuid, peer, begun_ms, ended_ms, details)};
	ck_assert_int_eq(journal_write(j, &q, 1, JOURNAL_WAIT, 10000, NULL), 0);
}

START_TEST(whose_moves_teach)
{
	char dir[] = "/var/tmp/test_evacuate.XXXXXX", command[64];
	struct journal *j = NULL;
	json_t *rows = NULL;
	ck_assert_ptr_nonnull(mkdtemp(dir));
	ck_assert_int_eq(journal_open(dir, &j, NULL), 0);
	/* what ran beside an arrival of a plan is not in this journal */
	moved(j, "in", "u", "b", 1000, 2000, "evacuation");
	moved(j, "in", "u", "b", 3000, 4000, NULL);
	moved(j, "out", "v", "c", 5000, 7000, NULL);
	moved(j, "out", "w", "b", 6000, 7000, "return");
	ck_assert_int_eq(run_earlier_moves(j, "u", "b", &rows, NULL), 0);
	static const struct {
		const char *uuid;
		double total_ms, others;
	} want[] = {{"u", 1000, 0}, {"w", 1000, 1}, {"v", 2000, 0.5}}; /* its own, to that host, the rest */
	ck_assert_uint_eq(json_array_size(rows), ARRAY_SIZE(want));
	for (size_t i = 0; i < ARRAY_SIZE(want); i++) {
		json_t *o = json_array_get(rows, i);
		ck_assert_str_eq(json_string_value(json_object_get(o, "uuid")), want[i].uuid);
		ck_assert_double_eq(json_number_value(json_object_get(o, "total_ms")), want[i].total_ms);
		ck_assert_double_eq(json_number_value(json_object_get(o, "others")), want[i].others);
	}
	json_decref(rows);
	journal_close(j, 10000);
	snprintf(command, sizeof command, "rm -rf %s", dir);
	ck_assert_int_eq(system(command), 0);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("evacuate");
	TCase *t = tcase_create("evacuate");
	tcase_add_loop_test(t, a_plan_ends, 0, ARRAY_SIZE(ends));
	tcase_add_test(t, names_of_states);
	tcase_add_test(t, as_json);
	tcase_add_test(t, earlier_moves_teach);
	tcase_add_test(t, whose_moves_teach);
	tcase_add_test(t, maintenance_is_a_file);
	suite_add_tcase(s, t);
	return suite_run(s);
}
