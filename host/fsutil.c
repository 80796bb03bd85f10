/* SPDX-License-Identifier: Apache-2.0 */
#include "host/fsutil.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"

#define COPY_BLOCK_BYTES (1u << 20)
#define TREE_DEPTH_MAX	 16

static int read_fd(int fd, const char *label, size_t max_bytes, char **out, size_t *len, struct error *err)
{
	size_t size = 0, room = 4096;
	CLEANUP_FREE char *buf = malloc(room + 1);
	if (!buf)
		return error_errno(err, ENOMEM, "%s", label);
	for (;;) {
		if (size == room) {
			if (room > max_bytes)
				return error_set(err, EFBIG, "%s: larger than %zu bytes", label, max_bytes);
			room *= 2;
			char *more = realloc(buf, room + 1);
			if (!more)
				return error_errno(err, ENOMEM, "%s", label);
			buf = more;
		}
		ssize_t n = read(fd, buf + size, room - size);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return error_errno(err, errno, "%s", label);
		if (n == 0)
			break;
		size += (size_t)n;
	}
	if (size > max_bytes)
		return error_set(err, EFBIG, "%s: larger than %zu bytes", label, max_bytes);
	buf[size] = '\0';
	*len = size;
	*out = steal_ptr(buf);
	return 0;
}

int fs_read_file(const char *path, size_t max_bytes, char **out, size_t *len, struct error *err)
{
	CLEANUP_FD int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
	if (fd < 0)
		return error_errno(err, errno, "%s", path);
	return read_fd(fd, path, max_bytes, out, len, err);
}

int fs_read_file_at(int dirfd, const char *name, const char *label, size_t max_bytes, char **out, size_t *len,
		    struct error *err)
{
	CLEANUP_FD int fd = openat(dirfd, name, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NOFOLLOW | O_NONBLOCK);
	struct stat st;
	if (fd < 0 || fstat(fd, &st) < 0)
		return error_errno(err, errno, "%s", label);
	if (!S_ISREG(st.st_mode))
		return error_set(err, EINVAL, "%s: not a regular file", label);
	return read_fd(fd, label, max_bytes, out, len, err);
}

int fs_write_file_at(int dirfd, const char *name, const void *data, size_t len, mode_t mode,
		     struct error *err)
{
	char temporary[NAME_MAX + 1];
	if ((size_t)snprintf(temporary, sizeof temporary, "%s.new", name) >= sizeof temporary)
		return error_errno(err, ENAMETOOLONG, "%s", name);
	CLEANUP_FD int fd =
		openat(dirfd, temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, mode);
	if (fd < 0)
		return error_errno(err, errno, "%s", temporary);
	for (size_t at = 0; at < len;) {
		ssize_t n = write(fd, (const char *)data + at, len - at);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return error_errno(err, errno, "%s: write", temporary);
		at += (size_t)n;
	}
	if (fsync(fd) < 0 || renameat(dirfd, temporary, dirfd, name) < 0 || fsync(dirfd) < 0)
		return error_errno(err, errno, "%s", name);
	return 0;
}

int fs_open_dir(const char *path, struct error *err)
{
	int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
	return fd < 0 ? error_errno(err, errno, "%s", path) : fd;
}

int fs_sync_dir(const char *path, struct error *err)
{
	CLEANUP_FD int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0 || fsync(fd) < 0)
		return error_errno(err, errno, "%s", path);
	return 0;
}

int fs_make_dirs(const char *path, struct error *err)
{
	char part[PATH_MAX];
	if (strlen(path) >= sizeof part)
		return error_errno(err, ENAMETOOLONG, "%.200s...", path);
	strcpy(part, path);
	for (char *p = part + 1;; p++) {
		if (*p && *p != '/')
			continue;
		char saved = *p;
		*p = '\0';
		if (mkdir(part, 0700) == 0) {
			char parent[PATH_MAX];
			strcpy(parent, part);
			char *slash = strrchr(parent, '/');
			if (!slash)
				strcpy(parent, ".");
			else
				slash[slash == parent] = '\0';
			int rc = fs_sync_dir(parent, err);
			if (rc < 0)
				return rc;
		} else if (errno != EEXIST) {
			return error_errno(err, errno, "%s", part);
		}
		*p = saved;
		if (!saved)
			break;
	}
	struct stat st;
	if (stat(path, &st) < 0)
		return error_errno(err, errno, "%s", path);
	return S_ISDIR(st.st_mode) ? 0 : error_errno(err, ENOTDIR, "%s", path);
}

static int remove_below(int dirfd, dev_t device, unsigned depth, const char *label, struct error *err)
{
	if (depth > TREE_DEPTH_MAX) {
		close(dirfd);
		return error_set(err, ELOOP, "%s: folders nested deeper than %d", label, TREE_DEPTH_MAX);
	}
	DIR *dir = fdopendir(dirfd);
	if (!dir) {
		close(dirfd);
		return error_errno(err, errno, "%s", label);
	}
	int rc = 0;
	struct dirent *de;
	while (!rc && (de = readdir(dir))) {
		if (!strcmp(de->d_name, ".") || !strcmp(de->d_name, ".."))
			continue;
		struct stat st;
		if (fstatat(dirfd, de->d_name, &st, AT_SYMLINK_NOFOLLOW) < 0) {
			if (errno != ENOENT)
				rc = error_errno(err, errno, "%s/%s", label, de->d_name);
			continue;
		}
		int flags = 0;
		if (S_ISDIR(st.st_mode)) {
			int sub = openat(dirfd, de->d_name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
			if (st.st_dev != device) {
				rc = error_set(err, EXDEV, "%s/%s: another file system is mounted there",
					       label, de->d_name);
				if (sub >= 0)
					close(sub);
				break;
			}
			rc = sub < 0 ? error_errno(err, errno, "%s/%s", label, de->d_name)
				     : remove_below(sub, device, depth + 1, label, err);
			flags = AT_REMOVEDIR;
		}
		if (!rc && unlinkat(dirfd, de->d_name, flags) < 0 && errno != ENOENT)
			rc = error_errno(err, errno, "%s/%s", label, de->d_name);
	}
	closedir(dir);
	return rc;
}

int fs_remove_tree(const char *path, struct error *err)
{
	int fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	struct stat st;
	if (fd < 0)
		return errno == ENOENT ? 0 : error_errno(err, errno, "%s", path);
	if (fstat(fd, &st) < 0) {
		int rc = error_errno(err, errno, "%s", path);
		close(fd);
		return rc;
	}
	int rc = remove_below(fd, st.st_dev, 0, path, err);
	if (!rc && rmdir(path) < 0 && errno != ENOENT)
		rc = error_errno(err, errno, "%s", path);
	return rc;
}

static int copy_range(int in, int out, off_t from, off_t to)
{
	static const char zeroes[4096];
	CLEANUP_FREE char *buf = NULL;
	while (from < to) {
		off_t in_at = from, out_at = from;
		ssize_t n = copy_file_range(in, &in_at, out, &out_at, (size_t)(to - from), 0);
		if (n <= 0) {
			if (n < 0 && errno != EXDEV && errno != EINVAL && errno != EOPNOTSUPP &&
			    errno != ENOSYS)
				return -errno;
			if (!buf && !(buf = malloc(COPY_BLOCK_BYTES)))
				return -ENOMEM;
			size_t want =
				to - from < (off_t)COPY_BLOCK_BYTES ? (size_t)(to - from) : COPY_BLOCK_BYTES;
			n = pread(in, buf, want, from);
			if (n < 0 && errno == EINTR)
				continue;
			if (n <= 0)
				return n < 0 ? -errno : 0; /* the file shrank: its end is what it is */
			for (ssize_t at = 0; at < n;) {
				size_t piece =
					n - at < (ssize_t)sizeof zeroes ? (size_t)(n - at) : sizeof zeroes;
				ssize_t w = memcmp(buf + at, zeroes, piece)
						    ? pwrite(out, buf + at, piece, from + at)
						    : (ssize_t)piece;
				if (w < 0 && errno == EINTR)
					continue;
				if (w <= 0)
					return w < 0 ? -errno : -EIO;
				at += w;
			}
		}
		from += n;
	}
	return 0;
}

static int copy_data(int in, int out, off_t size)
{
	if (ioctl(out, FICLONE, in) == 0)
		return 0;
	if (ftruncate(out, size) < 0)
		return -errno;
	for (off_t at = 0; at < size;) {
		off_t data = lseek(in, at, SEEK_DATA), hole;
		if (data < 0 && errno == ENXIO)
			break; /* nothing but a hole to the end */
		if (data < 0) {
			data = at;
			hole = size;
		} else {
			hole = lseek(in, data, SEEK_HOLE);
			if (hole < 0 || hole > size)
				hole = size;
		}
		int rc = copy_range(in, out, data, hole);
		if (rc < 0)
			return rc;
		at = hole;
	}
	return 0;
}

int fs_copy_file(const char *from, int dirfd, const char *name, struct error *err)
{
	CLEANUP_FD int in = open(from, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
	struct stat st;
	if (in < 0 || fstat(in, &st) < 0)
		return error_errno(err, errno, "%s", from);
	off_t size = st.st_size;
	if (S_ISBLK(st.st_mode))
		size = lseek(in, 0, SEEK_END);
	else if (!S_ISREG(st.st_mode))
		return error_set(err, EINVAL, "%s: neither a regular file nor a block device", from);
	if (size < 0)
		return error_errno(err, errno, "%s", from);
	CLEANUP_FD int out = openat(dirfd, name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (out < 0)
		return error_errno(err, errno, "%s", name);
	int rc = copy_data(in, out, size);
	if (!rc && fsync(out) < 0)
		rc = -errno;
	if (rc < 0) {
		unlinkat(dirfd, name, 0);
		return error_errno(err, rc, "copying %s to %s", from, name);
	}
	return 0;
}

int fs_join(char *out, size_t size, const char *a, const char *b, struct error *err)
{
	if ((size_t)snprintf(out, size, "%s/%s", a, b) >= size)
		return error_set(err, ENAMETOOLONG, "path too long: %.200s/%.100s", a, b);
	return 0;
}
