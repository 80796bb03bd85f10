/* SPDX-License-Identifier: Apache-2.0 */
/* PCI configuration space of bus 0 by ports 0xcf8 and 0xcfc. */
#ifndef TESTS_GUEST_PCI_H
#define TESTS_GUEST_PCI_H

#include "guest.h"

uint32_t pci_read32(unsigned device, unsigned offset);
uint16_t pci_read16(unsigned device, unsigned offset);
uint8_t pci_read8(unsigned device, unsigned offset);
void pci_write32(unsigned device, unsigned offset, uint32_t v);

/* Where a memory BAR is decoded; placed first if nobody has, or if the option rebar (=low or =high) asks. 0
 * if it is no memory BAR. */
uint64_t pci_memory_bar(unsigned device, unsigned bar);
void pci_enable(unsigned device); /* memory decoding and bus mastering */

#endif
