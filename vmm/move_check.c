/* SPDX-License-Identifier: Apache-2.0 */
/* snmigrate check, at the source: what the VM needs. */
#include <errno.h>
#include <string.h>
#include <sys/stat.h>

#include "base/cleanup.h"
#include "host/facts.h"
#include "vmm/move_source.h"

/* What is allocated now, as hello will say it. */
static uint64_t allocated_now(struct vm *vm, unsigned disk)
{
	char path[8400];
	struct stat st;
	if (!vm_resolve_path(vm, vm->def.disks[disk].path, path, sizeof path, NULL) && !stat(path, &st) &&
	    S_ISREG(st.st_mode))
		return (uint64_t)st.st_blocks * 512;
	return vm->disks[disk].info.allocated_bytes;
}

static json_t *describe_disks(struct vm *vm)
{
	json_t *disks = json_array();
	for (unsigned i = 0; i < vm->def.ndisks; i++) {
		const struct vm_disk_def *d = &vm->def.disks[i];
		json_array_append_new(
			disks,
			json_pack("{s:s, s:s, s:I, s:I, s:b}", "id", d->id, "format", d->format,
				  "virtual_bytes",
				  (json_int_t)(vm->disks[i].local ? vm->disks[i].local->size_bytes : 0),
				  "allocated_bytes", (json_int_t)allocated_now(vm, i), "backing",
				  d->backing[0] != '\0'));
	}
	return disks;
}

/* Kernel and initrd: 0 for what is not there. */
static uint64_t files_bytes(struct vm *vm)
{
	const char *paths[] = {vm->def.kernel, vm->def.initrd};
	uint64_t sum = 0;
	for (unsigned i = 0; i < ARRAY_SIZE(paths); i++) {
		char path[8400];
		struct stat st;
		if (*paths[i] && !vm_resolve_path(vm, paths[i], path, sizeof path, NULL) && !stat(path, &st))
			sum += (uint64_t)st.st_size;
	}
	return sum;
}

/* What there is of the guest's memory: by regions, as they travel, or by pages where that is less. */
static uint64_t populated_bytes(struct vm *vm)
{
	struct mem_space space = machine_memory_space(vm->machine);
	uint64_t regions = source_populated_bytes(vm);
	struct stat st;
	if (fstat(space.fd, &st))
		return regions;
	uint64_t pages = (uint64_t)st.st_blocks * 512;
	return pages < regions ? pages : regions;
}

json_t *move_check_describe(struct vm *vm, struct error *err)
{
	enum vm_state state = vm_get_state(vm);
	if (state != VM_RUNNING && state != VM_PAUSED) {
		error_set(err, EBUSY, "VM %s is %s", vm->def.name, vm_state_name(state));
		return NULL;
	}
	json_t *cpu = machine_cpu_describe(vm->machine, err), *nets = json_array();
	if (!cpu) {
		json_decref(nets);
		return NULL;
	}
	for (unsigned i = 0; i < vm->def.nnets; i++)
		json_array_append_new(nets, json_pack("{s:s, s:s, s:i}", "id", vm->def.nets[i].id, "bridge",
						      vm->def.nets[i].bridge, "mtu",
						      (int)facts_interface_mtu(vm->def.nets[i].bridge)));
	json_t *o =
		json_pack("{s:i, s:i, s:I, s:I, s:I, s:o, s:o, s:o}", "protocol", MOVE_PROTOCOL_MOST, "cpus",
			  (int)vm->def.cpus, "memory_bytes", (json_int_t)vm->def.memory_bytes,
			  "populated_bytes", (json_int_t)populated_bytes(vm), "files_bytes",
			  (json_int_t)files_bytes(vm), "disks", describe_disks(vm), "nets", nets, "cpu", cpu);
	if (!o)
		error_errno(err, ENOMEM, "check");
	return o;
}
