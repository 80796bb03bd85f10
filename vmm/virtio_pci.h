/* SPDX-License-Identifier: Apache-2.0 */
#ifndef VMM_VIRTIO_PCI_H
#define VMM_VIRTIO_PCI_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "vmm/device.h"
#include "vmm/machine.h"
#include "vmm/memory.h"
#include "vmm/pci.h"
#include "vmm/virtqueue.h"

/*
 * The modern virtio PCI transport (virtio 1.2, 4.1): one BAR with common configuration, ISR, device
 * configuration and notifications, a second one with the MSI-X table, and the PCI configuration access
 * capability. No INTx: a driver uses MSI-X or polls.
 *
 * One lock a device guards registers, queues and the device's own state. Interrupts raised under it are
 * delivered after it was released, so that no lock of the PCI code is ever taken inside it. One I/O thread a
 * device waits for the queues' ioeventfds and takes requests under the lock; completions come from the
 * block's threads.
 *
 * Saved (section version 1): PCI configuration, BARs and MSI-X (vmm/pci.h); feature selectors and driver
 *          features; status; configuration vector and generation; ISR; queue selector; the configuration
 *          access window; every queue (vmm/virtqueue.h); then what the device adds.
 * Rebuilt: ioeventfds (when the BAR is mapped), the I/O thread, interrupt routes. Notifications in flight are
 *          not saved: resume looks at every queue and raises every queue interrupt once.
 */
#define VIRTIO_PCI_QUEUES_MAX 8

struct virtio_pci;

struct virtio_device_ops {
	uint16_t device_type; /* virtio 1.2, 5 */
	uint8_t class_code, subclass;
	unsigned nqueues;
	uint64_t features; /* the device's own; the transport adds VERSION_1, INDIRECT_DESC and EVENT_IDX */
	unsigned config_bytes;
	/* All of these are called with the device lock held. */
	void (*config_read)(void *dev, uint8_t *config); /* fills config_bytes; optional */
	/* The driver wrote there, within config_bytes; on a vCPU's thread. Optional. */
	void (*config_write)(void *dev, unsigned offset, const uint8_t *data, unsigned len);
	/* Takes what it can from the queue. On the I/O thread, only while running. */
	void (*process)(void *dev, unsigned queue);
	/* The driver's features are final; also after a load. Optional. */
	void (*features_set)(void *dev, uint64_t features);
	void (*reset)(void *dev);			 /* nothing is in flight; optional */
	void (*resumed)(void *dev);			 /* optional */
	void (*save)(void *dev, struct state_writer *w); /* optional */
	int (*load)(void *dev, struct state_reader *r, struct error *err); /* optional; hostile input */
	/* A readable file descriptor given to virtio_pci_watch. */
	void (*readable)(void *dev);
	void (*destroy)(void *dev); /* not locked; the thread is gone */
};

/* `section` is the name in the saved state, `label` the one for messages: "disk root". Both are copied. The
 * device is created paused. On failure dev stays the caller's. */
int virtio_pci_create(struct machine *m, uint8_t slot, const char *section, const char *label,
		      const struct virtio_device_ops *ops, void *dev, struct virtio_pci **out,
		      struct error *err);
/* Makes it and gives it to the machine; dev is taken over in any case: freed by ops->destroy on failure,
 * after which *out, which may be in it, means nothing. */
int virtio_pci_add(struct machine *m, uint8_t slot, const char *section, const char *label,
		   const struct virtio_device_ops *ops, void *dev, struct virtio_pci **out,
		   struct error *err);
/* "KIND.ID", shortened and made unique by the slot where it would not fit a section name. */
void virtio_pci_section(char name[STATE_NAME_BYTES], const char *kind, const char *id, uint8_t slot);

void virtio_pci_lock(struct virtio_pci *v);
void virtio_pci_unlock(struct virtio_pci *v);

/* With the lock held: */
struct virtqueue *virtio_pci_queue(struct virtio_pci *v, unsigned queue);
struct guest_memory *virtio_pci_memory(struct virtio_pci *v);
uint64_t virtio_pci_features(const struct virtio_pci *v); /* as the driver accepted them */
/* The driver is up and the device neither paused, broken nor being reset. */
bool virtio_pci_running(const struct virtio_pci *v);
/* Takes the next chain of a queue into a buffer of the transport, valid until the next call; NULL when there
 * is none. A malformed one sets NEEDS_RESET. */
struct virtqueue_chain *virtio_pci_pop(struct virtio_pci *v, unsigned queue);
/* The driver's fault: NEEDS_RESET, a configuration interrupt and a log line. */
void virtio_pci_broken(struct virtio_pci *v, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Interrupts, if the driver wants one for what was pushed. */
void virtio_pci_signal(struct virtio_pci *v, unsigned queue);
void virtio_pci_config_changed(struct virtio_pci *v);
/* Calls ops->process for the queue again, from the I/O thread and after others had the lock. */
void virtio_pci_requeue(struct virtio_pci *v, unsigned queue);
/* A request that outlives the lock. */
void virtio_pci_inflight_begin(struct virtio_pci *v);
/* It ended without leaving the lock. */
void virtio_pci_inflight_cancel(struct virtio_pci *v);

/* Without the lock, as the very last use of the device by a completion. */
void virtio_pci_inflight_end(struct virtio_pci *v);
/* The I/O thread calls ops->readable, once for each time that the fd becomes readable, while running; and
 * after every resume. Before the device is first resumed. */
int virtio_pci_watch(struct virtio_pci *v, int fd, struct error *err);

/* struct device_ops of every virtio device, over struct virtio_pci. */
extern const struct device_ops virtio_pci_device_ops;

#endif
