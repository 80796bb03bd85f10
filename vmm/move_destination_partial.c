/* SPDX-License-Identifier: Apache-2.0 */
/* Taking up what an earlier attempt of the same move left here (host/partial.h). */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "host/ask.h"
#include "vmm/move_destination.h"

void arrival_supersede(struct arrival *a, json_t *hello)
{
	struct vm *vm = a->vm;
	json_t *report = json_object_get(hello, "report"), *answer = NULL;
	struct record *r = NULL;
	struct vm_record rec;
	struct error err = ERROR_INIT;
	int rc = record_open(vm->cfg->state_dir, vm->def.uuid, &r, NULL);
	if (!rc)
		rc = record_load(r, &rec, NULL);
	record_close(r);
	if (rc || !report || rec.state != HANDOVER_PREPARED || rec.epoch >= a->epoch ||
	    strcmp(rec.peer, a->peer))
		return;
	/* The rules decide by what the source says of itself: prepared that hears of a higher epoch is
	 * abandoned. */
	log_info("epoch %llu from %s is still arriving: ending it", (unsigned long long)rec.epoch, a->peer);
	if (ask_answer_once(vm->cfg, a->peer, report, &answer, &err))
		log_info("%s", err.message);
	json_decref(answer);
}

static void describe_disk(const struct arrival *a, unsigned i, struct partial_disk *d)
{
	const struct block_image_info *s = &a->shape[i];
	bool qcow2 = s->format == BLOCK_FORMAT_QCOW2;
	*d = (struct partial_disk){.virtual_bytes = s->virtual_bytes};
	snprintf(d->file, sizeof d->file, "%s", a->vm->def.disks[i].path);
	snprintf(d->format, sizeof d->format, "%s", block_format_name(s->format));
	if (!qcow2)
		return;
	d->cluster_bytes = s->cluster_bytes;
	snprintf(d->compat, sizeof d->compat, "%s", s->compat);
	d->lazy_refcounts = s->lazy_refcounts;
	d->extended_l2 = s->extended_l2;
}

static bool same_disk(const struct partial_disk *x, const struct partial_disk *y)
{
	return !strcmp(x->file, y->file) && !strcmp(x->format, y->format) &&
	       x->virtual_bytes == y->virtual_bytes && x->cluster_bytes == y->cluster_bytes &&
	       !strcmp(x->compat, y->compat) && x->lazy_refcounts == y->lazy_refcounts &&
	       x->extended_l2 == y->extended_l2;
}

/* What of the kept images fits this arrival: p is cut down to it. False: nothing. */
static bool fits(struct arrival *a, struct partial *p)
{
	struct vm *vm = a->vm;
	unsigned n = 0;
	/* A source that cannot compare takes what is there for zeroes. */
	if (a->version < 2 || !arrival_all_files(a) || strcmp(p->peer, a->peer) ||
	    partial_expired(p, (int64_t)time(NULL)))
		return false;
	struct partial_disk disks[VM_DISKS_MAX];
	for (unsigned i = 0; i < vm->def.ndisks; i++) {
		struct partial_disk want;
		describe_disk(a, i, &want);
		for (unsigned k = 0; k < p->ndisks; k++)
			if (same_disk(&want, &p->disks[k])) {
				disks[n++] = want;
				break;
			}
	}
	memcpy(p->disks, disks, n * sizeof disks[0]);
	p->ndisks = n;
	return n > 0;
}

static struct partial *find(struct arrival *a, bool *there)
{
	struct partial *p = malloc(sizeof *p);
	int rc = p ? partial_load(a->vm->cfg, a->vm->def.uuid, p, NULL) : -ENOMEM;
	*there = rc != -ENOENT;
	if (rc || !fits(a, p)) {
		free(p);
		return NULL;
	}
	return p;
}

uint64_t arrival_partial_bytes(struct arrival *a)
{
	bool there;
	CLEANUP_FREE struct partial *p = find(a, &there);
	struct error err = ERROR_INIT;
	/* What does not fit this arrival must not stand in its way. */
	if (!p && there && partial_remove(a->vm->cfg, a->vm->def.uuid, &err))
		log_warn("%s", err.message);
	return p ? p->allocated_bytes : 0;
}

int arrival_take_partial(struct arrival *a, const char *rel, struct error *err)
{
	const struct host_config *cfg = a->vm->cfg;
	char path[REGISTRY_PATH_BYTES];
	bool there;
	CLEANUP_FREE struct partial *p = find(a, &there);
	if (!p)
		return -ENOENT;
	int rc = registry_path(cfg, rel, path, err);
	if (!rc)
		rc = partial_take(cfg, a->vm->def.uuid, rel, err);
	if (!rc) /* the folder is the arrival's from here on, and goes with it */
		snprintf(a->rel, sizeof a->rel, "%s", rel);
	if (!rc)
		rc = partial_prune(path, p, err);
	for (unsigned i = 0; !rc && i < a->vm->def.ndisks; i++) {
		struct partial_disk want;
		describe_disk(a, i, &want);
		for (unsigned k = 0; k < p->ndisks; k++)
			a->resumed[i] |= same_disk(&want, &p->disks[k]);
	}
	if (!rc)
		log_info("%" PRIu64 " MiB of the disks are here from an earlier attempt",
			 p->allocated_bytes >> 20);
	return rc;
}

/* Its shape is asked of the image itself; a qcow2 that was cut off in the middle is checked as a whole. */
static bool is_sound(struct arrival *a, unsigned i, struct error *err)
{
	const struct block_image_info *want = &a->shape[i];
	struct block_image_info have;
	char path[8400];
	struct stat st;
	int rc = vm_resolve_path(a->vm, a->vm->def.disks[i].path, path, sizeof path, err);
	if (!rc && (lstat(path, &st) || !S_ISREG(st.st_mode)))
		rc = error_set(err, ENOENT, "%s is not a regular file", path);
	if (!rc)
		rc = block_image_info(path, want->format, false, &have, err);
	if (!rc && (have.virtual_bytes != want->virtual_bytes || have.has_backing ||
		    (want->format == BLOCK_FORMAT_QCOW2 &&
		     (have.cluster_bytes != want->cluster_bytes || strcmp(have.compat, want->compat) ||
		      have.zstd != want->zstd ||
		      (want->refcount_bits && have.refcount_bits != want->refcount_bits)))))
		rc = error_set(err, EINVAL, "%s has another shape than its note says", path);
	return !rc;
}

void arrival_check_resumed(struct arrival *a)
{
	for (unsigned i = 0; i < a->vm->def.ndisks; i++) {
		struct error err = ERROR_INIT;
		if (!a->resumed[i] || is_sound(a, i, &err))
			continue;
		log_warn("disk %s begins anew: %s", a->vm->def.disks[i].id, err.message);
		a->resumed[i] = false;
		if (unlinkat(a->vm->dirfd, a->vm->def.disks[i].path, 0) && errno != ENOENT)
			log_warn("%s: %s", a->vm->def.disks[i].path, strerror(errno));
	}
}

int arrival_note_partial(struct arrival *a, struct error *err)
{
	struct vm *vm = a->vm;
	if (!a->keep_s || !arrival_all_files(a))
		return partial_unnote(vm->dir, err);
	CLEANUP_FREE struct partial *p = calloc(1, sizeof *p);
	if (!p)
		return error_errno(err, ENOMEM, PARTIAL_NOTE);
	snprintf(p->uuid, sizeof p->uuid, "%s", vm->def.uuid);
	snprintf(p->name, sizeof p->name, "%s", vm->def.name);
	snprintf(p->peer, sizeof p->peer, "%s", a->peer);
	p->keep_s = a->keep_s;
	for (; p->ndisks < vm->def.ndisks; p->ndisks++)
		describe_disk(a, p->ndisks, &p->disks[p->ndisks]);
	return partial_note(vm->dirfd, p, err);
}
