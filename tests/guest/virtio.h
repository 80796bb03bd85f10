/* SPDX-License-Identifier: Apache-2.0 */
/* The modern virtio transport over PCI, polled. VIRTIO 1.1, sections 2.6 and 4.1. */
#ifndef TESTS_GUEST_VIRTIO_H
#define TESTS_GUEST_VIRTIO_H

#include "guest.h"

#define VIRTIO_F_VERSION_1 (1ULL << 32)
#define VIRTIO_DESC_NEXT   1u
#define VIRTIO_DESC_WRITE  2u

struct virtio {
	uint64_t features;
	uint64_t common, notify, device_config;
	uint32_t notify_multiplier;
};

struct virtio_descriptor {
	uint64_t address;
	uint32_t len;
	uint16_t flags, next;
};

struct virtio_queue {
	uint16_t size, avail_index, used_index;
	uint64_t notify;
	uint16_t number;
	struct virtio_descriptor *descriptors;
	volatile uint16_t *avail, *used;
};

/* The next function of bus 0 from *device on that is a virtio device of this type, with those of the wanted
 * features that it offers; *device is then the one behind it. False when there is none left. `what` is for
 * BAD lines. */
bool virtio_next(struct virtio *v, unsigned *device, unsigned type, uint64_t wanted, const char *what);
/* False when the device has no such queue. */
bool virtio_queue_init(struct virtio *v, struct virtio_queue *q, uint16_t number, uint16_t most);
void virtio_go(struct virtio *v);

void virtio_describe(struct virtio_queue *q, unsigned at, const volatile void *address, uint32_t len,
		     unsigned flags);
/* Hands the chain that begins at `first` to the device. */
void virtio_submit(struct virtio_queue *q, unsigned first);
/* The head of a chain that came back, with the bytes written; false when there is none. */
bool virtio_poll(struct virtio_queue *q, uint32_t *head, uint32_t *written);

uint32_t virtio_config_read32(const struct virtio *v, unsigned offset);
uint64_t virtio_config_read64(const struct virtio *v, unsigned offset);
void virtio_config_write32(const struct virtio *v, unsigned offset, uint32_t value);

#endif
