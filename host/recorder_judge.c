/* SPDX-License-Identifier: Apache-2.0 */
/* How a move stands, from what can be read of it. The record decides; the last line tells more. */
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "host/exit.h"
#include "host/recorder.h"

static const char *text(const json_t *o, const char *key)
{
	const char *s = json_string_value(json_object_get(o, key));
	return s ? s : "";
}

static void say(struct move_outcome *out, enum move_verdict verdict, const char *result, int exit_status,
		const char *fmt, ...) __attribute__((format(printf, 5, 6)));
static void say(struct move_outcome *out, enum move_verdict verdict, const char *result, int exit_status,
		const char *fmt, ...)
{
	va_list ap;
	out->verdict = verdict;
	out->exit = exit_status;
	snprintf(out->result, sizeof out->result, "%s", result);
	va_start(ap, fmt);
	vsnprintf(out->reason, sizeof out->reason, fmt, ap);
	va_end(ap);
}

static void say_stored(struct move_outcome *out, const json_t *line)
{
	say(out, MOVE_OVER, text(line, "result"), (int)json_integer_value(json_object_get(line, "exit")),
	    "%s", text(line, "reason"));
}

bool move_line_matches(const json_t *line, bool incoming, uint64_t epoch)
{
	json_int_t last = json_integer_value(json_object_get(line, "epoch"));
	const json_t *first = json_object_get(line, "first_epoch");
	if (last <= 0 || !*text(line, "result"))
		return false;
	if (incoming)
		return (uint64_t)last == epoch;
	/* each new attempt of a move that was retried has a higher epoch */
	return (uint64_t)last >= epoch && (!first || (uint64_t)json_integer_value(first) <= epoch);
}

/* ---- a move from here ---- */

/* The VM is here, or came back by another way than this move: it ended at the source. */
static void judge_stayed(const struct move_facts *f, struct move_outcome *out)
{
	const struct vm_record *rec = f->record;
	const char *result = text(f->stored, "result");
	if (*result && strcmp(result, "in-doubt") && strcmp(result, "moved"))
		say_stored(out, f->stored);
	else if (rec->flags & RECORD_FORCED)
		say(out, MOVE_OVER, "failed", EXIT_FAILED, "settled by snmigrate resolve --run-here");
	else if (f->live && f->patient)
		say(out, MOVE_UNDER_WAY, "", 0, "%s", "");
	else if (f->live)
		say(out, MOVE_OVER, "failed", EXIT_FAILED, "%s",
		    *rec->reason ? rec->reason : "the VM is here; nothing more is known of the move's end");
	else if (rec->flags & RECORD_COLD && !(rec->flags & RECORD_POWERED_ON))
		say(out, MOVE_OVER, "failed", EXIT_FAILED, MOVE_COLD_BROKEN);
	else if (!(rec->flags & RECORD_POWERED_ON))
		say(out, MOVE_OVER, "failed", EXIT_FAILED, "the VM was stopped during the move");
	else
		say(out, MOVE_OVER, "crashed", EXIT_CRASHED,
		    "the VM crashed here during the move: its VMM was killed");
}

static void judge_left(const struct move_facts *f, struct move_outcome *out)
{
	if (!strcmp(text(f->stored, "result"), "moved"))
		say_stored(out, f->stored);
	else
		say(out, MOVE_OVER, "moved", EXIT_MOVED, "%s", "");
}

static void judge_tombstone(const struct move_facts *f, struct move_outcome *out)
{
	const struct vm_record *rec = f->record;
	if (rec->flags & RECORD_FILES_DONE)
		judge_left(f, out);
	else if (rec->flags & RECORD_PEER_STARTED || f->patient)
		say(out, MOVE_UNDER_WAY, "", 0, "%s", "");
	else
		say(out, MOVE_WAITING, "crashed", EXIT_CRASHED,
		    "%s owns the VM, but has not said that it ran there: it has crashed there; the files "
		    "here "
		    "stay until it has been started there",
		    rec->peer);
}

static void judge_outgoing(const struct move_facts *f, struct move_outcome *out)
{
	const struct vm_record *rec = f->record;
	if (!rec) {
		if (f->stored)
			say_stored(out, f->stored);
		else
			say(out, MOVE_OVER, "unknown", EXIT_FAILED,
			    "the VM is not here any more, and nothing is known of the move's end");
		return;
	}
	switch (rec->state) {
	case HANDOVER_HANDING_OVER:
		say(out, MOVE_WAITING, "in-doubt", EXIT_IN_DOUBT,
		    "%s has not said yet whether it has the VM: it is settled when it answers", rec->peer);
		break;
	case HANDOVER_MOVED:
		judge_tombstone(f, out);
		break;
	case HANDOVER_OWNER:
		judge_stayed(f, out);
		break;
	case HANDOVER_OWNER_UNCONFIRMED:
		if (rec->flags & RECORD_FORCED)
			judge_stayed(f, out);
		else
			judge_left(f, out); /* and came back */
		break;
	default:
		/* it is on its way back, or was given up there */
		judge_left(f, out);
	}
}

/* ---- an arrival ---- */

static void judge_ended_arrival(const struct move_facts *f, struct move_outcome *out, const char *otherwise)
{
	const char *result = text(f->stored, "result");
	if (*result && strcmp(result, "moved"))
		say_stored(out, f->stored);
	else
		say(out, MOVE_OVER, "failed", EXIT_FAILED, "%s", otherwise);
}

/* Owned here. A provisional line says what it would come to if its snvmm ended before the last memory came;
 * it writes another one before it stops working on that. */
static void judge_arrived(const struct move_facts *f, struct move_outcome *out)
{
	bool provisional = json_is_true(json_object_get(f->stored, "provisional"));
	if (f->live && f->patient && (!f->stored || provisional))
		say(out, MOVE_UNDER_WAY, "", 0, "%s", "");
	else if (!strcmp(text(f->stored, "result"), "crashed"))
		say_stored(out, f->stored);
	else
		say(out, MOVE_OVER, "moved", EXIT_MOVED, "%s", "");
}

static void judge_this_arrival(const struct move_facts *f, struct move_outcome *out)
{
	const struct vm_record *rec = f->record;
	switch (rec->state) {
	case HANDOVER_PREPARED:
		if (f->live)
			say(out, MOVE_UNDER_WAY, "", 0, "%s", "");
		else
			say(out, MOVE_WAITING, "in-doubt", EXIT_IN_DOUBT,
			    "its VMM is gone before the VM was handed over: being settled");
		break;
	case HANDOVER_OWNER_UNCONFIRMED:
		if (rec->flags & RECORD_HIGHER_SEEN || f->doubt)
			say(out, MOVE_WAITING, "in-doubt", EXIT_IN_DOUBT, "%s",
			    *rec->reason ? rec->reason : "the source shows a later epoch");
		else if (f->live && f->busy)
			say(out, MOVE_UNDER_WAY, "", 0, "%s", "");
		else if (!f->live && !strcmp(text(f->stored, "result"), "crashed"))
			say(out, MOVE_WAITING, "crashed", EXIT_CRASHED, "%s", text(f->stored, "reason"));
		else
			say(out, MOVE_WAITING, "moved", EXIT_MOVED,
			    "the VM is here; %s has not confirmed it yet", f->peer);
		break;
	case HANDOVER_ABANDONED:
		judge_ended_arrival(f, out,
				    *rec->reason ? rec->reason : "given up before the VM started here");
		break;
	default:
		/* its last memory is on the way */
		if (f->live && f->busy)
			say(out, MOVE_UNDER_WAY, "", 0, "%s", "");
		else
			judge_arrived(f, out);
	}
}

static void judge_incoming(const struct move_facts *f, struct move_outcome *out)
{
	const struct vm_record *rec = f->record;
	if (!rec || rec->epoch < f->epoch) {
		if (f->live && (f->busy || f->patient))
			say(out, MOVE_UNDER_WAY, "", 0, "%s", "");
		else if (f->stored)
			say_stored(out, f->stored); /* also of a VM that has left, or was deleted */
		else
			say(out, MOVE_OVER, "failed", EXIT_FAILED,
			    "the arrival ended before it was accepted");
	} else if (rec->epoch == f->epoch) {
		judge_this_arrival(f, out);
	} else if (f->stored) {
		say_stored(out, f->stored);
	} else if (rec->state == HANDOVER_PREPARED || rec->state == HANDOVER_ABANDONED ||
		   rec->state == HANDOVER_OWNER_UNCONFIRMED) {
		say(out, MOVE_OVER, "failed", EXIT_FAILED, "a later attempt took its place");
	} else {
		judge_arrived(f, out); /* only who owns it raises the epoch: to move it on */
	}
}

void move_judge(const struct move_facts *f, struct move_outcome *out)
{
	*out = (struct move_outcome){.verdict = MOVE_UNDER_WAY};
	if (f->live && f->busy && f->doubt)
		say(out, MOVE_WAITING, "in-doubt", EXIT_IN_DOUBT,
		    "%s does not say whether it has the VM; the guest is paused here until it does", f->peer);
	else if (f->live && f->busy && !f->incoming)
		return;
	else if (f->incoming)
		judge_incoming(f, out);
	else
		judge_outgoing(f, out);
}
