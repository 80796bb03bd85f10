/* SPDX-License-Identifier: Apache-2.0 */
/* interface: a flat PCI bus 0 (0xcf8/0xcfc and ECAM) */
#ifndef VMM_PCI_H
#define VMM_PCI_H

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "vmm/bus.h"
#include "vmm/irq.h"
#include "vmm/state.h"

struct pci_bus;
struct pci_device;

#define PCI_BARS	     6
#define PCI_CONFIG_BYTES     4096
#define PCI_MSIX_VECTORS_MAX 64

struct pci_device_config {
	uint8_t slot; /* 1..31 */
	uint16_t vendor_id, device_id, subsystem_vendor_id, subsystem_id;
	uint8_t revision, class_code, subclass, prog_if;
	struct {
		uint64_t size_bytes; /* 0 = none; power of two >= 4096; 32-bit non-prefetchable memory */
		struct bus_handler handler;
		/* BAR mapped at base (guest-physical) or unmapped (mapped = false): for ioeventfds. Called on
		 * the vCPU thread or while loading. Optional. */
		void (*mapped)(void *opaque, uint64_t base, bool mapped);
	} bar[PCI_BARS];
	int msix_bar; /* the BAR (own, size 0 above: pci makes it) that holds MSI-X table and PBA; -1 = none
		       */
	unsigned msix_vectors; /* <= PCI_MSIX_VECTORS_MAX */
};

/* The VMM assigns BARs itself before boot, inside [0xc0000000, 0xf8000000); the guest may move them. */
int pci_device_create(struct pci_bus *bus, const struct pci_device_config *cfg, struct pci_device **out,
		      struct error *err);
void pci_device_destroy(struct pci_device *d);
/* Adds a capability (id and body after the two-byte header) before boot; returns its offset or negative
 * errno. */
int pci_add_capability(struct pci_device *d, uint8_t id, const void *body, unsigned len, struct error *err);
/* Config space hooks for what a capability needs (virtio's PCI cfg access cap). Optional: called before the
 * default for accesses inside [offset, offset+len); return true when handled. */
void pci_set_config_hook(struct pci_device *d, unsigned offset, unsigned len,
			 bool (*hook)(void *opaque, bool write, unsigned off, uint8_t *data, unsigned n),
			 void *opaque);
/* Raises vector v (or sets its pending bit while masked). Ignored when MSI-X is off or v is out of range. Any
 * thread. */
void pci_msix_trigger(struct pci_device *d, unsigned v);
bool pci_msix_enabled(const struct pci_device *d);
bool pci_bus_master(const struct pci_device *d); /* command register: may it do DMA */
/* Writes the section payload (inside the caller's open section): config space, BARs, MSI-X table and PBA.
 * load re-creates mappings and routes. */
void pci_device_save(struct pci_device *d, struct state_writer *w);
int pci_device_load(struct pci_device *d, struct state_reader *r, struct error *err);
void pci_device_reset(struct pci_device *d);

#endif
