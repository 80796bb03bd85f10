/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The source's part for disks that both hosts see (docs/handover.md, "Shared disks"): they are not copied. In
 * the pause, with nothing in flight, they are flushed, fenced and unlocked before the destination may say
 * READY.
 */
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "vmm/move_source.h"

#define RELOCK_EVERY_MS 200

bool source_is_shared(const struct move *mv, unsigned disk)
{
	return mv->disks[disk].mode == MOVE_DISK_SHARED;
}

static int plan_one(struct move *mv, unsigned i, struct error *err)
{
	struct vm *vm = mv->vm;
	const struct vm_disk *d = &vm->disks[i];
	struct source_disk *s = &mv->disks[i];
	if (d->info.format != BLOCK_FORMAT_RAW)
		return error_set(
			err, EINVAL,
			"its format is %s: only raw disks can be used by two hosts in turn without being "
			"reopened; move it with --with-storage",
			vm->def.disks[i].format);
	if (d->info.is_block_device)
		return error_set(
			err, EINVAL,
			"%s is a block device, of which it cannot be proved that %s sees the same: move it "
			"with --with-storage",
			vm->def.disks[i].path, mv->opt.peer);
	struct error why = ERROR_INIT;
	int rc = move_shared_locate(vm->cfg->shared, vm->def.disks[i].path, s->shared_folder, &s->shared,
				    &why);
	if (rc)
		return error_set(err, rc, "%s on host %s: move it with --with-storage", why.message,
				 vm->cfg->name);
	if (!block_is_direct(d->local))
		return error_set(err, EINVAL,
				 "%s: its file system has no O_DIRECT, so this host may keep parts of it",
				 vm->def.disks[i].path);
	s->mode = MOVE_DISK_SHARED;
	return 0;
}

int source_shared_plan(struct move *mv, struct error *err)
{
	if (mv->opt.with_storage)
		return 0;
	if (mv->opt.nto_disk)
		return error_set(err, EINVAL, "--to-disk needs --with-storage");
	for (unsigned i = 0; i < mv->vm->def.ndisks; i++) {
		struct error e = ERROR_INIT;
		int rc = plan_one(mv, i, &e);
		if (rc)
			return error_set(err, rc, "disk %s: %s", mv->vm->def.disks[i].id, e.message);
	}
	return 0;
}

int source_shared_challenge(struct move *mv, struct error *err)
{
	int rc = 0;
	for (unsigned i = 0; !rc && i < mv->vm->def.ndisks; i++) {
		struct source_disk *s = &mv->disks[i];
		const struct block_image_info *info = &mv->vm->disks[i].info;
		if (!source_is_shared(mv, i))
			continue;
		rc = move_shared_challenge(s->shared_folder, info->device, info->inode, &s->shared, err);
		if (rc)
			error_prefix(err, "disk %s", mv->vm->def.disks[i].id);
	}
	return rc;
}

void source_shared_withdraw(struct move *mv)
{
	for (unsigned i = 0; i < mv->vm->def.ndisks; i++)
		if (source_is_shared(mv, i))
			move_shared_withdraw(mv->disks[i].shared_folder, &mv->disks[i].shared);
}

int source_shared_flush(struct move *mv, struct error *err)
{
	for (unsigned i = 0; i < mv->vm->def.ndisks; i++) {
		int rc = source_is_shared(mv, i) ? block_flush(mv->vm->disks[i].local) : 0;
		if (rc)
			return error_errno(err, rc, "disk %s: flush", mv->vm->def.disks[i].id);
	}
	return 0;
}

int source_shared_release(struct move *mv, struct error *err)
{
	int rc = source_shared_flush(mv, err);
	for (unsigned i = 0; !rc && i < mv->vm->def.ndisks; i++) {
		if (!source_is_shared(mv, i))
			continue;
		block_share_fence(mv->vm->disks[i].local);
		block_share_unlock(mv->vm->disks[i].local);
		mv->disks[i].released = true;
	}
	return rc;
}

/* For a while, or until a person says something. True: that nobody else can have the disk. */
static bool told_to_run_here(struct move *mv)
{
	SCOPE_LOCK(&mv->lock);
	mv->settle_started = true;
	uint64_t at = clock_now_ns() + RELOCK_EVERY_MS * UINT64_C(1000000);
	struct timespec until = clock_timespec(at);
	while (!mv->resolve[0] && clock_now_ns() < at)
		pthread_cond_timedwait(&mv->changed, &mv->lock, &until);
	if (!mv->resolve[0])
		return false;
	bool here = !strcmp(mv->resolve, "run-here");
	mv->resolve_result = ERROR_INIT;
	if (!here && strcmp(mv->resolve, "ask"))
		error_set(&mv->resolve_result, EPERM,
			  "VM %s is this host's and waits for the lock of a shared disk; where nobody else "
			  "can have it: --run-here",
			  mv->vm->def.name);
	mv->resolve[0] = '\0';
	mv->resolve_done = true;
	pthread_cond_broadcast(&mv->changed);
	return here;
}

/* The destination gives its lock back when it has given up, which a cut link may delay: until then, or as
 * long as anybody else has it, the guest waits. A file system whose locks do not come back is a person's to
 * judge (snmigrate resolve --run-here). */
void source_shared_take_back(struct move *mv)
{
	struct vm *vm = mv->vm;
	bool forced = false;
	for (unsigned i = 0; i < vm->def.ndisks; i++) {
		struct source_disk *s = &mv->disks[i];
		struct error e = ERROR_INIT;
		for (unsigned n = 0;
		     s->released && !vm->cold && !forced && block_share_lock(vm->disks[i].local, &e); n++) {
			char reason[300];
			snprintf(reason, sizeof reason, "disk %s: %.200s; the guest waits for it",
				 vm->def.disks[i].id, e.message);
			if (!n)
				log_warn("%s", reason);
			if (n == 1)
				vm_set_state(vm, VM_IN_DOUBT, reason);
			forced = told_to_run_here(mv);
			if (forced)
				log_warn("disk %s: used without its lock, as a person said that nobody else "
					 "can have it",
					 vm->def.disks[i].id);
			e = ERROR_INIT;
		}
		if (s->released && !vm->cold)
			block_share_unfence(vm->disks[i].local);
		s->released = false;
	}
}

json_t *source_shared_paths(const struct move *mv)
{
	json_t *list = NULL;
	for (unsigned i = 0; i < mv->vm->def.ndisks; i++) {
		if (!source_is_shared(mv, i))
			continue;
		list = list ? list : json_array();
		json_array_append_new(list, json_string(mv->vm->def.disks[i].path));
	}
	return list;
}
