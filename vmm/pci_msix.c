/* SPDX-License-Identifier: Apache-2.0 */
/* MSI-X (PCI 3.0, 6.8.2): table and pending bits in a BAR of their own, each vector an irqfd. */
#include <errno.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/log.h"
#include "vmm/irq_router.h"
#include "vmm/pci_device.h"

#define CAP_ID		 0x11
#define CONTROL_ENABLE	 0x8000
#define CONTROL_MASK_ALL 0x4000
#define PBA_OFFSET	 0x1000
#define BAR_BYTES	 0x2000
#define ENTRY_MASKED	 1u

/* Caller holds msix.lock. */
static bool masked(const struct pci_msix *x, unsigned v)
{
	return (x->control & (CONTROL_ENABLE | CONTROL_MASK_ALL)) != CONTROL_ENABLE ||
	       (get_le32(x->table + 16 * v + 12) & ENTRY_MASKED);
}

/* Caller holds msix.lock. */
static void update(struct pci_device *d, unsigned v)
{
	struct pci_msix *x = &d->msix;
	const uint8_t *e = x->table + 16 * v;
	struct error err = ERROR_INIT;
	bool off = masked(x, v);
	if (irq_msi_set(x->lines[v], get_le32(e), get_le32(e + 4), get_le32(e + 8), off, &err))
		log_error("pci slot %u vector %u: %s", d->cfg.slot, v, err.message);
	if (!off && (x->pending >> v & 1)) {
		x->pending &= ~(UINT64_C(1) << v);
		irq_msi_trigger(x->lines[v]);
	}
}

static void bar_read(void *opaque, uint64_t offset, uint8_t *data, unsigned len)
{
	struct pci_device *d = opaque;
	struct pci_msix *x = &d->msix;
	memset(data, 0, len);
	SCOPE_LOCK(&x->lock);
	if (range_fits(offset, len, x->vectors * 16))
		memcpy(data, x->table + offset, len);
	else if (offset >= PBA_OFFSET && range_fits(offset - PBA_OFFSET, len, 8)) {
		uint8_t pba[8];
		put_le64(pba, x->pending);
		memcpy(data, pba + offset - PBA_OFFSET, len);
	}
}

static void bar_write(void *opaque, uint64_t offset, const uint8_t *data, unsigned len)
{
	struct pci_device *d = opaque;
	struct pci_msix *x = &d->msix;
	/* 6.8.2: dword and qword accesses, aligned; anything else is undefined. */
	if ((len != 4 && len != 8) || offset % len)
		return;
	SCOPE_LOCK(&x->lock);
	if (!range_fits(offset, len, x->vectors * 16))
		return;
	memcpy(x->table + offset, data, len);
	update(d, (unsigned)(offset / 16));
}

int pci_msix_init(struct pci_device *d, struct error *err)
{
	struct pci_msix *x = &d->msix;
	pthread_mutex_init(&x->lock, NULL);
	if (d->cfg.msix_bar < 0 || !d->cfg.msix_vectors)
		return 0;
	uint8_t body[10];
	put_le16(body, (uint16_t)(d->cfg.msix_vectors - 1));
	put_le32(body + 2, (uint32_t)d->cfg.msix_bar);
	put_le32(body + 6, PBA_OFFSET | (uint32_t)d->cfg.msix_bar);
	int at = pci_add_capability(d, CAP_ID, body, sizeof body, err);
	if (at < 0)
		return at;
	x->cap = (unsigned)at;
	d->cfg.bar[d->cfg.msix_bar].size_bytes = BAR_BYTES;
	d->cfg.bar[d->cfg.msix_bar].handler =
		(struct bus_handler){.read = bar_read, .write = bar_write, .opaque = d};
	d->cfg.bar[d->cfg.msix_bar].mapped = NULL;
	for (unsigned v = 0; v < d->cfg.msix_vectors; v++) {
		int ret = irq_msi_create(d->irq, &x->lines[v], err);
		if (ret < 0)
			return ret;
		put_le32(x->table + 16 * v + 12, ENTRY_MASKED);
		x->vectors = v + 1;
	}
	return 0;
}

void pci_msix_destroy(struct pci_device *d)
{
	for (unsigned v = 0; v < d->msix.vectors; v++)
		irq_msi_free(d->msix.lines[v]);
	pthread_mutex_destroy(&d->msix.lock);
}

static void set_control(struct pci_device *d, uint16_t v)
{
	struct pci_msix *x = &d->msix;
	x->control = v & (CONTROL_ENABLE | CONTROL_MASK_ALL);
	put_le16(d->config + x->cap + 2, (uint16_t)(x->control | (x->vectors - 1)));
	struct error err = ERROR_INIT;
	irq_router_batch_begin(d->irq);
	for (unsigned i = 0; i < x->vectors; i++) {
		const uint8_t *e = x->table + 16 * i;
		irq_msi_set(x->lines[i], get_le32(e), get_le32(e + 4), get_le32(e + 8), masked(x, i), NULL);
	}
	if (irq_router_batch_end(d->irq, &err))
		log_error("pci slot %u: %s", d->cfg.slot, err.message);
}

void pci_msix_write_control(struct pci_device *d, uint16_t v)
{
	SCOPE_LOCK(&d->msix.lock);
	set_control(d, v);
	for (unsigned i = 0; i < d->msix.vectors; i++)
		update(d, i);
}

void pci_msix_reset(struct pci_device *d)
{
	struct pci_msix *x = &d->msix;
	if (!x->vectors)
		return;
	SCOPE_LOCK(&x->lock);
	memset(x->table, 0, sizeof x->table);
	for (unsigned v = 0; v < x->vectors; v++)
		put_le32(x->table + 16 * v + 12, ENTRY_MASKED);
	x->pending = 0;
	set_control(d, 0);
}

void pci_msix_trigger(struct pci_device *d, unsigned v)
{
	struct pci_msix *x = &d->msix;
	SCOPE_LOCK(&x->lock);
	if (v >= x->vectors || !(x->control & CONTROL_ENABLE))
		return;
	if (masked(x, v))
		x->pending |= UINT64_C(1) << v;
	else
		irq_msi_trigger(x->lines[v]);
}

bool pci_msix_enabled(const struct pci_device *d)
{
	struct pci_msix *x = (struct pci_msix *)&d->msix;
	SCOPE_LOCK(&x->lock);
	return (x->control & CONTROL_ENABLE) != 0;
}

void pci_msix_save(struct pci_device *d, struct state_writer *w)
{
	struct pci_msix *x = &d->msix;
	SCOPE_LOCK(&x->lock);
	state_put_u32(w, x->vectors);
	state_put_u16(w, x->control);
	state_put_bytes(w, x->table, 16 * x->vectors);
	state_put_u64(w, x->pending);
}

int pci_msix_load(struct pci_device *d, struct state_reader *r, struct error *err)
{
	struct pci_msix *x = &d->msix;
	SCOPE_LOCK(&x->lock);
	uint32_t vectors = state_get_u32(r);
	if (vectors != x->vectors)
		return error_set(err, EPROTO, "saved device has %u MSI-X vectors, here %u", vectors,
				 x->vectors);
	uint16_t control = state_get_u16(r);
	state_get_bytes(r, x->table, 16 * x->vectors);
	x->pending = state_get_u64(r);
	if (x->vectors < 64)
		x->pending &= (UINT64_C(1) << x->vectors) - 1;
	/* A vector pending and unmasked cannot be: its owner raises every interrupt again on resume. */
	if (x->vectors)
		set_control(d, control);
	return 0;
}
