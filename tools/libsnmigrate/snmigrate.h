/* SPDX-License-Identifier: Apache-2.0 */
#ifndef TOOLS_SNMIGRATE_H
#define TOOLS_SNMIGRATE_H

#include <getopt.h>
#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

/* One function a subcommand; argv[0] is its name. They return the exit status (host/exit.h). */
struct snmigrate {
	const char *control; /* --control, or NULL */
};

int snmigrate_move(struct snmigrate *s, int argc, char **argv);
/* Of move, for whoever has to tell an option's argument from the VM; ends with zeroes. */
extern const struct option snmigrate_move_options[];
int snmigrate_watch(struct snmigrate *s, int argc, char **argv);
int snmigrate_tune(struct snmigrate *s, int argc, char **argv);
int snmigrate_dirty_rate(struct snmigrate *s, int argc, char **argv);
int snmigrate_cancel(struct snmigrate *s, int argc, char **argv);
int snmigrate_resolve(struct snmigrate *s, int argc, char **argv);
int snmigrate_partial(struct snmigrate *s, int argc, char **argv);
int snmigrate_baseline(struct snmigrate *s, int argc, char **argv);
/* tools/libsnmigrate/move.c: all but the handover */
int snmigrate_rehearse(struct snmigrate *s, int argc, char **argv);
int snmigrate_check(struct snmigrate *s, int argc, char **argv);
/* tools/libsnmigrate/evacuate.c */
int snmigrate_evacuate(struct snmigrate *s, int argc, char **argv);
int snmigrate_return(struct snmigrate *s, int argc, char **argv);
int snmigrate_maintenance(struct snmigrate *s, int argc, char **argv);
/* tools/libsnmigrate/history.c */
int snmigrate_history(struct snmigrate *s, int argc, char **argv);
int snmigrate_status(struct snmigrate *s, int argc, char **argv);
int snmigrate_pair(struct snmigrate *s, int argc, char **argv);
int snmigrate_peers(struct snmigrate *s, int argc, char **argv);
int snmigrate_unpair(struct snmigrate *s, int argc, char **argv);
int snmigrate_pki(struct snmigrate *s, int argc, char **argv);

/* --json and --control of a subcommand that has no others; how: getopt_long(3)'s "" or "+". The rest begins
 * at optind. An exit status: one is not known, and that was said. */
int snmigrate_common_options(struct snmigrate *s, int argc, char **argv, const char *how, bool *json);
/* "snmigrate: message" and exit status 2. */
int snmigrate_usage_error(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

struct receipt;

/* tools/libsnmigrate/follow.c: moves to their end; return the exit status. */
struct follow_how {
	bool json;		 /* the events as they are, one a line */
	bool plain;		 /* lines also on a terminal */
	const json_t *predicted; /* of a rehearsal; the caller's. May be NULL */
	struct receipt
		*receipt; /* to be written at the end; NULL: none. Given up when that is not possible. */
};
/* Sends the request (taken over) and follows the move that it begins or names. host may be "". */
int follow_one(struct snmigrate *s, struct follow_how how, const char *vm, const char *host, json_t *request);
/* All moves of the host, until there is none any more. */
int follow_all(struct snmigrate *s, struct follow_how how);

/* tools/libsnmigrate/display.c: a move in lines. Names and reasons are cleaned of control characters. */
struct view;
struct display {
	bool json;     /* the events as they are, one a line */
	bool terminal; /* one line that is rewritten; else a line a phase */
	double percent;
	char phase[32];
	char vm[64], host[64];
	unsigned width;		 /* of what stands on the line */
	const struct view *view; /* the caller's, which has seen the event before it is displayed */
	unsigned told;		 /* its messages so far */
	const json_t *predicted; /* follow_how's */
};
/* many: others write lines, too. */
void display_begin(struct display *d, bool json, bool many, const char *vm, const char *host,
		   const struct view *view);
void display_event(struct display *d, json_t *event);
/* The last line; returns the exit status that it carries. */
int display_end(struct display *d, json_t *event);
/* A sentence between events (on stderr). */
void display_note(struct display *d, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* With --json every end has a last line: made here when no move began, or nothing is known of its end. */
int display_failure(struct display *d, const char *result, int exit_status, const char *reason);

#endif
