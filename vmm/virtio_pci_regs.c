/* SPDX-License-Identifier: Apache-2.0 */
/* Registers and PCI capabilities of the virtio transport (virtio 1.2, 4.1.4). */
#include <errno.h>
#include <linux/virtio_config.h>
#include <linux/virtio_pci.h>
#include <linux/virtio_ring.h>
#include <string.h>

#include "base/bytes.h"
#include "base/log.h"
#include "vmm/virtio_pci_internal.h"

#define CONFIG_BYTES_MAX 256

uint64_t virtio_pci_offered(const struct virtio_pci *v)
{
	return v->ops->features | UINT64_C(1) << VIRTIO_F_VERSION_1 |
	       UINT64_C(1) << VIRTIO_RING_F_INDIRECT_DESC | UINT64_C(1) << VIRTIO_RING_F_EVENT_IDX;
}

static struct virtqueue *selected(struct virtio_pci *v)
{
	return v->queue_select < v->ops->nqueues ? &v->queue[v->queue_select] : NULL;
}

static uint32_t feature_word(uint64_t features, uint32_t select)
{
	return select < 2 ? (uint32_t)(features >> (32 * select)) : 0;
}

static void common_image(struct virtio_pci *v, uint8_t *c)
{
	const struct virtqueue *q = selected(v);

	memset(c, 0, REGION_COMMON_BYTES);
	put_le32(c + VIRTIO_PCI_COMMON_DFSELECT, v->device_feature_select);
	put_le32(c + VIRTIO_PCI_COMMON_DF, feature_word(virtio_pci_offered(v), v->device_feature_select));
	put_le32(c + VIRTIO_PCI_COMMON_GFSELECT, v->driver_feature_select);
	put_le32(c + VIRTIO_PCI_COMMON_GF, feature_word(v->driver_features, v->driver_feature_select));
	put_le16(c + VIRTIO_PCI_COMMON_MSIX, v->config_vector);
	put_le16(c + VIRTIO_PCI_COMMON_NUMQ, (uint16_t)v->ops->nqueues);
	c[VIRTIO_PCI_COMMON_STATUS] = v->status;
	c[VIRTIO_PCI_COMMON_CFGGENERATION] = v->generation;
	put_le16(c + VIRTIO_PCI_COMMON_Q_SELECT, v->queue_select);
	if (!q) /* a queue that is not there has size 0 */
		return;
	put_le16(c + VIRTIO_PCI_COMMON_Q_SIZE, q->size);
	put_le16(c + VIRTIO_PCI_COMMON_Q_MSIX, q->vector);
	put_le16(c + VIRTIO_PCI_COMMON_Q_ENABLE, q->enabled);
	put_le16(c + VIRTIO_PCI_COMMON_Q_NOFF, v->queue_select);
	put_le64(c + VIRTIO_PCI_COMMON_Q_DESCLO, q->desc_gpa);
	put_le64(c + VIRTIO_PCI_COMMON_Q_AVAILLO, q->avail_gpa);
	put_le64(c + VIRTIO_PCI_COMMON_Q_USEDLO, q->used_gpa);
}

void virtio_pci_reset_now(struct virtio_pci *v)
{
	v->reset_pending = false;
	v->device_feature_select = v->driver_feature_select = 0;
	v->driver_features = 0;
	v->config_vector = VIRTQUEUE_NO_VECTOR;
	v->queue_select = 0;
	v->isr = 0;
	v->status = 0;
	for (unsigned i = 0; i < v->ops->nqueues; i++)
		virtqueue_reset(&v->queue[i]);
	if (v->ops->features_set)
		v->ops->features_set(v->dev, 0);
	if (v->ops->reset)
		v->ops->reset(v->dev);
}

static void write_status(struct virtio_pci *v, uint8_t value)
{
	uint8_t added;

	if (value == 0) {
		/* The status reads 0 only when no request touches guest memory any more (2.4.1). */
		if (v->inflight)
			v->reset_pending = true;
		else
			virtio_pci_reset_now(v);
		return;
	}
	added = value & (uint8_t)~v->status;
	if (added & VIRTIO_CONFIG_S_FEATURES_OK) {
		if ((v->driver_features & ~virtio_pci_offered(v)) ||
		    !(v->driver_features & UINT64_C(1) << VIRTIO_F_VERSION_1)) {
			log_warn("%s: the driver's features 0x%llx are not acceptable", v->label,
				 (unsigned long long)v->driver_features);
			value &= (uint8_t)~VIRTIO_CONFIG_S_FEATURES_OK;
		} else if (v->ops->features_set) {
			v->ops->features_set(v->dev, v->driver_features);
		}
	}
	/* Only a reset clears bits; NEEDS_RESET is the device's alone. */
	v->status |= value & (uint8_t)~VIRTIO_CONFIG_S_NEEDS_RESET;
	if (added & VIRTIO_CONFIG_S_DRIVER_OK)
		log_debug("%s: driver is up, features 0x%llx", v->label,
			  (unsigned long long)v->driver_features);
}

static uint16_t valid_vector(const struct virtio_pci *v, uint16_t vector)
{
	return vector <= v->ops->nqueues ? vector : VIRTQUEUE_NO_VECTOR;
}

static void enable_queue(struct virtio_pci *v, struct virtqueue *q)
{
	struct error err = ERROR_INIT;

	if (virtqueue_enable(q, v->driver_features & UINT64_C(1) << VIRTIO_RING_F_EVENT_IDX,
			     v->driver_features & UINT64_C(1) << VIRTIO_RING_F_INDIRECT_DESC, &err) < 0)
		virtio_pci_broken(v, "queue %u: %s", v->queue_select, err.message);
}

static uint64_t with_half(uint64_t old, unsigned half, uint32_t value)
{
	return half ? (old & UINT64_C(0xffffffff)) | (uint64_t)value << 32
		    : (old & ~UINT64_C(0xffffffff)) | value;
}

static void write_queue_address(struct virtqueue *q, unsigned offset, uint32_t value)
{
	unsigned half = offset / 4 % 2;

	switch (offset & ~7u) {
	case VIRTIO_PCI_COMMON_Q_DESCLO:
		q->desc_gpa = with_half(q->desc_gpa, half, value);
		break;
	case VIRTIO_PCI_COMMON_Q_AVAILLO:
		q->avail_gpa = with_half(q->avail_gpa, half, value);
		break;
	case VIRTIO_PCI_COMMON_Q_USEDLO:
		q->used_gpa = with_half(q->used_gpa, half, value);
		break;
	}
}

static void write_queue16(struct virtio_pci *v, struct virtqueue *q, unsigned offset, uint16_t value)
{
	if (offset == VIRTIO_PCI_COMMON_Q_MSIX) {
		q->vector = valid_vector(v, value);
		return;
	}
	if (q->enabled)
		return;
	if (offset == VIRTIO_PCI_COMMON_Q_SIZE)
		q->size = value;
	else if (offset == VIRTIO_PCI_COMMON_Q_ENABLE && value == 1)
		enable_queue(v, q);
}

/* A driver writes each field with its own width, 64-bit ones in halves (4.1.3.1). */
static void common_write(struct virtio_pci *v, unsigned offset, const uint8_t *data, unsigned len)
{
	struct virtqueue *q = selected(v);
	uint32_t value = len == 1 ? data[0] : len == 2 ? get_le16(data) : get_le32(data);

	if (v->reset_pending)
		return;
	if (len == 8) {
		common_write(v, offset, data, 4);
		common_write(v, offset + 4, data + 4, 4);
	} else if (offset == VIRTIO_PCI_COMMON_DFSELECT && len == 4) {
		v->device_feature_select = value;
	} else if (offset == VIRTIO_PCI_COMMON_GFSELECT && len == 4) {
		v->driver_feature_select = value;
	} else if (offset == VIRTIO_PCI_COMMON_GF && len == 4) {
		if (v->driver_feature_select < 2 && !(v->status & VIRTIO_CONFIG_S_FEATURES_OK))
			v->driver_features = with_half(v->driver_features, v->driver_feature_select, value);
	} else if (offset == VIRTIO_PCI_COMMON_MSIX && len == 2) {
		v->config_vector = valid_vector(v, (uint16_t)value);
	} else if (offset == VIRTIO_PCI_COMMON_STATUS && len == 1) {
		write_status(v, (uint8_t)value);
	} else if (offset == VIRTIO_PCI_COMMON_Q_SELECT && len == 2) {
		v->queue_select = (uint16_t)value;
	} else if (q && len == 2) {
		write_queue16(v, q, offset, (uint16_t)value);
	} else if (q && len == 4 && offset >= VIRTIO_PCI_COMMON_Q_DESCLO && offset % 4 == 0 && !q->enabled) {
		write_queue_address(q, offset, value);
	}
}

static void copy_out(uint8_t *data, unsigned len, const uint8_t *image, uint64_t at, uint64_t image_bytes)
{
	for (unsigned i = 0; i < len; i++)
		data[i] = at + i < image_bytes ? image[at + i] : 0;
}

static void bar_read(void *opaque, uint64_t offset, uint8_t *data, unsigned len)
{
	struct virtio_pci *v = opaque;
	uint8_t image[CONFIG_BYTES_MAX] = {0};
	uint64_t at = offset % REGION_BYTES;

	memset(data, 0, len);
	virtio_pci_lock(v);
	switch (offset - at) {
	case REGION_COMMON:
		common_image(v, image);
		copy_out(data, len, image, at, REGION_COMMON_BYTES);
		break;
	case REGION_ISR:
		if (at == 0) { /* reading clears it (4.1.4.5) */
			data[0] = v->isr;
			v->isr = 0;
		}
		break;
	case REGION_DEVICE:
		if (v->ops->config_read)
			v->ops->config_read(v->dev, image);
		copy_out(data, len, image, at, v->ops->config_bytes);
		break;
	}
	virtio_pci_unlock(v);
}

static void bar_write(void *opaque, uint64_t offset, const uint8_t *data, unsigned len)
{
	struct virtio_pci *v = opaque;

	if (offset >= REGION_NOTIFY) {
		/* What KVM's ioeventfd did not take: another width, or no KVM. */
		uint64_t queue = (offset - REGION_NOTIFY) / NOTIFY_MULTIPLIER;

		if (queue < v->ops->nqueues)
			virtio_pci_kick(v->kick_fd[queue]);
		return;
	}
	virtio_pci_lock(v);
	if (offset < REGION_COMMON_BYTES)
		common_write(v, (unsigned)offset, data, len);
	else if (offset >= REGION_DEVICE && v->ops->config_write && !v->reset_pending &&
		 range_fits(offset - REGION_DEVICE, len, v->ops->config_bytes))
		v->ops->config_write(v->dev, (unsigned)(offset - REGION_DEVICE), data, len);
	virtio_pci_unlock(v);
}

const struct bus_handler virtio_pci_bar_handler = {.read = bar_read, .write = bar_write};

/*
 * The window of the PCI configuration access capability: bar, offset and length are the driver's, an access
 * to pci_cfg_data is one to the BAR. Firmware uses it before it maps anything.
 */
bool virtio_pci_config_access(void *opaque, bool write, unsigned offset, uint8_t *data, unsigned n)
{
	struct virtio_pci *v = opaque;
	unsigned at = offset >= v->cfg_cap_offset ? offset - v->cfg_cap_offset : offset;
	uint32_t bar_offset, len;
	uint8_t bar;

	if (at >= VIRTIO_PCI_CAP_BYTES || n > VIRTIO_PCI_CAP_BYTES - at)
		return false;
	virtio_pci_lock(v);
	bar = v->cfg_cap[4];
	bar_offset = get_le32(v->cfg_cap + 8);
	len = get_le32(v->cfg_cap + 12);
	if (at < 16) {
		for (unsigned i = 0; i < n; i++) {
			if (write && (at + i == 4 || at + i >= 8))
				v->cfg_cap[at + i] = data[i];
			else if (!write)
				data[i] = v->cfg_cap[at + i];
		}
	}
	virtio_pci_unlock(v);
	if (at < 16)
		return at >= 2; /* the header's id and next pointer are the PCI code's */
	if (!write)
		memset(data, 0, n);
	if (at != 16 || n < len || bar != VIRTIO_BAR || (len != 1 && len != 2 && len != 4) ||
	    bar_offset % len || !range_fits(bar_offset, len, VIRTIO_BAR_BYTES))
		return true;
	if (write)
		bar_write(v, bar_offset, data, len);
	else
		bar_read(v, bar_offset, data, len);
	return true;
}

/* The body of struct virtio_pci_cap after its two-byte header, with room for what follows it. */
static int add_capability(struct virtio_pci *v, uint8_t type, uint32_t offset, uint32_t length,
			  unsigned extra, uint32_t extra_value, struct error *err)
{
	uint8_t body[VIRTIO_PCI_CAP_BYTES - 2] = {0};

	body[0] = (uint8_t)(16 + extra); /* cap_len */
	body[1] = type;
	body[2] = VIRTIO_BAR;
	put_le32(body + 6, offset);
	put_le32(body + 10, length);
	if (extra)
		put_le32(body + 14, extra_value);
	return pci_add_capability(v->pci, 0x09, body, 14 + extra, err);
}

int virtio_pci_add_capabilities(struct virtio_pci *v, struct error *err)
{
	int rc;

	rc = add_capability(v, VIRTIO_PCI_CAP_COMMON_CFG, REGION_COMMON, REGION_COMMON_BYTES, 0, 0, err);
	if (rc >= 0)
		rc = add_capability(v, VIRTIO_PCI_CAP_ISR_CFG, REGION_ISR, 1, 0, 0, err);
	if (rc >= 0 && v->ops->config_bytes)
		rc = add_capability(v, VIRTIO_PCI_CAP_DEVICE_CFG, REGION_DEVICE, v->ops->config_bytes, 0, 0,
				    err);
	if (rc >= 0)
		rc = add_capability(v, VIRTIO_PCI_CAP_NOTIFY_CFG, REGION_NOTIFY,
				    NOTIFY_MULTIPLIER * v->ops->nqueues, 4, NOTIFY_MULTIPLIER, err);
	if (rc >= 0)
		rc = add_capability(v, VIRTIO_PCI_CAP_PCI_CFG, 0, 0, 4, 0, err);
	if (rc < 0)
		return rc;
	v->cfg_cap_offset = (unsigned)rc;
	v->cfg_cap[0] = 0x09;
	v->cfg_cap[2] = VIRTIO_PCI_CAP_BYTES;
	v->cfg_cap[3] = VIRTIO_PCI_CAP_PCI_CFG;
	pci_set_config_hook(v->pci, v->cfg_cap_offset, VIRTIO_PCI_CAP_BYTES, virtio_pci_config_access, v);
	return 0;
}
