/* SPDX-License-Identifier: Apache-2.0 */
/* The machine's side of the PCI bus. */
#ifndef VMM_PCI_BUS_H
#define VMM_PCI_BUS_H

#include "vmm/pci.h"

#define PCI_ECAM_BASE  UINT64_C(0xe0000000) /* bus 0 alone */
#define PCI_ECAM_BYTES UINT64_C(0x100000)
#define PCI_MMIO_BASE  UINT64_C(0xc0000000)
#define PCI_MMIO_END   UINT64_C(0xe0000000)

int pci_bus_create(struct bus *bus, struct irq_router *irq, struct pci_bus **out, struct error *err);
/* After all its devices. */
void pci_bus_free(struct pci_bus *bus);
/* Port 0xcf9 asked for a reset. Set before the guest runs; called on a vCPU thread. */
void pci_bus_on_reset(struct pci_bus *bus, void (*fn)(void *opaque), void *opaque);
/* The bus itself and the host bridge; devices are reset and saved by their owners. */
void pci_bus_reset(struct pci_bus *bus);
/* Section "pci". */
void pci_bus_save(struct pci_bus *bus, struct state_writer *w);
int pci_bus_load(struct pci_bus *bus, struct state_reader *r, struct error *err);

#endif
