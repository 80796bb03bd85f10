/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "host/fsutil.h"
#include "host/record.h"
#include "host/registry.h"

#define QEMU_IMG_TIMEOUT_MS 60000
#define CHECK_TIMEOUT_MS    180000 /* of an image and what is below it */

/* Waits for a child for a bounded time; its exit status, or a negative errno. */
static int wait_child(pid_t pid, unsigned timeout_ms)
{
	uint64_t deadline = clock_now_ms() + timeout_ms;
	int status;
	for (;;) {
		pid_t got = waitpid(pid, &status, WNOHANG);
		if (got == pid)
			return WIFEXITED(status) ? WEXITSTATUS(status) : -EIO;
		if (got < 0 && errno != EINTR)
			return -errno;
		if (clock_now_ms() >= deadline) {
			kill(pid, SIGKILL);
			waitpid(pid, &status, 0);
			return -ETIMEDOUT;
		}
		clock_sleep_ms(10);
	}
}

/* Runs it; its exit status, or a negative errno. *said: the last line of its standard error. */
static int run_child(const char *const *argv, unsigned timeout_ms, char **said, struct error *err)
{
	extern char **environ;
	int out[2] = {-1, -1};
	if (pipe2(out, O_CLOEXEC) < 0)
		return error_errno(err, errno, "pipe");
	posix_spawn_file_actions_t acts;
	posix_spawn_file_actions_init(&acts);
	posix_spawn_file_actions_adddup2(&acts, out[1], STDERR_FILENO);
	pid_t pid;
	int rc = posix_spawnp(&pid, argv[0], &acts, NULL, (char *const *)(uintptr_t)argv, environ);
	posix_spawn_file_actions_destroy(&acts);
	close(out[1]);
	if (rc) {
		close(out[0]);
		return error_errno(err, rc, "%s", argv[0]);
	}
	rc = wait_child(pid, timeout_ms); /* what it says fits into the pipe */
	char text[4096];
	ssize_t n = read(out[0], text, sizeof text - 1);
	close(out[0]);
	text[n > 0 ? n : 0] = '\0';
	for (char *end = text + strlen(text); end > text && end[-1] == '\n';)
		*--end = '\0';
	char *line = strrchr(text, '\n');
	line = line ? line + 1 : text;
	*said = strdup(line);
	return rc < 0 ? error_errno(err, rc, "%s", argv[0]) : rc;
}

static int make_qcow2(const char *path, uint64_t size, struct error *err)
{
	char bytes[24];
	CLEANUP_FREE char *said = NULL;
	snprintf(bytes, sizeof bytes, "%llu", (unsigned long long)size);
	const char *const argv[] = {"qemu-img", "create", "-q", "-f", "qcow2", path, bytes, NULL};
	int rc = run_child(argv, QEMU_IMG_TIMEOUT_MS, &said, err);
	return rc > 0 ? error_set(err, EIO, "qemu-img create %s: %s", path, said ? said : "failed") : rc;
}

static int make_empty(const struct vm_disk_def *disk, int dirfd, const char *folder, struct error *err)
{
	CLEANUP_FD int fd =
		openat(dirfd, disk->path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (fd < 0)
		return error_errno(err, errno, "%s", disk->path);
	if (!strcmp(disk->format, "qcow2")) {
		char path[2 * REGISTRY_PATH_BYTES];
		int rc = fs_join(path, sizeof path, folder, disk->path, err);
		if (!rc)
			rc = make_qcow2(path, disk->size_bytes, err);
		if (rc < 0)
			return rc;
	} else if (ftruncate(fd, (off_t)disk->size_bytes) < 0) {
		return error_errno(err, errno, "%s", disk->path);
	}
	return fsync(fd) < 0 ? error_errno(err, errno, "%s", disk->path) : 0;
}

/*
 * A qcow2 image, and what is below it, is looked at as a whole before the VM is made: by a snvmm, which knows
 * images, and which reads nothing that the definition does not name.
 */
static int check_qcow2(const struct host_config *cfg, const struct vm_disk_def *disk, const char *image,
		       const char *folder, struct error *err)
{
	char text[sizeof disk->backing];
	const char *argv[8 + VM_BACKING_MAX] = {cfg->snvmm,	 "--config", cfg->path,
						"--check-image", folder,     image};
	unsigned n = 6;
	int below = vmdef_backing_names(disk, text, &argv[n]);
	for (int i = 0; i < below; i++)
		if (argv[n + (unsigned)i][0] != '/')
			return error_set(err, EINVAL, "backing = %s: not an absolute path",
					 argv[n + (unsigned)i]);
	if (strcmp(disk->format, "qcow2"))
		return 0;
	CLEANUP_FREE char *said = NULL;
	int rc = run_child(argv, CHECK_TIMEOUT_MS, &said, err);
	if (rc > 0)
		rc = error_set(err, EINVAL, "%s", said && *said ? said : "the image is not usable");
	return rc;
}

/* A disk outside the VM's folder: it stays where it is. */
static int check_outside(const struct host_config *cfg, struct vm_disk_def *disk, const char *folder,
			 struct error *err)
{
	CLEANUP_FD int fd = open(disk->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
	struct stat st;
	if (fd < 0 || fstat(fd, &st) < 0)
		return error_errno(err, errno, "%s", disk->path);
	if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
		return error_set(err, EINVAL, "%s: neither a regular file nor a block device", disk->path);
	if (disk->size_bytes && !S_ISBLK(st.st_mode))
		return error_set(err, EINVAL,
				 "size = needs a path in the VM's own folder, or a block device");
	off_t end = S_ISBLK(st.st_mode) ? lseek(fd, 0, SEEK_END) : 0;
	if (disk->size_bytes && (end < 0 || (uint64_t)end < disk->size_bytes))
		return error_set(err, ENOSPC, "%s: the block device has %lld bytes, size = %llu", disk->path,
				 (long long)end, (unsigned long long)disk->size_bytes);
	return check_qcow2(cfg, disk, disk->path, folder, err);
}

static int place_disk(const struct host_config *cfg, struct vm_disk_def *disk, const char *import, int dirfd,
		      const char *folder, struct error *err)
{
	bool inside = disk->path[0] != '/';
	if (!inside)
		return import ? error_set(err, EINVAL, "cannot be imported: its path is absolute (%s)",
					  disk->path)
			      : check_outside(cfg, disk, folder, err);
	if (!vm_file_name_valid(disk->path))
		return error_set(err, EINVAL, "path = %s: not a plain file name in the VM's own folder",
				 disk->path);
	if (import && disk->size_bytes)
		return error_set(err, EINVAL, "both imported and given a size");
	int rc;
	if (import) {
		rc = check_qcow2(cfg, disk, import, folder, err);
		if (!rc)
			rc = fs_copy_file(import, dirfd, disk->path, err);
	} else if (*disk->backing)
		rc = error_set(err, EINVAL,
			       "backing = needs an image that is imported or has an absolute path");
	else if (disk->size_bytes)
		rc = make_empty(disk, dirfd, folder, err);
	else
		rc = error_set(err, ENOENT,
			       "%s does not exist: give --import %s=PATH, or size = in the definition",
			       disk->path, disk->id);
	disk->size_bytes = 0; /* the image has it from now on */
	return rc < 0 ? rc : registry_files_add(dirfd, disk->path, err);
}

static int place_file(char *field, size_t size, const char *what, const char *base_dir, int dirfd,
		      struct error *err)
{
	char from[2 * REGISTRY_PATH_BYTES];
	int n = field[0] == '/' ? snprintf(from, sizeof from, "%s", field)
				: snprintf(from, sizeof from, "%s/%s", base_dir, field);
	if (n < 0 || (size_t)n >= sizeof from)
		return error_set(err, ENAMETOOLONG, "%s: path too long", what);
	struct stat st;
	if (stat(from, &st) < 0)
		return error_errno(err, errno, "%s %s", what, from);
	if (!S_ISREG(st.st_mode))
		return error_set(err, EINVAL, "%s %s: not a regular file", what, from);
	snprintf(field, size, "%s", what);
	int rc = fs_copy_file(from, dirfd, what, err);
	return rc < 0 ? error_prefix(err, "%s", what) : registry_files_add(dirfd, what, err);
}

static int fill_in(struct vm_definition *def, struct error *err)
{
	if (!*def->uuid) {
		int rc = vm_uuid_generate(def->uuid, err);
		if (rc < 0)
			return rc;
	}
	vmdef_set_balloon(def, def->balloon != VM_BALLOON_NO);
	for (unsigned i = 0; i < def->nnets; i++) {
		struct vm_net_def *net = &def->nets[i];
		if (net->has_mac)
			continue;
		if (getrandom(net->mac, sizeof net->mac, 0) != sizeof net->mac)
			return error_errno(err, errno, "getrandom");
		net->mac[0] = (uint8_t)((net->mac[0] & 0xfc) | 0x02); /* locally administered, unicast */
		net->has_mac = true;
	}
	return 0;
}

static int check_imports(const struct vm_definition *def, json_t *imports, struct error *err)
{
	const char *id;
	json_t *path;
	json_object_foreach(imports, id, path)
	{
		unsigned i = 0;
		while (i < def->ndisks && strcmp(def->disks[i].id, id))
			i++;
		if (i == def->ndisks)
			return error_set(err, EINVAL, "--import %.64s: the definition has no [disk %.64s]",
					 id, id);
		const char *text = json_string_value(path);
		if (!text || text[0] != '/')
			return error_set(err, EINVAL, "--import %s: not an absolute path", id);
	}
	return 0;
}

/* Everything but the record and the final name. */
static int build_folder(const struct host_config *cfg, struct vm_definition *def, const char *base_dir,
			json_t *imports, const char *folder, struct error *err)
{
	CLEANUP_FD int dirfd = fs_open_dir(folder, err);
	if (dirfd < 0)
		return dirfd;
	/* disks first: their names are people's, kernel and initrd get names of ours that must still be free
	 */
	for (unsigned i = 0; i < def->ndisks; i++) {
		struct vm_disk_def *disk = &def->disks[i];
		if (!strcmp(disk->path, "kernel") || !strcmp(disk->path, "initrd"))
			return error_set(err, EINVAL,
					 "[disk %s] path = %s: that name is the kernel's or initrd's",
					 disk->id, disk->path);
		const char *import = json_string_value(json_object_get(imports, disk->id));
		int rc = place_disk(cfg, disk, import, dirfd, folder, err);
		if (rc < 0)
			return error_prefix(err, "[disk %s]", disk->id), rc;
	}
	int rc = place_file(def->kernel, sizeof def->kernel, "kernel", base_dir, dirfd, err);
	if (!rc && *def->initrd)
		rc = place_file(def->initrd, sizeof def->initrd, "initrd", base_dir, dirfd, err);
	if (!rc)
		rc = registry_store_definition(dirfd, def, err);
	if (!rc && fsync(dirfd) < 0)
		rc = error_errno(err, errno, "%s", folder);
	return rc;
}

static int publish(const struct host_config *cfg, const struct vm_definition *def, const char *rel,
		   struct error *err)
{
	struct vm_record rec = {.state = HANDOVER_OWNER, .epoch = 1};
	struct record *r = NULL;
	strcpy(rec.uuid, def->uuid);
	strcpy(rec.name, def->name);
	registry_vm_rel(def->name, rec.folder);
	int rc = record_create(cfg->state_dir, &rec, &r, err);
	if (rc == -EEXIST)
		return error_set(err, EEXIST, "a VM with the uuid %s is already known here", def->uuid);
	if (rc < 0)
		return rc;
	rc = registry_publish(cfg, rel, def->name, err);
	if (rc < 0)
		record_remove(r, NULL);
	record_close(r);
	return rc;
}

int registry_create_vm(const struct host_config *cfg, struct vm_definition *def, const char *base_dir,
		       json_t *imports, struct error *err)
{
	char rel[REGISTRY_FOLDER_BYTES], folder[REGISTRY_PATH_BYTES];
	int rc = check_imports(def, imports, err);
	if (!rc)
		rc = fill_in(def, err);
	if (rc < 0)
		return rc;
	registry_vm_rel(def->name, rel);
	rc = registry_path(cfg, rel, folder, err);
	if (rc < 0)
		return rc;
	char taken[REGISTRY_PATH_BYTES + 8];
	snprintf(taken, sizeof taken, "%s/vm.ini", folder);
	if (access(taken, F_OK) == 0)
		return error_set(err, EEXIST, "a VM named %s is already on this host", def->name);
	snprintf(rel, sizeof rel, "creating/%s", def->uuid);
	rc = registry_path(cfg, rel, folder, err);
	if (rc < 0)
		return rc;
	if (mkdir(folder, 0700) < 0)
		return error_errno(err, errno, "%s", folder);
	rc = vmdef_read_baseline(def, base_dir, err);
	if (!rc)
		rc = build_folder(cfg, def, base_dir, imports, folder, err);
	if (!rc)
		rc = publish(cfg, def, rel, err);
	if (rc < 0)
		fs_remove_tree(folder, NULL);
	return rc;
}
