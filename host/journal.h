/* SPDX-License-Identifier: Apache-2.0 */
/* interface: the journal of this host, SQLite in STATE/journal.db */
#ifndef HOST_JOURNAL_H
#define HOST_JOURNAL_H

#include <jansson.h>
#include <stddef.h>

#include "base/error.h"

/*
 * What happened, for people and for plans: never the authority on who owns a VM (that is the record), and
 * nothing waits for it. All writing is done by a thread of the journal's own, in the order given; while the
 * database cannot be written (full, read-only, locked) its statements wait in memory, JOURNAL_QUEUE_MAX of
 * them, and are tried again. A file that is no sound database is moved aside to journal.db.corrupt, one of a
 * newer program is left alone; each is said once in the log.
 *
 * WAL: readers are never in the way of the writer. Only statements that say so are followed by an fsync, so
 * that the journal does not do one beside somebody's handover; a power failure may cost the latest of the
 * others, never the database.
 *
 * Tables: host/journal_schema.c. To add one, append a step to the list there.
 */
#define JOURNAL_FILE	  "journal.db"
#define JOURNAL_QUEUE_MAX 4096

struct journal;

struct journal_statement {
	const char *sql; /* one statement; a literal: it is not copied */
	json_t *params;	 /* array for its ?1, ?2...: text, integers, reals, booleans, null; objects as JSON
			    text.  Taken over; may be NULL */
};

enum journal_how {
	JOURNAL_LATER,	 /* returns at once */
	JOURNAL_DURABLE, /* as LATER, and followed by an fsync */
	JOURNAL_WAIT,	 /* durable, and returns when it is; not tried again */
};

/* Starts the thread, which opens the file. Fails only without memory or thread. */
int journal_open(const char *state_dir, struct journal **out, struct error *err);
/* Waits at most timeout_ms for what is queued; if that does not do, the journal is left to the process's end.
 * NULL is fine. */
void journal_close(struct journal *j, unsigned timeout_ms);

/*
 * The n statements as one transaction. LATER and DURABLE: 0. WAIT: how it went, -ETIMEDOUT after timeout_ms
 * (it may still be done). A statement that the schema refuses is logged and dropped. n is 1 at the least.
 */
int journal_write(struct journal *j, const struct journal_statement *statements, unsigned n,
		  enum journal_how how, unsigned timeout_ms, struct error *err);
/* Waits until what was queued before is written; -ETIMEDOUT. */
int journal_flush(struct journal *j, unsigned timeout_ms, struct error *err);
/*
 * Array of objects by column names, at most max_rows. On a read-only connection of its own, any thread; sees
 * what is written (journal_flush first, to see one's own).
 */
int journal_query(struct journal *j, const struct journal_statement *statement, size_t max_rows,
		  json_t **rows, struct error *err);

/* host/journal_schema.c: steps[v] turns version v (PRAGMA user_version) into v + 1. */
extern const char *const journal_schema_steps[];
extern const unsigned journal_schema_version;

#endif
