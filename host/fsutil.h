/* SPDX-License-Identifier: Apache-2.0 */
#ifndef HOST_FSUTIL_H
#define HOST_FSUTIL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/error.h"

/* Whole file, NUL-terminated (len excludes it); -EFBIG above max_bytes. free(3) it. A directory is -EISDIR.
 */
int fs_read_file(const char *path, size_t max_bytes, char **out, size_t *len, struct error *err);
/* As fs_read_file below dirfd, O_NOFOLLOW, regular files only. `label` names it in errors. */
int fs_read_file_at(int dirfd, const char *name, const char *label, size_t max_bytes, char **out, size_t *len,
		    struct error *err);
/* Writes NAME.new in dirfd, syncs it, renames it over name, syncs the folder: after a crash either text is
 * there, whole. */
int fs_write_file_at(int dirfd, const char *name, const void *data, size_t len, mode_t mode,
		     struct error *err);
int fs_sync_dir(const char *path, struct error *err);
/* As mkdir -p, mode 0700 for what is made; durable when the return is 0. */
int fs_make_dirs(const char *path, struct error *err);
/* O_DIRECTORY|O_CLOEXEC|O_NOFOLLOW of the last component; an fd or negative errno. */
int fs_open_dir(const char *path, struct error *err);
/* Removes what is below and the folder itself, never following a link and never crossing to another file
 * system. 0 when it is not there. */
int fs_remove_tree(const char *path, struct error *err);
/*
 * Copies a regular file or block device's content to dirfd/name, created with O_EXCL and mode 0600, keeping
 * holes (reflinked where the file system can), and syncs it. Nothing stays after a failure.
 */
int fs_copy_file(const char *from, int dirfd, const char *name, struct error *err);
/* "A/B" with a bound; -ENAMETOOLONG. */
int fs_join(char *out, size_t size, const char *a, const char *b, struct error *err);

#endif
