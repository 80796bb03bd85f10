/* SPDX-License-Identifier: Apache-2.0 */
/* Images of an arriving VM: made, put on a device that this host allows, or over a file that was here
 * already; and the files below, which travel along. */
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "vmm/move_destination.h"

/* --- hello --- */

static int read_device(struct arrival *a, unsigned i, json_t *o, struct error *err)
{
	struct vm *vm = a->vm;
	struct arrival_disk *d = &a->disks[i];
	struct vm_disk_def *def = &vm->def.disks[i];
	const char *path = json_string_value(json_object_get(o, "device"));
	if (!path || strlen(path) >= sizeof d->device || a->shape[i].format != BLOCK_FORMAT_RAW)
		return error_set(err, EPROTO, "hello: \"device\" is missing, or not for a raw disk");
	if (!host_config_device_allowed(vm->cfg, path))
		return error_set(err, EPERM,
				 "%s is not among the block devices that host %s allows ([devices] allow)",
				 path, vm->cfg->name);
	struct block_image_info info;
	int rc = block_image_info(path, BLOCK_FORMAT_RAW, true, &info, err);
	if (rc)
		return rc;
	if (!info.is_block_device)
		return error_set(err, EINVAL, "%s: not a block device", path);
	/* A larger one is fine, as logical volumes come in whole extents: the disk is its beginning. */
	if (info.virtual_bytes < a->shape[i].virtual_bytes)
		return error_set(err, ENOSPC, "%s on host %s has %" PRIu64 " bytes, the disk %" PRIu64, path,
				 vm->cfg->name, info.virtual_bytes, a->shape[i].virtual_bytes);
	for (unsigned k = 0; k < i; k++)
		if (!strcmp(a->disks[k].device, path))
			return error_set(err, EINVAL, "%s is given twice", path);
	/* One that runs holds its device; one that is stopped has nothing but its definition to say so. */
	char other[VM_NAME_MAX_CHARS + 1];
	if (registry_device_used(vm->cfg, path, vm->def.uuid, other))
		return error_set(err, EBUSY, "%s is a disk of VM %s on host %s", path, other, vm->cfg->name);
	strcpy(d->device, path);
	strcpy(def->path, path);
	def->size_bytes = a->shape[i].virtual_bytes;
	return 0;
}

int arrival_read_disk(struct arrival *a, unsigned i, json_t *o, struct error *err)
{
	struct arrival_disk *d = &a->disks[i];
	struct vm_disk_def *def = &a->vm->def.disks[i];
	json_t *mode = json_object_get(o, "mode");
	if (move_disk_mode_parse(json_string_value(mode), &d->mode) || (mode && !json_is_string(mode)))
		return error_set(err, EPROTO, "hello: an unknown \"mode\": upgrade the destination");
	int rc = move_backing_parse(json_object_get(o, "backing"), d->mode, &d->below, err);
	if (rc)
		return rc;
	char text[sizeof def->backing];
	const char *names[VM_BACKING_MAX];
	int n = vmdef_backing_names(def, text, names);
	if (n < 0 || (unsigned)n != d->below.nlayers)
		return error_set(err, EPROTO, "hello: what is below does not match the definition");
	if ((d->mode == MOVE_DISK_CHAIN || d->mode == MOVE_DISK_REUSE) &&
	    a->shape[i].format != BLOCK_FORMAT_QCOW2)
		return error_set(err, EPROTO, "hello: a raw disk over another file");
	def->size_bytes = 0;
	a->nlayers += d->below.nlayers;
	if (d->mode == MOVE_DISK_SHARED)
		return arrival_read_shared(a, i, o, err);
	return d->mode == MOVE_DISK_DEVICE ? read_device(a, i, o, err) : 0;
}

uint64_t arrival_layers_bytes(const struct arrival *a)
{
	uint64_t sum = 0;
	for (unsigned i = 0; i < a->vm->def.ndisks; i++)
		for (unsigned k = 0; k < a->disks[i].below.nlayers; k++)
			sum += a->disks[i].below.layers[k].allocated_bytes;
	return sum;
}

bool arrival_all_files(const struct arrival *a)
{
	for (unsigned i = 0; i < a->vm->def.ndisks; i++)
		if (a->disks[i].mode != MOVE_DISK_FILE)
			return false;
	return true;
}

/* --- reuse --- */

static bool peer_gone(void *opaque)
{
	struct arrival *a = opaque;
	SCOPE_LOCK(&a->lock);
	return !a->channel_up;
}

/* 1: the same content. */
static int compare_backing(struct arrival *a, const struct host_backing *b, const struct move_backing *want,
			   struct error *err)
{
	struct block_open_options opt = {.read_only = true,
					 .direct = true,
					 .label = b->name,
					 .run_dir = a->vm->dir,
					 .as_backing = true};
	struct block *blk = NULL;
	char hash[BLOCK_CONTENT_HEX_CHARS + 1] = "";
	int rc = block_format_parse(b->format, &opt.format);
	if (!rc)
		rc = block_open(b->path, &opt, &blk, err);
	if (rc)
		return error_prefix(err, "[backing %s]", b->name);
	if (blk->size_bytes == want->virtual_bytes)
		rc = block_content_hash(blk, peer_gone, a, hash, err);
	block_close(blk);
	return rc ? rc : strcmp(hash, want->sha256) == 0;
}

static int find_backing(struct arrival *a, unsigned i, const struct host_backing **out, struct error *err)
{
	const struct host_config *cfg = a->vm->cfg;
	const struct move_backing *want = &a->disks[i].below;
	char tried[256] = "";
	for (unsigned k = 0; k < cfg->nbackings; k++) {
		const struct host_backing *b = &cfg->backings[k];
		struct error e = ERROR_INIT;
		int rc = compare_backing(a, b, want, &e);
		if (rc == -ECANCELED) {
			error_copy(err, &e);
			return rc;
		}
		if (rc < 0)
			log_warn("%s", e.message); /* another one may do */
		if (rc == 1) {
			log_info("disk %s: [backing %s] %s has the content of %s", a->vm->def.disks[i].id,
				 b->name, b->path, want->name);
			*out = b;
			return 0;
		}
		size_t at = strlen(tried);
		snprintf(tried + at, sizeof tried - at, "%s%s (%s)", at ? ", " : "", b->name,
			 rc < 0 ? "cannot be read" : "differs");
	}
	return error_set(
		err, ENOENT,
		"no [backing] of host %s has the content of %s (%" PRIu64 " bytes, SHA-256 %.16s...): %s",
		cfg->name, want->name, want->virtual_bytes, want->sha256, *tried ? tried : "there is none");
}

static int prepare_reuse(struct arrival *a, unsigned i, struct error *err)
{
	struct block_image_info *shape = &a->shape[i];
	const struct host_backing *found = NULL;
	int rc = find_backing(a, i, &found, err);
	if (rc)
		return rc;
	if (strlen(found->path) >= sizeof shape->backing_name || strchr(found->path, ','))
		return error_set(err, EINVAL, "[backing %s] path: too long, or with a comma", found->name);
	strcpy(shape->backing_name, found->path);
	strcpy(a->vm->def.disks[i].backing, found->path);
	return block_format_parse(found->format, &shape->backing_format);
}

/* --- images --- */

static int make_image(struct arrival *a, const char *name, const struct block_image_info *shape,
		      struct error *err)
{
	int rc = block_image_create(a->vm->dirfd, name, shape, err);
	return rc ? rc : registry_files_add(a->vm->dirfd, name, err);
}

static int make_chain(struct arrival *a, unsigned i, struct error *err)
{
	struct move_backing *below = &a->disks[i].below;
	char text[sizeof a->vm->def.disks[i].backing];
	const char *names[VM_BACKING_MAX];
	int rc = vmdef_backing_names(&a->vm->def.disks[i], text, names) < 0 ? -EINVAL : 0;
	struct block_image_info *above = &a->shape[i];
	for (unsigned k = 0; k < below->nlayers; k++) {
		snprintf(above->backing_name, sizeof above->backing_name, "%s", names[k]);
		above->backing_format = below->layers[k].format;
		above = &below->layers[k];
	}
	for (unsigned k = 0; !rc && k < below->nlayers; k++)
		rc = make_image(a, names[k], &below->layers[k], err);
	return rc;
}

int arrival_make_images(struct arrival *a, struct error *err)
{
	int rc = 0;
	for (unsigned i = 0; !rc && i < a->vm->def.ndisks; i++) {
		enum move_disk_mode mode = a->disks[i].mode;
		if (mode == MOVE_DISK_REUSE)
			rc = prepare_reuse(a, i, err);
		else if (mode == MOVE_DISK_CHAIN)
			rc = make_chain(a, i, err);
		const char *path = a->vm->def.disks[i].path;
		if (!rc && a->resumed[i])
			rc = registry_files_add(a->vm->dirfd, path, err);
		else if (!rc && mode != MOVE_DISK_DEVICE && mode != MOVE_DISK_SHARED)
			rc = make_image(a, path, &a->shape[i], err);
		if (rc)
			error_prefix(err, "disk %s", a->vm->def.disks[i].id);
	}
	return rc;
}

/* --- the files below: filled one after another, the lowest of a disk first --- */

/* The layer'th token's disk, and its place below it. */
static void locate(const struct arrival *a, unsigned layer, unsigned *disk, unsigned *depth, unsigned *order)
{
	unsigned i = 0, first = 0;
	while (layer - first >= a->disks[i].below.nlayers)
		first += a->disks[i++].below.nlayers;
	*disk = i;
	*depth = layer - first;
	*order = first + a->disks[i].below.nlayers - 1 - *depth;
}

static int open_layer(struct arrival *a, unsigned disk, unsigned depth, struct block **out, struct error *err)
{
	struct vm_backing below;
	char label[64];
	int rc = vm_backing_paths(a->vm, disk, &below, err);
	if (rc)
		return rc;
	snprintf(label, sizeof label, "disk %s.below%u", a->vm->def.disks[disk].id, depth + 1);
	struct block_open_options opt = {.format = a->disks[disk].below.layers[depth].format,
					 .direct = true,
					 .label = label,
					 .run_dir = a->vm->dir,
					 .backing = &below.list[depth + 1],
					 .nbacking = below.n - depth - 1};
	return block_open(below.list[depth], &opt, out, err);
}

void arrival_layer_close(struct arrival *a)
{
	pthread_mutex_lock(&a->lock);
	struct nbd_server *server = steal_ptr(a->layer_nbd);
	struct block *blk = steal_ptr(a->layer);
	pthread_mutex_unlock(&a->lock);
	nbd_server_free(server);
	block_close(blk);
}

/* Opens the next one, or leaves the present one open for a new session. */
static int turn_to(struct arrival *a, unsigned layer, struct error *err)
{
	unsigned disk, depth, order;
	locate(a, layer, &disk, &depth, &order);
	pthread_mutex_lock(&a->lock);
	unsigned begun = a->layers_begun;
	bool assembled = a->assembled;
	struct nbd_server *old = steal_ptr(a->layer_nbd);
	pthread_mutex_unlock(&a->lock);
	nbd_server_free(old); /* the fence */
	if (order + 1 == begun && !assembled)
		return 0;
	if (order != begun || assembled)
		return error_set(err, EPROTO, "file %u below disk %s: out of turn", depth + 1,
				 a->vm->def.disks[disk].id);
	arrival_layer_close(a);
	struct block *blk = NULL;
	int rc = open_layer(a, disk, depth, &blk, err);
	if (rc)
		return rc;
	SCOPE_LOCK(&a->lock);
	a->layer = blk;
	a->layers_begun = begun + 1;
	return 0;
}

int arrival_layer_add(struct arrival *a, unsigned layer, struct conn *conn, struct error *err)
{
	int rc = turn_to(a, layer, err);
	struct nbd_server_options opt = {
		.export_name = "", .max_connections = 4, .handshake_timeout_ms = a->vm->cfg->silence_ms};
	char name[64];
	unsigned disk, depth, order;
	locate(a, layer, &disk, &depth, &order);
	snprintf(name, sizeof name, "%s.below%u", a->vm->def.disks[disk].id, depth + 1);
	opt.export_name = name;
	pthread_mutex_lock(&a->lock);
	opt.block = a->layer;
	pthread_mutex_unlock(&a->lock);
	struct nbd_server *s = NULL;
	if (!rc && !opt.block)
		rc = error_set(err, EPROTO, "%s: not open", name);
	if (!rc)
		rc = nbd_server_create(&opt, &s, err);
	if (rc) {
		conn_close(conn);
		return rc;
	}
	SCOPE_LOCK(&a->lock);
	if (a->channels_over || a->assembled || a->layer != opt.block) {
		nbd_server_free(s);
		conn_close(conn);
		return error_set(err, ESHUTDOWN, "%s: no session is taken any more", name);
	}
	rc = nbd_server_add(s, conn, err);
	if (rc)
		nbd_server_free(s);
	else
		a->layer_nbd = s;
	return rc;
}

int arrival_layers_done(struct arrival *a, struct error *err)
{
	pthread_mutex_lock(&a->lock);
	unsigned begun = a->layers_begun;
	struct block *last = a->layer;
	pthread_mutex_unlock(&a->lock);
	if (begun != a->nlayers)
		return error_set(err, EPROTO, "%u of %u files below the disks came", begun, a->nlayers);
	int rc = last ? block_flush(last) : 0;
	arrival_layer_close(a);
	return rc ? error_errno(err, rc, "files below the disks: flush") : 0;
}
