/* SPDX-License-Identifier: Apache-2.0 */
#include "virtio.h"

#include "pci.h"

#define VENDOR_VIRTIO	   0x1af4u
#define DEVICE_MODERN	   0x1040u
#define TYPE_BLK	   2u
#define BLK_TRANSITIONAL   0x1001u
#define PCI_DEVICES	   32u
#define CAP_VENDOR	   0x09u
#define AVAIL_NO_INTERRUPT 1u
#define USED_NO_NOTIFY	   1u
#define NO_VECTOR	   0xffffu

enum { CFG_COMMON = 1, CFG_NOTIFY = 2, CFG_ISR = 3, CFG_DEVICE = 4 };
/* struct virtio_pci_common_cfg */
enum {
	COMMON_DFSELECT = 0,
	COMMON_DF = 4,
	COMMON_GFSELECT = 8,
	COMMON_GF = 12,
	COMMON_MSIX = 16,
	COMMON_STATUS = 20,
	COMMON_Q_SELECT = 22,
	COMMON_Q_SIZE = 24,
	COMMON_Q_MSIX = 26,
	COMMON_Q_ENABLE = 28,
	COMMON_Q_NOFF = 30,
	COMMON_Q_DESC = 32,
	COMMON_Q_AVAIL = 40,
	COMMON_Q_USED = 48,
};
enum { STATUS_ACKNOWLEDGE = 1, STATUS_DRIVER = 2, STATUS_DRIVER_OK = 4, STATUS_FEATURES_OK = 8 };

uint32_t virtio_config_read32(const struct virtio *v, unsigned offset)
{
	return mmio_read32(v->device_config + offset);
}

uint64_t virtio_config_read64(const struct virtio *v, unsigned offset)
{
	return virtio_config_read32(v, offset) | (uint64_t)virtio_config_read32(v, offset + 4) << 32;
}

void virtio_config_write32(const struct virtio *v, unsigned offset, uint32_t value)
{
	mmio_write32(v->device_config + offset, value);
}

static void write64(uint64_t at, uint64_t v)
{
	mmio_write32(at, (uint32_t)v);
	mmio_write32(at + 4, (uint32_t)(v >> 32));
}

static bool find_capabilities(struct virtio *v, unsigned device)
{
	unsigned cap = pci_read8(device, 0x34) & 0xfc, hops = 0;

	for (; cap && hops < 48; cap = pci_read8(device, cap + 1) & 0xfc, hops++) {
		uint8_t type;
		uint64_t at;

		if (pci_read8(device, cap) != CAP_VENDOR)
			continue;
		type = pci_read8(device, cap + 3);
		if (type != CFG_COMMON && type != CFG_NOTIFY && type != CFG_DEVICE)
			continue;
		at = pci_memory_bar(device, pci_read8(device, cap + 4));
		if (!at)
			continue;
		at += pci_read32(device, cap + 8);
		if (type == CFG_COMMON && !v->common)
			v->common = at;
		if (type == CFG_DEVICE && !v->device_config)
			v->device_config = at;
		if (type == CFG_NOTIFY && !v->notify) {
			v->notify = at;
			v->notify_multiplier = pci_read32(device, cap + 16);
		}
	}
	return v->common && v->notify && v->device_config;
}

static bool negotiate(struct virtio *v, uint64_t wanted)
{
	uint64_t offered;

	mmio_write8(v->common + COMMON_STATUS, 0);
	while (mmio_read8(v->common + COMMON_STATUS))
		;
	mmio_write8(v->common + COMMON_STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
	mmio_write32(v->common + COMMON_DFSELECT, 0);
	offered = mmio_read32(v->common + COMMON_DF);
	mmio_write32(v->common + COMMON_DFSELECT, 1);
	offered |= (uint64_t)mmio_read32(v->common + COMMON_DF) << 32;
	v->features = offered & (wanted | VIRTIO_F_VERSION_1);
	if (!(v->features & VIRTIO_F_VERSION_1))
		return false;
	mmio_write32(v->common + COMMON_GFSELECT, 0);
	mmio_write32(v->common + COMMON_GF, (uint32_t)v->features);
	mmio_write32(v->common + COMMON_GFSELECT, 1);
	mmio_write32(v->common + COMMON_GF, (uint32_t)(v->features >> 32));
	mmio_write8(v->common + COMMON_STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK);
	if (!(mmio_read8(v->common + COMMON_STATUS) & STATUS_FEATURES_OK))
		return false;
	mmio_write16(v->common + COMMON_MSIX, NO_VECTOR);
	return true;
}

bool virtio_next(struct virtio *v, unsigned *device, unsigned type, uint64_t wanted, const char *what)
{
	for (; *device < PCI_DEVICES; ++*device) {
		uint32_t id = pci_read32(*device, 0);

		if (id != (VENDOR_VIRTIO | (DEVICE_MODERN + type) << 16) &&
		    !(type == TYPE_BLK && id == (VENDOR_VIRTIO | BLK_TRANSITIONAL << 16)))
			continue;
		*v = (struct virtio){0};
		if (!find_capabilities(v, *device)) {
			con_printf("BAD %s device=%u lacks a modern virtio capability\n", what, *device);
			continue;
		}
		pci_enable(*device);
		if (!negotiate(v, wanted)) {
			con_printf("BAD %s device=%u refuses its features\n", what, *device);
			continue;
		}
		++*device;
		return true;
	}
	return false;
}

bool virtio_queue_init(struct virtio *v, struct virtio_queue *q, uint16_t number, uint16_t most)
{
	mmio_write16(v->common + COMMON_Q_SELECT, number);
	*q = (struct virtio_queue){.size = mmio_read16(v->common + COMMON_Q_SIZE), .number = number};
	if (q->size > most)
		q->size = most;
	if (!q->size)
		return false;
	q->descriptors = ram_alloc(sizeof(*q->descriptors) * q->size, PAGE_BYTES);
	q->avail = ram_alloc(6 + 2u * q->size, PAGE_BYTES);
	q->used = ram_alloc(6 + 8u * q->size, PAGE_BYTES);
	q->avail[0] = AVAIL_NO_INTERRUPT;
	mmio_write16(v->common + COMMON_Q_SIZE, q->size);
	mmio_write16(v->common + COMMON_Q_MSIX, NO_VECTOR);
	write64(v->common + COMMON_Q_DESC, (uint64_t)q->descriptors);
	write64(v->common + COMMON_Q_AVAIL, (uint64_t)q->avail);
	write64(v->common + COMMON_Q_USED, (uint64_t)q->used);
	q->notify = v->notify + (uint64_t)mmio_read16(v->common + COMMON_Q_NOFF) * v->notify_multiplier;
	mmio_write16(v->common + COMMON_Q_ENABLE, 1);
	return true;
}

void virtio_go(struct virtio *v)
{
	mmio_write8(v->common + COMMON_STATUS,
		    STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK);
}

void virtio_describe(struct virtio_queue *q, unsigned at, const volatile void *address, uint32_t len,
		     unsigned flags)
{
	q->descriptors[at] =
		(struct virtio_descriptor){(uint64_t)address, len, (uint16_t)flags, (uint16_t)(at + 1)};
}

void virtio_submit(struct virtio_queue *q, unsigned first)
{
	work_done++;
	q->avail[2 + q->avail_index % q->size] = (uint16_t)first;
	barrier();
	q->avail[1] = ++q->avail_index;
	/* The device must see the index before we look whether it sleeps. */
	__asm__ volatile("mfence" ::: "memory");
	if (!(q->used[0] & USED_NO_NOTIFY))
		mmio_write16(q->notify, q->number);
}

bool virtio_poll(struct virtio_queue *q, uint32_t *head, uint32_t *written)
{
	volatile uint32_t *element;

	if (q->used[1] == q->used_index)
		return false;
	work_done++;
	barrier();
	element = (volatile uint32_t *)(q->used + 2) + 2 * (q->used_index % q->size);
	q->used_index++;
	*head = element[0];
	*written = element[1];
	return true;
}
