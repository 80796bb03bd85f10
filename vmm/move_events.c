/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/move_events.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/cond.h"
#include "base/clock.h"

#define EVENTS_KEPT 512

struct move_events {
	pthread_mutex_t lock;
	pthread_cond_t changed;
	json_t *item[EVENTS_KEPT]; /* number n is item[n % EVENTS_KEPT] */
	unsigned end;		   /* number of the next one */
	json_t *final;
};

struct move_events *move_events_create(void)
{
	struct move_events *ev = calloc(1, sizeof *ev);
	if (!ev)
		return NULL;
	pthread_mutex_init(&ev->lock, NULL);
	cond_init_monotonic(&ev->changed);
	return ev;
}

void move_events_free(struct move_events *ev)
{
	if (!ev)
		return;
	for (unsigned i = 0; i < EVENTS_KEPT; i++)
		json_decref(ev->item[i]);
	json_decref(ev->final);
	pthread_cond_destroy(&ev->changed);
	pthread_mutex_destroy(&ev->lock);
	free(ev);
}

void move_events_emit(struct move_events *ev, json_t *event, bool final)
{
	if (!event)
		return;
	SCOPE_LOCK(&ev->lock);
	if (ev->final) {
		json_decref(event);
		return;
	}
	if (final)
		ev->final = json_incref(event);
	json_decref(ev->item[ev->end % EVENTS_KEPT]);
	ev->item[ev->end % EVENTS_KEPT] = event;
	ev->end++;
	pthread_cond_broadcast(&ev->changed);
}

json_t *move_events_wait(struct move_events *ev, unsigned *next, unsigned timeout_ms, bool *ended)
{
	uint64_t deadline = clock_now_ns() + timeout_ms * UINT64_C(1000000);
	struct timespec until = clock_timespec(deadline);
	SCOPE_LOCK(&ev->lock);
	*ended = false;
	while (*next >= ev->end) {
		if (ev->final) {
			*ended = true;
			return NULL;
		}
		if (pthread_cond_timedwait(&ev->changed, &ev->lock, &until))
			return NULL;
	}
	if (ev->end - *next > EVENTS_KEPT)
		*next = ev->end - EVENTS_KEPT;
	return json_incref(ev->item[(*next)++ % EVENTS_KEPT]);
}

json_t *move_events_final(struct move_events *ev)
{
	SCOPE_LOCK(&ev->lock);
	return json_incref(ev->final);
}
