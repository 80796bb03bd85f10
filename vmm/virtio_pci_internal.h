/* SPDX-License-Identifier: Apache-2.0 */
/* Shared by virtio_pci.c (life), virtio_pci_regs.c (registers) and virtio_pci_thread.c (I/O thread). */
#ifndef VMM_VIRTIO_PCI_INTERNAL_H
#define VMM_VIRTIO_PCI_INTERNAL_H

#include "vmm/virtio_pci.h"

#define VIRTIO_PCI_LABEL_BYTES 64
#define VIRTIO_PCI_CAP_BYTES   20 /* struct virtio_pci_cfg_cap, virtio 1.2, 4.1.4.9 */

/* The layout of BAR 0. */
enum {
	VIRTIO_BAR = 0,
	VIRTIO_MSIX_BAR = 1,
	VIRTIO_BAR_BYTES = 0x4000,
	REGION_COMMON = 0x0000,
	REGION_COMMON_BYTES = 56, /* up to and including queue_device */
	REGION_ISR = 0x1000,
	REGION_DEVICE = 0x2000,
	REGION_NOTIFY = 0x3000,
	REGION_BYTES = 0x1000,
	NOTIFY_MULTIPLIER = 4,
};

enum { ISR_QUEUE = 1, ISR_CONFIG = 2 };

struct virtio_pci {
	struct machine *machine;
	struct guest_memory *mem;
	struct pci_device *pci;
	const struct virtio_device_ops *ops;
	void *dev;
	char section[STATE_NAME_BYTES];
	char label[VIRTIO_PCI_LABEL_BYTES];

	pthread_mutex_t lock;
	pthread_cond_t idle; /* inflight became 0 */
	bool paused;	     /* atomic: set without the lock */
	/* guarded by lock */
	bool reset_pending;
	unsigned inflight;
	uint64_t raise; /* vectors to trigger when the lock is released */
	uint32_t device_feature_select, driver_feature_select;
	uint64_t driver_features;
	uint16_t config_vector, queue_select;
	uint8_t status, generation, isr;
	unsigned faults_logged;
	struct virtqueue queue[VIRTIO_PCI_QUEUES_MAX];
	struct virtqueue_chain chain;
	uint8_t cfg_cap[VIRTIO_PCI_CAP_BYTES]; /* the driver's half of the configuration access capability */
	unsigned cfg_cap_offset;

	pthread_mutex_t ioevent_lock; /* innermost; BAR mapping may come with locks of the PCI code held */
	uint64_t mapped_base;
	bool ioevent_registered[VIRTIO_PCI_QUEUES_MAX];

	pthread_t thread;
	bool thread_started;
	int epoll_fd, control_fd, watch_fd;
	int kick_fd[VIRTIO_PCI_QUEUES_MAX];
	bool stop, look_at_all; /* guarded by lock */
};

/* virtio_pci_regs.c */
extern const struct bus_handler virtio_pci_bar_handler; /* opaque to be filled in */
bool virtio_pci_config_access(void *opaque, bool write, unsigned offset, uint8_t *data, unsigned n);
int virtio_pci_add_capabilities(struct virtio_pci *v, struct error *err);
uint64_t virtio_pci_offered(const struct virtio_pci *v);
/* Lock held, nothing in flight. */
void virtio_pci_reset_now(struct virtio_pci *v);

/* virtio_pci_thread.c */
int virtio_pci_thread_start(struct virtio_pci *v, struct error *err);
void virtio_pci_thread_stop(struct virtio_pci *v);
void virtio_pci_thread_close(struct virtio_pci *v); /* file descriptors; after the BAR was unmapped */
void virtio_pci_kick(int fd);
void virtio_pci_mapped(void *opaque, uint64_t base, bool mapped);

#endif
