/* SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <errno.h>
#include <signal.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "host/fsutil.h"
#include "host/journal.h"
#include "tests/suite.h"

#define WAIT_MS 20000

static char dir[128];
static struct journal *j;
static struct error err;

static void setup(void)
{
	snprintf(dir, sizeof dir, "%s/test_journal.XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/var/tmp");
	ck_assert(mkdtemp(dir) != NULL);
	err = ERROR_INIT;
	j = NULL;
}

static void teardown(void)
{
	journal_close(j, WAIT_MS);
	ck_assert_msg(fs_remove_tree(dir, &err) == 0, "%s", err.message);
}

static const char *at(const char *name)
{
	static char path[4][300];
	static unsigned n;
	n = (n + 1) % 4;
	snprintf(path[n], sizeof path[n], "%s/%s", dir, name);
	return path[n];
}

static void open_it(void)
{
	ck_assert_int_eq(journal_open(dir, &j, &err), 0);
}

static void reopen(void)
{
	journal_close(j, WAIT_MS);
	open_it();
}

static struct journal_statement move(int epoch, const char *reason)
{
	return (struct journal_statement){
		.sql = "INSERT INTO move (direction, uuid, name, peer, epoch, last_epoch, begun_ms, reason) "
		       "VALUES ('out', 'u', 'vm1', 'hostb', ?1, ?1, 1, ?2)",
		.params = json_pack("[i, s]", epoch, reason)};
}

static int put(int epoch, enum journal_how how)
{
	struct journal_statement s = move(epoch, "because");
	return journal_write(j, &s, 1, how, WAIT_MS, &err);
}

/* How many moves there are, once what was queued is written. */
static long long count(void)
{
	struct journal_statement q = {.sql = "SELECT count(*) AS n FROM move"};
	json_t *rows = NULL;
	ck_assert_msg(journal_flush(j, WAIT_MS, &err) == 0, "%s", err.message);
	ck_assert_msg(journal_query(j, &q, 1, &rows, &err) == 0, "%s", err.message);
	long long n = json_integer_value(json_object_get(json_array_get(rows, 0), "n"));
	json_decref(rows);
	return n;
}

START_TEST(what_is_written_is_read_back)
{
	open_it();
	struct journal_statement s = {
		.sql = "INSERT INTO move (direction, uuid, name, peer, epoch, last_epoch, begun_ms, "
		       "ended_ms, "
		       "exit, reason, details) VALUES ('in', ?1, ?2, ?3, ?4, ?4, ?5, ?6, ?7, ?8, ?9)",
		.params = json_pack("[s, s, s, i, I, n, b, f, {s:i}]", "uuid", "vm'1; DROP TABLE move", "p",
				    7, (json_int_t)1 << 40, 1, 1.5, "rounds", 3)};
	ck_assert_msg(journal_write(j, &s, 1, JOURNAL_WAIT, WAIT_MS, &err) == 0, "%s", err.message);
	struct journal_statement q = {.sql = "SELECT name, epoch, begun_ms, ended_ms, exit, reason, details "
					     "FROM move WHERE epoch = ?1",
				      .params = json_pack("[i]", 7)};
	json_t *rows = NULL;
	ck_assert_msg(journal_query(j, &q, 10, &rows, &err) == 0, "%s", err.message);
	ck_assert_uint_eq(json_array_size(rows), 1);
	json_t *want = json_pack("{s:s, s:i, s:I, s:n, s:i, s:s, s:s}", "name", "vm'1; DROP TABLE move",
				 "epoch", 7, "begun_ms", (json_int_t)1 << 40, "ended_ms", "exit", 1, "reason",
				 "1.5", "details", "{\"rounds\":3}");
	ck_assert(json_equal(json_array_get(rows, 0), want));
	json_decref(want);
	json_decref(rows);
}
END_TEST

START_TEST(order_is_kept_and_it_is_there_after_a_restart)
{
	open_it();
	for (int i = 1; i <= 50; i++)
		ck_assert_int_eq(put(i, i % 2 ? JOURNAL_LATER : JOURNAL_DURABLE), 0);
	reopen();
	struct journal_statement q = {.sql = "SELECT epoch FROM move ORDER BY id"};
	json_t *rows = NULL;
	ck_assert_msg(journal_query(j, &q, 20, &rows, &err) == 0, "%s", err.message);
	ck_assert_uint_eq(json_array_size(rows), 20); /* no more than asked for */
	for (int i = 0; i < 20; i++)
		ck_assert_int_eq(json_integer_value(json_object_get(json_array_get(rows, i), "epoch")),
				 i + 1);
	json_decref(rows);
	ck_assert_int_eq(count(), 50);
}
END_TEST

START_TEST(statements_go_together_or_not_at_all)
{
	open_it();
	struct journal_statement two[] = {move(1, "a"), move(1, "twice")};
	ck_assert_int_eq(journal_write(j, two, 2, JOURNAL_WAIT, WAIT_MS, &err), -EEXIST);
	ck_assert_int_eq(count(), 0);
	struct journal_statement good[] = {move(1, "a"), move(2, "b")};
	ck_assert_int_eq(journal_write(j, good, 2, JOURNAL_WAIT, WAIT_MS, &err), 0);
	ck_assert_int_eq(count(), 2);
}
END_TEST

START_TEST(what_the_schema_refuses_holds_nothing_up)
{
	open_it();
	struct journal_statement bad = {.sql = "INSERT INTO nonsense VALUES (1)"};
	ck_assert_int_eq(journal_write(j, &bad, 1, JOURNAL_LATER, 0, &err), 0);
	ck_assert_int_eq(put(1, JOURNAL_LATER), 0);
	ck_assert_int_eq(count(), 1);
	ck_assert_int_eq(journal_write(j, &bad, 1, JOURNAL_WAIT, WAIT_MS, &err), -EINVAL);
	ck_assert_msg(strstr(err.message, "nonsense") != NULL, "%s", err.message);
}
END_TEST

START_TEST(garbage_is_moved_aside)
{
	FILE *f = fopen(at(JOURNAL_FILE), "w");
	for (int i = 0; i < 5000; i++)
		fputs("this is no database", f);
	fclose(f);
	open_it();
	ck_assert_msg(put(1, JOURNAL_WAIT) == 0, "%s", err.message);
	ck_assert_int_eq(count(), 1);
	struct stat st;
	ck_assert_int_eq(stat(at(JOURNAL_FILE ".corrupt"), &st), 0);
	ck_assert_int_eq(st.st_size, 5000 * 19);
}
END_TEST

/* All pages but the first are overwritten while the journal is open. */
START_TEST(a_file_that_rots_is_moved_aside_while_it_is_used)
{
	open_it();
	for (int i = 1; i <= 500; i++)
		put(i, JOURNAL_LATER);
	ck_assert_int_eq(count(), 500);
	reopen(); /* checkpointed */
	ck_assert_int_eq(count(), 500);
	CLEANUP_FILE FILE *f = fopen(at(JOURNAL_FILE), "r+");
	struct stat st;
	ck_assert_int_eq(fstat(fileno(f), &st), 0);
	ck_assert_int_gt(st.st_size, 8192);
	fseek(f, 4096, SEEK_SET);
	for (long i = 4096; i < st.st_size; i++)
		fputc(0x5a, f);
	fflush(f);
	struct journal_statement q = {.sql = "SELECT * FROM move ORDER BY begun_ms, name"};
	json_t *rows = NULL;
	/* The reader meets it, and the writer looks because of that. Or the writer met it first, and the
	 * reader finds the file on its way, or the new one. In no case are there rows of the old one. */
	int rc = journal_query(j, &q, 1000, &rows, &err);
	ck_assert(rc < 0 || json_array_size(rows) == 0);
	json_decref(rows);
	bool there = false;
	for (int i = 0; i < 200 && !there; i++) {
		there = stat(at(JOURNAL_FILE ".corrupt"), &st) == 0;
		clock_sleep_ms(50);
	}
	ck_assert(there);
	put(1000, JOURNAL_LATER);
	ck_assert_int_eq(count(), 1);
}
END_TEST

START_TEST(one_of_a_newer_program_is_left_alone)
{
	sqlite3 *db = NULL;
	ck_assert_int_eq(sqlite3_open(at(JOURNAL_FILE), &db), SQLITE_OK);
	ck_assert_int_eq(
		sqlite3_exec(db, "PRAGMA user_version = 4711; CREATE TABLE later (x)", NULL, NULL, NULL), 0);
	sqlite3_close(db);
	open_it();
	ck_assert_int_eq(put(1, JOURNAL_WAIT), -EPROTONOSUPPORT);
	ck_assert_msg(strstr(err.message, "4711") != NULL, "%s", err.message);
	journal_close(j, WAIT_MS);
	j = NULL;
	ck_assert_int_eq(sqlite3_open(at(JOURNAL_FILE), &db), SQLITE_OK);
	ck_assert_int_eq(sqlite3_exec(db, "INSERT INTO later VALUES (1)", NULL, NULL, NULL), SQLITE_OK);
	sqlite3_close(db);
}
END_TEST

START_TEST(an_empty_file_of_version_0_gets_the_tables)
{
	sqlite3 *db = NULL;
	ck_assert_int_eq(sqlite3_open(at(JOURNAL_FILE), &db), SQLITE_OK);
	ck_assert_int_eq(sqlite3_exec(db, "VACUUM", NULL, NULL, NULL), SQLITE_OK);
	sqlite3_close(db);
	open_it();
	ck_assert_msg(put(1, JOURNAL_WAIT) == 0, "%s", err.message);
	struct journal_statement q = {.sql = "PRAGMA user_version"};
	json_t *rows = NULL;
	ck_assert_int_eq(journal_query(j, &q, 1, &rows, &err), 0);
	ck_assert_int_eq(json_integer_value(json_object_get(json_array_get(rows, 0), "user_version")),
			 journal_schema_version);
	json_decref(rows);
}
END_TEST

/* Nothing can be opened there: entries wait, whoever waits hears why, and nobody is held up. */
START_TEST(what_cannot_be_written_waits)
{
	ck_assert_int_eq(mkdir(at(JOURNAL_FILE), 0700), 0);
	open_it();
	uint64_t begin = clock_now_ms();
	for (int i = 1; i <= JOURNAL_QUEUE_MAX + 10; i++)
		ck_assert_int_eq(put(i, JOURNAL_LATER), 0);
	ck_assert_int_ne(put(0, JOURNAL_WAIT), 0);
	ck_assert_msg(strstr(err.message, JOURNAL_FILE) != NULL, "%s", err.message);
	struct journal_statement q = {.sql = "SELECT 1 FROM move"};
	json_t *rows = NULL;
	ck_assert_int_lt(journal_query(j, &q, 1, &rows, &err), 0);
	ck_assert_ptr_null(rows);
	ck_assert_uint_lt(clock_now_ms() - begin, 5000);
	ck_assert_int_eq(rmdir(at(JOURNAL_FILE)), 0);
	/* the oldest were dropped, but for the one that was being tried; one place was the waiter's */
	ck_assert_int_eq(count(), JOURNAL_QUEUE_MAX - 1);
}
END_TEST

START_TEST(a_full_disk_is_waited_for)
{
	struct rlimit small = {.rlim_cur = 60000, .rlim_max = RLIM_INFINITY},
		      none = {.rlim_cur = RLIM_INFINITY, .rlim_max = RLIM_INFINITY};
	CLEANUP_FREE char *text = malloc(100001);
	memset(text, 'x', 100000);
	text[100000] = '\0';
	signal(SIGXFSZ, SIG_IGN);
	open_it();
	ck_assert_int_eq(put(1, JOURNAL_WAIT), 0);
	ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &small), 0);
	struct journal_statement s = move(2, text);
	ck_assert_int_eq(journal_write(j, &s, 1, JOURNAL_LATER, 0, &err), 0);
	put(3, JOURNAL_LATER);
	ck_assert_int_ne(journal_flush(j, 500, &err), 0);
	ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &none), 0);
	ck_assert_int_eq(count(), 3);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("journal");
	TCase *tc = tcase_create("journal");
	tcase_add_checked_fixture(tc, setup, teardown);
	tcase_add_test(tc, what_is_written_is_read_back);
	tcase_add_test(tc, order_is_kept_and_it_is_there_after_a_restart);
	tcase_add_test(tc, statements_go_together_or_not_at_all);
	tcase_add_test(tc, what_the_schema_refuses_holds_nothing_up);
	tcase_add_test(tc, garbage_is_moved_aside);
	tcase_add_test(tc, a_file_that_rots_is_moved_aside_while_it_is_used);
	tcase_add_test(tc, one_of_a_newer_program_is_left_alone);
	tcase_add_test(tc, an_empty_file_of_version_0_gets_the_tables);
	tcase_add_test(tc, what_cannot_be_written_waits);
	tcase_add_test(tc, a_full_disk_is_waited_for);
	suite_add_tcase(s, tc);
	return suite_run(s);
}
