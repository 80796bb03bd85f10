/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/move_shared.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "net/preamble.h"

/* Relative, without "", "." and ".."; nothing that a definition could not hold. */
static bool is_plain(const char *path)
{
	size_t len = strlen(path);
	if (!len || len >= MOVE_SHARED_PATH_BYTES || path[len - 1] == ' ' || strpbrk(path, ",;"))
		return false;
	for (const char *p = path; *p; p++)
		if ((unsigned char)*p < ' ')
			return false;
	for (const char *p = path;; p++) {
		size_t n = strcspn(p, "/");
		if (!n || (n == 1 && *p == '.') || (n == 2 && !strncmp(p, "..", 2)))
			return false;
		p += n;
		if (!*p)
			return true;
	}
}

static bool is_challenge(const char *name)
{
	size_t n = strlen(MOVE_SHARED_NAME_PREFIX);
	return !strncmp(name, MOVE_SHARED_NAME_PREFIX, n) && strlen(name + n) == TOKEN_HEX_CHARS &&
	       strspn(name + n, "0123456789abcdef") == TOKEN_HEX_CHARS;
}

/* The next of the list, without a slash at its end; false at the end. */
static bool next_dir(const char **list, char dir[MOVE_SHARED_PATH_BYTES])
{
	const char *p = *list + strspn(*list, ", \t");
	size_t n = strcspn(p, ",");
	*list = p + n;
	while (n && strchr(" \t/", p[n - 1]))
		n--;
	if (!n || n >= MOVE_SHARED_PATH_BYTES)
		return false;
	memcpy(dir, p, n);
	dir[n] = '\0';
	return true;
}

/* Below the folder, through no symbolic link. */
static int open_below(int dirfd, const char *path, uint64_t flags)
{
	struct open_how how = {.flags = flags | O_CLOEXEC,
			       .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS};
	long fd = syscall(SYS_openat2, dirfd, path, &how, sizeof how);
	return fd < 0 ? -errno : (int)fd;
}

/* The folder that the image is in. */
static int open_folder(int dirfd, const char *path, uint64_t flags)
{
	char folder[MOVE_SHARED_PATH_BYTES];
	snprintf(folder, sizeof folder, "%s", path);
	char *slash = strrchr(folder, '/');
	if (slash)
		*slash = '\0';
	return open_below(dirfd, slash ? folder : ".", flags | O_DIRECTORY);
}

int move_shared_locate(const char *dirs, const char *image, char folder[MOVE_SHARED_PATH_BYTES],
		       struct move_shared *out, struct error *err)
{
	memset(out, 0, sizeof *out);
	for (const char *list = dirs; next_dir(&list, folder);) {
		size_t n = strlen(folder);
		if (strncmp(image, folder, n) || image[n] != '/' || !is_plain(image + n + 1))
			continue;
		snprintf(out->path, sizeof out->path, "%s", image + n + 1);
		return 0;
	}
	return error_set(err, EXDEV, "%s is in no folder of [shared] path%s", image,
			 *dirs ? "" : ", which is not set");
}

/* In the folder; of this inode alone, so that no other VM's proof is disturbed. */
static unsigned sweep_in(int dir, const struct stat *image)
{
	unsigned n = 0;
	DIR *d = fdopendir(dir);
	if (!d) {
		close(dir);
		return 0;
	}
	for (struct dirent *de; (de = readdir(d));) {
		struct stat st;
		if (!is_challenge(de->d_name) || fstatat(dirfd(d), de->d_name, &st, AT_SYMLINK_NOFOLLOW) ||
		    st.st_dev != image->st_dev || st.st_ino != image->st_ino)
			continue;
		if (unlinkat(dirfd(d), de->d_name, 0) == 0)
			n++;
		else
			log_warn("%s, a second name of a VM's disk: %s", de->d_name, strerror(errno));
	}
	closedir(d);
	return n;
}

void move_shared_sweep(const char *dirs, const char *image, uint64_t device, uint64_t inode)
{
	char folder[MOVE_SHARED_PATH_BYTES];
	struct move_shared s;
	struct stat st;
	if (move_shared_locate(dirs, image, folder, &s, NULL))
		return;
	CLEANUP_FD int top = open(folder, O_PATH | O_DIRECTORY | O_CLOEXEC);
	CLEANUP_FD int file = top < 0 ? -1 : open_below(top, s.path, O_PATH);
	if (file < 0 || fstat(file, &st) || st.st_dev != device || st.st_ino != inode || st.st_nlink < 2)
		return;
	int dir = open_folder(top, s.path, O_RDONLY);
	unsigned n = dir < 0 ? 0 : sweep_in(dir, &st);
	if (n)
		log_info("%s: %u second name%s removed, which a move that was cut off left", image, n,
			 n == 1 ? "" : "s");
}

int move_shared_challenge(const char *folder, uint64_t device, uint64_t inode, struct move_shared *s,
			  struct error *err)
{
	char token[TOKEN_HEX_CHARS + 1], self[64];
	struct stat st;
	int rc = token_generate(token, err);
	if (rc)
		return rc;
	CLEANUP_FD int top = open(folder, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (top < 0)
		return error_errno(err, errno, "%s", folder);
	CLEANUP_FD int dir = open_folder(top, s->path, O_PATH);
	CLEANUP_FD int image = open_below(top, s->path, O_PATH);
	if (dir < 0 || image < 0)
		return error_errno(err, dir < 0 ? dir : image, "%s/%s (through no symbolic link)", folder,
				   s->path);
	if (fstat(image, &st))
		return error_errno(err, errno, "%s/%s", folder, s->path);
	if (!S_ISREG(st.st_mode) || st.st_dev != device || st.st_ino != inode)
		return error_set(err, EIO, "%s/%s is another file than the one that the VM uses", folder,
				 s->path);
	snprintf(s->name, sizeof s->name, "%s%s", MOVE_SHARED_NAME_PREFIX, token);
	snprintf(self, sizeof self, "/proc/self/fd/%d", image);
	if (linkat(AT_FDCWD, self, dir, s->name, AT_SYMLINK_FOLLOW)) {
		rc = error_errno(err, errno, "%s/%s: a second name, to prove that both hosts see it", folder,
				 s->path);
		s->name[0] = '\0';
		return rc;
	}
	s->bytes = (uint64_t)st.st_size;
	return 0;
}

void move_shared_withdraw(const char *folder, struct move_shared *s)
{
	if (!s->name[0])
		return;
	CLEANUP_FD int top = open(folder, O_PATH | O_DIRECTORY | O_CLOEXEC);
	CLEANUP_FD int dir = top < 0 ? -1 : open_folder(top, s->path, O_PATH);
	if (dir < 0 || unlinkat(dir, s->name, 0))
		log_warn("%s: %s beside %s could not be removed: %s", folder, s->name, s->path,
			 strerror(errno));
	s->name[0] = '\0';
}

/* 1: in this folder both names are one file. */
static int compare_in(const char *folder, const struct move_shared *s, struct stat *st, const char **why)
{
	struct stat second;
	CLEANUP_FD int top = open(folder, O_PATH | O_DIRECTORY | O_CLOEXEC);
	CLEANUP_FD int dir = top < 0 ? -1 : open_folder(top, s->path, O_PATH);
	CLEANUP_FD int image = top < 0 ? -1 : open_below(top, s->path, O_PATH);
	*why = "it is not there";
	if (dir < 0 || image < 0 || fstat(image, st))
		return 0;
	CLEANUP_FD int link = open_below(dir, s->name, O_PATH);
	*why = "the folder is another one than the source's";
	if (link < 0 || fstat(link, &second))
		return 0;
	*why = "the file is another one than the source's";
	if (!S_ISREG(st->st_mode) || st->st_dev != second.st_dev || st->st_ino != second.st_ino ||
	    (uint64_t)st->st_size != s->bytes)
		return 0;
	return 1;
}

int move_shared_find(const char *dirs, const struct move_shared *s, char path[MOVE_SHARED_PATH_BYTES],
		     uint64_t *device, uint64_t *inode, struct error *err)
{
	char folder[MOVE_SHARED_PATH_BYTES], tried[400] = "";
	size_t at = 0;
	for (const char *list = dirs; next_dir(&list, folder);) {
		struct stat st;
		const char *why = "its path is too long";
		bool fits = strlen(folder) + 1 + strlen(s->path) < MOVE_SHARED_PATH_BYTES;
		if (fits && compare_in(folder, s, &st, &why)) {
			size_t n = strlen(folder);
			memcpy(path, folder, n);
			path[n] = '/';
			strcpy(path + n + 1, s->path);
			*device = st.st_dev;
			*inode = st.st_ino;
			return 0;
		}
		if (at < sizeof tried)
			at += (size_t)snprintf(tried + at, sizeof tried - at, "%s%.100s: %s", at ? "; " : "",
					       folder, why);
	}
	return error_set(err, ENOENT, "%.200s is not shared (%s)", s->path,
			 *tried ? tried : "this host has no [shared] path");
}

json_t *move_shared_to_json(const struct move_shared *s)
{
	return json_pack("{s:s, s:s, s:I}", "path", s->path, "name", s->name, "bytes", (json_int_t)s->bytes);
}

int move_shared_parse(json_t *o, struct move_shared *s, struct error *err)
{
	const char *path = json_string_value(json_object_get(o, "path"));
	const char *name = json_string_value(json_object_get(o, "name"));
	json_t *bytes = json_object_get(o, "bytes");
	*s = (struct move_shared){0};
	if (!path || !is_plain(path) || !name || !is_challenge(name) || !json_is_integer(bytes) ||
	    json_integer_value(bytes) <= 0)
		return error_set(err, EPROTO, "hello: \"shared\" is malformed");
	strcpy(s->path, path);
	strcpy(s->name, name);
	s->bytes = (uint64_t)json_integer_value(bytes);
	return 0;
}
