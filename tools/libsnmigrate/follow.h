/* SPDX-License-Identifier: Apache-2.0 */
#ifndef TOOLS_SNMIGRATE_FOLLOW_H
#define TOOLS_SNMIGRATE_FOLLOW_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "tools/libsnmigrate/session.h"
#include "tools/libsnmigrate/snmigrate.h"
#include "tui/model.h"
#include "tui/ui.h"

/* Following moves to their end, one or all of the host, in lines (follow.c) or on a full screen
 * (fullscreen.c). */

struct followed {
	struct session session;
	struct view view;
	struct display display;
	uint64_t heard_ms; /* when its last event came */
	bool over, printed;
	int status;
	json_t *end;				      /* its last line, or */
	char failed[16], reason[ERROR_MESSAGE_BYTES]; /* why there is none */
};

struct follow {
	struct snmigrate *s;
	struct follow_how how;
	bool all;	 /* of the host, not one */
	bool fullscreen; /* what is said waits until the screen is left */
	struct followed *move[UI_MOVES];
	unsigned nmoves;
	struct call list;			     /* what moves there are */
	uint64_t next_list_ms, answered_ms, seen_ms; /* seen: a move that was under way */
	bool listed;
	int failed_status; /* the list could not be had */
	char failed[ERROR_MESSAGE_BYTES];
};

/* True once a signal asked to leave. */
bool follow_interrupted(void);
/* Reads all that is there. Returns true if anything changed. */
bool follow_step(struct follow *f);
/* Nothing is left to follow. */
bool follow_over(const struct follow *f);
/* Adds the descriptors to wait for; returns how many. */
struct pollfd;
unsigned follow_fds(const struct follow *f, struct pollfd *p, unsigned max);
#define FOLLOW_WAIT_MS 250

/* fullscreen.c: until all is over (true), or the user leaves (false). -errno where there is no such screen.
 */
int fullscreen_follow(struct follow *f, bool *left);

#endif
