/* SPDX-License-Identifier: Apache-2.0 */
/* Real disks: files and loop devices, raw or qcow2, opened as the product opens them. */
#ifndef TESTS_STORAGE_MODEL_DISK_H
#define TESTS_STORAGE_MODEL_DISK_H

#include <stdbool.h>
#include <stdint.h>

#include "block/open.h"

enum disk_kind { DISK_RAW, DISK_RAW_BUFFERED, DISK_LOOP, DISK_QCOW2, DISK_KINDS };

struct disk {
	enum disk_kind kind;
	const char *dir;
	char file[128], path[128]; /* the same, but for a loop device */
	uint64_t size_bytes;
	int loop_fd;
	struct block *block;
};

const char *disk_kind_name(enum disk_kind kind);
/* NULL: the kind can be used here; else what is missing. */
const char *disk_kind_missing(enum disk_kind kind);
/* cluster_bytes: of a qcow2. */
void disk_create(struct disk *d, enum disk_kind kind, const char *dir, const char *name, uint64_t size_bytes,
		 uint32_t cluster_bytes);
void disk_open(struct disk *d);
void disk_close(struct disk *d);
/* All of it through the open disk; the caller frees. */
uint8_t *disk_content(struct disk *d);
/* All of a closed disk by another reader than the product's (for qcow2: qemu-img). */
uint8_t *disk_foreign_content(struct disk *d);
void disk_remove(struct disk *d);

#endif
