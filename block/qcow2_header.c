/* SPDX-License-Identifier: Apache-2.0 */
#include "block/qcow2_header.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "base/bytes.h"

#define MAGIC		     0x514649fbu /* "QFI\xfb" */
#define V2_HEADER_BYTES	     72
#define CLUSTER_BITS_MIN     9
#define CLUSTER_BITS_MAX     21
#define INCOMPAT_DIRTY	     (UINT64_C(1) << 0)
#define INCOMPAT_CORRUPT     (UINT64_C(1) << 1)
#define INCOMPAT_DATA_FILE   (UINT64_C(1) << 2)
#define INCOMPAT_COMPRESSION (UINT64_C(1) << 3)
#define INCOMPAT_EXTENDED_L2 (UINT64_C(1) << 4)
#define INCOMPAT_KNOWN	     (UINT64_C(0x1f))
#define COMPAT_LAZY	     (UINT64_C(1) << 0)
#define REFCOUNT_ORDER_MAX   6
#define COMPRESSION_ZSTD     1
#define EXTENSION_FORMAT     0xe2792acau /* of the backing file */

int qcow2_header_decode(const uint8_t *raw, size_t len, struct qcow2_header *out, struct error *err)
{
	*out = (struct qcow2_header){0};
	if (len < 8 || get_be32(raw) != MAGIC)
		return error_set(err, EINVAL, "not a qcow2 image");
	out->version = get_be32(raw + 4);
	if (out->version != 2 && out->version != 3)
		return error_set(err, EINVAL, "qcow2 version %u is unknown", out->version);
	if (len < (out->version == 2 ? V2_HEADER_BYTES : QCOW2_HEADER_BYTES))
		return error_set(err, EINVAL, "truncated: the qcow2 header is cut short");
	out->backing_at = get_be64(raw + 8);
	out->backing_bytes = get_be32(raw + 16);
	out->has_backing = out->backing_at != 0;
	uint32_t bits = get_be32(raw + 20);
	if (bits < CLUSTER_BITS_MIN || bits > CLUSTER_BITS_MAX)
		return error_set(err, EINVAL, "qcow2 header: cluster size of 2^%u bytes", bits);
	out->cluster_bytes = UINT32_C(1) << bits;
	out->virtual_bytes = get_be64(raw + 24);
	if (out->virtual_bytes > INT64_MAX)
		return error_set(err, EINVAL, "qcow2 header: impossible size");
	out->encrypted = get_be32(raw + 32) != 0;
	out->nsnapshots = get_be32(raw + 60);
	out->refcount_bits = 16;
	out->header_bytes = V2_HEADER_BYTES;
	if (out->version == 2)
		return 0;
	uint64_t incompat = get_be64(raw + 72), compat = get_be64(raw + 80);
	if (incompat & ~INCOMPAT_KNOWN)
		return error_set(err, EINVAL, "qcow2 header: unknown incompatible features 0x%llx",
				 (unsigned long long)(incompat & ~INCOMPAT_KNOWN));
	out->dirty = incompat & INCOMPAT_DIRTY;
	out->corrupt = incompat & INCOMPAT_CORRUPT;
	out->has_data_file = incompat & INCOMPAT_DATA_FILE;
	out->extended_l2 = incompat & INCOMPAT_EXTENDED_L2;
	out->lazy_refcounts = compat & COMPAT_LAZY;
	uint32_t order = get_be32(raw + 96);
	if (order > REFCOUNT_ORDER_MAX)
		return error_set(err, EINVAL, "qcow2 header: reference counts of 2^%u bits", order);
	out->refcount_bits = UINT32_C(1) << order;
	out->header_bytes = get_be32(raw + 100);
	if (out->header_bytes < QCOW2_HEADER_BYTES || out->header_bytes > out->cluster_bytes)
		return error_set(err, EINVAL, "qcow2 header: a length of %u bytes", out->header_bytes);
	if (incompat & INCOMPAT_COMPRESSION) {
		/* one byte after what every header of version 3 has */
		if (len <= QCOW2_HEADER_BYTES)
			return error_set(err, EINVAL, "truncated: the qcow2 header is cut short");
		out->zstd = raw[QCOW2_HEADER_BYTES] == COMPRESSION_ZSTD;
	}
	return 0;
}

static ssize_t read_at(int fd, void *buf, size_t len, uint64_t at)
{
	ssize_t n;
	do
		n = pread(fd, buf, len, (off_t)at);
	while (n < 0 && errno == EINTR);
	return n;
}

/* The name lies in the first cluster, after the header extensions, one of which says its format. */
static int read_backing(int fd, struct qcow2_header *out, struct error *err)
{
	if (out->backing_bytes == 0 || out->backing_bytes > QCOW2_BACKING_MAX_BYTES ||
	    out->backing_at < out->header_bytes ||
	    out->backing_at > out->cluster_bytes - out->backing_bytes ||
	    out->cluster_bytes < out->backing_bytes)
		return error_set(err, EINVAL, "qcow2 header: the backing file's name is not in it");
	ssize_t n = read_at(fd, out->backing_name, out->backing_bytes, out->backing_at);
	if (n != (ssize_t)out->backing_bytes)
		return error_set(err, n < 0 ? errno : EINVAL, "qcow2 header: the backing file's name");
	if (memchr(out->backing_name, 0, (size_t)n))
		return error_set(err, EINVAL, "qcow2 header: a zero byte in the backing file's name");
	for (char *p = out->backing_name; *p; p++)
		if ((unsigned char)*p < 0x20 || *p == 0x7f)
			*p = '?'; /* for people's eyes: files are found by the definition */
	for (uint64_t at = out->header_bytes; at + 8 <= out->backing_at;) {
		uint8_t raw[8];
		if (read_at(fd, raw, sizeof raw, at) != sizeof raw || !get_be32(raw))
			break;
		uint32_t len = get_be32(raw + 4);
		if (get_be32(raw) == EXTENSION_FORMAT && len < sizeof out->backing_format) {
			n = read_at(fd, out->backing_format, len, at + 8);
			out->backing_format[n == (ssize_t)len ? len : 0] = '\0';
		}
		at += 8 + ((uint64_t)len + 7) / 8 * 8;
	}
	return 0;
}

int qcow2_header_read(int fd, struct qcow2_header *out, struct error *err)
{
	uint8_t raw[QCOW2_HEADER_BYTES + 8];
	ssize_t n = read_at(fd, raw, sizeof raw, 0);
	if (n < 0)
		return error_errno(err, errno, "read of the qcow2 header");
	int rc = qcow2_header_decode(raw, (size_t)n, out, err);
	return rc || !out->has_backing ? rc : read_backing(fd, out, err);
}

int qcow2_header_usable(const struct qcow2_header *head, struct error *err)
{
	if (head->corrupt)
		return error_set(err, EINVAL, "the qcow2 image is marked corrupt (qemu-img check -r)");
	if (head->has_data_file)
		return error_set(err, ENOTSUP, "qcow2 images with an external data file are not supported");
	if (head->encrypted)
		return error_set(err, ENOTSUP, "encrypted qcow2 images are not supported");
	return 0;
}
