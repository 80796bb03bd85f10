/* SPDX-License-Identifier: Apache-2.0 */
#include "virtio_blk.h"

#include "pci.h"

#define VENDOR_VIRTIO		0x1af4u
#define DEVICE_BLK_MODERN	0x1042u
#define DEVICE_BLK_TRANSITIONAL 0x1001u
#define PCI_DEVICES		32u
#define CAP_VENDOR		0x09u

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
/* struct virtio_blk_config */
enum {
	BLK_CAPACITY = 0,
	BLK_SIZE_MAX = 8,
	BLK_BLK_SIZE = 20,
	BLK_MAX_DISCARD = 36,
	BLK_DISCARD_ALIGN = 44,
	BLK_MAX_ZEROES = 48,
};
#define F_SIZE_MAX  (1ULL << 1)
#define F_SEG_MAX   (1ULL << 2)
#define F_BLK_SIZE  (1ULL << 6)
#define F_VERSION_1 (1ULL << 32)
#define WANTED                                                                                               \
	(F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | VBLK_F_RO | VBLK_F_FLUSH | VBLK_F_DISCARD |                   \
	 VBLK_F_WRITE_ZEROES | F_VERSION_1)

#define DESC_NEXT	   1u
#define DESC_WRITE	   2u
#define AVAIL_NO_INTERRUPT 1u
#define USED_NO_NOTIFY	   1u
#define NO_VECTOR	   0xffffu
#define QUEUE_MAX	   (VBLK_SLOTS_MAX * VBLK_DESCRIPTORS_PER_SLOT)

struct vblk_descriptor {
	uint64_t address;
	uint32_t len;
	uint16_t flags, next;
};
struct vblk_header {
	uint32_t type, reserved;
	uint64_t sector;
	/* struct virtio_blk_discard_write_zeroes, for the requests that have one */
	uint64_t range_sector;
	uint32_t range_sectors, range_flags;
};

static uint64_t config_read64(uint64_t at)
{
	return mmio_read32(at) | (uint64_t)mmio_read32(at + 4) << 32;
}

static void config_write64(uint64_t at, uint64_t v)
{
	mmio_write32(at, (uint32_t)v);
	mmio_write32(at + 4, (uint32_t)(v >> 32));
}

static bool find_capabilities(struct vblk *v, unsigned device, uint32_t *multiplier)
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
			*multiplier = pci_read32(device, cap + 16);
		}
	}
	return v->common && v->notify && v->device_config;
}

static bool negotiate(struct vblk *v)
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
	v->features = offered & WANTED;
	if (!(v->features & F_VERSION_1))
		return false;
	mmio_write32(v->common + COMMON_GFSELECT, 0);
	mmio_write32(v->common + COMMON_GF, (uint32_t)v->features);
	mmio_write32(v->common + COMMON_GFSELECT, 1);
	mmio_write32(v->common + COMMON_GF, (uint32_t)(v->features >> 32));
	mmio_write8(v->common + COMMON_STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK);
	return mmio_read8(v->common + COMMON_STATUS) & STATUS_FEATURES_OK;
}

static bool set_up_queue(struct vblk *v, uint32_t multiplier)
{
	uint16_t offset;

	mmio_write16(v->common + COMMON_MSIX, NO_VECTOR);
	mmio_write16(v->common + COMMON_Q_SELECT, 0);
	v->queue_size = mmio_read16(v->common + COMMON_Q_SIZE);
	if (v->queue_size > QUEUE_MAX)
		v->queue_size = QUEUE_MAX;
	v->nslots = v->queue_size / VBLK_DESCRIPTORS_PER_SLOT;
	if (!v->nslots)
		return false;
	v->descriptors = ram_alloc(sizeof(*v->descriptors) * v->queue_size, PAGE_BYTES);
	v->avail = ram_alloc(6 + 2u * v->queue_size, PAGE_BYTES);
	v->used = ram_alloc(6 + 8u * v->queue_size, PAGE_BYTES);
	v->headers = ram_alloc(sizeof(*v->headers) * VBLK_SLOTS_MAX, PAGE_BYTES);
	v->status = ram_alloc(VBLK_SLOTS_MAX, PAGE_BYTES);
	v->avail[0] = AVAIL_NO_INTERRUPT;

	mmio_write16(v->common + COMMON_Q_SIZE, v->queue_size);
	mmio_write16(v->common + COMMON_Q_MSIX, NO_VECTOR);
	config_write64(v->common + COMMON_Q_DESC, (uint64_t)v->descriptors);
	config_write64(v->common + COMMON_Q_AVAIL, (uint64_t)v->avail);
	config_write64(v->common + COMMON_Q_USED, (uint64_t)v->used);
	offset = mmio_read16(v->common + COMMON_Q_NOFF);
	mmio_write16(v->common + COMMON_Q_ENABLE, 1);
	v->notify += (uint64_t)offset * multiplier;
	mmio_write8(v->common + COMMON_STATUS,
		    STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK);
	return true;
}

static void read_config(struct vblk *v)
{
	uint64_t c = v->device_config;

	v->sectors = config_read64(c + BLK_CAPACITY);
	v->block_sectors = v->features & F_BLK_SIZE ? mmio_read32(c + BLK_BLK_SIZE) / VBLK_SECTOR_BYTES : 1;
	if (v->block_sectors < 1)
		v->block_sectors = 1;
	v->max_request_sectors = UINT32_MAX;
	if (v->features & F_SIZE_MAX)
		v->max_request_sectors = mmio_read32(c + BLK_SIZE_MAX) / VBLK_SECTOR_BYTES;
	if (v->features & VBLK_F_DISCARD) {
		v->max_discard_sectors = mmio_read32(c + BLK_MAX_DISCARD);
		v->discard_align_sectors = mmio_read32(c + BLK_DISCARD_ALIGN);
	}
	if (v->features & VBLK_F_WRITE_ZEROES)
		v->max_zeroes_sectors = mmio_read32(c + BLK_MAX_ZEROES);
}

bool vblk_next(struct vblk *v, unsigned *device)
{
	for (; *device < PCI_DEVICES; ++*device) {
		uint32_t id = pci_read32(*device, 0), multiplier = 0;

		if (id != (VENDOR_VIRTIO | DEVICE_BLK_MODERN << 16) &&
		    id != (VENDOR_VIRTIO | DEVICE_BLK_TRANSITIONAL << 16))
			continue;
		*v = (struct vblk){.slot_on_bus = (uint8_t)*device};
		if (!find_capabilities(v, *device, &multiplier)) {
			con_printf("BAD disk device=%u lacks a modern virtio capability\n", *device);
			continue;
		}
		pci_enable(*device);
		if (!negotiate(v) || !set_up_queue(v, multiplier)) {
			con_printf("BAD disk device=%u refuses its features or has no queue\n", *device);
			continue;
		}
		read_config(v);
		++*device;
		return true;
	}
	return false;
}

static void describe(struct vblk *v, unsigned at, volatile void *address, uint32_t len, unsigned flags)
{
	v->descriptors[at] =
		(struct vblk_descriptor){(uint64_t)address, len, (uint16_t)flags, (uint16_t)(at + 1)};
}

void vblk_submit(struct vblk *v, unsigned slot, enum vblk_type type, uint64_t sector, uint32_t nsectors,
		 void *buffer, uint32_t split, uint32_t flags)
{
	unsigned first = slot * VBLK_DESCRIPTORS_PER_SLOT, d = first;
	struct vblk_header *h = &v->headers[slot];
	unsigned dir = type == VBLK_READ ? DESC_WRITE : 0;
	uint8_t *bytes = buffer;

	*h = (struct vblk_header){.type = type};
	v->status[slot] = 0xff;
	describe(v, d++, h, 16, DESC_NEXT);
	if (type == VBLK_READ || type == VBLK_WRITE) {
		h->sector = sector;
		if (split)
			describe(v, d++, bytes, split * VBLK_SECTOR_BYTES, DESC_NEXT | dir);
		describe(v, d++, bytes + (uint64_t)split * VBLK_SECTOR_BYTES,
			 (nsectors - split) * VBLK_SECTOR_BYTES, DESC_NEXT | dir);
	} else if (type == VBLK_DISCARD || type == VBLK_WRITE_ZEROES) {
		h->range_sector = sector;
		h->range_sectors = nsectors;
		h->range_flags = flags;
		describe(v, d++, &h->range_sector, 16, DESC_NEXT);
	}
	describe(v, d, &v->status[slot], 1, DESC_WRITE);

	v->avail[2 + v->avail_index % v->queue_size] = (uint16_t)first;
	barrier();
	v->avail[1] = ++v->avail_index;
	/* The device must see the index before we look whether it sleeps. */
	__asm__ volatile("mfence" ::: "memory");
	if (!(v->used[0] & USED_NO_NOTIFY))
		mmio_write16(v->notify, 0);
}

int vblk_poll(struct vblk *v, uint8_t *status, uint32_t *written)
{
	volatile uint32_t *element;
	uint32_t slot;

	if (v->used[1] == v->used_index)
		return -1;
	barrier();
	element = (volatile uint32_t *)(v->used + 2) + 2 * (v->used_index % v->queue_size);
	v->used_index++;
	slot = element[0] / VBLK_DESCRIPTORS_PER_SLOT;
	*written = element[1];
	if (slot >= v->nslots) {
		if (report_bad(BAD_REQUEST))
			con_printf("BAD used ring names descriptor=%lu\n", (uint64_t)element[0]);
		return -1;
	}
	*status = v->status[slot];
	return (int)slot;
}
