/* SPDX-License-Identifier: Apache-2.0 */
/* A PCI device inside; shared by pci.c and pci_msix.c. */
#ifndef VMM_PCI_DEVICE_H
#define VMM_PCI_DEVICE_H

#include <pthread.h>

#include "vmm/pci.h"

#define PCI_COMMAND_MEMORY   0x0002
#define PCI_COMMAND_MASTER   0x0004
#define PCI_COMMAND_INTX_OFF 0x0400

struct pci_msix {
	pthread_mutex_t lock; /* taken inside bus->lock and inside the device's own locks; takes none but the
				 router's */
	unsigned vectors;     /* 0 = no MSI-X */
	unsigned cap;	      /* offset of the capability */
	uint16_t control;     /* enable and function mask bits */
	uint8_t table[PCI_MSIX_VECTORS_MAX * 16];
	uint64_t pending;
	struct irq_line *lines[PCI_MSIX_VECTORS_MAX];
};

struct pci_device {
	struct pci_bus *bus;
	struct irq_router *irq;
	struct pci_device_config cfg;
	uint8_t config[PCI_CONFIG_BYTES];
	struct {
		uint64_t base;
		bool mapped;
		uint32_t assigned;
	} bar[PCI_BARS];
	bool master; /* atomic copy of the command bit */
	unsigned next_cap, last_cap;
	unsigned hook_offset, hook_len;
	bool (*hook)(void *opaque, bool write, unsigned off, uint8_t *data, unsigned n);
	void *hook_opaque;
	struct pci_msix msix;
};

/* Adds the capability and the BAR to d->cfg. */
int pci_msix_init(struct pci_device *d, struct error *err);
void pci_msix_destroy(struct pci_device *d);
void pci_msix_write_control(struct pci_device *d, uint16_t v);
void pci_msix_reset(struct pci_device *d);
void pci_msix_save(struct pci_device *d, struct state_writer *w);
int pci_msix_load(struct pci_device *d, struct state_reader *r, struct error *err);

#endif
