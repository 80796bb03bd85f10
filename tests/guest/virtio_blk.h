/* SPDX-License-Identifier: Apache-2.0 */
/* Modern virtio-blk over PCI, one queue, polled. VIRTIO 1.1, sections 4.1 and 5.2. */
#ifndef TESTS_GUEST_VIRTIO_BLK_H
#define TESTS_GUEST_VIRTIO_BLK_H

#include "guest.h"
#include "virtio.h"

#define VBLK_SECTOR_BYTES	  512u
#define VBLK_SLOTS_MAX		  32u
#define VBLK_DESCRIPTORS_PER_SLOT 4u /* header, up to two pieces of data, status */

enum vblk_type {
	VBLK_READ = 0,
	VBLK_WRITE = 1,
	VBLK_FLUSH = 4,
	VBLK_DISCARD = 11,
	VBLK_WRITE_ZEROES = 13,
};
#define VBLK_F_RO	    (1ULL << 5)
#define VBLK_F_FLUSH	    (1ULL << 9)
#define VBLK_F_DISCARD	    (1ULL << 13)
#define VBLK_F_WRITE_ZEROES (1ULL << 14)
#define VBLK_ZEROES_UNMAP   1u

struct vblk {
	uint8_t slot_on_bus;
	uint64_t features;
	uint64_t sectors;
	uint32_t block_sectors; /* the least that may be read or written */
	uint32_t max_request_sectors;
	uint32_t max_discard_sectors, discard_align_sectors;
	uint32_t max_zeroes_sectors;
	unsigned nslots;

	/* private */
	struct virtio virtio;
	struct virtio_queue queue;
	struct vblk_header *headers;
	volatile uint8_t *status;
};

/* The next virtio-blk function on bus 0 from *device (0 first) on, set up and live; false when there is none
 * left. */
bool vblk_next(struct vblk *v, unsigned *device);

/*
 * Hands a request to the device. The slot must be free. READ and WRITE: buffer holds nsectors, and split
 * (below nsectors) says how many of them go into a first descriptor of their own. DISCARD and WRITE_ZEROES:
 * flags are the segment's.
 */
void vblk_submit(struct vblk *v, unsigned slot, enum vblk_type type, uint64_t sector, uint32_t nsectors,
		 void *buffer, uint32_t split, uint32_t flags);

/* The slot of a request that the device has completed, with its status and the bytes written to memory; or
 * -1. */
int vblk_poll(struct vblk *v, uint8_t *status, uint32_t *written);

#endif
