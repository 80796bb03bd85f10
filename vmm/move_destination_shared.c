/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The destination's part for disks that both hosts see: found and proved by the source's challenge
 * (vmm/move_shared.h), opened without a lock and fenced, locked before READY, written to once the owner's
 * record is durable.
 */
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "base/log.h"
#include "vmm/move_destination.h"

bool arrival_is_shared(const struct arrival *a, unsigned disk)
{
	return a->disks[disk].mode == MOVE_DISK_SHARED;
}

int arrival_read_shared(struct arrival *a, unsigned i, json_t *o, struct error *err)
{
	struct vm *vm = a->vm;
	struct arrival_disk *d = &a->disks[i];
	char path[MOVE_SHARED_PATH_BYTES], other[VM_NAME_MAX_CHARS + 1];
	if (a->version < MOVE_PROTOCOL_COLD || a->shape[i].format != BLOCK_FORMAT_RAW)
		return error_set(err, EPROTO,
				 "hello: \"shared\" of a disk that is not raw, or in protocol %u",
				 a->version);
	int rc = move_shared_parse(json_object_get(o, "shared"), &d->shared, err);
	if (!rc)
		rc = move_shared_find(vm->cfg->shared, &d->shared, path, &d->shared_device, &d->shared_inode,
				      err);
	if (rc)
		return rc == -ENOENT ? error_prefix(err, "host %s", vm->cfg->name) : rc;
	for (unsigned k = 0; k < i; k++)
		if (!strcmp(vm->def.disks[k].path, path))
			return error_set(err, EINVAL, "%s is given twice", path);
	if (registry_device_used(vm->cfg, path, vm->def.uuid, other))
		return error_set(err, EBUSY, "%s is a disk of VM %s on host %s", path, other, vm->cfg->name);
	snprintf(vm->def.disks[i].path, sizeof vm->def.disks[i].path, "%s", path);
	vm->disks[i].shared = true;
	log_info("disk %s: %s is the file that %s uses", vm->def.disks[i].id, path, a->peer);
	return 0;
}

int arrival_check_shared(struct arrival *a, struct error *err)
{
	for (unsigned i = 0; i < a->vm->def.ndisks; i++) {
		const struct vm_disk *d = &a->vm->disks[i];
		const char *path = a->vm->def.disks[i].path;
		if (!arrival_is_shared(a, i))
			continue;
		if (d->info.inode != a->disks[i].shared_inode || d->info.device != a->disks[i].shared_device)
			return error_set(err, EIO, "%s is not the file any more that the source uses", path);
		if (!block_is_direct(d->local))
			return error_set(
				err, EINVAL,
				"%s: its file system has no O_DIRECT on host %s, so that host may keep parts "
				"of it",
				path, a->vm->cfg->name);
	}
	return 0;
}

int arrival_lock_shared(struct arrival *a, struct error *err)
{
	int rc = 0;
	for (unsigned i = 0; !rc && i < a->vm->def.ndisks; i++)
		if (arrival_is_shared(a, i))
			rc = block_share_lock(a->vm->disks[i].local, err);
	return rc;
}

void arrival_unfence_shared(struct arrival *a)
{
	for (unsigned i = 0; i < a->vm->def.ndisks; i++)
		if (arrival_is_shared(a, i))
			block_share_unfence(a->vm->disks[i].local);
}
