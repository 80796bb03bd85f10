/* SPDX-License-Identifier: Apache-2.0 */
#include "host/maintenance.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "host/fsutil.h"

#define FILE_NAME "maintenance"

static int open_state(const struct host_config *cfg, struct error *err)
{
	int fd = open(cfg->state_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	return fd < 0 ? error_errno(err, errno, "%s", cfg->state_dir) : fd;
}

bool maintenance_is_on(const struct host_config *cfg)
{
	struct stat st;
	CLEANUP_FD int dirfd = open_state(cfg, NULL);
	return dirfd < 0 || !fstatat(dirfd, FILE_NAME, &st, AT_SYMLINK_NOFOLLOW) || errno != ENOENT;
}

int maintenance_set(const struct host_config *cfg, bool on, struct error *err)
{
	static const char text[] = "no VM may arrive: snmigrate maintenance off\n";
	CLEANUP_FD int dirfd = open_state(cfg, err);
	int rc = dirfd < 0 ? dirfd : 0;
	if (!rc && on)
		rc = fs_write_file_at(dirfd, FILE_NAME, text, strlen(text), 0600, err);
	else if (!rc && unlinkat(dirfd, FILE_NAME, 0) < 0 && errno != ENOENT)
		rc = error_errno(err, errno, "%s/" FILE_NAME, cfg->state_dir);
	else if (!rc && fsync(dirfd) < 0)
		rc = error_errno(err, errno, "%s", cfg->state_dir);
	return rc;
}

int maintenance_check(const struct host_config *cfg, struct error *err)
{
	if (!maintenance_is_on(cfg))
		return 0;
	return error_set(err, EPERM,
			 "host %s is in maintenance and takes no VMs (snmigrate maintenance off, there)",
			 cfg->name);
}
