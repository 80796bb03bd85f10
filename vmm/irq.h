/* SPDX-License-Identifier: Apache-2.0 */
/* interface: interrupts */
#ifndef VMM_IRQ_H
#define VMM_IRQ_H

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"

struct irq_router; /* owns KVM's GSI routing table; one per machine */
struct irq_line;

/* A legacy ISA/ACPI interrupt (GSI 0..23 through IOAPIC and PIC). */
int irq_set_level(struct irq_router *r, unsigned gsi, bool level);

/* One MSI vector: a GSI above 23 with an irqfd. Creates unrouted. */
int irq_msi_create(struct irq_router *r, struct irq_line **out, struct error *err);
void irq_msi_free(struct irq_line *line);
/* Programs the message; masked = true takes the route out (a trigger while masked is remembered by the
 * caller's PBA). Any thread. */
int irq_msi_set(struct irq_line *line, uint32_t address_lo, uint32_t address_hi, uint32_t data, bool masked,
		struct error *err);
/* Raises it through the irqfd. Any thread, async-signal-safe cost: one write(2). */
void irq_msi_trigger(struct irq_line *line);

#endif
