/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/vm.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/cond.h"
#include "base/log.h"
#include "host/jsonl.h"
#include "vmm/memory.h"
#include "vmm/move.h"
#include "vmm/move_shared.h"
#include "vmm/tap.h"

/* Less is no running guest's. */
#define BALLOON_LEAST_BYTES (2u << 20)

int vm_init(struct vm *vm, const struct host_config *cfg)
{
	memset(vm, 0, sizeof *vm);
	vm->cfg = cfg;
	vm->dirfd = -1;
	vm->state = VM_STOPPED;
	pthread_mutex_init(&vm->run_lock, NULL);
	pthread_mutex_init(&vm->lock, NULL);
	cond_init_monotonic(&vm->changed);
	return 0;
}

void vm_release(struct vm *vm)
{
	if (vm->machine)
		machine_destroy(vm->machine);
	vm->machine = NULL;
	for (unsigned i = 0; i < vm->def.ndisks; i++) {
		struct vm_disk *d = &vm->disks[i];
		if (d->mirror) {
			mirror_stop(d->mirror);
			mirror_free(d->mirror);
		}
		block_close(d->local);
		memset(d, 0, sizeof *d);
	}
	if (vm->dirfd >= 0)
		close(vm->dirfd);
	vm->dirfd = -1;
	record_close(vm->record);
	vm->record = NULL;
}

int vm_resolve_path(const struct vm *vm, const char *path, char *out, size_t size, struct error *err)
{
	int n = path[0] == '/' ? snprintf(out, size, "%s", path)
			       : snprintf(out, size, "%s/%s", vm->dir, path);
	if (n < 0 || (size_t)n >= size)
		return error_set(err, ENAMETOOLONG, "%s: path too long", path);
	return 0;
}

int vm_backing_paths(const struct vm *vm, unsigned disk, struct vm_backing *out, struct error *err)
{
	char text[sizeof vm->def.disks[0].backing];
	const char *names[VM_BACKING_MAX];
	int n = vmdef_backing_names(&vm->def.disks[disk], text, names);
	if (n < 0)
		return error_set(err, n, "disk %s: backing", vm->def.disks[disk].id);
	out->n = (unsigned)n;
	for (int i = 0; i < n; i++) {
		int rc = vm_resolve_path(vm, names[i], out->paths[i], sizeof out->paths[i], err);
		if (rc)
			return rc;
		out->list[i] = out->paths[i];
	}
	return 0;
}

int vm_open_disks(struct vm *vm, struct error *err)
{
	for (unsigned i = 0; i < vm->def.ndisks; i++) {
		const struct vm_disk_def *def = &vm->def.disks[i];
		struct vm_disk *d = &vm->disks[i];
		char path[8400], label[48];
		int rc = vm_resolve_path(vm, def->path, path, sizeof path, err);
		snprintf(label, sizeof label, "disk %s", def->id);
		struct block_open_options opt = {.read_only = def->read_only,
						 .direct = true,
						 .label = label,
						 .run_dir = vm->dir,
						 .shared = d->shared};
		struct vm_backing below;
		if (!rc)
			rc = vm_backing_paths(vm, i, &below, err);
		if (!rc)
			rc = block_format_parse(def->format, &opt.format);
		if (!rc)
			rc = block_image_info(path, opt.format, false, &d->info, err);
		if (!rc) {
			opt.backing = below.list;
			opt.nbacking = below.n;
			opt.size_bytes = d->info.is_block_device ? def->size_bytes : 0;
			rc = block_open(path, &opt, &d->local, err);
		}
		/* it is locked now; while it is another host's, so may be its names */
		if (!rc && !d->shared && !d->info.is_block_device)
			move_shared_sweep(vm->cfg->shared, path, d->info.device, d->info.inode);
		if (!rc)
			rc = mirror_create(d->local, &d->mirror, &d->top, err);
		if (rc)
			return error_prefix(err, "disk %s", def->id);
	}
	return 0;
}

static void machine_event_cb(void *opaque, enum machine_event event, const char *detail)
{
	struct vm *vm = opaque;
	if (event == MACHINE_EVENT_RESET) {
		log_info("guest reset");
		return;
	}
	log_info("guest %s%s%s", event == MACHINE_EVENT_SHUTDOWN ? "powered off" : "crashed",
		 detail ? ": " : "", detail ? detail : "");
	SCOPE_LOCK(&vm->lock);
	if (event == MACHINE_EVENT_SHUTDOWN)
		vm->guest_stopped = true;
	else
		vm->guest_crashed = true;
	if (detail)
		snprintf(vm->state_reason, sizeof vm->state_reason, "%s", detail);
	pthread_cond_broadcast(&vm->changed);
}

int vm_create_machine(struct vm *vm, json_t *cpu, struct error *err)
{
	char serial[8400];
	struct machine_config mc = {
		.memory_bytes = vm->def.memory_bytes,
		.cpus = vm->def.cpus,
		.ndisks = vm->def.ndisks,
		.serial = vm->def.serial[0] ? vm->def.serial : "socket",
		.run_dir = vm->dir,
		.balloon = vm->def.balloon == VM_BALLOON_YES,
		.cpu = cpu,
		.event = machine_event_cb,
		.opaque = vm,
	};
	struct cpu_features allowed, needed;
	if (!cpu && vmdef_cpu_limits(&vm->def, &allowed, &needed)) {
		mc.cpu_allowed = &allowed;
		mc.cpu_needed = &needed;
	}
	if (!strncmp(mc.serial, "file:", 5) && mc.serial[5] != '/') {
		snprintf(serial, sizeof serial, "file:%s/%s", vm->dir, mc.serial + 5);
		mc.serial = serial;
	}
	for (unsigned i = 0; i < vm->def.ndisks; i++) {
		snprintf(mc.disks[i].id, sizeof mc.disks[i].id, "%s", vm->def.disks[i].id);
		mc.disks[i].block = vm->disks[i].top;
		mc.disks[i].read_only = vm->def.disks[i].read_only;
	}
	int rc = 0;
	for (unsigned i = 0; i < vm->def.nnets; i++) {
		const struct vm_net_def *net = &vm->def.nets[i];
		char ifname[16];
		int fd = tap_open(net->bridge, ifname, err);
		if (fd < 0) {
			rc = error_prefix(err, "net %s", net->id);
			break;
		}
		snprintf(mc.nets[i].id, sizeof mc.nets[i].id, "%s", net->id);
		memcpy(mc.nets[i].mac, net->mac, sizeof net->mac);
		mc.nets[i].tap_fd = fd;
		mc.nnets++;
	}
	if (!rc)
		rc = machine_create(&mc, &vm->machine, err);
	if (rc)
		for (unsigned i = 0; i < mc.nnets; i++)
			close(mc.nets[i].tap_fd);
	return rc;
}

int vm_load_kernel(struct vm *vm, bool boot, struct error *err)
{
	/* Through the folder's descriptor, so that a reset finds the files after an arrival's folder was
	 * renamed. */
	char kernel[4200], initrd[4200];
	const char *in = vm->def.initrd[0] ? initrd : NULL;
	if (vm->def.kernel[0] == '/')
		snprintf(kernel, sizeof kernel, "%s", vm->def.kernel);
	else
		snprintf(kernel, sizeof kernel, "/proc/self/fd/%d/%s", vm->dirfd, vm->def.kernel);
	if (vm->def.initrd[0] == '/')
		snprintf(initrd, sizeof initrd, "%s", vm->def.initrd);
	else
		snprintf(initrd, sizeof initrd, "/proc/self/fd/%d/%s", vm->dirfd, vm->def.initrd);
	const char *const names[] = {vm->def.kernel, vm->def.initrd};
	for (unsigned i = 0; i < 2;
	     i++) /* named as people know them, before the descriptor's path would be */
		if (names[i][0] && names[i][0] != '/' && faccessat(vm->dirfd, names[i], R_OK, 0))
			return error_errno(err, errno, "%s %s/%s", i ? "initrd" : "kernel", vm->dir,
					   names[i]);
	if (boot)
		return machine_load_kernel(vm->machine, kernel, in, vm->def.cmdline, err);
	return machine_set_kernel(vm->machine, kernel, in, vm->def.cmdline, err);
}

void vm_stop_guest(struct vm *vm)
{
	if (vm->machine)
		machine_pause(vm->machine, NULL);
}

int vm_mark_powered_on(struct vm *vm, bool on, struct error *err)
{
	struct vm_record rec;
	int rc = vm_record(vm, &rec, err);
	if (rc)
		return rc;
	uint32_t flags = on ? rec.flags | RECORD_POWERED_ON : rec.flags & ~RECORD_POWERED_ON;
	if (flags == rec.flags)
		return 0;
	rec.flags = flags;
	return record_store(vm->record, &rec, err);
}

int vm_record(struct vm *vm, struct vm_record *out, struct error *err)
{
	if (!vm->record)
		return error_set(err, EAGAIN, "VM %s: no record is open", vm->def.name);
	/* After a write that failed only the medium knows; it is asked again each time, and believed once it
	 * answers. */
	if (record_load(vm->record, out, NULL) == 0)
		return 0;
	return record_reload(vm->record, out, err);
}

int vm_record_transition(struct vm *vm, const struct vm_transition *t, struct error *err)
{
	struct vm_record rec;
	int rc = vm_record(vm, &rec, err);
	if (rc)
		return rc;
	rec.state = t->to;
	rec.epoch = t->to_epoch;
	rec.flags = (rec.flags | t->flags_set) & ~t->flags_clear;
	if (t->peer)
		snprintf(rec.peer, sizeof rec.peer, "%s", t->peer);
	if (t->peer_address)
		snprintf(rec.peer_address, sizeof rec.peer_address, "%s", t->peer_address);
	if (t->folder)
		snprintf(rec.folder, sizeof rec.folder, "%s", t->folder);
	snprintf(rec.reason, sizeof rec.reason, "%s", t->reason ? t->reason : "");
	uint64_t begin = clock_now_us();
	rc = record_compare_and_set(vm->record, t->from, t->from_epoch, &rec, NULL, err);
	__atomic_store_n(&vm->record_us, clock_now_us() - begin, __ATOMIC_RELAXED);
	return rc;
}

void vm_set_state(struct vm *vm, enum vm_state state, const char *reason)
{
	SCOPE_LOCK(&vm->lock);
	if (vm->state != state)
		log_info("state %s -> %s%s%s", vm_state_name(vm->state), vm_state_name(state),
			 reason ? ": " : "", reason ? reason : "");
	vm->state = state;
	snprintf(vm->state_reason, sizeof vm->state_reason, "%s", reason ? reason : "");
	pthread_cond_broadcast(&vm->changed);
}

enum vm_state vm_get_state(struct vm *vm)
{
	SCOPE_LOCK(&vm->lock);
	return vm->state;
}

void vm_request_quit(struct vm *vm, int exit_status)
{
	SCOPE_LOCK(&vm->lock);
	vm->quit = true;
	vm->exit_status = exit_status;
	pthread_cond_broadcast(&vm->changed);
}

int vm_user_pause(struct vm *vm, struct error *err)
{
	SCOPE_LOCK(&vm->run_lock);
	enum vm_state state = vm_get_state(vm);
	if (state == VM_PAUSED)
		return 0;
	if (state != VM_RUNNING)
		return error_set(err, EBUSY, "VM %s is %s", vm->def.name, vm_state_name(state));
	if (move_is_deciding(vm))
		return error_set(err, EBUSY, "VM %s is being handed over", vm->def.name);
	if (move_destination_is_paging(vm)) /* a vCPU that waits for a page does not stop */
		return error_set(err, EBUSY,
				 "VM %s has just moved here, and its last memory is on the way still",
				 vm->def.name);
	int rc = machine_pause(vm->machine, err);
	if (!rc)
		vm_set_state(vm, VM_PAUSED, NULL);
	return rc;
}

int vm_user_resume(struct vm *vm, struct error *err)
{
	SCOPE_LOCK(&vm->run_lock);
	enum vm_state state = vm_get_state(vm);
	if (state == VM_RUNNING)
		return 0;
	if (state == VM_IN_DOUBT)
		return error_set(err, EBUSY, "VM %s is in doubt (%s): only snmigrate resolve may start it",
				 vm->def.name, vm->state_reason);
	if (state != VM_PAUSED)
		return error_set(err, EBUSY, "VM %s is %s", vm->def.name, vm_state_name(state));
	if (move_is_deciding(vm))
		return error_set(err, EBUSY, "VM %s is being handed over", vm->def.name);
	int rc = machine_start(vm->machine, err);
	if (!rc)
		vm_set_state(vm, VM_RUNNING, NULL);
	return rc;
}

int vm_user_balloon(struct vm *vm, json_t *request, struct error *err)
{
	json_t *bytes = json_object_get(request, "bytes");
	SCOPE_LOCK(&vm->run_lock);
	enum vm_state state = vm_get_state(vm);
	if (!json_is_integer(bytes) || json_integer_value(bytes) < BALLOON_LEAST_BYTES)
		return error_set(err, EINVAL, "balloon: a guest has to keep %u MiB at the least",
				 BALLOON_LEAST_BYTES >> 20);
	if (state != VM_RUNNING && state != VM_PAUSED)
		return error_set(err, EBUSY, "VM %s is %s", vm->def.name, vm_state_name(state));
	/* from here on the device is as it was saved */
	if (move_is_deciding(vm))
		return error_set(err, EBUSY, "VM %s is being handed over", vm->def.name);
	if (move_destination_is_paging(vm)) /* the device may be waiting for a page */
		return error_set(err, EBUSY,
				 "VM %s has just moved here, and its last memory is on the way still",
				 vm->def.name);
	int rc = machine_balloon_set(vm->machine, (uint64_t)json_integer_value(bytes), err);
	return rc == -ENOTSUP
		       ? error_set(err, ENOTSUP, "VM %s has no balloon: stop it, and snvm set %s balloon=yes",
				   vm->def.name, vm->def.name)
		       : rc;
}

/* What the host gives, and what became of the balloon; null where there is none. */
static void describe_memory(struct vm *vm, json_t *o)
{
	struct machine_balloon b;
	json_t *balloon = json_null();
	enum vm_state state = vm_get_state(vm);
	if (state != VM_RUNNING && state != VM_PAUSED) /* there may be no machine */
		return;
	if (machine_balloon(vm->machine, &b))
		balloon = json_pack("{s:I, s:I, s:b}", "target_bytes", (json_int_t)b.target_bytes,
				    "actual_bytes", (json_int_t)b.actual_bytes, "driver", b.driver);
	json_object_set_new(o, "balloon", balloon);
	json_object_set_new(
		o, "resident_bytes",
		json_integer((json_int_t)guest_memory_resident_bytes(machine_memory(vm->machine))));
}

json_t *vm_info(struct vm *vm)
{
	json_t *disks = json_array();
	for (unsigned i = 0; i < vm->def.ndisks; i++)
		json_array_append_new(
			disks,
			json_pack("{s:s, s:s, s:s, s:I}", "id", vm->def.disks[i].id, "path",
				  vm->def.disks[i].path, "format", vm->def.disks[i].format, "virtual_bytes",
				  (json_int_t)(vm->disks[i].local ? vm->disks[i].local->size_bytes : 0)));
	json_t *migrating = move_describe(vm), *memory = json_object();
	describe_memory(vm, memory);
	SCOPE_LOCK(&vm->lock);
	json_t *o =
		json_pack("{s:b, s:s, s:s, s:s, s:o, s:o, s:o, s:I, s:i, s:o, s:i}", "ok", 1, "uuid",
			  vm->def.uuid, "name", vm->def.name, "state", vm_state_name(vm->state),
			  "state_reason", jsonl_text(vm->state_reason), "migrating", migrating, "arriving",
			  move_arrival_describe(vm), "memory_bytes", (json_int_t)vm->def.memory_bytes, "cpus",
			  (int)vm->def.cpus, "disks", disks, "pid", (int)getpid());
	json_object_update(o, memory);
	json_decref(memory);
	return o;
}
