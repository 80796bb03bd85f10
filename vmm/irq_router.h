/* SPDX-License-Identifier: Apache-2.0 */
/* The machine's side of interrupts: life of the router. */
#ifndef VMM_IRQ_ROUTER_H
#define VMM_IRQ_ROUTER_H

#include "vmm/irq.h"

/* The VM has its in-kernel irqchip already. vm_fd stays the caller's. Installs the ISA routes. */
int irq_router_create(int vm_fd, struct irq_router **out, struct error *err);
void irq_router_free(struct irq_router *r);
/* Between these, irq_msi_set only notes the change; the end installs the table once. Replacing KVM's table
 * waits for readers in the kernel, which would add up over every vector while a guest stands still. Nests. */
void irq_router_batch_begin(struct irq_router *r);
int irq_router_batch_end(struct irq_router *r, struct error *err);

#endif
