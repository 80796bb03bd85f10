/* SPDX-License-Identifier: Apache-2.0 */
#include "tui/model.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "tui/text.h"

/* Beyond these a number is nonsense, and sums of a few cannot overflow. */
#define BYTES_MAX (UINT64_C(1) << 60)
#define MS_MAX	  (UINT64_C(1) << 42) /* 139 years */
/* The end is expected later than shown by this much, in so many events in a row: that is said. */
#define LATE_FACTOR 1.25
#define LATE_MS	    2000
#define LATE_EVENTS 2

static const char *text(const json_t *o, const char *key)
{
	const char *s = json_string_value(json_object_get(o, key));
	return s ? s : "";
}

static uint64_t count(const json_t *o, const char *key, uint64_t max)
{
	double d = json_number_value(json_object_get(o, key));
	if (!(d > 0)) /* NaN, too */
		return 0;
	return d >= (double)max ? max : (uint64_t)d;
}

static uint64_t size(const json_t *o, const char *key)
{
	return count(o, key, BYTES_MAX);
}

void view_init(struct view *v, const char *vm, const char *from, const char *host)
{
	memset(v, 0, sizeof *v);
	text_clean(v->vm, sizeof v->vm, vm);
	text_clean(v->from, sizeof v->from, from);
	text_clean(v->host, sizeof v->host, host);
}

const char *view_phase_name(const struct view *v)
{
	return v->nphases ? v->phase[v->nphases - 1].name : "";
}

const struct view_sample *view_sample(const struct view *v, unsigned i)
{
	return &v->history[i % VIEW_HISTORY];
}

const struct view_message *view_message(const struct view *v, unsigned i)
{
	return &v->message[i % VIEW_MESSAGES];
}

void view_note(struct view *v, const char *said)
{
	struct view_message *m = &v->message[v->nmessages++ % VIEW_MESSAGES];
	m->ms = v->now_ms;
	text_clean(m->text, sizeof m->text, said);
	*v->repeats = '\0';
}

/* --- phases --- */

static void enter_phase(struct view *v, const char *raw)
{
	char name[sizeof v->phase->name];
	text_clean(name, sizeof name, raw);
	if (!*name || !strcmp(name, view_phase_name(v)))
		return;
	if (v->nphases)
		v->phase[v->nphases - 1].ended_ms = v->now_ms ? v->now_ms : 1;
	if (v->nphases == VIEW_PHASES) /* of many attempts the last count */
		memmove(v->phase, v->phase + 1, --v->nphases * sizeof *v->phase);
	struct view_phase *p = &v->phase[v->nphases++];
	*p = (struct view_phase){.began_ms = v->now_ms};
	memcpy(p->name, name, sizeof name);
}

/* --- what a progress event carries --- */

static void take_disks(struct view *v, const json_t *disks)
{
	size_t i;
	json_t *o;
	if (!json_is_array(disks))
		return;
	v->ndisks = 0;
	json_array_foreach((json_t *)disks, i, o)
	{
		if (v->ndisks == VIEW_DISKS)
			break;
		struct view_disk *d = &v->disk[v->ndisks++];
		text_clean(d->id, sizeof d->id, text(o, "id"));
		d->total_bytes = size(o, "total_bytes");
		d->synced_bytes = size(o, "synced_bytes");
		if (d->synced_bytes > d->total_bytes)
			d->synced_bytes = d->total_bytes;
		d->copied_bytes = size(o, "copied_bytes");
		d->mirrored_bytes = size(o, "mirrored_bytes");
	}
}

static void take_round(struct view *v)
{
	const struct view_memory *m = &v->memory;
	struct view_round *last = v->nrounds ? &v->round[v->nrounds - 1] : NULL;
	if (last && last->number == m->round) {
		last->bytes = m->round_bytes;
		return;
	}
	if (v->nrounds == VIEW_ROUNDS)
		memmove(v->round, v->round + 1, --v->nrounds * sizeof *v->round);
	v->round[v->nrounds++] = (struct view_round){m->round, m->round_bytes};
}

static void take_memory(struct view *v, const json_t *o)
{
	struct view_memory *m = &v->memory;
	if (!json_is_object(o))
		return;
	m->known = true;
	m->total_bytes = size(o, "total_bytes");
	m->remaining_bytes = size(o, "remaining_bytes");
	m->round_bytes = size(o, "round_bytes");
	if (m->round_bytes < m->remaining_bytes)
		m->round_bytes = m->remaining_bytes;
	m->sent_bytes = size(o, "sent_bytes");
	m->wire_bytes = size(o, "wire_bytes");
	m->round = (unsigned)count(o, "round", 1000000);
	if (m->round)
		take_round(v);
}

static void take_postcopy(struct view *v, const json_t *o)
{
	if (!json_is_object(o))
		return;
	v->postcopy = (struct view_postcopy){.known = true,
					     .connected = json_is_true(json_object_get(o, "connected")),
					     .faults = count(o, "faults", MS_MAX),
					     .median_us = count(o, "fault_median_us", MS_MAX),
					     .worst_us = count(o, "fault_worst_us", MS_MAX)};
}

static void take_rates(struct view *v, const json_t *event)
{
	v->send_rate = size(event, "rate_bytes_per_s");
	v->dirty_rate = size(event, "dirty_bytes_per_s");
	v->history[v->nsamples++ % VIEW_HISTORY] =
		(struct view_sample){.send = v->send_rate, .dirty = v->dirty_rate};
	v->bandwidth = size(event, "bandwidth_bytes_per_s");
	v->throttled = v->bandwidth && json_is_true(json_object_get(event, "throttled"));
	v->buffered_bytes = size(event, "mirror_buffered_bytes");
	v->slowed_percent = (unsigned)count(event, "guest_slowed_percent", 100);
	v->verify_bytes = size(event, "verify_bytes");
	v->verified_bytes = size(event, "verified_bytes");
	const json_t *downtime = json_object_get(event, "predicted_downtime_ms");
	double ms = json_number_value(downtime);
	v->downtime_predicted = json_is_number(downtime) && ms >= 0 && ms < (double)MS_MAX;
	v->predicted_downtime_ms = v->downtime_predicted ? ms : 0;
}

/* --- per cent and time left --- */

static void take_percent(struct view *v, const json_t *event)
{
	double now = json_number_value(json_object_get(event, "percent"));
	uint64_t total = size(event, "total_bytes");
	v->remaining_bytes = size(event, "remaining_bytes");
	/* the event's own never falls; from the bytes it can be seen to, where a reason was given */
	if (json_object_get(event, "remaining_bytes") && total && v->remaining_bytes <= total)
		now = 99.0 * (double)(total - v->remaining_bytes) / (double)total;
	if (!(now >= 0))
		now = 0;
	if (now > 99)
		now = 99; /* the rest is the end's */
	if (now > v->percent || v->excused)
		v->percent = now;
}

static void take_left(struct view *v, uint64_t left)
{
	v->left_ms = left;
	v->left_known = true;
	v->left_rate = v->send_rate;
	v->late = 0;
}

/* Why the end is further away than was thought. */
static void say_later(struct view *v, uint64_t left)
{
	char said[VIEW_TEXT], was[TEXT_BYTES], is[TEXT_BYTES], to[TEXT_BYTES], rest[TEXT_BYTES];
	text_clock(v->left_ms, was);
	text_clock(left, to);
	text_bytes((double)v->remaining_bytes, rest);
	if ((double)v->send_rate < 0.8 * (double)v->left_rate)
		snprintf(said, sizeof said, "time left %s, not %s: sending slowed down to %s/s, %s to move",
			 to, was, text_bytes((double)v->send_rate, is), rest);
	else if (v->memory.round > 1)
		snprintf(said, sizeof said,
			 "time left %s, not %s: the guest dirties %s/s, round %u of the memory", to, was,
			 text_bytes((double)v->dirty_rate, is), v->memory.round);
	else
		snprintf(said, sizeof said, "time left %s, not %s: %s to move at %s/s", to, was, rest,
			 text_bytes((double)v->send_rate, is));
	view_note(v, said);
}

static void take_eta(struct view *v, const json_t *event)
{
	uint64_t left = count(event, "eta_ms", MS_MAX);
	if (!left)
		return; /* not known: what was known stays */
	if (!v->left_known || left <= v->left_ms || v->excused) {
		take_left(v, left);
	} else if ((double)left > (double)v->left_ms * LATE_FACTOR + LATE_MS) {
		if (++v->late >= LATE_EVENTS) {
			say_later(v, left);
			take_left(v, left);
		}
	} else {
		v->late = 0;
	}
}

static bool was_in_phase(const struct view *v, const char *name)
{
	for (unsigned i = 0; i < v->nphases; i++)
		if (!strncmp(v->phase[i].name, name, sizeof v->phase->name - 1))
			return true;
	return false;
}

static void take_progress(struct view *v, const json_t *event)
{
	/* back to a former phase goes only an event of its own: a progress may know them more coarsely */
	if (!was_in_phase(v, text(event, "phase")))
		enter_phase(v, text(event, "phase"));
	take_rates(v, event);
	take_disks(v, json_object_get(event, "disks"));
	take_memory(v, json_object_get(event, "memory"));
	take_postcopy(v, json_object_get(event, "postcopy"));
	take_percent(v, event);
	take_eta(v, event);
	v->excused = false;
}

/* "message", and events that came after this program: their name and the sentence that they carry. */
static void take_other(struct view *v, const json_t *event, const char *name)
{
	static const char *const keys[] = {"text", "message", "reason", "why", "error"};
	char said[VIEW_TEXT], clock[TEXT_BYTES], rest[48] = "";
	const char *sentence = "";
	uint64_t left = count(event, "left_ms", MS_MAX); /* of a patience */
	if (left)
		snprintf(rest, sizeof rest, ", for another %s", text_clock(left, clock));
	for (size_t i = 0; !*sentence && i < sizeof keys / sizeof *keys; i++)
		sentence = text(event, keys[i]);
	if (!strcmp(name, "message"))
		snprintf(said, sizeof said, "%s", sentence);
	else
		snprintf(said, sizeof said, "%s%s%s%s", name, *sentence ? ": " : "", sentence, rest);
	v->excused = true;
	if (!*said)
		return;
	/* such as "retrying for another 10 s", every second */
	bool again = *v->repeats && !strncmp(name, v->repeats, sizeof v->repeats - 1);
	if (again)
		v->nmessages--;
	view_note(v, said);
	if (strcmp(name, "message"))
		snprintf(v->repeats, sizeof v->repeats, "%s", name);
}

void view_event(struct view *v, const json_t *event)
{
	const char *name = text(event, "event");
	uint64_t ms = count(event, "ms", MS_MAX);
	if (ms > v->now_ms)
		v->now_ms = ms;
	if (!*v->host)
		text_clean(v->host, sizeof v->host, text(event, "peer"));
	if (!strcmp(name, "phase")) {
		/* a phase once more: another attempt, which begins with its own figures */
		v->excused |= was_in_phase(v, text(event, "phase"));
		enter_phase(v, text(event, "phase"));
	} else if (!strcmp(name, "progress"))
		take_progress(v, event);
	else if (*name)
		take_other(v, event, name);
}

void view_end(struct view *v, const json_t *event)
{
	uint64_t ms = count(event, "total_ms", MS_MAX);
	if (ms > v->now_ms)
		v->now_ms = ms;
	v->total_ms = ms;
	if (v->nphases)
		v->phase[v->nphases - 1].ended_ms = v->now_ms ? v->now_ms : 1;
	v->ended = true;
	if (!*v->vm)
		text_clean(v->vm, sizeof v->vm, text(event, "vm"));
	if (!*v->host)
		text_clean(v->host, sizeof v->host, text(event, "destination"));
	text_clean(v->result, sizeof v->result, text(event, "result"));
	text_clean(v->reason, sizeof v->reason, text(event, "reason"));
	v->exit_status = (int)count(event, "exit", 255);
	double down = json_number_value(json_object_get(event, "downtime_ms"));
	v->downtime_ms = down > 0 && down < (double)MS_MAX ? down : 0;
	v->left_ms = 0;
	if (!strcmp(v->result, "moved"))
		v->percent = 100;
}
