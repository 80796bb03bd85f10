/* SPDX-License-Identifier: Apache-2.0 */
#include "virtio_blk.h"

#define TYPE_BLK 2u
/* struct virtio_blk_config */
enum {
	BLK_CAPACITY = 0,
	BLK_SIZE_MAX = 8,
	BLK_BLK_SIZE = 20,
	BLK_MAX_DISCARD = 36,
	BLK_DISCARD_ALIGN = 44,
	BLK_MAX_ZEROES = 48,
};
#define F_SIZE_MAX (1ULL << 1)
#define F_SEG_MAX  (1ULL << 2)
#define F_BLK_SIZE (1ULL << 6)
#define WANTED                                                                                               \
	(F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | VBLK_F_RO | VBLK_F_FLUSH | VBLK_F_DISCARD |                   \
	 VBLK_F_WRITE_ZEROES)
#define QUEUE_MAX (VBLK_SLOTS_MAX * VBLK_DESCRIPTORS_PER_SLOT)

struct vblk_header {
	uint32_t type, reserved;
	uint64_t sector;
	/* struct virtio_blk_discard_write_zeroes, for the requests that have one */
	uint64_t range_sector;
	uint32_t range_sectors, range_flags;
};

static bool set_up_queue(struct vblk *v)
{
	if (!virtio_queue_init(&v->virtio, &v->queue, 0, QUEUE_MAX))
		return false;
	v->nslots = v->queue.size / VBLK_DESCRIPTORS_PER_SLOT;
	if (!v->nslots)
		return false;
	v->headers = ram_alloc(sizeof(*v->headers) * VBLK_SLOTS_MAX, PAGE_BYTES);
	v->status = ram_alloc(VBLK_SLOTS_MAX, PAGE_BYTES);
	virtio_go(&v->virtio);
	return true;
}

static void read_config(struct vblk *v)
{
	const struct virtio *c = &v->virtio;

	v->features = c->features;
	v->sectors = virtio_config_read64(c, BLK_CAPACITY);
	v->block_sectors =
		v->features & F_BLK_SIZE ? virtio_config_read32(c, BLK_BLK_SIZE) / VBLK_SECTOR_BYTES : 1;
	if (v->block_sectors < 1)
		v->block_sectors = 1;
	v->max_request_sectors = UINT32_MAX;
	if (v->features & F_SIZE_MAX)
		v->max_request_sectors = virtio_config_read32(c, BLK_SIZE_MAX) / VBLK_SECTOR_BYTES;
	if (v->features & VBLK_F_DISCARD) {
		v->max_discard_sectors = virtio_config_read32(c, BLK_MAX_DISCARD);
		v->discard_align_sectors = virtio_config_read32(c, BLK_DISCARD_ALIGN);
	}
	if (v->features & VBLK_F_WRITE_ZEROES)
		v->max_zeroes_sectors = virtio_config_read32(c, BLK_MAX_ZEROES);
}

bool vblk_next(struct vblk *v, unsigned *device)
{
	*v = (struct vblk){0};
	while (virtio_next(&v->virtio, device, TYPE_BLK, WANTED, "disk")) {
		v->slot_on_bus = (uint8_t)(*device - 1);
		if (set_up_queue(v)) {
			read_config(v);
			return true;
		}
		con_printf("BAD disk device=%u has no queue\n", *device - 1);
	}
	return false;
}

void vblk_submit(struct vblk *v, unsigned slot, enum vblk_type type, uint64_t sector, uint32_t nsectors,
		 void *buffer, uint32_t split, uint32_t flags)
{
	unsigned first = slot * VBLK_DESCRIPTORS_PER_SLOT, d = first;
	struct vblk_header *h = &v->headers[slot];
	unsigned dir = type == VBLK_READ ? VIRTIO_DESC_WRITE : 0;
	uint8_t *bytes = buffer;

	*h = (struct vblk_header){.type = type};
	v->status[slot] = 0xff;
	virtio_describe(&v->queue, d++, h, 16, VIRTIO_DESC_NEXT);
	if (type == VBLK_READ || type == VBLK_WRITE) {
		h->sector = sector;
		if (split)
			virtio_describe(&v->queue, d++, bytes, split * VBLK_SECTOR_BYTES,
					VIRTIO_DESC_NEXT | dir);
		virtio_describe(&v->queue, d++, bytes + (uint64_t)split * VBLK_SECTOR_BYTES,
				(nsectors - split) * VBLK_SECTOR_BYTES, VIRTIO_DESC_NEXT | dir);
	} else if (type == VBLK_DISCARD || type == VBLK_WRITE_ZEROES) {
		h->range_sector = sector;
		h->range_sectors = nsectors;
		h->range_flags = flags;
		virtio_describe(&v->queue, d++, &h->range_sector, 16, VIRTIO_DESC_NEXT);
	}
	virtio_describe(&v->queue, d, &v->status[slot], 1, VIRTIO_DESC_WRITE);

	virtio_submit(&v->queue, first);
}

int vblk_poll(struct vblk *v, uint8_t *status, uint32_t *written)
{
	uint32_t head, slot;

	if (!virtio_poll(&v->queue, &head, written))
		return -1;
	slot = head / VBLK_DESCRIPTORS_PER_SLOT;
	if (slot >= v->nslots) {
		if (report_bad(BAD_REQUEST))
			con_printf("BAD used ring names descriptor=%lu\n", (uint64_t)head);
		return -1;
	}
	*status = v->status[slot];
	return (int)slot;
}
