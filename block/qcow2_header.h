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

#define QCOW2_HEADER_BYTES	104
#define QCOW2_BACKING_MAX_BYTES 1023 /* of a backing file's name, as the format says */

struct qcow2_header {
	uint32_t version; /* 2 or 3 */
	uint32_t cluster_bytes;
	uint64_t virtual_bytes;
	uint32_t nsnapshots;
	uint32_t refcount_bits;
	uint32_t header_bytes;	/* where the header extensions begin */
	uint64_t backing_at;	/* of the backing file's name; 0: there is none */
	uint32_t backing_bytes; /* of that name */
	bool has_backing, has_data_file, encrypted;
	bool compressed; /* clusters, as qemu-img check found */
	bool dirty, corrupt, extended_l2, lazy_refcounts, zstd;
	/* qcow2_header_read: as the image says it. Nothing to be trusted, only to be compared. */
	char backing_name[QCOW2_BACKING_MAX_BYTES + 1];
	char backing_format[16]; /* "" where the image does not say */
};

/* Pure; raw holds what the file begins with, len of it (up to QCOW2_HEADER_BYTES is looked at). -EINVAL with
 * the reason when this is no qcow2, is cut short, or has features that nobody knows. */
int qcow2_header_decode(const uint8_t *raw, size_t len, struct qcow2_header *out, struct error *err);
/* Reads and decodes, with the name and format of a backing file. */
int qcow2_header_read(int fd, struct qcow2_header *out, struct error *err);
/* What no disk of a guest may have: -EINVAL marked corrupt, -ENOTSUP an external data file or encryption. */
int qcow2_header_usable(const struct qcow2_header *head, struct error *err);

#endif
