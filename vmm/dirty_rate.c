/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/dirty_rate.h"

#include <errno.h>

#include "base/cleanup.h"
#include "memxfer/dirty_rate.h"
#include "vmm/move.h"

static int may_go_on(void *opaque, struct error *err)
{
	struct vm *vm = opaque;
	SCOPE_LOCK(&vm->lock);
	if (vm->measure_end)
		return error_set(err, EBUSY, "VM %s is being moved", vm->def.name);
	if (vm->quit || vm->state != VM_RUNNING)
		return error_set(err, EBUSY, "VM %s does not run", vm->def.name);
	return 0;
}

static void end(struct vm *vm)
{
	SCOPE_LOCK(&vm->lock);
	vm->measuring = false;
	pthread_cond_broadcast(&vm->changed);
}

/* One at a time; not during a move. A move that begins after this was asked finds `measuring`. */
static int begin(struct vm *vm, struct error *err)
{
	{
		SCOPE_LOCK(&vm->lock);
		if (vm->state != VM_RUNNING)
			return error_set(err, EBUSY,
					 "VM %s is %s: only a running VM's dirty rate can be measured",
					 vm->def.name, vm_state_name(vm->state));
		if (vm->measuring)
			return error_set(err, EBUSY, "VM %s: its dirty rate is being measured already",
					 vm->def.name);
		vm->measuring = true;
	}
	if (!move_is_running(vm))
		return 0;
	end(vm);
	return error_set(err, EBUSY, "VM %s is being moved", vm->def.name);
}

json_t *vm_dirty_rate(struct vm *vm, json_t *request, struct error *err)
{
	json_t *n = json_object_get(request, "seconds");
	json_int_t seconds = json_integer_value(n);
	struct mem_dirty_rate r;
	if (!json_is_integer(n) || seconds < 1 || seconds > DIRTY_RATE_SECONDS_MAX) {
		error_set(err, EINVAL, "dirty-rate: 1 to %d seconds are possible", DIRTY_RATE_SECONDS_MAX);
		return NULL;
	}
	if (begin(vm, err))
		return NULL;
	struct dirty_source source = machine_dirty_source(vm->machine);
	int rc = mem_dirty_rate_measure(&source, machine_memory_space(vm->machine).npages,
					(unsigned)seconds * (1000 / MEM_DIRTY_SAMPLE_MS), may_go_on, vm, &r,
					err);
	end(vm);
	if (rc)
		return NULL;
	return json_pack("{s:s, s:I, s:I, s:I, s:I, s:I}", "vm", vm->def.name, "seconds", seconds,
			 "dirty_bytes_per_s", (json_int_t)r.bytes_per_s, "most_dirty_bytes_per_s",
			 (json_int_t)r.most_bytes_per_s, "working_set_bytes", (json_int_t)r.working_set_bytes,
			 "memory_bytes", (json_int_t)vm->def.memory_bytes);
}

void vm_dirty_rate_end(struct vm *vm)
{
	SCOPE_LOCK(&vm->lock);
	vm->measure_end = true;
	while (vm->measuring)
		pthread_cond_wait(&vm->changed, &vm->lock);
	vm->measure_end = false;
}
