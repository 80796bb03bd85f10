/* SPDX-License-Identifier: Apache-2.0 */
/* Private to block: the files of a qcow2 image and of what is below it. */
#ifndef BLOCK_CHAIN_H
#define BLOCK_CHAIN_H

#include <stdbool.h>
#include <stddef.h>

#include "base/error.h"
#include "block/open.h"
#include "block/qcow2_header.h"

struct chain_layer {
	int fd; /* holds the lock */
	enum block_format format;
	bool is_device;
	struct qcow2_header head; /* qcow2 only */
};

struct image_chain {
	struct chain_layer layers[1 + BLOCK_BACKING_MAX]; /* top first */
	unsigned nlayers;
	bool direct; /* every one of them */
};

/*
 * Opens, locks, checks: the image at path for writing unless opt says otherwise, then the files of
 * opt->backing read-only. What an image says of its backing file is compared with that list, never
 * followed. On failure nothing stays open.
 */
int chain_open(const char *path, const struct block_open_options *opt, struct image_chain *out,
	       struct error *err);
void chain_close(struct image_chain *chain);

/* Bytes that chain_describe writes at the most. */
#define CHAIN_TEXT_BYTES 1600
/* The chain for QEMU's tools, its files being the descriptors from first_fd on. */
void chain_describe(const struct image_chain *chain, int first_fd, char out[CHAIN_TEXT_BYTES]);

/* qemu-img check of this one layer, bounded in time; -EINVAL with the reason if it is truncated or corrupt.
 */
int chain_layer_check(struct chain_layer *layer, struct error *err);

#endif
