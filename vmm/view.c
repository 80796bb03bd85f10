/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/view.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/landlock.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "vmm/move_shared.h"

/* Linux 6.2, newer than the headers of Debian 12 */
#ifndef LANDLOCK_ACCESS_FS_TRUNCATE
#define LANDLOCK_ACCESS_FS_TRUNCATE (1ULL << 14)
#endif
#define ABI_TRUNCATE 3
/* Before it no file could change its folder at all. */
#define ABI_LEAST 2

#define READ (LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_READ_DIR)
/* Of a file; a rule for one may name no others. */
#define WRITE	(LANDLOCK_ACCESS_FS_WRITE_FILE | LANDLOCK_ACCESS_FS_TRUNCATE)
#define FOLDERS (LANDLOCK_ACCESS_FS_MAKE_DIR | LANDLOCK_ACCESS_FS_REMOVE_DIR | LANDLOCK_ACCESS_FS_REFER)
#define FILES                                                                                                \
	(WRITE | LANDLOCK_ACCESS_FS_MAKE_REG | LANDLOCK_ACCESS_FS_MAKE_SOCK | LANDLOCK_ACCESS_FS_REMOVE_FILE)
#define UNUSED                                                                                               \
	(LANDLOCK_ACCESS_FS_MAKE_CHAR | LANDLOCK_ACCESS_FS_MAKE_BLOCK | LANDLOCK_ACCESS_FS_MAKE_FIFO |       \
	 LANDLOCK_ACCESS_FS_MAKE_SYM)

struct view {
	int ruleset;
	uint64_t known; /* what this kernel tells apart */
};

static int allow_fd(const struct view *v, int fd, uint64_t access)
{
	struct landlock_path_beneath_attr rule = {.allowed_access = access & v->known, .parent_fd = fd};
	return syscall(SYS_landlock_add_rule, v->ruleset, LANDLOCK_RULE_PATH_BENEATH, &rule, 0) < 0 ? -errno
												    : 0;
}

/* What is not there, or out of reach, cannot be used. */
static int allow(const struct view *v, const char *path, uint64_t access, struct error *err)
{
	CLEANUP_FD int fd = open(path, O_PATH | O_CLOEXEC);
	struct stat st;
	if (fd < 0 && (errno == ENOENT || errno == ENOTDIR || errno == EACCES))
		return 0;
	if (fd < 0 || fstat(fd, &st) < 0)
		return error_errno(err, errno, "view: %s", path);
	if (!S_ISDIR(st.st_mode))
		access &= WRITE | LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_EXECUTE;
	int rc = allow_fd(v, fd, access);
	return rc ? error_errno(err, rc, "view: %s", path) : 0;
}

static int allow_programs(const struct view *v, struct error *err)
{
	static const char *const system[] = {"/usr", "/bin", "/lib", "/lib64"};
	const char *dirs = getenv("PATH");
	int rc = 0;
	for (unsigned i = 0; !rc && i < ARRAY_SIZE(system); i++)
		rc = allow(v, system[i], LANDLOCK_ACCESS_FS_EXECUTE, err);
	while (!rc && dirs && *dirs) {
		char dir[4096];
		size_t len = strcspn(dirs, ":");
		snprintf(dir, sizeof dir, "%.*s", (int)len, dirs);
		if (*dir == '/')
			rc = allow(v, dir, LANDLOCK_ACCESS_FS_EXECUTE, err);
		dirs += len + (dirs[len] == ':');
	}
	return rc;
}

static int allow_state(const struct view *v, const struct vm *vm, struct error *err)
{
	static const struct {
		const char *name;
		uint64_t access;
	} below[] = {{"vms", FOLDERS},
		     {"kept", FOLDERS},
		     {"incoming", FOLDERS | FILES}, /* the notes of what is kept for another attempt */
		     {"partial", FOLDERS | FILES},
		     {"records", FILES},
		     {"moves", FILES}, /* how moves ended */
		     {"trust/lock", WRITE}};
	int rc = allow_fd(v, vm->dirfd, FOLDERS | FILES);
	if (rc)
		return error_errno(err, rc, "view: %s", vm->dir);
	for (unsigned i = 0; !rc && i < ARRAY_SIZE(below); i++) {
		char path[REGISTRY_PATH_BYTES];
		rc = registry_path(vm->cfg, below[i].name, path, err);
		if (!rc)
			rc = allow(v, path, below[i].access, err);
	}
	return rc;
}

/* Beside an image that other hosts see, a second name comes and goes, to prove that they do. */
static int allow_names(const struct view *v, const struct vm *vm, const char *image, struct error *err)
{
	char folder[MOVE_SHARED_PATH_BYTES], beside[4096];
	struct move_shared shared;
	struct error none = ERROR_INIT;
	if (move_shared_locate(vm->cfg->shared, image, folder, &shared, &none))
		return 0;
	snprintf(beside, sizeof beside, "%.*s", (int)(strrchr(image, '/') - image), image);
	return allow(v, beside, LANDLOCK_ACCESS_FS_MAKE_REG | LANDLOCK_ACCESS_FS_REMOVE_FILE, err);
}

/* Relative paths are in the folder. */
static int allow_outside(const struct view *v, const struct vm *vm, struct error *err)
{
	static const char *const devices[] = {"/dev/kvm", "/dev/net/tun", "/dev/null"};
	const char *faults = getenv("SNM_FAULT_DIR");
	int rc = 0;
	for (unsigned i = 0; !rc && i < ARRAY_SIZE(devices); i++)
		rc = allow(v, devices[i], WRITE, err);
	for (unsigned i = 0; !rc && i < vm->def.ndisks; i++)
		if (vm->def.disks[i].path[0] == '/') {
			rc = allow(v, vm->def.disks[i].path, WRITE, err);
			if (!rc)
				rc = allow_names(v, vm, vm->def.disks[i].path, err);
		}
	if (!rc && !strncmp(vm->def.serial, "file:/", 6)) {
		/* made here, as no rule can be about what is not there */
		CLEANUP_FD int fd = open(vm->def.serial + 5, O_WRONLY | O_CREAT | O_CLOEXEC | O_NOCTTY, 0600);
		rc = allow(v, vm->def.serial + 5, WRITE, err);
	}
	if (!rc && faults)
		rc = allow(v, faults, FILES, err);
	return rc;
}

int view_restrict(const struct vm *vm, struct error *err)
{
	long abi = syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION);
	if (abi < ABI_LEAST) {
		log_warn("the view of the file system stays the host's: this kernel has no Landlock");
		return 0;
	}
	struct landlock_ruleset_attr attr = {.handled_access_fs = READ | FILES | FOLDERS | UNUSED |
								  LANDLOCK_ACCESS_FS_EXECUTE};
	if (abi < ABI_TRUNCATE)
		attr.handled_access_fs &= ~LANDLOCK_ACCESS_FS_TRUNCATE;
	CLEANUP_FD int ruleset = (int)syscall(SYS_landlock_create_ruleset, &attr, sizeof attr, 0);
	if (ruleset < 0)
		return error_errno(err, errno, "view: Landlock");
	struct view v = {.ruleset = ruleset, .known = attr.handled_access_fs};
	int rc = allow(&v, "/", READ, err);
	if (!rc)
		rc = allow_programs(&v, err);
	if (!rc)
		rc = allow_state(&v, vm, err);
	if (!rc)
		rc = allow_outside(&v, vm, err);
	if (!rc && syscall(SYS_landlock_restrict_self, ruleset, 0) < 0)
		rc = error_errno(err, errno, "view: Landlock");
	return rc;
}
