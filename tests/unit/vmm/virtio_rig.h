/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A driver for the virtio devices, in the place of a guest: real guest memory, buses, PCI and saved state;
 * only KVM is missing. Interrupt lines are counted here instead of going to an irqfd (this file stands in for
 * irq.c and for the few functions of machine.c that devices call), and notifications take the MMIO path.
 */
#ifndef TESTS_UNIT_VMM_VIRTIO_RIG_H
#define TESTS_UNIT_VMM_VIRTIO_RIG_H

#include <check.h>
#include <errno.h>
#include <linux/virtio_config.h>
#include <linux/virtio_pci.h>
#include <linux/virtio_ring.h>
#include <string.h>

#include "base/bitmap.h"
#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "vmm/irq_router.h"
#include "vmm/machine.h"
#include "vmm/memory.h"
#include "vmm/pci_bus.h"
#include "vmm/device.h"
#include "vmm/virtio.h"

#define RIG_MEMORY_BYTES (16u << 20)
#define RIG_QUEUE_SIZE	 64u
#define RIG_WAIT_MS	 10000u
#define RIG_SLOT	 3
#define RIG_QUEUES	 5u

/* ---- interrupts ---- */

struct irq_router {
	int unused;
};
struct irq_line {
	uint32_t data;
	bool masked;
};
static unsigned rig_raised[64]; /* by MSI data; atomic */

int irq_set_level(struct irq_router *r, unsigned gsi, bool level)
{
	return 0;
}
int irq_msi_create(struct irq_router *r, struct irq_line **out, struct error *err)
{
	*out = calloc(1, sizeof **out);
	return *out ? 0 : -ENOMEM;
}
void irq_msi_free(struct irq_line *line)
{
	free(line);
}
int irq_msi_set(struct irq_line *line, uint32_t lo, uint32_t hi, uint32_t data, bool masked,
		struct error *err)
{
	line->data = data;
	line->masked = masked;
	return 0;
}
void irq_msi_trigger(struct irq_line *line)
{
	if (!line->masked && line->data < ARRAY_SIZE(rig_raised))
		__atomic_fetch_add(&rig_raised[line->data], 1, __ATOMIC_SEQ_CST);
}
int irq_router_create(int vm_fd, struct irq_router **out, struct error *err)
{
	return -ENOSYS;
}
void irq_router_free(struct irq_router *r)
{
}
void irq_router_batch_begin(struct irq_router *r)
{
}
int irq_router_batch_end(struct irq_router *r, struct error *err)
{
	return 0;
}

static inline unsigned rig_interrupts(unsigned vector)
{
	return __atomic_load_n(&rig_raised[vector], __ATOMIC_SEQ_CST);
}

/* ---- the machine, as far as a device sees it ---- */

struct machine {
	struct guest_memory *mem;
	struct bus *bus;
	struct pci_bus *pci;
	struct irq_router irq;
	const struct device_ops *ops;
	void *dev;
};

struct guest_memory *machine_memory(struct machine *m)
{
	return m->mem;
}
struct bus *machine_bus(struct machine *m)
{
	return m->bus;
}
struct pci_bus *machine_pci(struct machine *m)
{
	return m->pci;
}
struct irq_router *machine_irq(struct machine *m)
{
	return &m->irq;
}
int machine_vm_fd(struct machine *m)
{
	return -1;
}
int machine_add_device(struct machine *m, const struct device_ops *ops, void *dev, struct error *err)
{
	m->ops = ops;
	m->dev = dev;
	return 0;
}

static inline struct machine *rig_machine(struct guest_memory *mem)
{
	struct machine *m = calloc(1, sizeof *m);
	struct error err = ERROR_INIT;

	m->mem = mem;
	m->bus = bus_create();
	ck_assert_msg(pci_bus_create(m->bus, &m->irq, &m->pci, &err) == 0, "%s", err.message);
	return m;
}

static inline void rig_machine_free(struct machine *m)
{
	if (m->ops)
		m->ops->destroy(m->dev);
	pci_bus_free(m->pci);
	bus_free(m->bus);
	free(m);
}

/* ---- the driver ---- */

struct rig_queue {
	uint64_t desc, avail, used;
	uint16_t avail_idx, seen; /* seen: used entries taken */
	unsigned next_desc;
};

struct rig {
	struct machine *m;
	struct guest_memory mem;
	uint64_t bar, msix_bar;
	uint64_t common, notify, device, isr;
	uint32_t notify_multiplier;
	unsigned cfg_cap;
	uint64_t features;
	struct rig_queue q[RIG_QUEUES];
	uint64_t next_buffer;
};

struct rig_buffer {
	uint64_t gpa;
	uint32_t len;
	bool write; /* by the device */
};

static inline uint32_t rig_config_read(struct rig *r, unsigned off, unsigned len)
{
	uint8_t a[4], d[4] = {0};

	put_le32(a, 0x80000000u | RIG_SLOT << 11 | (off & 0xfc));
	bus_write(r->m->bus, BUS_PIO, 0xcf8, a, 4);
	bus_read(r->m->bus, BUS_PIO, 0xcfc + (off & 3), d, len);
	return get_le32(d);
}

static inline void rig_config_write(struct rig *r, unsigned off, uint32_t v, unsigned len)
{
	uint8_t a[4], d[4];

	put_le32(a, 0x80000000u | RIG_SLOT << 11 | (off & 0xfc));
	put_le32(d, v);
	bus_write(r->m->bus, BUS_PIO, 0xcf8, a, 4);
	bus_write(r->m->bus, BUS_PIO, 0xcfc + (off & 3), d, len);
}

static inline uint64_t rig_read(struct rig *r, uint64_t addr, unsigned len)
{
	uint8_t d[8] = {0};

	bus_read(r->m->bus, BUS_MMIO, addr, d, len);
	return get_le64(d);
}

static inline void rig_write(struct rig *r, uint64_t addr, uint64_t v, unsigned len)
{
	uint8_t d[8];

	put_le64(d, v);
	bus_write(r->m->bus, BUS_MMIO, addr, d, len);
}

/* Walks the capabilities as a driver does. */
static inline void rig_probe(struct rig *r)
{
	unsigned at = rig_config_read(r, 0x34, 1);

	r->bar = rig_config_read(r, 0x10, 4) & ~15u;
	r->msix_bar = rig_config_read(r, 0x14, 4) & ~15u;
	ck_assert_uint_ne(r->bar, 0);
	rig_config_write(r, 0x04, 0x6, 2);
	for (; at; at = rig_config_read(r, at + 1, 1)) {
		uint64_t where = r->bar + rig_config_read(r, at + 8, 4);

		if (rig_config_read(r, at, 1) != 0x09)
			continue;
		switch (rig_config_read(r, at + 3, 1)) {
		case VIRTIO_PCI_CAP_COMMON_CFG:
			r->common = where;
			break;
		case VIRTIO_PCI_CAP_NOTIFY_CFG:
			r->notify = where;
			r->notify_multiplier = rig_config_read(r, at + 16, 4);
			break;
		case VIRTIO_PCI_CAP_ISR_CFG:
			r->isr = where;
			break;
		case VIRTIO_PCI_CAP_DEVICE_CFG:
			r->device = where;
			break;
		case VIRTIO_PCI_CAP_PCI_CFG:
			r->cfg_cap = at;
			break;
		}
	}
	ck_assert(r->common && r->notify && r->isr && r->notify_multiplier && r->cfg_cap);
	/* MSI-X on; vector i carries data i */
	for (unsigned i = 0; i < RIG_QUEUES + 1; i++) {
		rig_write(r, r->msix_bar + 16 * i, 0xfee00000, 4);
		rig_write(r, r->msix_bar + 16 * i + 8, i, 4);
		rig_write(r, r->msix_bar + 16 * i + 12, 0, 4);
	}
	for (at = rig_config_read(r, 0x34, 1); at; at = rig_config_read(r, at + 1, 1))
		if (rig_config_read(r, at, 1) == 0x11)
			rig_config_write(r, at + 2, 0x8000, 2);
}

static inline void rig_init(struct rig *r)
{
	struct error err = ERROR_INIT;

	memset(r, 0, sizeof *r);
	memset(rig_raised, 0, sizeof rig_raised);
	ck_assert_msg(guest_memory_create(RIG_MEMORY_BYTES, &r->mem, &err) == 0, "%s", err.message);
	r->m = rig_machine(&r->mem);
	for (unsigned i = 0; i < RIG_QUEUES; i++) {
		r->q[i].desc = 0x100000 + i * 0x10000;
		r->q[i].avail = r->q[i].desc + 0x2000;
		r->q[i].used = r->q[i].desc + 0x4000;
	}
	r->next_buffer = 0x200000;
}

static inline void rig_free(struct rig *r)
{
	rig_machine_free(r->m);
	guest_memory_destroy(&r->mem);
}

static inline uint8_t *rig_ptr(struct rig *r, uint64_t gpa)
{
	return guest_memory_ptr(&r->mem, gpa, 1);
}

static inline uint64_t rig_alloc(struct rig *r, uint32_t len)
{
	uint64_t at = r->next_buffer;

	r->next_buffer += (len + 4095u) & ~4095u;
	ck_assert_uint_le(r->next_buffer, RIG_MEMORY_BYTES);
	return at;
}

static inline uint8_t rig_status(struct rig *r)
{
	return (uint8_t)rig_read(r, r->common + VIRTIO_PCI_COMMON_STATUS, 1);
}

static inline void rig_set_status(struct rig *r, uint8_t v)
{
	rig_write(r, r->common + VIRTIO_PCI_COMMON_STATUS, v, 1);
}

static inline uint64_t rig_offered(struct rig *r)
{
	uint64_t f;

	rig_write(r, r->common + VIRTIO_PCI_COMMON_DFSELECT, 0, 4);
	f = rig_read(r, r->common + VIRTIO_PCI_COMMON_DF, 4);
	rig_write(r, r->common + VIRTIO_PCI_COMMON_DFSELECT, 1, 4);
	return f | rig_read(r, r->common + VIRTIO_PCI_COMMON_DF, 4) << 32;
}

/* Vector 0 is configuration, queue i has vector i + 1. */
static inline void rig_queue_setup(struct rig *r, unsigned i)
{
	struct rig_queue *q = &r->q[i];

	q->avail_idx = q->seen = 0;
	q->next_desc = 0;
	memset(rig_ptr(r, q->desc), 0, 0x6000);
	rig_write(r, r->common + VIRTIO_PCI_COMMON_Q_SELECT, i, 2);
	ck_assert_uint_ge(rig_read(r, r->common + VIRTIO_PCI_COMMON_Q_SIZE, 2), RIG_QUEUE_SIZE);
	rig_write(r, r->common + VIRTIO_PCI_COMMON_Q_SIZE, RIG_QUEUE_SIZE, 2);
	rig_write(r, r->common + VIRTIO_PCI_COMMON_Q_MSIX, i + 1, 2);
	rig_write(r, r->common + VIRTIO_PCI_COMMON_Q_DESCLO, q->desc, 4);
	rig_write(r, r->common + VIRTIO_PCI_COMMON_Q_DESCHI, q->desc >> 32, 4);
	rig_write(r, r->common + VIRTIO_PCI_COMMON_Q_AVAILLO, q->avail, 8);
	rig_write(r, r->common + VIRTIO_PCI_COMMON_Q_USEDLO, q->used, 8);
	rig_write(r, r->common + VIRTIO_PCI_COMMON_Q_ENABLE, 1, 2);
}

static inline void rig_start_driver(struct rig *r, uint64_t features, unsigned nqueues)
{
	rig_set_status(r, 0);
	ck_assert_uint_eq(rig_status(r), 0);
	rig_set_status(r, VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER);
	r->features = features | UINT64_C(1) << VIRTIO_F_VERSION_1;
	for (unsigned i = 0; i < 2; i++) {
		rig_write(r, r->common + VIRTIO_PCI_COMMON_GFSELECT, i, 4);
		rig_write(r, r->common + VIRTIO_PCI_COMMON_GF, r->features >> (32 * i) & 0xffffffff, 4);
	}
	rig_set_status(r, rig_status(r) | VIRTIO_CONFIG_S_FEATURES_OK);
	ck_assert(rig_status(r) & VIRTIO_CONFIG_S_FEATURES_OK);
	rig_write(r, r->common + VIRTIO_PCI_COMMON_MSIX, 0, 2);
	for (unsigned i = 0; i < nqueues; i++)
		rig_queue_setup(r, i);
	rig_set_status(r, rig_status(r) | VIRTIO_CONFIG_S_DRIVER_OK);
}

static inline void rig_put_desc(struct rig *r, uint64_t at, uint64_t addr, uint32_t len, uint16_t flags,
				uint16_t next)
{
	uint8_t *p = rig_ptr(r, at);

	put_le64(p, addr);
	put_le32(p + 8, len);
	put_le16(p + 12, flags);
	put_le16(p + 14, next);
}

static inline void rig_publish(struct rig *r, struct rig_queue *q, uint16_t head)
{
	uint8_t *a = rig_ptr(r, q->avail);

	put_le16(a + 4 + 2 * (q->avail_idx % RIG_QUEUE_SIZE), head);
	q->avail_idx++;
	__atomic_store_n((uint16_t *)(void *)(a + 2), q->avail_idx, __ATOMIC_SEQ_CST);
}

/* Returns the head. Descriptors are taken round robin: the test does not put more in flight than fit. */
static inline uint16_t rig_add(struct rig *r, unsigned queue, const struct rig_buffer *b, unsigned n)
{
	struct rig_queue *q = &r->q[queue];
	uint16_t head = (uint16_t)(q->next_desc % RIG_QUEUE_SIZE);

	for (unsigned i = 0; i < n; i++) {
		unsigned at = q->next_desc++ % RIG_QUEUE_SIZE;

		rig_put_desc(r, q->desc + 16 * at, b[i].gpa, b[i].len,
			     (uint16_t)((b[i].write ? VRING_DESC_F_WRITE : 0) |
					(i + 1 < n ? VRING_DESC_F_NEXT : 0)),
			     (uint16_t)((at + 1) % RIG_QUEUE_SIZE));
	}
	rig_publish(r, q, head);
	return head;
}

static inline uint16_t rig_add_indirect(struct rig *r, unsigned queue, const struct rig_buffer *b, unsigned n)
{
	struct rig_queue *q = &r->q[queue];
	uint64_t table = rig_alloc(r, 16 * n);
	unsigned at = q->next_desc++ % RIG_QUEUE_SIZE;

	for (unsigned i = 0; i < n; i++)
		rig_put_desc(r, table + 16 * i, b[i].gpa, b[i].len,
			     (uint16_t)((b[i].write ? VRING_DESC_F_WRITE : 0) |
					(i + 1 < n ? VRING_DESC_F_NEXT : 0)),
			     (uint16_t)(i + 1));
	rig_put_desc(r, q->desc + 16 * at, table, 16 * n, VRING_DESC_F_INDIRECT, 0);
	rig_publish(r, q, (uint16_t)at);
	return (uint16_t)at;
}

static inline void rig_kick(struct rig *r, unsigned queue)
{
	rig_write(r, r->notify + queue * r->notify_multiplier, queue, 2);
}

static inline uint16_t rig_used_idx(struct rig *r, unsigned queue)
{
	return __atomic_load_n((uint16_t *)(void *)(rig_ptr(r, r->q[queue].used) + 2), __ATOMIC_ACQUIRE);
}

/* Takes one used element: its id; *len may be NULL. Fails the test after RIG_WAIT_MS. */
static inline uint32_t rig_take_used(struct rig *r, unsigned queue, uint32_t *len)
{
	struct rig_queue *q = &r->q[queue];
	uint64_t until = clock_now_ms() + RIG_WAIT_MS;
	const uint8_t *e;

	while (rig_used_idx(r, queue) == q->seen) {
		ck_assert_msg(clock_now_ms() < until, "no used buffer in %u ms", RIG_WAIT_MS);
		clock_sleep_ms(1);
	}
	e = rig_ptr(r, q->used + 4 + 8 * (q->seen++ % RIG_QUEUE_SIZE));
	if (len)
		*len = get_le32(e + 4);
	return get_le32(e);
}

/* Spins until the condition holds. */
#define RIG_UNTIL(cond)                                                                                      \
	do {                                                                                                 \
		uint64_t until_ = clock_now_ms() + RIG_WAIT_MS;                                              \
		while (!(cond)) {                                                                            \
			ck_assert_msg(clock_now_ms() < until_, "not within %u ms: %s", RIG_WAIT_MS, #cond);  \
			clock_sleep_ms(1);                                                                   \
		}                                                                                            \
	} while (0)

#define RIG_RESUME(r) (r)->m->ops->resume((r)->m->dev)
#define RIG_PAUSE(r)  (r)->m->ops->pause((r)->m->dev)

/* Saves the device of `r` and loads it into the (created, paused) device of m. */
static inline int rig_transfer(struct rig *r, struct machine *to, struct error *err)
{
	struct state_writer *w = state_writer_create();
	struct state_reader *s = NULL;
	const uint8_t *buf;
	size_t len;
	int rc = r->m->ops->save(r->m->dev, w, err);

	if (rc == 0)
		rc = state_writer_finish(w, &buf, &len, err);
	if (rc == 0)
		rc = state_reader_open(buf, len, &s, err);
	if (rc == 0)
		rc = to->ops->load(to->dev, s, err);
	if (rc == 0)
		rc = state_reader_finish(s, err);
	state_reader_free(s);
	state_writer_free(w);
	return rc;
}

#endif
