/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "vmm/move_destination.h"

#define REREAD_EVERY_MS 1000

/* docs/handover.md D, "D's owner write fails": prepared -> abandoned; owner-unconfirmed -> the VM runs here.
 */
static bool reread(struct arrival *a)
{
	struct vm *vm = a->vm;
	struct vm_record rec;
	struct error err = ERROR_INIT;
	if (record_reload(vm->record, &rec, &err)) {
		log_warn("record: %s", err.message);
		return false;
	}
	if (rec.state == HANDOVER_OWNER_UNCONFIRMED && rec.epoch == a->epoch) {
		pthread_mutex_lock(&a->lock);
		a->write_failed = false;
		__atomic_store_n(&a->owner, true, __ATOMIC_RELAXED);
		pthread_mutex_unlock(&a->lock);
		enum vm_state state = arrival_state(a);
		arrival_unfence_shared(a);
		if (state == VM_RUNNING && machine_start(vm->machine, &err))
			log_error("start: %s", err.message);
		if (!vm->cold)
			machine_announce(vm->machine);
		vm_set_state(vm, state, NULL);
		move_link_send(a->link, FRAME_RUNNING, NULL, NULL);
		arrival_settle_in(a);
		if (arrival_confirm_start(a, &err))
			log_error("%s", err.message);
		return true;
	}
	pthread_mutex_lock(&a->lock);
	a->commit = false;
	pthread_mutex_unlock(&a->lock);
	if (arrival_abandon(a, "the owner record could not be written", &err)) {
		log_warn("record: %s", err.message);
		pthread_mutex_lock(&a->lock);
		a->commit = true;
		pthread_mutex_unlock(&a->lock);
		return false;
	}
	json_t *o = json_pack("{s:s}", "reason", "the owner record could not be written");
	move_link_send(a->link, FRAME_ABANDONED, o, NULL);
	json_decref(o);
	vm_request_quit(vm, 1);
	return true;
}

static void *reread_thread(void *arg)
{
	struct arrival *a = arg;
	for (;;) {
		pthread_mutex_lock(&a->lock);
		bool closing = a->closing;
		pthread_mutex_unlock(&a->lock);
		if (closing || reread(a))
			return NULL;
		clock_sleep_ms(REREAD_EVERY_MS);
	}
}

int arrival_reread_start(struct arrival *a, struct error *err)
{
	int rc = pthread_create(&a->rereader, NULL, reread_thread, a);
	if (rc)
		return error_errno(err, rc, "thread");
	a->rereader_started = true;
	return 0;
}
