/* SPDX-License-Identifier: Apache-2.0 */
/* Shape of images: information, check and creation. */
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "block/chain.h"
#include "block/child.h"
#include "block/image.h"
#include "block/open.h"
#include "block/qcow2_header.h"

#define CHECK_TIMEOUT_MS  120000
#define CREATE_TIMEOUT_MS 60000

static void cleanup_json(json_t **json)
{
	json_decref(*json);
}

static json_int_t number(json_t *obj, const char *key)
{
	return json_integer_value(json_object_get(obj, key));
}

int block_qcow2_check(int fd, bool is_device, struct qcow2_header *head, struct error *err)
{
	struct image_chain alone = {.nlayers = 1,
				    .layers = {{.format = BLOCK_FORMAT_QCOW2, .is_device = is_device}}};
	char image[CHAIN_TEXT_BYTES];
	chain_describe(&alone, 3, image);
	const char *const argv[] = {"qemu-img", "check", "--output=json", image, NULL};
	struct child_spec spec = {
		.tool = "qemu-img", .argv = argv, .fds = &fd, .nfds = 1, .out_fd = -1, .err_fd = -1};
	struct child_result res;
	int rc = child_run(&spec, CHECK_TIMEOUT_MS, &res, err);
	if (rc)
		return error_prefix(err, "check");
	CLEANUP_FREE char *out = res.out;
	/* 2: corruptions, 3: leaked clusters, both with a report; 1: no report. */
	CLEANUP(cleanup_json) json_t *report = out ? json_loadb(out, res.out_len, 0, NULL) : NULL;
	if (!json_is_object(report))
		return error_set(err, EINVAL, "qemu-img check: %s",
				 res.complaint[0] ? res.complaint : "no report");
	head->compressed = number(report, "compressed-clusters") > 0;
	struct stat st;
	if (fstat(fd, &st))
		return error_errno(err, errno, "stat");
	/* The last cluster need not be complete; more missing than that is a truncation. */
	json_int_t end = number(report, "image-end-offset");
	if (S_ISREG(st.st_mode) && end - (json_int_t)st.st_size >= (json_int_t)head->cluster_bytes)
		return error_set(err, EINVAL,
				 "truncated: the qcow2 image should be %lld bytes long, it has %lld",
				 (long long)end, (long long)st.st_size);
	if (number(report, "check-errors") > 0)
		return error_set(err, EINVAL, "qemu-img check: %lld errors: %s",
				 (long long)number(report, "check-errors"), res.complaint);
	/* Refcounts of an image marked dirty are stale by design (lazy refcounts): opening repairs them. */
	if (number(report, "corruptions") > 0 && !head->dirty)
		return error_set(err, EINVAL,
				 "truncated or corrupt qcow2 image: %lld errors found by qemu-img check: %s",
				 (long long)number(report, "corruptions"), res.complaint);
	return 0;
}

static int qcow2_info(int fd, bool in_use, struct block_image_info *info, struct error *err)
{
	struct qcow2_header head;
	int rc = qcow2_header_read(fd, &head, err);
	if (rc)
		return rc;
	info->virtual_bytes = head.virtual_bytes;
	info->cluster_bytes = head.cluster_bytes;
	snprintf(info->compat, sizeof info->compat, "%s", head.version == 2 ? "0.10" : "1.1");
	info->lazy_refcounts = head.lazy_refcounts;
	info->extended_l2 = head.extended_l2;
	info->refcount_bits = head.refcount_bits;
	info->zstd = head.zstd;
	info->has_backing = head.has_backing || head.has_data_file;
	snprintf(info->backing_name, sizeof info->backing_name, "%s", head.backing_name);
	if (block_format_parse(head.backing_format, &info->backing_format))
		info->backing_format = BLOCK_FORMAT_RAW;
	if (head.corrupt)
		return qcow2_header_usable(&head, err);
	if (in_use || head.has_data_file || head.encrypted)
		return 0; /* nothing may be concluded from a moving image, nor other files be touched */
	return block_qcow2_check(fd, info->is_block_device, &head, err);
}

int block_image_info(const char *path, enum block_format format, bool in_use, struct block_image_info *info,
		     struct error *err)
{
	*info = (struct block_image_info){.format = format};
	CLEANUP_FD int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
	if (fd < 0)
		return error_errno(err, errno, "%s: open", path);
	struct stat st;
	if (fstat(fd, &st))
		return error_errno(err, errno, "%s: stat", path);
	info->inode = st.st_ino;
	info->device = st.st_dev;
	info->is_block_device = S_ISBLK(st.st_mode);
	if (info->is_block_device) {
		if (ioctl(fd, BLKGETSIZE64, &info->virtual_bytes))
			return error_errno(err, errno, "%s: size of the block device", path);
	} else if (S_ISREG(st.st_mode)) {
		info->virtual_bytes = (uint64_t)st.st_size;
		info->allocated_bytes = (uint64_t)st.st_blocks * 512;
		info->file_bytes = (uint64_t)st.st_size;
	} else {
		return error_set(err, EINVAL, "%s: neither a regular file nor a block device", path);
	}
	if (format == BLOCK_FORMAT_RAW)
		return 0;
	int rc = qcow2_info(fd, in_use, info, err);
	return rc ? error_prefix(err, "%s", path) : 0;
}

static int format_qcow2(int fd, const struct block_image_info *like, struct error *err)
{
	char options[256], size[32];
	uint32_t cluster = like->cluster_bytes ? like->cluster_bytes : 65536;
	const char *compat = like->compat[0] ? like->compat : "1.1";
	if (strcmp(compat, "0.10") != 0 && strcmp(compat, "1.1") != 0)
		return error_set(err, EINVAL, "qcow2 compatibility level \"%s\"", compat);
	snprintf(options, sizeof options, "compat=%s,cluster_size=%u,refcount_bits=%u%s%s%s", compat, cluster,
		 like->refcount_bits ? like->refcount_bits : 16,
		 like->lazy_refcounts ? ",lazy_refcounts=on" : "", like->extended_l2 ? ",extended_l2=on" : "",
		 like->zstd ? ",compression_type=zstd" : "");
	snprintf(size, sizeof size, "%llu", (unsigned long long)like->virtual_bytes);
	const char *argv[16] = {"qemu-img", "create", "-q", "-f", "qcow2", "-o", options};
	unsigned n = 7;
	if (like->backing_name[0]) {
		argv[n++] = "-u"; /* it is not opened */
		argv[n++] = "-b";
		argv[n++] = like->backing_name;
		argv[n++] = "-F";
		argv[n++] = block_format_name(like->backing_format);
	}
	argv[n++] = CHILD_FD_PATH(3);
	argv[n++] = size;
	struct child_spec spec = {
		.tool = "qemu-img", .argv = argv, .fds = &fd, .nfds = 1, .out_fd = -1, .err_fd = -1};
	struct child_result res;
	int rc = child_run(&spec, CREATE_TIMEOUT_MS, &res, err);
	if (rc)
		return rc;
	free(res.out);
	if (res.exit_status != 0)
		return error_set(err, EIO, "qemu-img create: %s",
				 res.complaint[0] ? res.complaint : "failed without a word");
	struct qcow2_header head;
	rc = qcow2_header_read(fd, &head, err);
	if (rc == 0 && strcmp(head.backing_name, like->backing_name) != 0)
		rc = error_set(err, EIO, "qemu-img create wrote another backing file's name");
	if (rc == 0 && head.virtual_bytes != like->virtual_bytes)
		rc = error_set(err, EIO, "qemu-img create made %llu bytes instead of %llu",
			       (unsigned long long)head.virtual_bytes,
			       (unsigned long long)like->virtual_bytes);
	return rc;
}

int block_image_create(int dirfd, const char *name, const struct block_image_info *like, struct error *err)
{
	if (!*name || strchr(name, '/') || strcmp(name, ".") == 0 || strcmp(name, "..") == 0)
		return error_set(err, EINVAL, "\"%s\" is no name for an image", name);
	if (like->virtual_bytes > INT64_MAX)
		return error_set(err, EFBIG, "%s: impossible size", name);
	CLEANUP_FD int fd = openat(dirfd, name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (fd < 0)
		return error_errno(err, errno, "%s: create", name);
	int rc = 0;
	if (like->format == BLOCK_FORMAT_QCOW2)
		rc = format_qcow2(fd, like, err);
	else if (ftruncate(fd, (off_t)like->virtual_bytes))
		rc = error_errno(err, errno, "set the size to %llu bytes",
				 (unsigned long long)like->virtual_bytes);
	if (rc == 0 && fsync(fd))
		rc = error_errno(err, errno, "fsync");
	if (rc == 0 && fsync(dirfd))
		rc = error_errno(err, errno, "fsync of its folder");
	if (rc) {
		unlinkat(dirfd, name, 0);
		return error_prefix(err, "%s", name);
	}
	return 0;
}
