/* SPDX-License-Identifier: Apache-2.0 */
/* interface: what the journal says of moves */
#ifndef HOST_RECORDER_H
#define HOST_RECORDER_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "host/record.h"

/*
 * One thread looks after every move that the journal has as under way, twice a second: its phase, and how it
 * ended, from what the VM's snvmm says, the last line that it wrote down, and the record. So the journal
 * tells the truth also of a move that ended while nobody watched, or while no daemon ran: at its start the
 * thread takes up what an earlier daemon left, and what it finds on disk that the journal does not have.
 * Nothing here is in a move's way: it is told that one begins, and reads.
 */
struct daemon;
struct recorder;
struct journal;

/* Opens the journal and starts the thread. */
int recorder_start(struct daemon *d, struct error *err);
/* Waits a moment for what is to be written. */
void recorder_stop(struct daemon *d);
/* A move begins here ("out") or arrives ("in"). Returns at once; any thread. */
void recorder_begin(struct daemon *d, bool incoming, const char *uuid, const char *name, const char *peer,
		    uint64_t epoch);
/* The database, for plans and for whoever reads it. */
struct journal *recorder_journal(struct daemon *d);

/* ---- the judgement, pure (host/recorder_judge.c) ---- */

struct move_facts {
	bool incoming;
	uint64_t epoch; /* with which the move began here */
	const char *peer;
	bool live;			/* the VM has a snvmm */
	bool busy;			/* which works on this move, or a later attempt of it */
	bool doubt;			/* and says that it is in doubt */
	bool patient;			/* what is missing may still be written */
	const struct vm_record *record; /* NULL: none */
	const json_t *stored;		/* the last line that was written down of this move, NULL: none */
};

enum move_verdict {
	MOVE_UNDER_WAY,
	MOVE_WAITING, /* it has a result for now, but is not over: in doubt, or not confirmed */
	MOVE_OVER,
};

struct move_outcome {
	enum move_verdict verdict;
	char result[24]; /* moved, rehearsed, refused, failed, cancelled, in-doubt, crashed, unknown; "" while under way
			  */
	int exit;	 /* host/exit.h */
	char reason[ERROR_MESSAGE_BYTES];
};

/* Of the move of a stopped VM whose process died before COMMIT. */
#define MOVE_COLD_BROKEN                                                                                     \
	"the process that moved the stopped VM ended before it was handed over; the VM is stopped here, as " \
	"before"

void move_judge(const struct move_facts *f, struct move_outcome *out);
/* Whether that last line is one of the move that began with this epoch. */
bool move_line_matches(const json_t *line, bool incoming, uint64_t epoch);

#endif
