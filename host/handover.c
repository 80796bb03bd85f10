/* SPDX-License-Identifier: Apache-2.0 */
#include "host/handover.h"

#include <errno.h>
#include <string.h>

#include "base/cleanup.h"

static const char *const state_names[HANDOVER_STATES] = {
	[HANDOVER_NONE] = "none",
	[HANDOVER_OWNER] = "owner",
	[HANDOVER_HANDING_OVER] = "handing-over",
	[HANDOVER_MOVED] = "moved",
	[HANDOVER_PREPARED] = "prepared",
	[HANDOVER_OWNER_UNCONFIRMED] = "owner-unconfirmed",
	[HANDOVER_ABANDONED] = "abandoned",
};

static const char *const action_names[HANDOVER_ACTIONS] = {
	[HANDOVER_ACT_NONE] = "none",
	[HANDOVER_ACT_WAIT] = "wait",
	[HANDOVER_ACT_ASK] = "ask",
	[HANDOVER_ACT_ABORT] = "abort",
	[HANDOVER_ACT_TAKE_BACK] = "take-back",
	[HANDOVER_ACT_RECORD_MOVED] = "record-moved",
	[HANDOVER_ACT_NOTE] = "note",
	[HANDOVER_ACT_CLEAN] = "clean",
	[HANDOVER_ACT_FORGET] = "forget",
	[HANDOVER_ACT_ABANDON] = "abandon",
	[HANDOVER_ACT_CONFIRM] = "confirm",
	[HANDOVER_ACT_IN_DOUBT] = "in-doubt",
};

/* What the epoch must do on a transition. */
enum epoch_rule { NEVER = 0, SAME, HIGHER, ANY };

static const uint8_t transitions[HANDOVER_STATES][HANDOVER_STATES] = {
	[HANDOVER_NONE] = {[HANDOVER_OWNER] = ANY, [HANDOVER_PREPARED] = ANY},
	/* owner -> owner, higher: a move begins, or a person decided */
	[HANDOVER_OWNER] = {[HANDOVER_OWNER] = HIGHER, [HANDOVER_HANDING_OVER] = SAME, [HANDOVER_NONE] = ANY},
	[HANDOVER_HANDING_OVER] =
		{[HANDOVER_OWNER] = SAME, [HANDOVER_MOVED] = SAME, [HANDOVER_OWNER_UNCONFIRMED] = HIGHER},
	[HANDOVER_MOVED] = {[HANDOVER_PREPARED] = HIGHER, [HANDOVER_NONE] = ANY},
	[HANDOVER_PREPARED] = {[HANDOVER_OWNER_UNCONFIRMED] = SAME, [HANDOVER_ABANDONED] = SAME},
	[HANDOVER_OWNER_UNCONFIRMED] =
		{[HANDOVER_OWNER] = SAME, [HANDOVER_OWNER_UNCONFIRMED] = HIGHER, [HANDOVER_ABANDONED] = SAME},
	[HANDOVER_ABANDONED] = {[HANDOVER_PREPARED] = HIGHER, [HANDOVER_NONE] = ANY},
};

static bool state_valid(enum handover_state s)
{
	return (unsigned)s < HANDOVER_STATES;
}

const char *handover_state_name(enum handover_state state)
{
	return state_valid(state) ? state_names[state] : "invalid";
}

int handover_state_parse(const char *name)
{
	for (int i = 0; i < HANDOVER_STATES; i++)
		if (!strcmp(name, state_names[i]))
			return i;
	return -EINVAL;
}

const char *handover_action_name(enum handover_action action)
{
	return (unsigned)action < HANDOVER_ACTIONS ? action_names[action] : "invalid";
}

bool handover_transition_allowed(enum handover_state from, uint64_t from_epoch, enum handover_state to,
				 uint64_t to_epoch)
{
	if (!state_valid(from) || !state_valid(to))
		return false;
	switch (transitions[from][to]) {
	case SAME:
		return to_epoch == from_epoch;
	case HIGHER:
		return to_epoch > from_epoch;
	case ANY:
		return true;
	default:
		return false;
	}
}

static bool is_owner(enum handover_state s)
{
	return s == HANDOVER_OWNER || s == HANDOVER_OWNER_UNCONFIRMED;
}

/* The tombstone's peer has, or had, the VM for good: it got past our epoch, or says that it owns it. */
static bool peer_has_it(const struct vm_record *rec, const struct handover_report *r)
{
	return (is_owner(r->state) && r->epoch >= rec->epoch) ||
	       (r->state != HANDOVER_NONE && r->epoch > rec->epoch);
}

uint32_t handover_note(const struct vm_record *rec, const struct handover_report *r)
{
	uint32_t flags = rec->flags;
	if (!r || !r->heard)
		return flags;
	/* handing-over: the flags that the `moved` to be written will carry */
	if ((rec->state == HANDOVER_MOVED || rec->state == HANDOVER_HANDING_OVER) && peer_has_it(rec, r)) {
		/* Past our epoch it has moved the VM on, or has it back: then it did run there. */
		bool beyond = !is_owner(r->state);
		if (r->started || beyond)
			flags |= RECORD_PEER_STARTED;
		if (r->state == HANDOVER_OWNER || beyond)
			flags |= RECORD_PEER_ACKED;
	}
	if (rec->state == HANDOVER_OWNER_UNCONFIRMED && r->state != HANDOVER_NONE && r->epoch > rec->epoch)
		flags |= RECORD_HIGHER_SEEN;
	return flags;
}

static enum handover_action decide_handing_over(const struct vm_record *rec, const struct handover_self *self,
						const struct handover_report *r)
{
	/* While nobody can have seen COMMIT, the source decides alone. */
	bool alone = self->live && !self->commit;

	if (r && r->state == HANDOVER_ABANDONED && r->epoch == rec->epoch)
		return HANDOVER_ACT_TAKE_BACK;
	if (r && is_owner(r->state) && r->epoch >= rec->epoch) {
		/* An owner without our COMMIT breaks the protocol. */
		return alone ? HANDOVER_ACT_IN_DOUBT : HANDOVER_ACT_RECORD_MOVED;
	}
	/* The peer cannot be past our epoch unless it owned the VM or our record is an old copy. */
	if (r && r->state != HANDOVER_NONE && r->epoch > rec->epoch)
		return HANDOVER_ACT_IN_DOUBT;
	/* Silence, "prepared", or stale news: a lower epoch, no record (its disk may not be mounted yet). */
	if (alone)
		return self->channel_up ? HANDOVER_ACT_NONE : HANDOVER_ACT_TAKE_BACK;
	return self->live && self->channel_up ? HANDOVER_ACT_WAIT : HANDOVER_ACT_ASK;
}

static enum handover_action decide_moved(const struct vm_record *rec, const struct handover_report *r)
{
	if (r && handover_note(rec, r) != rec->flags)
		return HANDOVER_ACT_NOTE;
	if (!(rec->flags & RECORD_FILES_DONE))
		return rec->flags & RECORD_PEER_STARTED ? HANDOVER_ACT_CLEAN : HANDOVER_ACT_ASK;
	return rec->flags & RECORD_PEER_ACKED ? HANDOVER_ACT_FORGET : HANDOVER_ACT_ASK;
}

enum handover_action handover_decide_source(const struct vm_record *rec, const struct handover_self *self,
					    const struct handover_report *report)
{
	const struct handover_report *r = report && report->heard ? report : NULL;

	switch (rec->state) {
	case HANDOVER_OWNER:
		/* A confirmed owner heeds nobody, but for the promise that its present attempt is dead. */
		if (self->live && self->attempt_open &&
		    (!self->channel_up || (r && r->state == HANDOVER_ABANDONED && r->epoch == rec->epoch)))
			return HANDOVER_ACT_ABORT;
		return HANDOVER_ACT_NONE;
	case HANDOVER_HANDING_OVER:
		return decide_handing_over(rec, self, r);
	case HANDOVER_MOVED:
		return decide_moved(rec, r);
	default:
		return HANDOVER_ACT_NONE;
	}
}

static enum handover_action decide_prepared(const struct vm_record *rec, const struct handover_self *self,
					    const struct handover_report *r)
{
	if (!self->live)
		return HANDOVER_ACT_ABANDON;
	if (self->write_failed)
		return HANDOVER_ACT_IN_DOUBT;
	if (self->commit)
		return HANDOVER_ACT_WAIT;
	if (!self->channel_up)
		return HANDOVER_ACT_ABANDON;
	/* Asked about this attempt, or told of a later one: the source has given it up. */
	if (r && r->state != HANDOVER_NONE && ((r->asked && r->epoch >= rec->epoch) || r->epoch > rec->epoch))
		return HANDOVER_ACT_ABANDON;
	return HANDOVER_ACT_NONE;
}

static enum handover_action decide_unconfirmed(const struct vm_record *rec, const struct handover_self *self,
					       const struct handover_report *r)
{
	bool forced = rec->flags & RECORD_FORCED;

	if (self->live && self->write_failed)
		return HANDOVER_ACT_IN_DOUBT;
	if (!r) {
		if (rec->flags & RECORD_HIGHER_SEEN)
			return HANDOVER_ACT_IN_DOUBT;
		/* MOVED is on its way. */
		return self->live && self->channel_up ? HANDOVER_ACT_WAIT : HANDOVER_ACT_ASK;
	}
	if (r->state == HANDOVER_NONE) {
		/* A source forgets only after we confirmed, so it has lost its records, and may be finding
		 * them again. Only a person's word makes that enough. */
		return forced ? HANDOVER_ACT_CONFIRM : HANDOVER_ACT_ASK;
	}
	if (r->epoch > rec->epoch)
		return HANDOVER_ACT_IN_DOUBT;
	switch (r->state) {
	case HANDOVER_MOVED:
		return HANDOVER_ACT_CONFIRM;
	case HANDOVER_HANDING_OVER:
		/* It settles for `moved` once it has heard us. */
		return HANDOVER_ACT_ASK;
	case HANDOVER_ABANDONED:
		return forced ? HANDOVER_ACT_CONFIRM : HANDOVER_ACT_IN_DOUBT;
	case HANDOVER_PREPARED:
		/* To a forced source: it abandons once asked. */
		return forced ? HANDOVER_ACT_ASK : HANDOVER_ACT_IN_DOUBT;
	case HANDOVER_OWNER_UNCONFIRMED:
		/* A forced owner's epoch is the higher one: the other sees that and stops. */
		return forced && r->epoch < rec->epoch ? HANDOVER_ACT_ASK : HANDOVER_ACT_IN_DOUBT;
	default:
		return HANDOVER_ACT_IN_DOUBT;
	}
}

static enum handover_action decide_abandoned(const struct vm_record *rec, const struct handover_report *r)
{
	if (!(rec->flags & RECORD_FILES_DONE))
		return HANDOVER_ACT_CLEAN;
	if (!r)
		return HANDOVER_ACT_ASK;
	/* The promise may be forgotten once the source can never ask for it again. */
	if (r->state == HANDOVER_NONE || r->epoch > rec->epoch)
		return HANDOVER_ACT_FORGET;
	if (r->state == HANDOVER_OWNER && r->epoch == rec->epoch && !r->attempt_open)
		return HANDOVER_ACT_FORGET;
	return HANDOVER_ACT_ASK;
}

enum handover_action handover_decide_destination(const struct vm_record *rec,
						 const struct handover_self *self,
						 const struct handover_report *report)
{
	const struct handover_report *r = report && report->heard ? report : NULL;

	switch (rec->state) {
	case HANDOVER_PREPARED:
		return decide_prepared(rec, self, r);
	case HANDOVER_OWNER_UNCONFIRMED:
		return decide_unconfirmed(rec, self, r);
	case HANDOVER_ABANDONED:
		return decide_abandoned(rec, r);
	default:
		return HANDOVER_ACT_NONE;
	}
}

enum handover_action handover_decide(const struct vm_record *rec, const struct handover_self *self,
				     const struct handover_report *report)
{
	switch (rec->state) {
	case HANDOVER_PREPARED:
	case HANDOVER_OWNER_UNCONFIRMED:
	case HANDOVER_ABANDONED:
		return handover_decide_destination(rec, self, report);
	default:
		return handover_decide_source(rec, self, report);
	}
}

void handover_describe(const struct vm_record *rec, const struct handover_self *self, bool guest_started,
		       struct handover_report *out)
{
	*out = (struct handover_report){.heard = true};
	if (!rec)
		return;
	out->state = rec->state;
	out->epoch = rec->epoch;
	/* A VM that moved while it was stopped has nothing to be let out: its proved disks are all of it. */
	out->started = is_owner(rec->state) && (rec->flags & RECORD_COLD || (self->live && guest_started));
	out->attempt_open = self->live && self->attempt_open && !self->commit;
}

static const char *const vm_state_names[] = {
	[VM_ABSENT] = "absent",	    [VM_RUNNING] = "running", [VM_PAUSED] = "paused",
	[VM_STOPPED] = "stopped",   [VM_CRASHED] = "crashed", [VM_INCOMING] = "incoming",
	[VM_IN_DOUBT] = "in-doubt",
};

const char *vm_state_name(enum vm_state state)
{
	return (unsigned)state < ARRAY_SIZE(vm_state_names) ? vm_state_names[state] : "invalid";
}

enum vm_state handover_vm_state(const struct vm_record *rec, const struct handover_self *self,
				bool guest_running)
{
	enum vm_state alive = guest_running ? VM_RUNNING : VM_PAUSED;

	if (!rec)
		return VM_ABSENT;
	switch (rec->state) {
	case HANDOVER_OWNER:
		if (self->live)
			return alive;
		return rec->flags & RECORD_POWERED_ON ? VM_CRASHED : VM_STOPPED;
	case HANDOVER_HANDING_OVER:
		/* With COMMIT out and the channel alive the answer is milliseconds away. */
		return self->live && (!self->commit || self->channel_up) ? alive : VM_IN_DOUBT;
	case HANDOVER_PREPARED:
		return self->live && self->write_failed ? VM_IN_DOUBT : VM_INCOMING;
	case HANDOVER_OWNER_UNCONFIRMED:
		if (!self->live || self->write_failed || rec->flags & RECORD_HIGHER_SEEN)
			return VM_IN_DOUBT;
		return alive;
	default:
		return VM_ABSENT;
	}
}

/* Why nothing but resolve may touch the VM. */
static int refuse_unsettled(const struct vm_record *rec, const char *verb, struct error *err)
{
	const char *where = rec->peer[0] ? rec->peer : "the other host";

	switch (rec->state) {
	case HANDOVER_HANDING_OVER:
		return error_set(err, EPERM,
				 "VM %s cannot be %s: its move to %s is not settled; bring %s back, or see "
				 "snmigrate resolve %s",
				 rec->name, verb, where, where, rec->name);
	case HANDOVER_OWNER_UNCONFIRMED:
		if (rec->flags & RECORD_HIGHER_SEEN)
			return error_set(
				err, EPERM,
				"VM %s cannot be %s: %s was made its owner since; snmigrate resolve %s "
				"--give-up keeps this copy aside",
				rec->name, verb, where, rec->name);
		return error_set(
			err, EPERM,
			"VM %s cannot be %s before %s has confirmed that it gave it up; bring %s back, or "
			"see snmigrate resolve %s",
			rec->name, verb, where, where, rec->name);
	case HANDOVER_PREPARED:
		return error_set(err, EPERM, "VM %s cannot be %s: it is still arriving from %s", rec->name,
				 verb, where);
	case HANDOVER_MOVED:
		return error_set(err, EPERM, "VM %s cannot be %s: it has moved to %s", rec->name, verb,
				 where);
	default:
		return error_set(err, EPERM, "VM %s cannot be %s: it is not on this host", rec->name, verb);
	}
}

int handover_may_start(const struct vm_record *rec, struct error *err)
{
	return rec->state == HANDOVER_OWNER ? 0 : refuse_unsettled(rec, "started", err);
}

int handover_may_delete(const struct vm_record *rec, struct error *err)
{
	return rec->state == HANDOVER_OWNER ? 0 : refuse_unsettled(rec, "deleted", err);
}

int handover_may_move(const struct vm_record *rec, struct error *err)
{
	return rec->state == HANDOVER_OWNER ? 0 : refuse_unsettled(rec, "moved", err);
}

int handover_may_arrive(const struct vm_record *rec, uint64_t epoch, struct error *err)
{
	if (!rec || rec->state == HANDOVER_NONE)
		return 0;
	switch (rec->state) {
	case HANDOVER_MOVED:
	case HANDOVER_ABANDONED:
		if (epoch <= rec->epoch)
			return error_set(
				err, ESTALE, "VM %s: epoch %llu of the arrival is not above %llu, known here",
				rec->name, (unsigned long long)epoch, (unsigned long long)rec->epoch);
		if (!(rec->flags & RECORD_FILES_DONE))
			return error_set(err, EAGAIN,
					 "VM %s: what an earlier move left here is still being cleaned",
					 rec->name);
		return 0;
	case HANDOVER_PREPARED:
		if (epoch <= rec->epoch)
			return error_set(err, ESTALE,
					 "VM %s: epoch %llu of the arrival is not above %llu, arriving now",
					 rec->name, (unsigned long long)epoch,
					 (unsigned long long)rec->epoch);
		return error_set(err, EAGAIN, "VM %s: an earlier attempt is still arriving", rec->name);
	default:
		return error_set(err, EEXIST, "VM %s is already on this host (%s)", rec->name,
				 handover_state_name(rec->state));
	}
}

int handover_run_here(const struct vm_record *rec, const struct handover_self *self, struct vm_record *to,
		      struct error *err)
{
	bool unsettled = rec->state == HANDOVER_OWNER_UNCONFIRMED ||
			 (rec->state == HANDOVER_HANDING_OVER && (!self->live || self->commit));

	if (rec->state == HANDOVER_PREPARED)
		return error_set(
			err, EPERM,
			"VM %s: this copy never became the VM, %s has it; only --give-up is possible here",
			rec->name, rec->peer);
	if (!unsettled)
		return error_set(err, EPERM, "VM %s is not in doubt here (%s)", rec->name,
				 handover_state_name(rec->state));
	if (self->live && self->write_failed)
		return error_set(err, EPERM, "VM %s: its record could not be written; --give-up first",
				 rec->name);
	*to = *rec;
	to->state = HANDOVER_OWNER_UNCONFIRMED;
	/* above whatever the other side has shown, so that the two can never tie */
	to->epoch = (rec->peer_epoch > rec->epoch ? rec->peer_epoch : rec->epoch) + 1;
	to->flags = (rec->flags & ~(uint32_t)(RECORD_HIGHER_SEEN | RECORD_COLD)) | RECORD_FORCED |
		    RECORD_POWERED_ON;
	return 0;
}

enum handover_action handover_give_up(const struct vm_record *rec, const struct handover_self *self,
				      struct error *err)
{
	switch (rec->state) {
	case HANDOVER_PREPARED:
		if (!self->live || !self->commit || self->write_failed)
			return HANDOVER_ACT_ABANDON;
		error_set(err, EPERM, "VM %s is becoming this host's just now: try again", rec->name);
		return HANDOVER_ACT_NONE;
	case HANDOVER_MOVED:
		return rec->flags & RECORD_FILES_DONE ? HANDOVER_ACT_FORGET : HANDOVER_ACT_CLEAN;
	case HANDOVER_ABANDONED:
		return rec->flags & RECORD_FILES_DONE ? HANDOVER_ACT_FORGET : HANDOVER_ACT_CLEAN;
	case HANDOVER_OWNER_UNCONFIRMED:
		if (rec->flags & RECORD_HIGHER_SEEN)
			return HANDOVER_ACT_ABANDON;
		/* The snvmm that could not write its record is ended; what the medium holds decides. */
		if (self->live && self->write_failed)
			return HANDOVER_ACT_ASK;
		error_set(err, EPERM,
			  "VM %s: this may be its only copy with the latest writes; giving it up is possible "
			  "once "
			  "%s has been made its owner (snmigrate resolve %s --run-here there)",
			  rec->name, rec->peer, rec->name);
		return HANDOVER_ACT_NONE;
	case HANDOVER_HANDING_OVER:
		if (!self->live || self->commit)
			return HANDOVER_ACT_ASK;
		error_set(err, EPERM, "VM %s is not in doubt yet: snmigrate cancel %s ends the move",
			  rec->name, rec->name);
		return HANDOVER_ACT_NONE;
	default:
		error_set(err, EPERM, "VM %s: nothing to give up here (%s)", rec->name,
			  handover_state_name(rec->state));
		return HANDOVER_ACT_NONE;
	}
}
