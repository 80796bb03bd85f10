/* SPDX-License-Identifier: Apache-2.0 */
#ifndef VMM_MOVE_EVENTS_H
#define VMM_MOVE_EVENTS_H

#include <jansson.h>
#include <stdbool.h>

/* What happened in a move, for any number of watchers. Bounded: old progress is forgotten, phases and the end
 * are not. Any thread. */
struct move_events;

struct move_events *move_events_create(void);
void move_events_free(struct move_events *ev); /* no watcher may be left */
/* Takes the reference. After the final one nothing is added. */
void move_events_emit(struct move_events *ev, json_t *event, bool final);
/*
 * The event with number *next or the first later one still known; advances *next; new reference. NULL when
 * timeout_ms passed, or when the final event was already given (*ended).
 */
json_t *move_events_wait(struct move_events *ev, unsigned *next, unsigned timeout_ms, bool *ended);
/* The final event (new reference) or NULL. */
json_t *move_events_final(struct move_events *ev);

#endif
