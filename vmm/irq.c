/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/irq.h"

#include <errno.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "vmm/irq_router.h"

#define ISA_GSIS  24u
#define MSI_LINES 1024u

struct irq_line {
	struct irq_router *router;
	unsigned gsi;
	int fd;
	bool routed;
	struct kvm_irq_routing_msi msi;
};

struct irq_router {
	int vm_fd;
	pthread_mutex_t lock;
	struct irq_line *lines[MSI_LINES];
	unsigned batch;
	bool stale; /* the table in the kernel is older than ours */
};

/* Caller holds r->lock. */
static int install(struct irq_router *r)
{
	if (r->batch) {
		r->stale = true;
		return 0;
	}
	size_t max = ISA_GSIS + 16 + MSI_LINES;
	CLEANUP_FREE struct kvm_irq_routing *t = calloc(1, sizeof *t + max * sizeof t->entries[0]);
	if (!t)
		return -ENOMEM;
	for (unsigned gsi = 0; gsi < ISA_GSIS; gsi++) {
		/* As KVM's own default table: the PIT's line reaches IOAPIC pin 2 by the MADT's override; the
		 * 8259s cascade on their pin 2. */
		if (gsi < 16 && gsi != 2)
			t->entries[t->nr++] = (struct kvm_irq_routing_entry){
				.gsi = gsi,
				.type = KVM_IRQ_ROUTING_IRQCHIP,
				.u.irqchip = {.irqchip = gsi < 8 ? KVM_IRQCHIP_PIC_MASTER
								 : KVM_IRQCHIP_PIC_SLAVE,
					      .pin = gsi % 8},
			};
		if (gsi != 2)
			t->entries[t->nr++] = (struct kvm_irq_routing_entry){
				.gsi = gsi,
				.type = KVM_IRQ_ROUTING_IRQCHIP,
				.u.irqchip = {.irqchip = KVM_IRQCHIP_IOAPIC, .pin = gsi == 0 ? 2 : gsi},
			};
	}
	for (unsigned i = 0; i < MSI_LINES; i++)
		if (r->lines[i] && r->lines[i]->routed)
			t->entries[t->nr++] = (struct kvm_irq_routing_entry){
				.gsi = r->lines[i]->gsi,
				.type = KVM_IRQ_ROUTING_MSI,
				.u.msi = r->lines[i]->msi,
			};
	r->stale = false;
	return ioctl(r->vm_fd, KVM_SET_GSI_ROUTING, t) < 0 ? -errno : 0;
}

int irq_router_create(int vm_fd, struct irq_router **out, struct error *err)
{
	struct irq_router *r = calloc(1, sizeof *r);
	if (!r)
		return error_errno(err, ENOMEM, "interrupt routes");
	r->vm_fd = vm_fd;
	pthread_mutex_init(&r->lock, NULL);
	int ret = install(r);
	if (ret < 0) {
		irq_router_free(r);
		return error_errno(err, ret, "interrupt routes: KVM_SET_GSI_ROUTING");
	}
	*out = r;
	return 0;
}

void irq_router_free(struct irq_router *r)
{
	if (!r)
		return;
	pthread_mutex_destroy(&r->lock);
	free(r);
}

void irq_router_batch_begin(struct irq_router *r)
{
	SCOPE_LOCK(&r->lock);
	r->batch++;
}

int irq_router_batch_end(struct irq_router *r, struct error *err)
{
	SCOPE_LOCK(&r->lock);
	int ret = 0;
	if (--r->batch == 0 && r->stale)
		ret = install(r);
	return ret < 0 ? error_errno(err, ret, "interrupt routes: KVM_SET_GSI_ROUTING") : 0;
}

int irq_set_level(struct irq_router *r, unsigned gsi, bool level)
{
	struct kvm_irq_level l = {.irq = gsi, .level = level};
	return ioctl(r->vm_fd, KVM_IRQ_LINE, &l) < 0 ? -errno : 0;
}

int irq_msi_create(struct irq_router *r, struct irq_line **out, struct error *err)
{
	SCOPE_LOCK(&r->lock);
	unsigned i = 0;
	while (i < MSI_LINES && r->lines[i])
		i++;
	if (i == MSI_LINES)
		return error_set(err, ENOSPC, "MSI: more than %u vectors", MSI_LINES);
	CLEANUP_FREE struct irq_line *line = calloc(1, sizeof *line);
	CLEANUP_FD int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (!line)
		return error_errno(err, ENOMEM, "MSI");
	if (fd < 0)
		return error_errno(err, errno, "MSI: eventfd");
	struct kvm_irqfd irqfd = {.fd = (uint32_t)fd, .gsi = ISA_GSIS + i};
	if (ioctl(r->vm_fd, KVM_IRQFD, &irqfd) < 0)
		return error_errno(err, errno, "MSI: KVM_IRQFD");
	line->router = r;
	line->gsi = ISA_GSIS + i;
	line->fd = steal_fd(&fd);
	r->lines[i] = line;
	*out = steal_ptr(line);
	return 0;
}

void irq_msi_free(struct irq_line *line)
{
	if (!line)
		return;
	struct irq_router *r = line->router;
	SCOPE_LOCK(&r->lock);
	struct kvm_irqfd irqfd = {
		.fd = (uint32_t)line->fd, .gsi = line->gsi, .flags = KVM_IRQFD_FLAG_DEASSIGN};
	ioctl(r->vm_fd, KVM_IRQFD, &irqfd);
	r->lines[line->gsi - ISA_GSIS] = NULL;
	close(line->fd);
	free(line);
}

int irq_msi_set(struct irq_line *line, uint32_t address_lo, uint32_t address_hi, uint32_t data, bool masked,
		struct error *err)
{
	struct irq_router *r = line->router;
	SCOPE_LOCK(&r->lock);
	bool same = line->msi.address_lo == address_lo && line->msi.address_hi == address_hi &&
		    line->msi.data == data;
	if (line->routed == !masked && (masked || same))
		return 0;
	line->routed = !masked;
	line->msi = (struct kvm_irq_routing_msi){
		.address_lo = address_lo, .address_hi = address_hi, .data = data};
	int ret = install(r);
	return ret < 0 ? error_errno(err, ret, "MSI route of GSI %u", line->gsi) : 0;
}

void irq_msi_trigger(struct irq_line *line)
{
	uint64_t one = 1;
	ssize_t n;
	do
		n = write(line->fd, &one, sizeof one);
	while (n < 0 && errno == EINTR);
}
