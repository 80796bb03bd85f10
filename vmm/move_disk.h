/* SPDX-License-Identifier: Apache-2.0 */
#ifndef VMM_MOVE_DISK_H
#define VMM_MOVE_DISK_H

/* How a disk arrives: what both ends of a move say to one another of its shape. */

#include <jansson.h>

#include "base/error.h"
#include "block/open.h"

#define MOVE_DEVICE_PATH_BYTES 256

enum move_disk_mode {
	MOVE_DISK_FILE,	  /* an image of its own; what was below the source's is in it */
	MOVE_DISK_DEVICE, /* a block device that the destination allows */
	MOVE_DISK_CHAIN,  /* an image over the files that were below the source's, which travel along */
	MOVE_DISK_SHARED, /* not at all: both hosts see it (vmm/move_shared.h) */
	MOVE_DISK_REUSE,  /* an image over a file of the destination's with the same content */
};

const char *move_disk_mode_name(enum move_disk_mode mode);
/* -EINVAL for an unknown name; NULL is "file". */
int move_disk_mode_parse(const char *name, enum move_disk_mode *mode);

/* A number of a hello, from 0 to max; -EPROTO names the key. */
int move_need_u64(json_t *o, const char *key, uint64_t max, uint64_t *out, struct error *err);

/* {"format", "virtual_bytes", ...}: what block_image_create needs. */
json_t *move_shape_to_json(const struct block_image_info *shape);
/* Everything checked, as a peer's word. backing_name stays empty. */
int move_shape_parse(json_t *o, struct block_image_info *shape, struct error *err);

/* hello's "backing": what a disk has below it. */
struct move_backing {
	unsigned nlayers; /* chain */
	struct block_image_info layers[BLOCK_BACKING_MAX];
	uint64_t virtual_bytes; /* reuse: of all that is below, as the disk sees it */
	char sha256[BLOCK_CONTENT_HEX_CHARS + 1];
	char name[256]; /* of the nearest file, for people */
};
json_t *move_backing_to_json(enum move_disk_mode mode, const struct move_backing *backing);
int move_backing_parse(json_t *o, enum move_disk_mode mode, struct move_backing *backing, struct error *err);

#endif
