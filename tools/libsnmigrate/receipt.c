/* SPDX-License-Identifier: Apache-2.0 */
#include "tools/libsnmigrate/receipt.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"

int receipt_begin(struct receipt *r, const char *path, struct error *err)
{
	*r = RECEIPT_NONE;
	if (!*path || strlen(path) >= sizeof r->path)
		return error_set(err, ENAMETOOLONG, "%.64s: no name of a file", path);
	snprintf(r->path, sizeof r->path, "%s", path);
	snprintf(r->temporary, sizeof r->temporary, "%s.XXXXXX", path);
	int fd = mkostemp(r->temporary, O_CLOEXEC); /* mode 0600 */
	if (fd < 0)
		return error_errno(err, errno, "%s", path);
	r->fd = fd;
	return 0;
}

void receipt_end(struct receipt *r)
{
	if (r->fd < 0)
		return;
	close(r->fd);
	unlink(r->temporary);
	r->fd = -1;
}

static json_t *not_covered(const json_t *proof, bool agreed)
{
	static const char *const always[] = {
		"What was written to the disks after they were compared: it is proved as the destination "
		"received "
		"it, and not read again from its media.",
		"The drives' own caches: the destination's media were read again past the host's page cache, "
		"but "
		"a drive may answer from its own.",
		"The image files' own metadata: a disk's content is compared as the guest reads it, not the "
		"bytes "
		"of a qcow2 file.",
		"The guest's memory and device state as a whole: each frame of them carries a checksum "
		"(XXH3-64) "
		"that the destination checked, and the guest went on from what came.",
		"A destination that lies about what it read or received: both hosts are trusted, and "
		"XXH3-128 is "
		"no cryptographic hash.",
		"Whatever happens to the disks after the move.",
	};
	json_t *list = json_array();
	if (!agreed)
		json_array_append_new(list, json_string("The disks: they were not found equal."));
	for (size_t i = 0; i < sizeof always / sizeof *always; i++)
		json_array_append_new(list, json_string(always[i]));
	if (json_is_false(json_object_get(proof, "tls")))
		json_array_append_new(
			list,
			json_string("Somebody on the network who changes disks and memory on the way on "
				    "purpose: this move was made with --no-tls, and checksums keep "
				    "nobody out."));
	return list;
}

static json_t *compose(const json_t *end)
{
	static const char *const from_end[] = {"vm",	     "uuid",	   "destination", "epoch",
					       "result",     "exit",	   "reason",	  "total_ms",
					       "storage_ms", "memory_ms",  "downtime_ms", "memory_bytes",
					       "disk_bytes", "wire_bytes", "rounds",	  "left_behind"};
	json_t *proof = json_object_get(end, "proof"), *o = json_object();
	bool moved = json_is_true(json_object_get(proof, "agreed"));
	json_object_set_new(o, "receipt", json_integer(1));
	json_object_set_new(o, "agreed", json_boolean(moved));
	for (size_t i = 0; i < sizeof from_end / sizeof *from_end; i++)
		json_object_set(o, from_end[i], json_object_get(end, from_end[i]));
	const char *key;
	json_t *value;
	json_object_foreach(proof, key, value) json_object_set(o, key, value);
	if (!json_is_array(json_object_get(o, "disks")))
		json_object_set_new(o, "disks", json_array());
	json_object_set_new(o, "does_not_cover", not_covered(proof, moved));
	return o;
}

static int write_all(int fd, const char *text, size_t len)
{
	while (len) {
		ssize_t n = write(fd, text, len);
		if (n < 0)
			return -errno;
		text += n;
		len -= (size_t)n;
	}
	return 0;
}

static void sync_folder(const char *path)
{
	char copy[4096];
	snprintf(copy, sizeof copy, "%s", path);
	CLEANUP_FD int dir = open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (dir >= 0)
		fsync(dir);
}

int receipt_write(struct receipt *r, const json_t *end, struct error *err)
{
	if (r->fd < 0)
		return 0;
	json_t *o = compose(end);
	CLEANUP_FREE char *text = json_dumps(o, JSON_INDENT(2));
	json_decref(o);
	int rc = text ? write_all(r->fd, text, strlen(text)) : -ENOMEM;
	if (!rc)
		rc = write_all(r->fd, "\n", 1);
	if (!rc && (fsync(r->fd) || rename(r->temporary, r->path)))
		rc = -errno;
	if (rc) {
		receipt_end(r);
		return error_errno(err, rc, "receipt %s", r->path);
	}
	sync_folder(r->path);
	close(r->fd);
	r->fd = -1;
	return 0;
}
