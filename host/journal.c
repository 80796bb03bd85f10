/* SPDX-License-Identifier: Apache-2.0 */
#include "host/journal.h"

#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <sqlite3.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/cond.h"
#include "base/log.h"
#include "host/jsonl.h"

#define BUSY_TIMEOUT_MS 2000
#define RETRY_FIRST_MS	1000
#define RETRY_LAST_MS	60000
#define CORRUPT_SUFFIX	".corrupt"

/* One transaction. */
struct op {
	struct op *next;
	struct journal_statement *statements;
	unsigned n;
	bool durable;
	/* of one that is waited for; the waiter frees it */
	bool waited, done, abandoned;
	struct error result;
};

struct journal {
	char path[PATH_MAX];
	pthread_t thread;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	struct op *first, **last; /* lock */
	unsigned queued;	  /* lock; with the one that is being written */
	uint64_t added, written;  /* lock; transactions so far, dropped ones are written */
	bool closing, ended;	  /* lock */
	bool suspect;		  /* lock; a reader found it corrupt */
	struct error why;	  /* lock; why it is not there now; code 0: it is */
	/* the thread's alone */
	sqlite3 *db;
	bool durable;
	unsigned retry_ms;
	unsigned dropped;
};

/* ---- statements ---- */

static int bind_text(sqlite3_stmt *st, int at, const char *text)
{
	return sqlite3_bind_text(st, at, text, -1, SQLITE_TRANSIENT);
}

static int bind(sqlite3_stmt *st, int at, const json_t *v)
{
	switch (json_typeof(v)) {
	case JSON_STRING:
		return bind_text(st, at, json_string_value(v));
	case JSON_INTEGER:
		return sqlite3_bind_int64(st, at, json_integer_value(v));
	case JSON_REAL:
		return sqlite3_bind_double(st, at, json_real_value(v));
	case JSON_TRUE:
	case JSON_FALSE:
		return sqlite3_bind_int(st, at, json_is_true(v));
	case JSON_NULL:
		return sqlite3_bind_null(st, at);
	default: {
		CLEANUP_FREE char *text = json_dumps(v, JSON_COMPACT);
		return text ? bind_text(st, at, text) : SQLITE_NOMEM;
	}
	}
}

static int prepare(sqlite3 *db, const struct journal_statement *s, sqlite3_stmt **out)
{
	int rc = sqlite3_prepare_v2(db, s->sql, -1, out, NULL);
	size_t i;
	json_t *v;
	json_array_foreach(s->params, i, v) if (rc == SQLITE_OK) rc = bind(*out, (int)i + 1, v);
	return rc;
}

static int run(sqlite3 *db, const struct journal_statement *s)
{
	sqlite3_stmt *st = NULL;
	int rc = prepare(db, s, &st);
	while (rc == SQLITE_OK || rc == SQLITE_ROW)
		rc = sqlite3_step(st);
	sqlite3_finalize(st);
	return rc == SQLITE_DONE ? SQLITE_OK : rc;
}

static int run_sql(sqlite3 *db, const char *sql)
{
	return sqlite3_exec(db, sql, NULL, NULL, NULL);
}

/* The first column of the first row as text ("" without one). */
static int ask(sqlite3 *db, const char *sql, char *out, size_t size)
{
	sqlite3_stmt *st = NULL;
	out[0] = '\0';
	int rc = sqlite3_prepare_v2(db, sql, -1, &st, NULL);
	if (rc == SQLITE_OK)
		rc = sqlite3_step(st);
	if (rc == SQLITE_ROW)
		snprintf(out, size, "%s",
			 sqlite3_column_text(st, 0) ? (const char *)sqlite3_column_text(st, 0) : "");
	sqlite3_finalize(st);
	return rc == SQLITE_ROW || rc == SQLITE_DONE ? SQLITE_OK : rc;
}

static bool is_corrupt(int rc)
{
	return (rc & 0xff) == SQLITE_CORRUPT || (rc & 0xff) == SQLITE_NOTADB;
}

/* Not the database's fault, so it would fail again. */
static bool is_refused(int rc)
{
	switch (rc & 0xff) {
	case SQLITE_CONSTRAINT:
	case SQLITE_MISMATCH:
	case SQLITE_ERROR:
	case SQLITE_RANGE:
	case SQLITE_TOOBIG:
	case SQLITE_MISUSE:
		return true;
	default:
		return false;
	}
}

static int to_errno(int rc)
{
	switch (rc & 0xff) {
	case SQLITE_FULL:
		return -ENOSPC;
	case SQLITE_BUSY:
	case SQLITE_LOCKED:
		return -EBUSY;
	case SQLITE_READONLY:
	case SQLITE_PERM:
		return -EACCES;
	case SQLITE_NOMEM:
		return -ENOMEM;
	case SQLITE_CONSTRAINT:
		return -EEXIST;
	default:
		return is_corrupt(rc) ? -EUCLEAN : is_refused(rc) ? -EINVAL : -EIO;
	}
}

static int set_error(const struct journal *j, sqlite3 *db, int rc, struct error *err)
{
	return error_set(err, to_errno(rc), "%s: %s", j->path, db ? sqlite3_errmsg(db) : sqlite3_errstr(rc));
}

/* ---- opening: the thread's ---- */

static void move_aside(struct journal *j)
{
	static const char *const parts[] = {"", "-wal", "-shm"};
	bool moved = false;
	for (size_t i = 0; i < ARRAY_SIZE(parts); i++) {
		char from[PATH_MAX + 16], to[PATH_MAX + 32];
		snprintf(from, sizeof from, "%s%s", j->path, parts[i]);
		snprintf(to, sizeof to, "%s" CORRUPT_SUFFIX "%s", j->path, parts[i]);
		moved |= rename(from, to) == 0 && !i;
	}
	if (moved)
		log_error("%s is corrupt: moved aside to %s" CORRUPT_SUFFIX ", beginning a new one", j->path,
			  j->path);
}

static int migrate(struct journal *j, sqlite3 *db, struct error *err)
{
	char text[24], sql[64];
	int rc = ask(db, "PRAGMA user_version", text, sizeof text);
	unsigned long version = strtoul(text, NULL, 10);
	if (rc == SQLITE_OK && version > journal_schema_version)
		return error_set(err, EPROTONOSUPPORT,
				 "%s has version %lu, this program knows %u: a newer one wrote it", j->path,
				 version, journal_schema_version);
	for (; rc == SQLITE_OK && version < journal_schema_version; version++) {
		snprintf(sql, sizeof sql, "PRAGMA user_version = %lu", version + 1);
		rc = run_sql(db, "BEGIN IMMEDIATE");
		if (rc == SQLITE_OK)
			rc = run_sql(db, journal_schema_steps[version]);
		if (rc == SQLITE_OK)
			rc = run_sql(db, sql);
		if (rc == SQLITE_OK)
			rc = run_sql(db, "COMMIT");
	}
	return rc == SQLITE_OK ? 0 : set_error(j, db, rc, err);
}

static int try_open(struct journal *j, struct error *err)
{
	sqlite3 *db = NULL;
	char text[256];
	int rc = sqlite3_open_v2(j->path, &db,
				 SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE | SQLITE_OPEN_NOMUTEX |
					 SQLITE_OPEN_NOFOLLOW,
				 NULL);
	if (rc == SQLITE_OK) {
		sqlite3_extended_result_codes(db, 1);
		sqlite3_busy_timeout(db, BUSY_TIMEOUT_MS);
		rc = ask(db, "PRAGMA journal_mode = WAL", text, sizeof text);
	}
	if (rc == SQLITE_OK)
		rc = run_sql(db, "PRAGMA synchronous = NORMAL");
	if (rc == SQLITE_OK)
		rc = ask(db, "PRAGMA quick_check(1)", text, sizeof text);
	int ret = 0;
	if (rc == SQLITE_OK && strcmp(text, "ok"))
		ret = error_set(err, EUCLEAN, "%s: %s", j->path, text);
	else if (rc != SQLITE_OK)
		ret = set_error(j, db, rc, err);
	else
		ret = migrate(j, db, err);
	if (ret) {
		sqlite3_close(db);
		return ret;
	}
	j->db = db;
	j->durable = false;
	return 0;
}

static void close_db(struct journal *j)
{
	sqlite3_close(steal_ptr(j->db));
}

static int open_db(struct journal *j, struct error *err)
{
	int rc = try_open(j, err);
	if (rc != -EUCLEAN)
		return rc;
	log_error("%s", err->message);
	move_aside(j);
	*err = ERROR_INIT;
	return try_open(j, err);
}

/* ---- writing: the thread's ---- */

static int transact(struct journal *j, const struct op *op)
{
	int rc = SQLITE_OK;
	if (op->durable != j->durable) {
		rc = run_sql(j->db,
			     op->durable ? "PRAGMA synchronous = FULL" : "PRAGMA synchronous = NORMAL");
		j->durable = op->durable;
	}
	if (rc == SQLITE_OK)
		rc = run_sql(j->db, "BEGIN IMMEDIATE");
	for (unsigned i = 0; rc == SQLITE_OK && i < op->n; i++)
		rc = run(j->db, &op->statements[i]);
	if (rc == SQLITE_OK)
		rc = run_sql(j->db, "COMMIT");
	return rc;
}

/* 0, or why not. *again: it may go later. */
static int write_op(struct journal *j, const struct op *op, bool *again, struct error *err)
{
	*again = true;
	int ret = j->db ? 0 : open_db(j, err);
	if (ret)
		return ret;
	int rc = transact(j, op);
	if (rc == SQLITE_OK)
		return 0;
	ret = set_error(j, j->db, rc, err);
	*again = !is_refused(rc);
	if (!sqlite3_get_autocommit(j->db))
		run_sql(j->db, "ROLLBACK");
	/* what the file is now is found out by opening it again */
	if (*again && (rc & 0xff) != SQLITE_BUSY)
		close_db(j);
	return ret;
}

static void free_op(struct op *op)
{
	for (unsigned i = 0; i < op->n; i++)
		json_decref(op->statements[i].params);
	free(op->statements);
	free(op);
}

/* lock held. The first one is through, or given up. */
static void finish_first(struct journal *j, const struct error *result)
{
	struct op *op = j->first;
	j->first = op->next;
	if (!j->first)
		j->last = &j->first;
	j->queued--;
	j->written++;
	bool waiter = op->waited && !op->abandoned;
	if (waiter) {
		op->result = *result;
		op->done = true;
	}
	pthread_cond_broadcast(&j->changed);
	if (!waiter)
		free_op(op);
}

/* lock held; returns with it held. */
static void timed_wait(struct journal *j, unsigned ms)
{
	struct timespec until = clock_timespec(clock_now_ns() + ms * UINT64_C(1000000));
	pthread_cond_timedwait(&j->changed, &j->lock, &until);
}

/* lock held. Told once, when it begins and when it ends. */
static void note_state(struct journal *j, const struct error *err)
{
	if (err->code && !j->why.code)
		log_error("journal: %s; moves go on without it", err->message);
	else if (!err->code && j->why.code)
		log_info("journal: %s is written again", j->path);
	j->why = *err;
	if (!err->code) {
		j->retry_ms = RETRY_FIRST_MS;
		if (j->dropped)
			log_warn("journal: %u entries are missing: there were too many while it could not be "
				 "written",
				 j->dropped);
		j->dropped = 0;
	}
}

/* lock held: until there is something to do and, after a failure, the time has passed. */
static void wait_for_work(struct journal *j)
{
	uint64_t until = j->why.code ? clock_now_ms() + j->retry_ms : 0;
	while (!j->closing) {
		bool waited = false; /* whoever waits hears at once */
		for (const struct op *op = j->first; op; op = op->next)
			waited |= op->waited && !op->abandoned;
		uint64_t now = clock_now_ms();
		if (j->suspect || waited || (j->first && now >= until) || (until && now >= until))
			break;
		timed_wait(j, until ? (unsigned)(until - now) : RETRY_LAST_MS);
	}
	if (j->why.code && clock_now_ms() >= until)
		j->retry_ms = j->retry_ms * 2 < RETRY_LAST_MS ? j->retry_ms * 2 : RETRY_LAST_MS;
}

/* lock held. What cannot be written now stays, but for those who wait for it. */
static void fail_waiters(struct journal *j, const struct error *why)
{
	for (struct op **at = &j->first; *at;) {
		struct op *op = *at;
		if (!op->waited) {
			at = &op->next;
			continue;
		}
		*at = op->next;
		j->queued--;
		j->written++;
		op->result = *why;
		op->done = true;
		if (op->abandoned)
			free_op(op);
	}
	j->last = &j->first;
	while (*j->last)
		j->last = &(*j->last)->next;
	pthread_cond_broadcast(&j->changed);
}

static void *write_all(void *arg)
{
	struct journal *j = arg;
	struct error err = ERROR_INIT;
	int rc = open_db(j, &err);
	pthread_mutex_lock(&j->lock);
	note_state(j, &err);
	while (!j->closing || (j->first && !j->why.code)) {
		wait_for_work(j);
		bool suspect = j->suspect;
		j->suspect = false;
		const struct op *op = j->first;
		pthread_mutex_unlock(&j->lock);
		err = ERROR_INIT;
		bool again = true;
		if (suspect && j->db)
			close_db(j);
		rc = op ? write_op(j, op, &again, &err) : j->db ? 0 : open_db(j, &err);
		pthread_mutex_lock(&j->lock);
		if (rc && !again) {
			log_error("journal: %s: not written", err.message);
		} else {
			note_state(j, &err);
			if (rc)
				fail_waiters(j, &err);
		}
		if (op && (!rc || !again))
			finish_first(j, &err);
	}
	pthread_mutex_unlock(&j->lock);
	close_db(j);
	SCOPE_LOCK(&j->lock);
	j->ended = true;
	pthread_cond_broadcast(&j->changed);
	return NULL;
}

/* ---- what others call ---- */

int journal_open(const char *state_dir, struct journal **out, struct error *err)
{
	struct journal *j = calloc(1, sizeof *j);
	if (!j)
		return error_errno(err, ENOMEM, "journal");
	snprintf(j->path, sizeof j->path, "%s/" JOURNAL_FILE, state_dir);
	pthread_mutex_init(&j->lock, NULL);
	cond_init_monotonic(&j->changed);
	j->last = &j->first;
	j->retry_ms = RETRY_FIRST_MS;
	int rc = pthread_create(&j->thread, NULL, write_all, j);
	if (rc) {
		free(j);
		return error_errno(err, rc, "journal: thread");
	}
	*out = j;
	return 0;
}

void journal_close(struct journal *j, unsigned timeout_ms)
{
	if (!j)
		return;
	uint64_t deadline = clock_now_ms() + timeout_ms, now;
	pthread_mutex_lock(&j->lock);
	j->closing = true;
	pthread_cond_broadcast(&j->changed);
	while (!j->ended && (now = clock_now_ms()) < deadline)
		timed_wait(j, (unsigned)(deadline - now));
	bool ended = j->ended;
	pthread_mutex_unlock(&j->lock);
	if (!ended)
		return; /* its disk does not answer */
	pthread_join(j->thread, NULL);
	while (j->first) {
		struct op *op = j->first;
		j->first = op->next;
		free_op(op);
	}
	pthread_cond_destroy(&j->changed);
	pthread_mutex_destroy(&j->lock);
	free(j);
}

static struct op *make_op(const struct journal_statement *s, unsigned n, enum journal_how how)
{
	struct op *op = calloc(1, sizeof *op);
	struct journal_statement *copy = calloc(n, sizeof *copy);
	if (!op || !copy) {
		for (unsigned i = 0; i < n; i++)
			json_decref(s[i].params);
		free(op);
		free(copy);
		return NULL;
	}
	memcpy(copy, s, n * sizeof *copy);
	op->statements = copy;
	op->n = n;
	op->durable = how != JOURNAL_LATER;
	op->waited = how == JOURNAL_WAIT;
	return op;
}

/* lock held. The oldest that is not being written goes first. */
static void drop_one(struct journal *j)
{
	struct op *op = j->first ? j->first->next : NULL;
	if (!op || op->waited)
		return;
	j->first->next = op->next;
	if (!op->next)
		j->last = &j->first->next;
	j->queued--;
	j->written++;
	j->dropped++;
	free_op(op);
}

int journal_write(struct journal *j, const struct journal_statement *statements, unsigned n,
		  enum journal_how how, unsigned timeout_ms, struct error *err)
{
	struct op *op = make_op(statements, n, how);
	if (!op)
		return error_errno(err, ENOMEM, "journal");
	uint64_t deadline = clock_now_ms() + timeout_ms;
	pthread_mutex_lock(&j->lock);
	if (j->queued >= JOURNAL_QUEUE_MAX)
		drop_one(j);
	*j->last = op;
	j->last = &op->next;
	j->queued++;
	j->added++;
	pthread_cond_broadcast(&j->changed);
	int rc = 0;
	if (how == JOURNAL_WAIT) {
		uint64_t now;
		while (!op->done && (now = clock_now_ms()) < deadline)
			timed_wait(j, (unsigned)(deadline - now));
		if (op->done) {
			rc = op->result.code;
			error_copy(err, &op->result);
			free_op(op);
		} else {
			op->abandoned = true;
			rc = error_set(err, ETIMEDOUT, "%s: not written within %u ms", j->path, timeout_ms);
		}
	}
	pthread_mutex_unlock(&j->lock);
	return rc;
}

int journal_flush(struct journal *j, unsigned timeout_ms, struct error *err)
{
	uint64_t deadline = clock_now_ms() + timeout_ms;
	SCOPE_LOCK(&j->lock);
	uint64_t want = j->added, now;
	while (j->written < want && (now = clock_now_ms()) < deadline)
		timed_wait(j, (unsigned)(deadline - now));
	if (j->written >= want)
		return 0;
	if (j->why.code) {
		error_copy(err, &j->why);
		return j->why.code;
	}
	return error_set(err, ETIMEDOUT, "%s: not written within %u ms", j->path, timeout_ms);
}

static json_t *column(sqlite3_stmt *st, int i)
{
	switch (sqlite3_column_type(st, i)) {
	case SQLITE_INTEGER:
		return json_integer(sqlite3_column_int64(st, i));
	case SQLITE_FLOAT:
		return json_real(sqlite3_column_double(st, i));
	case SQLITE_TEXT:
		return jsonl_text((const char *)sqlite3_column_text(st, i));
	default:
		return json_null();
	}
}

static int read_rows(sqlite3 *db, const struct journal_statement *s, size_t max_rows, json_t *rows)
{
	sqlite3_stmt *st = NULL;
	int rc = prepare(db, s, &st);
	while ((rc == SQLITE_OK || rc == SQLITE_ROW) && json_array_size(rows) < max_rows) {
		rc = sqlite3_step(st);
		if (rc != SQLITE_ROW)
			break;
		json_t *row = json_object();
		for (int i = 0; i < sqlite3_column_count(st); i++)
			json_object_set_new(row, sqlite3_column_name(st, i), column(st, i));
		json_array_append_new(rows, row);
	}
	sqlite3_finalize(st);
	return rc == SQLITE_DONE || rc == SQLITE_ROW ? SQLITE_OK : rc;
}

int journal_query(struct journal *j, const struct journal_statement *statement, size_t max_rows, json_t **out,
		  struct error *err)
{
	sqlite3 *db = NULL;
	json_t *rows = json_array();
	pthread_mutex_lock(&j->lock);
	struct error why = j->why;
	pthread_mutex_unlock(&j->lock);
	int rc = sqlite3_open_v2(j->path, &db,
				 SQLITE_OPEN_READONLY | SQLITE_OPEN_NOMUTEX | SQLITE_OPEN_NOFOLLOW, NULL);
	if (rc == SQLITE_OK) {
		sqlite3_busy_timeout(db, BUSY_TIMEOUT_MS);
		rc = read_rows(db, statement, max_rows, rows);
	}
	json_decref(statement->params);
	int ret = 0;
	if (rc != SQLITE_OK) {
		ret = set_error(j, db, rc, err);
		/* the thread knows better why it is not there */
		if (why.code)
			error_copy(err, &why);
		json_decref(steal_ptr(rows));
	}
	sqlite3_close(db);
	if (is_corrupt(rc)) {
		SCOPE_LOCK(&j->lock);
		j->suspect = true;
		pthread_cond_broadcast(&j->changed);
	}
	*out = rows;
	return ret;
}
