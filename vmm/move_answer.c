/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <string.h>
#include <strings.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "host/ask.h"
#include "vmm/move_destination.h"
#include "vmm/move_source.h"

/* How long an ASK may wait for an answer or a write that is under way; then the asker asks again. */
#define ANSWER_WAIT_MS 3000

/* attempt: the epoch of the move under way, or 0. */
static void self_now(struct vm *vm, struct handover_self *self, bool *started, uint64_t *attempt)
{
	pthread_mutex_lock(&vm->lock);
	struct move *mv = vm->move;
	struct arrival *a = vm->arrival;
	*started = vm->state == VM_RUNNING || vm->state == VM_PAUSED;
	pthread_mutex_unlock(&vm->lock);
	*self = (struct handover_self){.live = true};
	*attempt = 0;
	if (mv) {
		SCOPE_LOCK(&mv->lock);
		if (mv->phase != MOVE_ENDED) {
			/* Between two attempts, and before the first is connected, none is open. */
			*attempt = mv->opt.epoch;
			self->attempt_open = mv->link || mv->commit;
			self->commit = mv->commit;
			self->channel_up =
				mv->link && !mv->settle_started && !move_link_failed(mv->link, NULL);
			return;
		}
	}
	if (a) {
		SCOPE_LOCK(&a->lock);
		self->commit = a->commit;
		self->channel_up = a->channel_up;
		self->write_failed = a->write_failed;
		*started = a->owner && !arrival_is_paging(a);
	}
}

static json_t *answer_json(struct vm *vm, const struct vm_record *rec, const struct handover_self *self,
			   bool started)
{
	struct handover_report answer;
	handover_describe(rec, self, started, &answer);
	answer.paging = move_source_is_paging(vm) || move_destination_is_paging(vm);
	return ask_report_to_json(vm->def.uuid, &answer);
}

json_t *move_answer(struct vm *vm, json_t *request, struct error *err)
{
	char uuid[VM_UUID_CHARS + 1];
	struct handover_report report;
	const char *peer = json_string_value(json_object_get(request, "peer"));
	if (!peer) {
		error_set(err, EPROTO, "ask: no peer");
		return NULL;
	}
	if (ask_report_from_json(json_object_get(request, "report"), true, uuid, &report, err))
		return NULL;
	if (strcasecmp(uuid, vm->def.uuid)) {
		error_set(err, ENOENT, "this process holds %s, not %s", vm->def.uuid, uuid);
		return NULL;
	}
	uint64_t deadline = clock_now_ms() + ANSWER_WAIT_MS;
	for (;;) {
		struct vm_record rec;
		struct handover_self self;
		bool started;
		uint64_t attempt;
		struct error e = ERROR_INIT;
		pthread_mutex_lock(&vm->lock);
		struct move *mv = vm->move;
		struct arrival *a = vm->arrival;
		bool no_record = !vm->record;
		pthread_mutex_unlock(&vm->lock);
		if (no_record) {
			/* An arrival before its prepared record: there is nothing to say yet that would bind
			 * anybody. */
			struct handover_report none = {.heard = true, .state = HANDOVER_NONE};
			return ask_report_to_json(vm->def.uuid, &none);
		}
		self_now(vm, &self, &started, &attempt);
		if (vm_record(vm, &rec, err))
			return NULL;
		/* A new attempt that is not recorded yet: the one that the record speaks of is closed. */
		if (attempt && rec.state == HANDOVER_OWNER && rec.epoch != attempt)
			self.attempt_open = self.channel_up = false;
		/* What another than the other side of this VM says about it does not count. */
		bool counts = !strcmp(rec.peer, peer);
		enum handover_action act = counts ? handover_decide(&rec, &self, &report) : HANDOVER_ACT_NONE;
		switch (act) {
		case HANDOVER_ACT_ABORT:
			error_set(&e, ECONNRESET, "the destination does not know this attempt any more");
			if (mv)
				source_interrupt(mv, &e);
			break;
		case HANDOVER_ACT_TAKE_BACK:
		case HANDOVER_ACT_RECORD_MOVED:
			/* The settling thread asks the peer itself and hears the same; wake it. */
			if (mv) {
				SCOPE_LOCK(&mv->lock);
				pthread_cond_broadcast(&mv->changed);
			}
			break;
		case HANDOVER_ACT_NOTE:
			rec.flags = handover_note(&rec, &report);
			if (report.epoch > rec.peer_epoch)
				rec.peer_epoch = report.epoch;
			if (record_store(vm->record, &rec, &e))
				log_warn("record: %s", e.message);
			continue;
		case HANDOVER_ACT_CONFIRM:
		case HANDOVER_ACT_ABANDON:
		case HANDOVER_ACT_IN_DOUBT:
			if (a) {
				arrival_settle(a, &report, &e);
				if (e.code)
					log_warn("settling: %s", e.message);
			} else if (move_forced_settle(vm, &report, &e)) {
				log_warn("settling: %s", e.message);
			}
			if (vm_record(vm, &rec, err))
				return NULL;
			self_now(vm, &self, &started, &attempt);
			return answer_json(vm, &rec, &self, started);
		case HANDOVER_ACT_WAIT:
			break;
		default:
			return answer_json(vm, &rec, &self, started);
		}
		if (clock_now_ms() > deadline) {
			error_set(err, EAGAIN, "not settled yet");
			return NULL;
		}
		clock_sleep_ms(20);
	}
}

int move_destination_resolve(struct vm *vm, const char *how, struct error *err)
{
	pthread_mutex_lock(&vm->lock);
	struct arrival *a = vm->arrival;
	pthread_mutex_unlock(&vm->lock);
	if (!vm->record)
		return error_set(err, ENOENT, "VM %s is not in doubt here", vm->def.name);
	struct vm_record rec, to;
	struct handover_self self;
	bool started;
	uint64_t attempt;
	self_now(vm, &self, &started, &attempt);
	int rc = vm_record(vm, &rec, err);
	if (rc)
		return rc;
	if (!strcmp(how, "ask")) {
		if (!a)
			return 0; /* its thread asks every second */
		SCOPE_LOCK(&a->lock);
		pthread_cond_broadcast(&a->changed);
		return 0;
	}
	if (!strcmp(how, "run-here")) {
		pthread_mutex_lock(&vm->lock);
		bool answers = vm->forced_answers;
		pthread_mutex_unlock(&vm->lock);
		if (a) {
			SCOPE_LOCK(&a->lock);
			answers |= a->answers || a->channel_up;
		}
		if (answers)
			return error_set(
				err, EPERM,
				"VM %s: host %s answers, so it has power; see snmigrate resolve %s on both",
				vm->def.name, rec.peer, vm->def.name);
		if (vm->cold)
			return error_set(err, EBUSY, "VM %s is being settled just now: try again",
					 vm->def.name);
		SCOPE_LOCK(&vm->run_lock);
		rc = handover_run_here(&rec, &self, &to, err);
		if (!rc)
			rc = record_compare_and_set(vm->record, rec.state, rec.epoch, &to, NULL, err);
		if (!rc)
			rc = machine_start(vm->machine, err);
		if (!rc)
			vm_set_state(vm, VM_RUNNING, NULL);
		return rc;
	}
	if (strcmp(how, "give-up"))
		return error_set(err, EINVAL, "resolve: unknown way '%s'", how);
	enum handover_action act = handover_give_up(&rec, &self, err);
	if (act == HANDOVER_ACT_NONE)
		return err && err->code ? err->code : -EPERM;
	if (act == HANDOVER_ACT_ABANDON && rec.state == HANDOVER_OWNER_UNCONFIRMED) {
		/* A copy that was the VM is kept aside, though its folder may not have got its place yet:
		 * what is abandoned in incoming/ is an arrival's, and goes. */
		char folder[REGISTRY_FOLDER_BYTES];
		snprintf(folder, sizeof folder, "%s", rec.folder);
		if (!strncmp(rec.folder, "incoming/", strlen("incoming/"))) {
			rc = registry_publish(vm->cfg, rec.folder, rec.name, err);
			if (rc)
				return rc;
			registry_vm_rel(rec.name, folder);
		}
		struct vm_transition t = {.from = HANDOVER_OWNER_UNCONFIRMED,
					  .from_epoch = rec.epoch,
					  .to = HANDOVER_ABANDONED,
					  .to_epoch = rec.epoch,
					  .flags_clear = RECORD_POWERED_ON,
					  .folder = folder,
					  .reason = "given up by snmigrate resolve"};
		SCOPE_LOCK(&vm->run_lock);
		vm_stop_guest(vm);
		rc = vm_record_transition(vm, &t, err);
		if (rc)
			return rc;
	}
	/* The process ends; with the lock free the daemon writes the record by the same rules and cleans. */
	vm_request_quit(vm, 0);
	return 0;
}
