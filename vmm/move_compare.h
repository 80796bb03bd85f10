/* SPDX-License-Identifier: Apache-2.0 */
#ifndef VMM_MOVE_COMPARE_H
#define VMM_MOVE_COMPARE_H

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"

/*
 * SNM_VERIFY=1 at the source, for tests: between READY and COMMIT both sides hash all of the guest's memory,
 * and the destination saves its device state again; whatever differs ends the move. Payload of VERIFY
 * (docs/protocol.md). Pure; what a host sends is hostile.
 */
#define MOVE_COMPARE_CHUNKS_MAX 32768u

struct move_image {
	uint64_t npages;    /* of guest memory */
	uint64_t state_sum; /* XXH3-64 of the device state */
	uint32_t chunk_pages, nchunks;
	uint64_t *hashes; /* one a chunk */
	uint64_t *skip;	  /* one bit a chunk: pages of it come by post-copy, so it is left out */
};

/* Tables for so many pages. move_image_release also after an error. */
int move_image_init(struct move_image *im, uint64_t npages, struct error *err);
void move_image_release(struct move_image *im);
/* Chunks that have one of these pages are left out. */
void move_image_skip(struct move_image *im, const uint64_t *pages);
uint32_t move_image_left_out(const struct move_image *im);

uint32_t move_image_bytes(const struct move_image *im);
void move_image_encode(uint8_t *out, const struct move_image *im);
/* Into one that was made for the guest's memory: hashes, state_sum and skip. */
int move_image_decode(const uint8_t *raw, uint32_t len, struct move_image *im, struct error *err);
/* 0, or -EBADMSG naming the first chunk that differs. Both have the same shape. */
int move_image_differ(const struct move_image *ours, const struct move_image *theirs, struct error *err);

#endif
