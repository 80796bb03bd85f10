/* SPDX-License-Identifier: Apache-2.0 */
#include "host/partial.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "host/fsutil.h"
#include "host/registry.h"

#define NOTE_MAX_BYTES (64u << 10)
#define NOTE_VERSION   1
#define GONE_PREFIX    ".gone-" /* being removed; no UUID begins like this */

static void cleanup_json(json_t **json)
{
	json_decref(*json);
}

/* ---- the note ----
 */

static json_t *disk_to_json(const struct partial_disk *d)
{
	return json_pack("{s:s, s:s, s:I, s:I, s:s, s:b, s:b}", "file", d->file, "format", d->format,
			 "virtual_bytes", (json_int_t)d->virtual_bytes, "cluster_bytes",
			 (json_int_t)d->cluster_bytes, "compat", d->compat, "lazy_refcounts",
			 (int)d->lazy_refcounts, "extended_l2", (int)d->extended_l2);
}

int partial_note(int dirfd, const struct partial *p, struct error *err)
{
	json_t *disks = json_array();
	for (unsigned i = 0; i < p->ndisks; i++)
		json_array_append_new(disks, disk_to_json(&p->disks[i]));
	CLEANUP(cleanup_json)
	json_t *o = json_pack("{s:i, s:s, s:s, s:s, s:I, s:I, s:o}", "version", NOTE_VERSION, "uuid", p->uuid,
			      "name", p->name, "peer", p->peer, "keep_s", (json_int_t)p->keep_s, "since_s",
			      (json_int_t)p->since_s, "disks", disks);
	CLEANUP_FREE char *text = o ? json_dumps(o, JSON_INDENT(1)) : NULL;
	if (!text)
		return error_errno(err, ENOMEM, PARTIAL_NOTE);
	return fs_write_file_at(dirfd, PARTIAL_NOTE, text, strlen(text), 0600, err);
}

static bool get_text(const json_t *o, const char *key, char *out, size_t size)
{
	const char *s = json_string_value(json_object_get(o, key));
	return s && (size_t)snprintf(out, size, "%s", s) < size;
}

static bool get_number(const json_t *o, const char *key, uint64_t max, uint64_t *out)
{
	json_t *v = json_object_get(o, key);
	if (!json_is_integer(v) || json_integer_value(v) < 0 || (uint64_t)json_integer_value(v) > max)
		return false;
	*out = (uint64_t)json_integer_value(v);
	return true;
}

static bool disk_from_json(const json_t *o, struct partial_disk *d)
{
	uint64_t cluster;
	if (!get_text(o, "file", d->file, sizeof d->file) || !vm_file_name_valid(d->file) ||
	    !get_text(o, "format", d->format, sizeof d->format) ||
	    !get_text(o, "compat", d->compat, sizeof d->compat) ||
	    !get_number(o, "virtual_bytes", INT64_MAX, &d->virtual_bytes) ||
	    !get_number(o, "cluster_bytes", UINT32_MAX, &cluster))
		return false;
	d->cluster_bytes = (uint32_t)cluster;
	d->lazy_refcounts = json_is_true(json_object_get(o, "lazy_refcounts"));
	d->extended_l2 = json_is_true(json_object_get(o, "extended_l2"));
	return true;
}

static bool note_from_json(const json_t *o, struct partial *p)
{
	uint64_t since, version;
	json_t *disks = json_object_get(o, "disks");
	*p = (struct partial){0};
	if (!get_number(o, "version", NOTE_VERSION, &version) || version != NOTE_VERSION ||
	    !get_text(o, "uuid", p->uuid, sizeof p->uuid) || !vm_uuid_valid(p->uuid) ||
	    !get_text(o, "name", p->name, sizeof p->name) || !get_text(o, "peer", p->peer, sizeof p->peer) ||
	    !get_number(o, "keep_s", UINT32_MAX, &p->keep_s) ||
	    !get_number(o, "since_s", INT64_MAX, &since) || !json_is_array(disks) ||
	    json_array_size(disks) > VM_DISKS_MAX)
		return false;
	p->since_s = (int64_t)since;
	for (; p->ndisks < json_array_size(disks); p->ndisks++)
		if (!disk_from_json(json_array_get(disks, p->ndisks), &p->disks[p->ndisks]))
			return false;
	return true;
}

static int load_note(int dirfd, const char *label, struct partial *p, struct error *err)
{
	CLEANUP_FREE char *text = NULL;
	size_t len;
	int rc = fs_read_file_at(dirfd, PARTIAL_NOTE, label, NOTE_MAX_BYTES, &text, &len, err);
	if (rc < 0)
		return rc;
	CLEANUP(cleanup_json) json_t *o = json_loadb(text, len, 0, NULL);
	if (!o || !note_from_json(o, p))
		return error_set(err, EUCLEAN, "%s/" PARTIAL_NOTE " cannot be read", label);
	for (unsigned i = 0; i < p->ndisks; i++) {
		struct stat st;
		if (!fstatat(dirfd, p->disks[i].file, &st, AT_SYMLINK_NOFOLLOW) && S_ISREG(st.st_mode))
			p->allocated_bytes += (uint64_t)st.st_blocks * 512;
	}
	return 0;
}

int partial_unnote(const char *folder, struct error *err)
{
	char path[REGISTRY_PATH_BYTES];
	int rc = fs_join(path, sizeof path, folder, PARTIAL_NOTE, err);
	if (rc)
		return rc;
	if (unlink(path) < 0)
		return errno == ENOENT ? 0 : error_errno(err, errno, "%s", path);
	return fs_sync_dir(folder, err);
}

/* ---- folders ----
 */

static void partial_rel(const char *uuid, char out[REGISTRY_FOLDER_BYTES])
{
	snprintf(out, REGISTRY_FOLDER_BYTES, "partial/%s", uuid);
}

static int open_rel(const struct host_config *cfg, const char *rel, char path[REGISTRY_PATH_BYTES],
		    struct error *err)
{
	int rc = registry_path(cfg, rel, path, err);
	return rc < 0 ? rc : fs_open_dir(path, err);
}

static bool is_disk(const struct partial *p, const char *name)
{
	for (unsigned i = 0; i < p->ndisks; i++)
		if (!strcmp(p->disks[i].file, name))
			return true;
	return false;
}

int partial_prune(const char *folder, const struct partial *p, struct error *err)
{
	DIR *dir = opendir(folder);
	struct dirent *de;
	int rc = dir ? 0 : error_errno(err, errno, "%s", folder);
	while (!rc && (de = readdir(dir))) {
		char whole[REGISTRY_PATH_BYTES];
		struct stat st;
		if (!strcmp(de->d_name, ".") || !strcmp(de->d_name, "..") ||
		    !strcmp(de->d_name, PARTIAL_NOTE))
			continue;
		rc = fs_join(whole, sizeof whole, folder, de->d_name, err);
		if (rc || lstat(whole, &st) < 0)
			continue;
		if (S_ISDIR(st.st_mode))
			rc = fs_remove_tree(whole, err);
		else if ((!S_ISREG(st.st_mode) || !is_disk(p, de->d_name)) && unlink(whole) < 0 &&
			 errno != ENOENT)
			rc = error_errno(err, errno, "%s", whole);
	}
	if (dir)
		closedir(dir);
	return rc;
}

static uint64_t room(const struct host_config *cfg)
{
	struct statvfs fs;
	return statvfs(cfg->state_dir, &fs) ? UINT64_MAX : (uint64_t)fs.f_bavail * fs.f_frsize;
}

static int keep(const struct host_config *cfg, const char *rel, const char *path, int dirfd,
		struct partial *p, struct error *err)
{
	char to[REGISTRY_FOLDER_BYTES];
	int rc = partial_prune(path, p, err);
	p->since_s = (int64_t)time(NULL);
	if (!rc)
		rc = partial_note(dirfd, p, err);
	if (!rc)
		rc = partial_remove(cfg, p->uuid, err);
	partial_rel(p->uuid, to);
	if (!rc)
		rc = registry_rename(cfg, rel, to, err);
	if (!rc)
		log_info("VM %s: %" PRIu64
			 " MiB of its disks are kept for the next attempt from %s, for %" PRIu64 " s",
			 p->name, p->allocated_bytes >> 20, p->peer, p->keep_s);
	return rc;
}

int partial_end_arrival(const struct host_config *cfg, const char *rel, bool *kept, struct error *err)
{
	char path[REGISTRY_PATH_BYTES];
	struct partial *p = calloc(1, sizeof *p);
	struct error why = ERROR_INIT;
	bool done = false;
	CLEANUP_FD int dirfd = strncmp(rel, "incoming/", 9) ? -1 : open_rel(cfg, rel, path, &why);
	/* The note must be of the VM whose folder it stands in. */
	if (p && dirfd >= 0 && !load_note(dirfd, path, p, &why) && p->keep_s && p->allocated_bytes &&
	    !strncmp(rel + 9, p->uuid, VM_UUID_CHARS)) {
		if (room(cfg) < PARTIAL_ROOM_LEAST_BYTES)
			log_info("VM %s: what came of its disks is not kept: too little room", p->name);
		else if (keep(cfg, rel, path, dirfd, p, &why))
			log_warn("VM %s: what came of its disks is not kept: %s", p->name, why.message);
		else
			done = true;
	}
	free(p);
	if (kept)
		*kept = done;
	return done ? 0 : registry_remove_incoming(cfg, rel, err);
}

/* ---- kept ones ----
 */

int partial_load(const struct host_config *cfg, const char *uuid, struct partial *out, struct error *err)
{
	char rel[REGISTRY_FOLDER_BYTES], path[REGISTRY_PATH_BYTES];
	if (!vm_uuid_valid(uuid))
		return error_set(err, EINVAL, "'%.40s' is not a UUID", uuid);
	partial_rel(uuid, rel);
	CLEANUP_FD int dirfd = open_rel(cfg, rel, path, err);
	if (dirfd < 0)
		return dirfd;
	int rc = load_note(dirfd, path, out, err);
	if (!rc && strcmp(out->uuid, uuid))
		rc = error_set(err, EUCLEAN, "%s is of another VM", path);
	return rc == -ENOENT ? error_set(err, EUCLEAN, "%s has no " PARTIAL_NOTE, path) : rc;
}

int partial_take(const struct host_config *cfg, const char *uuid, const char *rel, struct error *err)
{
	char from[REGISTRY_FOLDER_BYTES];
	if (!vm_uuid_valid(uuid) || strncmp(rel, "incoming/", 9))
		return error_set(err, EINVAL, "%s is not the folder of an arrival", rel);
	partial_rel(uuid, from);
	return registry_rename(cfg, from, rel, err);
}

/* Renamed first, so that an arrival takes a whole one or none. */
static int remove_name(const struct host_config *cfg, const char *name, struct error *err)
{
	char from[REGISTRY_PATH_BYTES], to[REGISTRY_PATH_BYTES], rel[REGISTRY_FOLDER_BYTES];
	snprintf(rel, sizeof rel, "partial/%.200s", name);
	int rc = registry_path(cfg, rel, from, err);
	snprintf(rel, sizeof rel, "partial/" GONE_PREFIX "%016" PRIx64, clock_now_ns());
	if (!rc)
		rc = registry_path(cfg, rel, to, err);
	if (rc < 0)
		return rc;
	if (rename(from, to) < 0)
		return errno == ENOENT ? 0 : error_errno(err, errno, "removing %s", from);
	/* a stray file, if somebody put one there */
	return unlink(to) == 0 ? 0 : fs_remove_tree(to, err);
}

int partial_remove(const struct host_config *cfg, const char *uuid, struct error *err)
{
	if (!vm_uuid_valid(uuid))
		return error_set(err, EINVAL, "'%.40s' is not a UUID", uuid);
	return remove_name(cfg, uuid, err);
}

bool partial_expired(const struct partial *p, int64_t now_s)
{
	return now_s > p->since_s && (uint64_t)(now_s - p->since_s) >= p->keep_s;
}

/* Every entry of partial/; p is NULL for one that cannot be read. */
static int each_entry(const struct host_config *cfg,
		      int (*each)(const struct host_config *cfg, void *opaque, const char *name,
				  const struct partial *p),
		      void *opaque)
{
	char path[REGISTRY_PATH_BYTES];
	CLEANUP_FREE struct partial *p = malloc(sizeof *p);
	if (!p || registry_path(cfg, "partial", path, NULL) < 0)
		return 0;
	DIR *dir = opendir(path);
	struct dirent *de;
	int rc = 0;
	while (dir && !rc && (de = readdir(dir))) {
		if (!strcmp(de->d_name, ".") || !strcmp(de->d_name, ".."))
			continue;
		bool readable = !partial_load(cfg, de->d_name, p, NULL);
		rc = each(cfg, opaque, de->d_name, readable ? p : NULL);
	}
	if (dir)
		closedir(dir);
	return rc;
}

struct visit {
	int (*each)(void *opaque, const struct partial *p);
	void *opaque;
};

static int visit_readable(const struct host_config *cfg, void *opaque, const char *name,
			  const struct partial *p)
{
	struct visit *v = opaque;
	return p ? v->each(v->opaque, p) : 0;
}

int partial_each(const struct host_config *cfg, int (*each)(void *opaque, const struct partial *p),
		 void *opaque)
{
	struct visit v = {.each = each, .opaque = opaque};
	return each_entry(cfg, visit_readable, &v);
}

static int sweep_one(const struct host_config *cfg, void *opaque, const char *name, const struct partial *p)
{
	unsigned *gone = opaque;
	struct error err = ERROR_INIT;
	if (p && !partial_expired(p, (int64_t)time(NULL)))
		return 0;
	if (p)
		log_info("VM %s: what was kept of its disks has expired", p->name);
	else if (strncmp(name, GONE_PREFIX, strlen(GONE_PREFIX)))
		log_warn("partial/%s cannot be read, removing it", name);
	if (remove_name(cfg, name, &err))
		log_warn("%s", err.message);
	else
		(*gone)++;
	return 0;
}

unsigned partial_sweep(const struct host_config *cfg)
{
	unsigned gone = 0;
	each_entry(cfg, sweep_one, &gone);
	return gone;
}

struct oldest {
	const char *but;
	char uuid[VM_UUID_CHARS + 1];
	int64_t since_s;
};

static int look_for_oldest(void *opaque, const struct partial *p)
{
	struct oldest *o = opaque;
	if (strcmp(p->uuid, o->but) && (!o->uuid[0] || p->since_s < o->since_s)) {
		strcpy(o->uuid, p->uuid);
		o->since_s = p->since_s;
	}
	return 0;
}

void partial_make_room(const struct host_config *cfg, const char *uuid, uint64_t bytes)
{
	while (room(cfg) < bytes) {
		struct oldest o = {.but = uuid};
		struct error err = ERROR_INIT;
		partial_each(cfg, look_for_oldest, &o);
		if (!o.uuid[0])
			return;
		log_info("partial/%s gives way to an arrival", o.uuid);
		if (partial_remove(cfg, o.uuid, &err)) {
			log_warn("%s", err.message);
			return;
		}
	}
}
