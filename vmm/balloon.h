/* SPDX-License-Identifier: Apache-2.0 */
#ifndef VMM_BALLOON_H
#define VMM_BALLOON_H

#include <stdbool.h>
#include <stdint.h>

#include "vmm/memory.h"
#include "vmm/virtqueue.h"

/*
 * What a guest gives back by a chain of a balloon's queue (virtio 1.2, 5.5.6). Nothing in it is trusted: only
 * whole pages that are RAM are taken, whatever else is named is passed over, and a call does a bounded amount
 * of work, so that nobody waits long for the device. The worst that a lying guest gets is zeroes in memory of
 * its own.
 *
 * A call goes on from *done (0 at first) and moves it; true once the chain is at its end. A chain that has
 * changed meanwhile is harmless.
 */
#define BALLOON_TURN_BYTES (4u << 20)
#define BALLOON_TURN_PAGES 256u

/* Of the inflate queue: an array of 32-bit page numbers, which may be in any order. */
bool balloon_inflate(struct guest_memory *mem, const struct virtqueue_chain *c, uint64_t *done);
/* Of the reporting queue: the buffers are the free pages. */
bool balloon_report(struct guest_memory *mem, const struct virtqueue_chain *c, uint64_t *done);

#endif
