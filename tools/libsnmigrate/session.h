/* SPDX-License-Identifier: Apache-2.0 */
#ifndef TOOLS_SNMIGRATE_SESSION_H
#define TOOLS_SNMIGRATE_SESSION_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "host/jsonl.h"

/* One move that is followed through the daemon: the request, its answer, the events, and the daemon's coming
 * back after it went away. Shows nothing, never blocks longer than a connect to the daemon's socket. */

struct session {
	const char *control; /* --control, or NULL */
	char vm[64], uuid[40], from[64];
	json_int_t epoch;
	struct jsonl *link;
	enum {
		SESSION_ASKED,	 /* the answer is awaited */
		SESSION_FOLLOWS, /* events come */
		SESSION_LOST,	 /* the daemon is looked for */
		SESSION_DONE,
	} state;
	bool accepted; /* the first request was: from now on a refusal means that the daemon has to be asked
			  again */
	uint64_t asked_ms, retry_ms, lost_ms;
};

enum session_news {
	SESSION_NOTHING,
	SESSION_BEGINS,	  /* accepted */
	SESSION_EVENT,	  /* *event */
	SESSION_END,	  /* *event is the last line */
	SESSION_REFUSED,  /* *status, err */
	SESSION_GONE,	  /* the daemon went away; it is looked for */
	SESSION_BACK,	  /* and was found */
	SESSION_GIVEN_UP, /* and was not: err */
};

#define SESSION_RECONNECT_MS 30000 /* docs/handover.md, "What users see" */

/* Connects and sends the request (taken over). On failure nothing is left open. */
int session_begin(struct session *m, const char *control, const char *vm, json_t *request, struct error *err);
/* {"cmd":"watch"} for what is known of the move. */
json_t *session_watch_request(const struct session *m);
/* The next that is there. SESSION_NOTHING: poll session_fd for POLLIN, and call again after 250 ms at the
 * latest. */
enum session_news session_read(struct session *m, json_t **event, int *status, struct error *err);
/* -1 while there is none. */
int session_fd(const struct session *m);
void session_close(struct session *m);

/* One request and its answer on a connection of its own, without waiting for it. */
struct call {
	struct jsonl *link; /* NULL: none is under way */
	uint64_t asked_ms;
};
/* The request is taken over. */
int call_begin(struct call *c, const char *control, json_t *request, struct error *err);
/* -EAGAIN: not yet. Otherwise the call is over: 0 with *reply, or what went wrong. */
int call_read(struct call *c, json_t **reply, struct error *err);
void call_close(struct call *c);

#endif
