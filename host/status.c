/* SPDX-License-Identifier: Apache-2.0 */
#include "host/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static bool say(struct status_advice *out, bool needs_you, const char *what, const char *fmt, ...)
	__attribute__((format(printf, 4, 5)));
static bool say(struct status_advice *out, bool needs_you, const char *what, const char *fmt, ...)
{
	va_list ap;
	out->needs_you = needs_you;
	snprintf(out->what, sizeof out->what, "%s", what);
	va_start(ap, fmt);
	vsnprintf(out->what_to_do, sizeof out->what_to_do, fmt, ap);
	va_end(ap);
	return true;
}

static bool source_in_doubt(const struct vm_record *rec, struct status_advice *out)
{
	return say(out, true, "in doubt: the other host has not said whether it has the VM",
		   "bring %s back and it settles by itself; if %s has no power and will have none: snmigrate "
		   "resolve %s --run-here",
		   rec->peer, rec->peer, rec->name);
}

static bool tombstone(const struct vm_record *rec, struct status_advice *out)
{
	if (!(rec->flags & RECORD_PEER_STARTED) && !(rec->flags & RECORD_FILES_DONE))
		return say(out, true, "moved, but the other host has not said that the VM ran there",
			   "start it on %s (snvm start %s); the files here stay until then", rec->peer,
			   rec->name);
	if (!(rec->flags & RECORD_FILES_DONE))
		return say(out, false, "moved; the files here are being cleaned", "%s", "");
	if (!(rec->flags & RECORD_PEER_ACKED))
		return say(out, false, "moved; the other host has not acknowledged it", "%s", "");
	return false;
}

bool status_advise(const struct vm_record *rec, bool live, const char *state, struct status_advice *out)
{
	bool doubt = !strcmp(state, "in-doubt");
	*out = (struct status_advice){0};
	switch (rec->state) {
	case HANDOVER_HANDING_OVER:
		if (live && !doubt)
			return false; /* a move under way */
		return source_in_doubt(rec, out);
	case HANDOVER_MOVED:
		return tombstone(rec, out);
	case HANDOVER_PREPARED:
		if (live && !doubt)
			return false;
		if (live)
			return say(out, true, "in doubt: what its record says cannot be read now",
				   "see to the disk with the state directory: it is read again every second");
		return say(out, false, "an arrival whose VMM is gone; being settled with the other host",
			   "%s", "");
	case HANDOVER_OWNER_UNCONFIRMED:
		if (rec->flags & RECORD_HIGHER_SEEN || doubt)
			return say(out, true, "in doubt: the other host shows a later attempt",
				   "see snmigrate resolve %s here and on %s; give one of the copies up "
				   "(--give-up)",
				   rec->name, rec->peer);
		return say(out, false, "the VM is here; the other host has not confirmed that it gave it up",
			   "%s", "");
	case HANDOVER_OWNER:
		if (!strcmp(state, "crashed"))
			return say(out, true, "crashed", "snvm start %s", rec->name);
		if (doubt)
			return say(out, true, "in doubt", "see snmigrate resolve %s", rec->name);
		return false;
	default:
		return false;
	}
}
