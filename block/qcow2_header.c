/* SPDX-License-Identifier: Apache-2.0 */
#include "block/qcow2_header.h"

#include <errno.h>
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
	out->has_backing = get_be64(raw + 8) != 0;
	uint32_t bits = get_be32(raw + 20);
	if (bits < CLUSTER_BITS_MIN || bits > CLUSTER_BITS_MAX)
		return error_set(err, EINVAL, "qcow2 header: cluster size of 2^%u bytes", bits);
	out->cluster_bytes = UINT32_C(1) << bits;
	out->virtual_bytes = get_be64(raw + 24);
	if (out->virtual_bytes > INT64_MAX)
		return error_set(err, EINVAL, "qcow2 header: impossible size");
	out->encrypted = get_be32(raw + 32) != 0;
	out->nsnapshots = get_be32(raw + 60);
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
	return 0;
}

int qcow2_header_read(int fd, bool self_contained, struct qcow2_header *out, struct error *err)
{
	uint8_t raw[QCOW2_HEADER_BYTES];
	ssize_t n;
	do
		n = pread(fd, raw, sizeof raw, 0);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return error_errno(err, errno, "read of the qcow2 header");
	int rc = qcow2_header_decode(raw, (size_t)n, out, err);
	if (rc || !self_contained)
		return rc;
	if (out->corrupt)
		return error_set(err, EINVAL, "the qcow2 image is marked corrupt (qemu-img check -r)");
	if (out->has_backing)
		return error_set(err, ENOTSUP, "qcow2 images with a backing file are not supported");
	if (out->has_data_file)
		return error_set(err, ENOTSUP, "qcow2 images with an external data file are not supported");
	if (out->encrypted)
		return error_set(err, ENOTSUP, "encrypted qcow2 images are not supported");
	return 0;
}
