/* SPDX-License-Identifier: Apache-2.0 */
#ifndef TUI_MODEL_H
#define TUI_MODEL_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * A move as its events tell it (docs/man/snmigrate.1.scd, "JSON lines"): plain data, changed by view_event
 * and view_end alone. Events and phases that are unknown here are kept by their names. Every text in it has
 * been through text_clean, and every number is bounded: what the events say is not trusted.
 *
 * Per cent and time left follow the bytes still to move and go backwards only together with a message that
 * says why; until then they stand still.
 */

#define VIEW_PHASES   24
#define VIEW_DISKS    64
#define VIEW_ROUNDS   32
#define VIEW_HISTORY  512
#define VIEW_MESSAGES 64
#define VIEW_TEXT     320

struct view_phase {
	char name[24];
	uint64_t began_ms, ended_ms; /* since the move's start; of the present one ended_ms is 0 */
};

struct view_disk {
	char id[40];
	uint64_t total_bytes, synced_bytes, copied_bytes, mirrored_bytes;
};

struct view_round {
	unsigned number;
	uint64_t bytes; /* that it began with */
};

struct view_memory {
	bool known;
	uint64_t total_bytes, remaining_bytes, round_bytes, sent_bytes, wire_bytes;
	unsigned round;
};

struct view_sample {	      /* a progress event's */
	uint64_t send, dirty; /* bytes a second */
};

struct view_message {
	uint64_t ms;
	char text[VIEW_TEXT];
};

struct view {
	char vm[72], from[72], host[72];
	uint64_t now_ms; /* of the last event, since the move's start */

	struct view_phase phase[VIEW_PHASES];
	unsigned nphases;
	struct view_disk disk[VIEW_DISKS];
	unsigned ndisks;
	struct view_memory memory;
	struct view_round round[VIEW_ROUNDS]; /* the last ones, oldest first */
	unsigned nrounds;

	uint64_t send_rate, dirty_rate;		  /* bytes a second, now */
	struct view_sample history[VIEW_HISTORY]; /* sample i is history[i % VIEW_HISTORY] */
	unsigned nsamples;			  /* seen in all */

	double percent;
	bool left_known;
	uint64_t left_ms, remaining_bytes;
	bool downtime_predicted;
	double predicted_downtime_ms;
	unsigned slowed_percent; /* the guest, so that it dirties less; 0: not */
	uint64_t bandwidth;	 /* 0: no limit */
	bool throttled;
	uint64_t verify_bytes, verified_bytes; /* of the proof that the disks agree, while it runs */
	uint64_t buffered_bytes;	       /* the guest's writes on their way to the destination */
	struct view_postcopy {
		bool known, connected;
		uint64_t faults, median_us, worst_us; /* the guest's waits for a page */
	} postcopy;

	struct view_message message[VIEW_MESSAGES]; /* message i is message[i % VIEW_MESSAGES] */
	unsigned nmessages;			    /* in all */
	char repeats[24]; /* the event that the last message is of, if the next of its kind replaces it */

	bool ended;
	char result[24], reason[VIEW_TEXT];
	int exit_status;
	double downtime_ms;
	uint64_t total_ms;

	/* how per cent and time left are kept from running backwards */
	bool excused;	    /* a message came: the next figures may be worse */
	unsigned late;	    /* events in a row that expect the end much later than is shown */
	uint64_t left_rate; /* of sending when left_ms was taken over last */
};

/* from and host may be "". */
void view_init(struct view *v, const char *vm, const char *from, const char *host);
/* Any event but the last one. */
void view_event(struct view *v, const json_t *event);
/* The last line, the one with "result". */
void view_end(struct view *v, const json_t *event);
/* A message of the program's own, at now_ms. */
void view_note(struct view *v, const char *text);

/* The phase under way, "" before the first. */
const char *view_phase_name(const struct view *v);
/* Sample number i (below nsamples and among the last VIEW_HISTORY); message likewise. */
const struct view_sample *view_sample(const struct view *v, unsigned i);
const struct view_message *view_message(const struct view *v, unsigned i);

#endif
