/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "host/ask.h"
#include "host/exit.h"
#include "vmm/move_destination.h"

#define ASK_EVERY_MS 1000

static void self_of(struct arrival *a, struct handover_self *self)
{
	SCOPE_LOCK(&a->lock);
	*self = (struct handover_self){.live = true,
				       .channel_up = a->channel_up,
				       .commit = a->commit,
				       .write_failed = a->write_failed};
}

int arrival_abandon(struct arrival *a, const char *why, struct error *err)
{
	struct vm *vm = a->vm;
	struct vm_record rec;
	int rc = 0;
	SCOPE_LOCK(&a->lock);
	if (a->commit)
		return error_set(err, EBUSY, "COMMIT was read already");
	if (a->abandoned || !vm->record)
		return 0;
	rc = vm_record(vm, &rec, err);
	if (!rc && rec.state == HANDOVER_PREPARED) {
		struct vm_transition t = {.from = HANDOVER_PREPARED,
					  .from_epoch = rec.epoch,
					  .to = HANDOVER_ABANDONED,
					  .to_epoch = rec.epoch,
					  .flags_clear = RECORD_POWERED_ON,
					  .reason = why};
		rc = vm_record_transition(vm, &t, err);
	}
	a->abandoned = !rc;
	return rc;
}

static int confirm(struct arrival *a, struct error *err)
{
	struct vm_record rec;
	int rc = vm_record(a->vm, &rec, err);
	if (rc || rec.state == HANDOVER_OWNER)
		return rc;
	struct vm_transition t = {.from = HANDOVER_OWNER_UNCONFIRMED,
				  .from_epoch = rec.epoch,
				  .to = HANDOVER_OWNER,
				  .to_epoch = rec.epoch,
				  .flags_clear = RECORD_FORCED | RECORD_HIGHER_SEEN};
	rc = vm_record_transition(a->vm, &t, err);
	if (rc == -ESTALE && !vm_record(a->vm, &rec, NULL) && rec.state == HANDOVER_OWNER)
		rc = 0; /* another thread of ours was faster */
	return rc;
}

enum handover_action arrival_settle(struct arrival *a, const struct handover_report *report,
				    struct error *err)
{
	struct vm_record rec;
	struct handover_self self;
	self_of(a, &self);
	if (vm_record(a->vm, &rec, err))
		return HANDOVER_ACT_WAIT;
	enum handover_action act = handover_decide(&rec, &self, report);
	switch (act) {
	case HANDOVER_ACT_CONFIRM:
		if (!confirm(a, err)) {
			SCOPE_LOCK(&a->lock);
			a->confirmed = true;
			pthread_cond_broadcast(&a->changed);
		}
		break;
	case HANDOVER_ACT_ABANDON:
		if (!arrival_abandon(a, "the other side asked before COMMIT came", err)) {
			struct error why = ERROR_INIT;
			error_set(&why, ECONNABORTED, "the source settled the move elsewhere");
			if (a->link)
				move_link_fail(a->link, &why);
		}
		break;
	case HANDOVER_ACT_IN_DOUBT: {
		char reason[200];
		snprintf(reason, sizeof reason, "%s shows epoch %llu, above this host's %llu", a->peer,
			 (unsigned long long)(report ? report->epoch : 0), (unsigned long long)rec.epoch);
		SCOPE_LOCK(&a->vm->run_lock);
		vm_stop_guest(a->vm);
		rec.flags = handover_note(&rec, report);
		if (report && report->epoch > rec.peer_epoch)
			rec.peer_epoch = report->epoch;
		record_store(a->vm->record, &rec, err);
		vm_set_state(a->vm, VM_IN_DOUBT, reason);
		break;
	}
	default:
		break;
	}
	return act;
}

static void own_report(struct arrival *a, const struct vm_record *rec, const struct handover_self *self,
		       struct handover_report *own)
{
	bool paging = arrival_is_paging(a);
	handover_describe(rec, self, !paging, own);
	own->paging = paging;
}

int arrival_ask(struct arrival *a, struct handover_report *answer, struct error *err)
{
	struct vm *vm = a->vm;
	struct vm_record rec;
	struct handover_self self;
	struct handover_report own;
	self_of(a, &self);
	int rc = vm_record(vm, &rec, err);
	if (rc)
		return rc;
	own_report(a, &rec, &self, &own);
	rc = ask_peer(vm->cfg, a->peer, a->peer_address, vm->def.uuid, &own, vm->cfg->silence_ms, answer,
		      err);
	SCOPE_LOCK(&a->lock);
	a->answers = !rc && answer->state != HANDOVER_NONE;
	return rc;
}

static void *confirm_thread(void *arg)
{
	struct arrival *a = arg;
	struct error err = ERROR_INIT;
	struct frame f;
	/* The source says MOVED on the channel that is open... */
	if (a->link && !move_link_wait(a->link, 1u << FRAME_MOVED, 0, &f, &err)) {
		struct handover_report r = {.heard = true, .state = HANDOVER_MOVED, .epoch = a->epoch};
		if (arrival_settle(a, &r, &err) == HANDOVER_ACT_CONFIRM && !err.code)
			move_link_send(a->link, FRAME_MOVED_ACK, NULL, NULL);
		arrival_note_owned(a, json_object_get(f.json, "figures"));
		frame_release(&f);
	}
	pthread_mutex_lock(&a->lock);
	a->channel_up = false;
	/* A VM that is stopped needs no process; with the lock free the daemon asks. */
	while (!a->vm->cold && !a->confirmed && !a->closing) {
		/* ...or it is asked until it says so. */
		pthread_mutex_unlock(&a->lock);
		struct handover_report answer;
		err = ERROR_INIT;
		if (!arrival_ask(a, &answer, &err))
			arrival_settle(a, &answer, &err);
		pthread_mutex_lock(&a->lock);
		if (a->confirmed || a->closing)
			break;
		uint64_t at = clock_now_ns() + ASK_EVERY_MS * UINT64_C(1000000);
		struct timespec until = clock_timespec(at);
		pthread_cond_timedwait(&a->changed, &a->lock, &until);
	}
	pthread_mutex_unlock(&a->lock);
	log_info("ownership of epoch %llu %s", (unsigned long long)a->epoch,
		 a->confirmed ? "confirmed" : "not confirmed");
	if (a->vm->cold)
		vm_request_quit(a->vm, 0);
	return NULL;
}

int arrival_confirm_start(struct arrival *a, struct error *err)
{
	int rc = pthread_create(&a->confirmer, NULL, confirm_thread, a);
	if (rc)
		return error_errno(err, rc, "thread");
	a->confirmer_started = true;
	return 0;
}
