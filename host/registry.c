/* SPDX-License-Identifier: Apache-2.0 */
#include "host/registry.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "host/fsutil.h"
#include "host/ini.h"
#include "host/partial.h"

#define FILES_JSON	     "files.json"
#define FILES_JSON_MAX_BYTES (1u << 20)
#define RESULT_MAX_BYTES     (1u << 20)

int registry_path(const struct host_config *cfg, const char *rel, char out[REGISTRY_PATH_BYTES],
		  struct error *err)
{
	return fs_join(out, REGISTRY_PATH_BYTES, cfg->state_dir, rel, err);
}

void registry_vm_rel(const char *name, char out[REGISTRY_FOLDER_BYTES])
{
	snprintf(out, REGISTRY_FOLDER_BYTES, "vms/%s", name);
}

void registry_incoming_rel(const char *uuid, uint64_t epoch, char out[REGISTRY_FOLDER_BYTES])
{
	snprintf(out, REGISTRY_FOLDER_BYTES, "incoming/%s-%" PRIu64, uuid, epoch);
}

int registry_vm_dir(const struct host_config *cfg, const char *name, char out[REGISTRY_PATH_BYTES],
		    struct error *err)
{
	char rel[REGISTRY_FOLDER_BYTES];
	registry_vm_rel(name, rel);
	return registry_path(cfg, rel, out, err);
}

int registry_log_path(const struct host_config *cfg, const char *name, char out[REGISTRY_PATH_BYTES],
		      struct error *err)
{
	char rel[REGISTRY_FOLDER_BYTES];
	snprintf(rel, sizeof rel, "logs/%s.log", name);
	return registry_path(cfg, rel, out, err);
}

int registry_prepare(const struct host_config *cfg, struct error *err)
{
	static const char *const folders[] = {"vms",  "incoming", "records",  "moves",
					      "kept", "logs",	  "creating", "partial"};
	char path[REGISTRY_PATH_BYTES];
	int rc = registry_path(cfg, "creating", path, err);
	if (!rc)
		rc = fs_remove_tree(path, err);
	for (size_t i = 0; !rc && i < ARRAY_SIZE(folders); i++) {
		rc = registry_path(cfg, folders[i], path, err);
		if (!rc)
			rc = fs_make_dirs(path, err);
	}
	return rc;
}

/* ---- files.json ------------------------------------------------------------------------------------------
 */

static int load_json(int dirfd, const char *name, size_t max_bytes, json_t **out, struct error *err)
{
	CLEANUP_FREE char *text = NULL;
	size_t len;
	json_error_t why;
	int rc = fs_read_file_at(dirfd, name, name, max_bytes, &text, &len, err);
	if (rc < 0)
		return rc;
	*out = json_loadb(text, len, 0, &why);
	return *out ? 0 : error_set(err, EUCLEAN, "%s:%d: %s", name, why.line, why.text);
}

static int store_json(int dirfd, const char *name, json_t *obj, struct error *err)
{
	CLEANUP_FREE char *text = json_dumps(obj, JSON_INDENT(1));
	if (!text)
		return error_errno(err, ENOMEM, "%s", name);
	return fs_write_file_at(dirfd, name, text, strlen(text), 0600, err);
}

int registry_files_add(int dirfd, const char *name, struct error *err)
{
	struct stat st;
	if (!vm_file_name_valid(name))
		return error_set(err, EINVAL, "'%.100s' is not a name for a file of a VM", name);
	if (fstatat(dirfd, name, &st, AT_SYMLINK_NOFOLLOW) < 0)
		return error_errno(err, errno, "%s", name);
	if (!S_ISREG(st.st_mode))
		return error_set(err, EINVAL, "%s: not a regular file", name);
	json_t *all = NULL;
	int rc = load_json(dirfd, FILES_JSON, FILES_JSON_MAX_BYTES, &all, err);
	if (rc == -ENOENT)
		all = json_pack("{s:i, s:[]}", "version", 1, "files");
	else if (rc < 0)
		return rc;
	json_t *files = json_object_get(all, "files");
	for (size_t i = json_array_size(files); i-- > 0;) {
		const char *other = json_string_value(json_object_get(json_array_get(files, i), "name"));
		if (other && !strcmp(other, name))
			json_array_remove(files, i);
	}
	json_t *entry = json_pack("{s:o, s:I, s:I}", "name", json_string(name), "device",
				  (json_int_t)st.st_dev, "inode", (json_int_t)st.st_ino);
	if (!entry || json_array_append_new(files, entry) < 0)
		rc = error_set(err, EUCLEAN, "%s cannot be extended", FILES_JSON);
	else
		rc = store_json(dirfd, FILES_JSON, all, err);
	json_decref(all);
	return rc;
}

int registry_load_definition(int dirfd, const char *label, struct vm_definition *def, struct error *err)
{
	CLEANUP_FREE char *text = NULL;
	char origin[REGISTRY_PATH_BYTES + 8];
	size_t len;
	snprintf(origin, sizeof origin, "%s/vm.ini", label);
	int rc = fs_read_file_at(dirfd, "vm.ini", origin, INI_TEXT_MAX_BYTES, &text, &len, err);
	return rc < 0 ? rc : vmdef_parse(text, len, origin, def, err);
}

int registry_store_definition(int dirfd, const struct vm_definition *def, struct error *err)
{
	CLEANUP_FREE char *text = vmdef_format(def);
	if (!text)
		return error_errno(err, ENOMEM, "vm.ini");
	return fs_write_file_at(dirfd, "vm.ini", text, strlen(text), 0600, err);
}

/* ---- folders that appear, are kept, or go
 * ------------------------------------------------------------------ */

int registry_rename(const struct host_config *cfg, const char *from_rel, const char *to_rel,
		    struct error *err)
{
	char from[REGISTRY_PATH_BYTES], to[REGISTRY_PATH_BYTES], parent[REGISTRY_PATH_BYTES];
	int rc = registry_path(cfg, from_rel, from, err);
	if (!rc)
		rc = registry_path(cfg, to_rel, to, err);
	if (rc < 0)
		return rc;
	if (renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_NOREPLACE) < 0)
		return error_errno(err, errno, "renaming %s to %s", from, to);
	strcpy(parent, to);
	*strrchr(parent, '/') = '\0';
	rc = fs_sync_dir(parent, err);
	if (rc < 0)
		return rc;
	strcpy(parent, from);
	*strrchr(parent, '/') = '\0';
	return fs_sync_dir(parent, err);
}

static bool exists_below(const struct host_config *cfg, const char *rel, const char *name)
{
	char path[REGISTRY_PATH_BYTES + 64];
	struct stat st;
	snprintf(path, sizeof path, "%s/%s%s%s", cfg->state_dir, rel, *name ? "/" : "", name);
	return lstat(path, &st) == 0;
}

int registry_publish(const struct host_config *cfg, const char *from_rel, const char *name, struct error *err)
{
	char rel[REGISTRY_FOLDER_BYTES], aside[REGISTRY_FOLDER_BYTES];
	registry_vm_rel(name, rel);
	if (!strcmp(from_rel, rel))
		return 0;
	if (!exists_below(cfg, from_rel, ""))
		return exists_below(cfg, rel, "vm.ini") ? 0 : error_errno(err, ENOENT, "%s", from_rel);
	if (exists_below(cfg, rel, "vm.ini"))
		return error_set(err, EEXIST, "a VM named %s is already on this host", name);
	/* It is a VM from now on, no longer something that could be kept for another attempt. */
	char from[REGISTRY_PATH_BYTES];
	int done = registry_path(cfg, from_rel, from, err);
	if (!done)
		done = partial_unnote(from, err);
	if (done < 0)
		return done;
	if (exists_below(cfg, rel, "")) {
		snprintf(aside, sizeof aside, "kept/%s-left-behind-%lld", name, (long long)time(NULL));
		int rc = registry_rename(cfg, rel, aside, err);
		if (rc < 0)
			return rc;
		log_info("what a VM that moved away had left behind in %s is now in %s", rel, aside);
	}
	return registry_rename(cfg, from_rel, rel, err);
}

static bool is_on(int dirfd, const char *path, const struct stat *device)
{
	struct stat st;
	if (fstatat(dirfd, path, &st, 0) || (st.st_mode & S_IFMT) != (device->st_mode & S_IFMT))
		return false;
	return S_ISBLK(st.st_mode) ? st.st_rdev == device->st_rdev
				   : st.st_dev == device->st_dev && st.st_ino == device->st_ino;
}

static bool uses_device(int dirfd, const struct vm_definition *def, const struct stat *device)
{
	for (unsigned i = 0; i < def->ndisks; i++) {
		char text[sizeof def->disks[i].backing];
		const char *names[VM_BACKING_MAX];
		int n = vmdef_backing_names(&def->disks[i], text, names);
		if (is_on(dirfd, def->disks[i].path, device))
			return true;
		for (int k = 0; k < n; k++)
			if (is_on(dirfd, names[k], device))
				return true;
	}
	return false;
}

bool registry_device_used(const struct host_config *cfg, const char *device, const char *uuid,
			  char name[VM_NAME_MAX_CHARS + 1])
{
	char path[REGISTRY_PATH_BYTES];
	struct stat dev;
	struct dirent *de;
	CLEANUP_FREE struct vm_definition *def = malloc(sizeof *def);
	if (!def || stat(device, &dev) || registry_path(cfg, "vms", path, NULL) < 0)
		return false;
	DIR *dir = opendir(path);
	bool used = false;
	while (dir && !used && (de = readdir(dir))) {
		if (de->d_name[0] == '.')
			continue;
		CLEANUP_FD int vm =
			openat(dirfd(dir), de->d_name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
		if (vm < 0 || registry_load_definition(vm, de->d_name, def, NULL) ||
		    !strcmp(def->uuid, uuid) || !uses_device(vm, def, &dev))
			continue;
		snprintf(name, VM_NAME_MAX_CHARS + 1, "%s", de->d_name);
		used = true;
	}
	if (dir)
		closedir(dir);
	return used;
}

static int unlink_if(int dirfd, const char *name, mode_t type, const json_t *entry, struct error *err)
{
	struct stat st;
	if (fstatat(dirfd, name, &st, AT_SYMLINK_NOFOLLOW) < 0)
		return errno == ENOENT ? 0 : error_errno(err, errno, "%s", name);
	if ((st.st_mode & S_IFMT) != type)
		return 0;
	if (entry && (json_integer_value(json_object_get(entry, "device")) != (json_int_t)st.st_dev ||
		      json_integer_value(json_object_get(entry, "inode")) != (json_int_t)st.st_ino))
		return 0;
	if (unlinkat(dirfd, name, 0) < 0 && errno != ENOENT)
		return error_errno(err, errno, "deleting %s", name);
	return 0;
}

static int remove_sockets(int dirfd, struct error *err)
{
	int copy = openat(dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *dir = copy < 0 ? NULL : fdopendir(copy);
	if (!dir)
		return error_errno(err, errno, "folder");
	struct dirent *de;
	int rc = 0;
	while (!rc && (de = readdir(dir)))
		rc = unlink_if(dirfd, de->d_name, S_IFSOCK, NULL, err);
	closedir(dir);
	return rc;
}

/* run/ holds sockets of our helpers; it goes when nothing else is in it. */
static int remove_run(int dirfd, struct error *err)
{
	CLEANUP_FD int run = openat(dirfd, "run", O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (run < 0)
		return 0;
	int rc = remove_sockets(run, err);
	if (!rc)
		unlinkat(dirfd, "run", AT_REMOVEDIR);
	return rc;
}

static int remove_listed(int dirfd, struct error *err)
{
	json_t *all = NULL, *entry;
	int rc = load_json(dirfd, FILES_JSON, FILES_JSON_MAX_BYTES, &all, err);
	if (rc < 0)
		return rc == -ENOENT ? 0 : rc;
	size_t i;
	json_array_foreach(json_object_get(all, "files"), i, entry)
	{
		const char *name = json_string_value(json_object_get(entry, "name"));
		if (name && vm_file_name_valid(name))
			rc = unlink_if(dirfd, name, S_IFREG, entry, err);
		if (rc < 0)
			break;
	}
	json_decref(all);
	return rc;
}

static void list_rest(int dirfd, const char *path, json_t *left)
{
	int copy = openat(dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *dir = copy < 0 ? NULL : fdopendir(copy);
	if (!dir)
		return;
	struct dirent *de;
	while ((de = readdir(dir))) {
		static const char *const ours[] = {".",	       "..",	     "vm.ini",
						   FILES_JSON, "vm.ini.new", FILES_JSON ".new"};
		size_t i = 0;
		while (i < ARRAY_SIZE(ours) && strcmp(de->d_name, ours[i]))
			i++;
		if (i < ARRAY_SIZE(ours))
			continue;
		CLEANUP_FREE char *whole = NULL;
		if (asprintf(&whole, "%s/%s", path, de->d_name) < 0)
			whole = NULL;
		struct stat st;
		json_t *text = json_string(whole ? whole : "");
		/* a name that is no UTF-8 is still something that stays */
		json_array_append_new(left, text ? text : json_string(path));
		if (fstatat(dirfd, de->d_name, &st, AT_SYMLINK_NOFOLLOW) < 0)
			log_warn("%s: %s", path, strerror(errno));
	}
	closedir(dir);
}

static void list_disk_outside(const struct vm_disk_def *disk, json_t *left)
{
	char text[sizeof disk->backing];
	const char *names[VM_BACKING_MAX];
	int n = vmdef_backing_names(disk, text, names);
	if (disk->path[0] == '/')
		json_array_append_new(left, json_string(disk->path));
	for (int i = 0; i < n; i++)
		if (names[i][0] == '/')
			json_array_append_new(left, json_string(names[i]));
}

static void list_outside(int dirfd, const char *path, json_t *left)
{
	struct vm_definition *def = malloc(sizeof *def);
	if (def && registry_load_definition(dirfd, path, def, NULL) == 0)
		for (unsigned i = 0; i < def->ndisks; i++)
			list_disk_outside(&def->disks[i], left);
	free(def);
}

static int delete_folder(int dirfd, const char *path, json_t *left, struct error *err)
{
	list_outside(dirfd, path, left);
	size_t outside = json_array_size(left);
	int rc = remove_listed(dirfd, err);
	if (!rc)
		rc = remove_sockets(dirfd, err);
	if (!rc)
		rc = remove_run(dirfd, err);
	if (rc < 0)
		return rc;
	if (fsync(dirfd) < 0)
		return error_errno(err, errno, "%s", path);
	list_rest(dirfd, path, left);
	/* the definition last, for it says what lies outside */
	static const char *const last[] = {"vm.ini.new", FILES_JSON ".new", FILES_JSON, "vm.ini"};
	for (size_t i = 0; !rc && i < ARRAY_SIZE(last); i++)
		rc = unlink_if(dirfd, last[i], S_IFREG, NULL, err);
	if (!rc && json_array_size(left) == outside && rmdir(path) < 0 && errno != ENOENT)
		rc = error_errno(err, errno, "deleting %s", path);
	return rc;
}

int registry_delete_moved(const struct host_config *cfg, const char *rel, json_t **left_behind,
			  struct error *err)
{
	char path[REGISTRY_PATH_BYTES], parent[REGISTRY_PATH_BYTES];
	*left_behind = json_array();
	if (!*left_behind)
		return error_errno(err, ENOMEM, "%s", rel);
	int rc = registry_path(cfg, rel, path, err);
	if (rc < 0)
		return rc;
	CLEANUP_FD int dirfd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (dirfd < 0)
		return errno == ENOENT ? 0 : error_errno(err, errno, "%s", path);
	rc = delete_folder(dirfd, path, *left_behind, err);
	if (rc < 0)
		return rc;
	strcpy(parent, path);
	*strrchr(parent, '/') = '\0';
	return fs_sync_dir(parent, err);
}

int registry_keep(const struct host_config *cfg, const char *rel, const char *name, uint64_t epoch,
		  char kept_rel[REGISTRY_FOLDER_BYTES], struct error *err)
{
	char path[REGISTRY_PATH_BYTES];
	snprintf(kept_rel, REGISTRY_FOLDER_BYTES, "kept/%s-%" PRIu64, name, epoch);
	int rc = registry_path(cfg, rel, path, err);
	if (rc < 0 || !strcmp(rel, kept_rel))
		return rc;
	CLEANUP_FD int dirfd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (dirfd < 0) {
		if (errno == ENOENT && exists_below(cfg, kept_rel, ""))
			return 0;
		return error_errno(err, errno, "%s", path);
	}
	rc = remove_sockets(dirfd, err);
	if (!rc)
		rc = remove_run(dirfd, err);
	return rc < 0 ? rc : registry_rename(cfg, rel, kept_rel, err);
}

int registry_remove_incoming(const struct host_config *cfg, const char *rel, struct error *err)
{
	char path[REGISTRY_PATH_BYTES];
	if (strncmp(rel, "incoming/", 9) || !rel[9] || rel[9] == '.' || strchr(rel + 9, '/'))
		return error_set(err, EINVAL, "%s is not the folder of an arrival", rel);
	int rc = registry_path(cfg, rel, path, err);
	if (!rc)
		rc = fs_remove_tree(path, err);
	if (!rc)
		rc = registry_path(cfg, "incoming", path, err);
	return rc < 0 ? rc : fs_sync_dir(path, err);
}

/* ---- results
 * ------------------------------------------------------------------------------------------------ */

#define ARRIVAL_SUFFIX ".in.json"
#define MOVE_SUFFIX    ".json"

static int open_moves(const struct host_config *cfg, const char *uuid, bool arrival, char *name, size_t size,
		      struct error *err)
{
	char path[REGISTRY_PATH_BYTES];
	if (!vm_uuid_valid(uuid))
		return error_set(err, EINVAL, "'%.40s' is not a UUID", uuid);
	snprintf(name, size, "%s%s", uuid, arrival ? ARRIVAL_SUFFIX : MOVE_SUFFIX);
	int rc = registry_path(cfg, "moves", path, err);
	return rc < 0 ? rc : fs_open_dir(path, err);
}

static int load_result(const struct host_config *cfg, const char *uuid, bool arrival, json_t **out,
		       struct error *err)
{
	char name[VM_UUID_CHARS + sizeof ARRIVAL_SUFFIX];
	CLEANUP_FD int dirfd = open_moves(cfg, uuid, arrival, name, sizeof name, err);
	return dirfd < 0 ? dirfd : load_json(dirfd, name, RESULT_MAX_BYTES, out, err);
}

static int store_result(const struct host_config *cfg, const char *uuid, bool arrival, json_t *result,
			struct error *err)
{
	char name[VM_UUID_CHARS + sizeof ARRIVAL_SUFFIX];
	CLEANUP_FD int dirfd = open_moves(cfg, uuid, arrival, name, sizeof name, err);
	return dirfd < 0 ? dirfd : store_json(dirfd, name, result, err);
}

int registry_result_load(const struct host_config *cfg, const char *uuid, json_t **out, struct error *err)
{
	return load_result(cfg, uuid, false, out, err);
}

int registry_result_store(const struct host_config *cfg, const char *uuid, json_t *result, struct error *err)
{
	return store_result(cfg, uuid, false, result, err);
}

int registry_arrival_load(const struct host_config *cfg, const char *uuid, json_t **out, struct error *err)
{
	return load_result(cfg, uuid, true, out, err);
}

int registry_arrival_store(const struct host_config *cfg, const char *uuid, json_t *result, struct error *err)
{
	return store_result(cfg, uuid, true, result, err);
}

static const char *const purposes[] = {
	[MOVE_BY_ITSELF] = "", [MOVE_EVACUATION] = "evacuation", [MOVE_RETURN] = "return"};

const char *move_purpose_name(enum move_purpose purpose)
{
	return purposes[purpose];
}

enum move_purpose move_purpose_parse(const char *name)
{
	for (unsigned i = 0; name && i < ARRAY_SIZE(purposes); i++)
		if (!strcmp(name, purposes[i]))
			return (enum move_purpose)i;
	return MOVE_BY_ITSELF;
}

uint64_t registry_result_time_ms(const struct host_config *cfg, const char *uuid, bool arrival)
{
	char name[VM_UUID_CHARS + sizeof ARRIVAL_SUFFIX];
	struct stat st;
	CLEANUP_FD int dirfd = open_moves(cfg, uuid, arrival, name, sizeof name, NULL);
	if (dirfd < 0 || fstatat(dirfd, name, &st, AT_SYMLINK_NOFOLLOW))
		return 0;
	return (uint64_t)st.st_mtim.tv_sec * 1000 + (uint64_t)st.st_mtim.tv_nsec / 1000000;
}

int registry_results_each(const struct host_config *cfg,
			  void (*each)(void *opaque, const char *uuid, bool arrival), void *opaque,
			  struct error *err)
{
	char path[REGISTRY_PATH_BYTES], uuid[VM_UUID_CHARS + 1];
	int rc = registry_path(cfg, "moves", path, err);
	DIR *dir = rc < 0 ? NULL : opendir(path);
	if (!dir)
		return rc < 0 ? rc : error_errno(err, errno, "%s", path);
	struct dirent *de;
	while ((de = readdir(dir))) {
		snprintf(uuid, sizeof uuid, "%s", de->d_name);
		if (!vm_uuid_valid(uuid))
			continue;
		const char *suffix = de->d_name + VM_UUID_CHARS;
		bool arrival = !strcmp(suffix, ARRIVAL_SUFFIX);
		if (arrival || !strcmp(suffix, MOVE_SUFFIX))
			each(opaque, uuid, arrival);
	}
	closedir(dir);
	return 0;
}
