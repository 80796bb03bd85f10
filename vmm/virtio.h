/* SPDX-License-Identifier: Apache-2.0 */
/* interface: what machine_create calls to build the virtio devices */
#ifndef VMM_VIRTIO_H
#define VMM_VIRTIO_H

#include <stdint.h>

#include "base/error.h"
#include "block/block.h"
#include "vmm/machine.h"

/* PCI slots: disks 1..16, nets 17..24, rng 25, balloon 26. Each call adds the device with machine_add_device.
 */
int virtio_blk_create(struct machine *m, uint8_t slot, const char *id, struct block *blk, bool read_only,
		      struct error *err);
int virtio_net_create(struct machine *m, uint8_t slot, const char *id, int tap_fd, const uint8_t mac[6],
		      struct error *err);
int virtio_rng_create(struct machine *m, uint8_t slot, struct error *err);
struct virtio_balloon; /* the machine's, like every device */
int virtio_balloon_create(struct machine *m, uint8_t slot, struct virtio_balloon **out, struct error *err);
/* Asks the guest to give so much back; what is above its memory counts as that. */
void virtio_balloon_set_target(struct virtio_balloon *d, uint64_t balloon_bytes);
/* Waits for nobody. */
void virtio_balloon_state(const struct virtio_balloon *d, struct machine_balloon *out);

/* Sends one RARP request frame with the device's MAC out of the tap (host side), for machine_announce. */
int net_announce_rarp(int tap_fd, const uint8_t mac[6]);

#endif
