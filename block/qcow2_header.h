/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The header of a qcow2 image (QEMU's docs/interop/qcow2.txt), read by ourselves before any of QEMU's tools
 * sees the file: `qemu-img info` opens whatever an external data file names, so a hostile image must be
 * refused before that.
 */
#ifndef BLOCK_QCOW2_HEADER_H
#define BLOCK_QCOW2_HEADER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

#define QCOW2_HEADER_BYTES 104

struct qcow2_header {
	uint32_t version; /* 2 or 3 */
	uint32_t cluster_bytes;
	uint64_t virtual_bytes;
	uint32_t nsnapshots;
	bool has_backing, has_data_file, encrypted;
	bool compressed; /* clusters, as qemu-img check found */
	bool dirty, corrupt, extended_l2, lazy_refcounts;
};

/* Pure; raw holds what the file begins with, len of it (up to QCOW2_HEADER_BYTES is looked at). -EINVAL with
 * the reason when this is no qcow2, is cut short, or has features that nobody knows. */
int qcow2_header_decode(const uint8_t *raw, size_t len, struct qcow2_header *out, struct error *err);
/* Reads and decodes; also refuses (-ENOTSUP) backing files, external data files and encryption if
 * self_contained is set. */
int qcow2_header_read(int fd, bool self_contained, struct qcow2_header *out, struct error *err);

#endif
