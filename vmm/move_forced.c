/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "host/ask.h"
#include "vmm/move.h"
#include "vmm/vm.h"

/*
 * An owner by `resolve --run-here` (docs/handover.md, "The way out"): runs, but a person's word is all it
 * has. It asks the other host for ever: one that is out of it makes this one the confirmed owner, one with a
 * higher epoch stops it.
 */

#define ASK_EVERY_MS 1000

static void stop_in_doubt(struct vm *vm, struct vm_record *rec, const struct handover_report *report)
{
	struct error err = ERROR_INIT;
	char reason[200];
	SCOPE_LOCK(&vm->run_lock);
	vm_stop_guest(vm);
	uint32_t flags = handover_note(rec, report);
	if (flags != rec->flags || report->epoch > rec->peer_epoch) {
		rec->flags = flags;
		if (report->epoch > rec->peer_epoch)
			rec->peer_epoch = report->epoch;
		if (record_store(vm->record, rec, &err))
			log_error("record: %s", err.message);
	}
	snprintf(reason, sizeof reason, "%s says %s, epoch %llu; this host has epoch %llu", rec->peer,
		 handover_state_name(report->state), (unsigned long long)report->epoch,
		 (unsigned long long)rec->epoch);
	vm_set_state(vm, VM_IN_DOUBT, reason);
}

int move_forced_settle(struct vm *vm, const struct handover_report *report, struct error *err)
{
	struct handover_self self = {.live = true};
	struct vm_record rec;
	int rc = vm_record(vm, &rec, err);
	if (rc || rec.state != HANDOVER_OWNER_UNCONFIRMED)
		return rc;
	switch (handover_decide(&rec, &self, report)) {
	case HANDOVER_ACT_CONFIRM: {
		struct vm_transition t = {.from = HANDOVER_OWNER_UNCONFIRMED,
					  .from_epoch = rec.epoch,
					  .to = HANDOVER_OWNER,
					  .to_epoch = rec.epoch,
					  .flags_clear = RECORD_FORCED | RECORD_HIGHER_SEEN};
		rc = vm_record_transition(vm, &t, err);
		return rc == -ESTALE ? 0 : rc; /* another thread of ours was faster */
	}
	case HANDOVER_ACT_IN_DOUBT:
		stop_in_doubt(vm, &rec, report);
		return 0;
	default:
		return 0;
	}
}

static void *forced_thread(void *arg)
{
	struct vm *vm = arg;
	struct handover_self self = {.live = true};
	struct vm_record rec;
	struct error err = ERROR_INIT;
	pthread_mutex_lock(&vm->lock);
	while (!vm->forced_stop) {
		pthread_mutex_unlock(&vm->lock);
		struct handover_report own, answer;
		err = ERROR_INIT;
		int rc = vm_record(vm, &rec, &err);
		bool over = !rc && rec.state != HANDOVER_OWNER_UNCONFIRMED;
		if (!rc && !over) {
			handover_describe(&rec, &self, vm_get_state(vm) == VM_RUNNING, &own);
			rc = ask_peer(vm->cfg, rec.peer, rec.peer_address, vm->def.uuid, &own,
				      vm->cfg->silence_ms, &answer, &err);
			pthread_mutex_lock(&vm->lock);
			vm->forced_answers = !rc && answer.state != HANDOVER_NONE;
			pthread_mutex_unlock(&vm->lock);
			if (!rc)
				rc = move_forced_settle(vm, &answer, &err);
		}
		if (rc)
			log_debug("after --run-here: %s", err.message);
		pthread_mutex_lock(&vm->lock);
		if (over)
			break;
		uint64_t at = clock_now_ns() + ASK_EVERY_MS * UINT64_C(1000000);
		struct timespec until = clock_timespec(at);
		while (!vm->forced_stop && clock_now_ns() < at)
			pthread_cond_timedwait(&vm->changed, &vm->lock, &until);
	}
	vm->forced_over = true;
	pthread_mutex_unlock(&vm->lock);
	return NULL;
}

int move_forced_start(struct vm *vm, struct error *err)
{
	SCOPE_LOCK(&vm->lock);
	if (vm->forced_started && !vm->forced_over)
		return 0;
	if (vm->forced_started)
		pthread_join(vm->forced, NULL);
	vm->forced_over = false;
	int rc = pthread_create(&vm->forced, NULL, forced_thread, vm);
	vm->forced_started = !rc;
	return rc ? error_errno(err, rc, "thread") : 0;
}

void move_forced_free(struct vm *vm)
{
	pthread_mutex_lock(&vm->lock);
	vm->forced_stop = true;
	pthread_cond_broadcast(&vm->changed);
	pthread_mutex_unlock(&vm->lock);
	if (vm->forced_started)
		pthread_join(vm->forced, NULL);
	vm->forced_started = false;
}
