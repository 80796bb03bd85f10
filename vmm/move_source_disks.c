/* SPDX-License-Identifier: Apache-2.0 */
/* How each disk is to arrive, and the copy of the files that are below one. */
#include <errno.h>
#include <string.h>
#include <sys/stat.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "vmm/move_source.h"

#define LAYER_TRIES	   8
#define LAYER_WAIT_MS	   200
#define LAYER_REDIAL_MS	   100
#define SECTOR_ROUND_BYTES 512

/* --- the plan: before the destination hears of anything --- */

static int plan_devices(struct move *mv, struct error *err)
{
	struct vm *vm = mv->vm;
	for (unsigned t = 0; t < mv->opt.nto_disk; t++) {
		const struct move_to_disk *to = &mv->opt.to_disk[t];
		unsigned i = 0;
		while (i < vm->def.ndisks && strcmp(vm->def.disks[i].id, to->id))
			i++;
		if (i == vm->def.ndisks)
			return error_set(err, EINVAL, "--to-disk %s: VM %s has no disk of that name", to->id,
					 vm->def.name);
		mv->disks[i].mode = MOVE_DISK_DEVICE;
		strcpy(mv->disks[i].device, to->path);
	}
	return 0;
}

static int open_below(struct move *mv, const struct vm_backing *below, unsigned from,
		      enum block_format format, const char *label, struct block **out, struct error *err)
{
	struct block_open_options opt = {.format = format,
					 .read_only = true,
					 .direct = true,
					 .label = label,
					 .run_dir = mv->vm->dir,
					 .as_backing = true};
	opt.backing = &below->list[from + 1];
	opt.nbacking = below->n - from - 1;
	return block_open(below->list[from], &opt, out, err);
}

static bool interrupted(void *opaque)
{
	return source_check(opaque, NULL) != 0;
}

static int hash_below(struct move *mv, unsigned i, const struct vm_backing *below, struct error *err)
{
	struct move_backing *b = &mv->disks[i].below;
	struct block *blk = NULL;
	const char *slash = strrchr(below->list[0], '/');
	snprintf(b->name, sizeof b->name, "%s", slash ? slash + 1 : below->list[0]);
	int rc = open_below(mv, below, 0, mv->vm->disks[i].info.backing_format, b->name, &blk, err);
	if (rc)
		return rc;
	b->virtual_bytes = blk->size_bytes;
	uint64_t begin_ms = clock_now_ms();
	rc = block_content_hash(blk, interrupted, mv, b->sha256, err);
	block_close(blk);
	if (!rc)
		log_info("%s: %llu bytes, SHA-256 of content %s, read in %llu ms", below->list[0],
			 (unsigned long long)b->virtual_bytes, b->sha256,
			 (unsigned long long)(clock_now_ms() - begin_ms));
	return rc;
}

/* Shapes of the files below, and what they have allocated. */
static int look_below(struct move *mv, unsigned i, const struct vm_backing *below, struct error *err)
{
	struct move_backing *b = &mv->disks[i].below;
	enum block_format format = mv->vm->disks[i].info.backing_format;
	for (unsigned k = 0; k < below->n; k++) {
		struct block_image_info *shape = &b->layers[k];
		int rc = block_image_info(below->list[k], format, true, shape, err);
		if (rc)
			return rc;
		shape->virtual_bytes = (shape->virtual_bytes + SECTOR_ROUND_BYTES - 1) / SECTOR_ROUND_BYTES *
				       SECTOR_ROUND_BYTES;
		mv->disks[i].below_allocated_bytes += shape->allocated_bytes;
		format = shape->backing_format;
	}
	b->nlayers = below->n;
	return 0;
}

static int plan_backing(struct move *mv, unsigned i, struct error *err)
{
	struct source_disk *d = &mv->disks[i];
	const char *id = mv->vm->def.disks[i].id;
	struct vm_backing below;
	int rc = vm_backing_paths(mv->vm, i, &below, err);
	if (!rc && below.n)
		rc = look_below(mv, i, &below, err);
	if (rc || !below.n)
		return rc ? error_prefix(err, "disk %s", id) : 0;
	if (d->mode == MOVE_DISK_DEVICE)
		return 0; /* which holds everything */
	switch (mv->opt.backing) {
	case MOVE_BACKING_REFUSE:
		return error_set(
			err, EINVAL,
			"disk %s has a backing file (%s): choose --backing flatten (one full image "
			"there), chain (the files below it travel along) or reuse (%s has one of the "
			"same content)",
			id, below.list[0], mv->opt.peer);
	case MOVE_BACKING_FLATTEN:
		return 0;
	case MOVE_BACKING_CHAIN:
		d->mode = MOVE_DISK_CHAIN;
		for (unsigned k = 0; k < below.n; k++)
			mv->layer_total_bytes += d->below.layers[k].allocated_bytes;
		mv->nlayers += below.n;
		return 0;
	case MOVE_BACKING_REUSE:
		d->mode = MOVE_DISK_REUSE;
		rc = hash_below(mv, i, &below, err);
		return rc ? error_prefix(err, "disk %s: backing file", id) : 0;
	}
	return -EINVAL;
}

int source_disks_plan(struct move *mv, struct error *err)
{
	int rc = plan_devices(mv, err);
	if (!rc)
		rc = source_shared_plan(mv, err);
	for (unsigned i = 0; !rc && i < mv->vm->def.ndisks; i++)
		rc = plan_backing(mv, i, err);
	return rc ? rc : source_images_check(mv, err);
}

void source_disk_describe(struct move *mv, unsigned i, json_t *o)
{
	const struct source_disk *d = &mv->disks[i];
	if (d->mode == MOVE_DISK_FILE)
		return;
	if (d->mode == MOVE_DISK_SHARED)
		json_object_set_new(o, "shared", move_shared_to_json(&d->shared));
	json_object_set_new(o, "mode", json_string(move_disk_mode_name(d->mode)));
	if (d->mode == MOVE_DISK_DEVICE)
		json_object_set_new(o, "device", json_string(d->device));
	else if (d->mode != MOVE_DISK_SHARED)
		json_object_set_new(o, "backing", move_backing_to_json(d->mode, &d->below));
}

int source_disks_accepted(struct move *mv, json_t *hello_ok, struct error *err)
{
	json_t *modes = json_object_get(hello_ok, "disk_modes");
	for (unsigned i = 0; i < mv->vm->def.ndisks; i++) {
		const char *said = json_string_value(json_array_get(modes, i));
		const char *meant = move_disk_mode_name(mv->disks[i].mode);
		/* one that does not know the word made a plain file of the disk */
		if (strcmp(said ? said : move_disk_mode_name(MOVE_DISK_FILE), meant))
			return error_set(err, EPROTO,
					 "disk %s: %s cannot take it as %s: upgrade the destination",
					 mv->vm->def.disks[i].id, mv->opt.peer, meant);
	}
	return 0;
}

/* --- images under us --- */

static int check_image(struct vm *vm, unsigned i, struct error *err)
{
	struct vm_disk *d = &vm->disks[i];
	struct block_image_info *was = &d->info;
	const char *id = vm->def.disks[i].id;
	char path[8400];
	struct stat st;
	int rc = vm_resolve_path(vm, vm->def.disks[i].path, path, sizeof path, err);
	if (rc || was->is_block_device)
		return rc;
	if (stat(path, &st))
		return error_errno(err, errno, "disk %s: %s", id, path);
	if (st.st_ino != was->inode || st.st_dev != was->device)
		return error_set(err, EIO, "disk %s: %s on %s is another file than the one that the VM uses",
				 id, path, vm->cfg->name);
	uint64_t now = (uint64_t)st.st_size;
	if (now < was->file_bytes)
		return error_set(err, EIO,
				 "disk %s: %s on %s was cut from %llu to %llu bytes while the VM uses it", id,
				 path, vm->cfg->name, (unsigned long long)was->file_bytes,
				 (unsigned long long)now);
	if (was->format == BLOCK_FORMAT_QCOW2)
		was->file_bytes = now; /* it grows as the guest writes, and never shrinks by itself */
	else if (now > d->local->size_bytes)
		return error_set(
			err, EIO, "disk %s: %s on %s grew from %llu to %llu bytes while the VM uses it", id,
			path, vm->cfg->name, (unsigned long long)was->file_bytes, (unsigned long long)now);
	return 0;
}

int source_images_check(struct move *mv, struct error *err)
{
	int rc = 0;
	for (unsigned i = 0; !rc && i < mv->vm->def.ndisks; i++)
		rc = check_image(mv->vm, i, err);
	return rc;
}

/* --- the files below --- */

struct layer_copy {
	struct move *mv;
	const char *token;
	char name[64];
	bool over_another; /* it has a backing file itself */
	struct block *local;
	struct mirror *mirror;
};

static int start_layer(struct layer_copy *c, bool again, struct error *err)
{
	struct block *remote = NULL;
	int rc = source_remote_open(c->mv, c->token, c->name, c->local->size_bytes, &remote, err);
	if (rc)
		return rc;
	struct mirror_options opt = {
		.remote = remote,
		.remote_is_zero = !c->over_another,
		.remote_has_backing = c->over_another,
		.keep_map = again,
		.bandwidth = &c->mv->bandwidth,
	};
	rc = mirror_start(c->mirror, &opt, err);
	if (rc)
		block_close(remote);
	return rc;
}

static int wait_layer(struct layer_copy *c, struct error *err)
{
	for (unsigned tries = 1;;) {
		struct error e = ERROR_INIT;
		int rc = source_check(c->mv, err);
		if (rc)
			return rc;
		rc = mirror_wait_synced(c->mirror, LAYER_WAIT_MS, &e);
		if (!rc)
			rc = mirror_flush_remote(c->mirror, &e);
		if (!rc)
			return 0;
		struct mirror_stats st;
		mirror_stats(c->mirror, &st);
		if (rc == -ETIMEDOUT && !st.failed)
			continue;
		if (source_check(c->mv, err))
			return source_check(c->mv, err);
		if (st.local_failed || e.code == -ENOSPC || tries++ == LAYER_TRIES)
			return error_set(err, e.code, "%s, %s %s", e.message, st.local_failed ? "on" : "at",
					 st.local_failed ? c->mv->vm->cfg->name : c->mv->opt.peer);
		log_warn("disk %s: session broke (%s), dialling again (%u)", c->name, e.message, tries);
		mirror_stop(c->mirror);
		clock_sleep_ms(LAYER_REDIAL_MS);
		rc = start_layer(c, true, err);
		if (rc)
			return rc;
	}
}

static int run_layer(struct layer_copy *c, struct error *err)
{
	struct move *mv = c->mv;
	struct block *top;
	int rc = mirror_create(c->local, &c->mirror, &top, err);
	if (rc)
		return rc;
	pthread_mutex_lock(&mv->lock);
	mv->layer_mirror = c->mirror;
	pthread_mutex_unlock(&mv->lock);
	rc = start_layer(c, false, err);
	if (!rc)
		rc = wait_layer(c, err);
	pthread_mutex_lock(&mv->lock);
	mv->layer_mirror = NULL;
	pthread_mutex_unlock(&mv->lock);
	struct mirror_stats st;
	mirror_stats(c->mirror, &st);
	mv->layer_copied_bytes += st.data_bytes_copied;
	mirror_stop(c->mirror);
	mirror_free(c->mirror);
	return rc;
}

static int copy_layer(struct move *mv, unsigned disk, const struct vm_backing *below, unsigned k,
		      const char *token, struct error *err)
{
	const struct block_image_info *shape = &mv->disks[disk].below.layers[k];
	struct layer_copy c = {.mv = mv, .token = token, .over_another = k + 1 < below->n};
	snprintf(c.name, sizeof c.name, "%s.below%u", mv->vm->def.disks[disk].id, k + 1);
	int rc = open_below(mv, below, k, shape->format, c.name, &c.local, err);
	if (!rc) {
		rc = run_layer(&c, err);
		block_close(c.local);
	}
	SCOPE_LOCK(&mv->lock);
	mv->layer_done_bytes += shape->allocated_bytes;
	return rc ? error_prefix(err, "disk %s: %s", mv->vm->def.disks[disk].id, below->list[k]) : 0;
}

int source_layers_copy(struct move *mv, struct error *err)
{
	unsigned first = 0;
	pthread_mutex_lock(&mv->lock);
	mv->layer_done_bytes = 0; /* of this attempt */
	pthread_mutex_unlock(&mv->lock);
	for (unsigned i = 0; i < mv->vm->def.ndisks; i++) {
		if (mv->disks[i].mode != MOVE_DISK_CHAIN)
			continue;
		struct vm_backing below;
		int rc = vm_backing_paths(mv->vm, i, &below, err);
		/* the lowest first: what is above it is opened over it there */
		for (unsigned k = below.n; !rc && k-- > 0;)
			rc = copy_layer(mv, i, &below, k, mv->layer_token[first + k], err);
		if (rc)
			return rc;
		first += below.n;
	}
	return 0;
}
