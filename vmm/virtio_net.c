/* SPDX-License-Identifier: Apache-2.0 */
/*
 * virtio network device (virtio 1.2, 5.1) over a tap: one queue pair and a control queue for announcements.
 * The 12-byte header passes through to the tap, which has the same one, so that checksum and segmentation
 * offloads are the kernel's work on either side.
 *
 * Saved (after what vmm/virtio_pci.h lists): MAC address; whether an announcement is asked of the guest.
 * Rebuilt: the tap's offloads, from the negotiated features; the link status.
 * Not saved: a frame read from the tap for which the guest had no buffer. Networks lose frames.
 */
#include <errno.h>
#include <linux/if_tun.h>
#include <linux/virtio_ids.h>
#include <linux/virtio_net.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/log.h"
#include "vmm/virtio.h"
#include "vmm/virtio_pci.h"

enum { QUEUE_RX, QUEUE_TX, QUEUE_CONTROL, QUEUES };

#define HEADER_BYTES	12u /* struct virtio_net_hdr_v1 */
#define FRAME_BYTES_MAX (HEADER_BYTES + 65535u + 14u + 4u)
#define CONFIG_BYTES	8u  /* mac, status */
#define BURST		256 /* frames taken before the lock is let go */
#define FEATURE(bit)	(UINT64_C(1) << (bit))
#define OFFLOAD_FEATURES                                                                                     \
	(FEATURE(VIRTIO_NET_F_CSUM) | FEATURE(VIRTIO_NET_F_GUEST_CSUM) | FEATURE(VIRTIO_NET_F_GUEST_TSO4) |  \
	 FEATURE(VIRTIO_NET_F_GUEST_TSO6) | FEATURE(VIRTIO_NET_F_GUEST_ECN) |                                \
	 FEATURE(VIRTIO_NET_F_HOST_TSO4) | FEATURE(VIRTIO_NET_F_HOST_TSO6) | FEATURE(VIRTIO_NET_F_HOST_ECN))

struct virtio_net {
	struct virtio_pci *v;
	int tap_fd;
	uint8_t mac[6];
	bool announce;	    /* VIRTIO_NET_S_ANNOUNCE: the guest is asked to make itself known */
	bool ask_at_resume; /* loaded: the link is a new one */
	size_t frame_bytes; /* a frame that waits for buffers; 0 = none */
	uint8_t frame[FRAME_BYTES_MAX];
};

static bool has(const struct virtio_net *d, unsigned bit)
{
	return virtio_pci_features(d->v) & FEATURE(bit);
}

/* The kernel may hand us what the driver said it understands, and nothing else. */
static void features_set(void *dev, uint64_t features)
{
	struct virtio_net *d = dev;
	unsigned flags = 0;

	if (features & FEATURE(VIRTIO_NET_F_GUEST_CSUM)) {
		flags |= TUN_F_CSUM;
		if (features & FEATURE(VIRTIO_NET_F_GUEST_TSO4))
			flags |= TUN_F_TSO4;
		if (features & FEATURE(VIRTIO_NET_F_GUEST_TSO6))
			flags |= TUN_F_TSO6;
		if ((features & FEATURE(VIRTIO_NET_F_GUEST_ECN)) && (flags & (TUN_F_TSO4 | TUN_F_TSO6)))
			flags |= TUN_F_TSO_ECN;
	}
	if (ioctl(d->tap_fd, TUNSETOFFLOAD, (unsigned long)flags) < 0)
		log_warn("net: tap offloads 0x%x: %s", flags, strerror(errno));
}

static void reset(void *dev)
{
	struct virtio_net *d = dev;

	d->announce = d->ask_at_resume = false;
	d->frame_bytes = 0;
}

/* ---- to the guest ---- */

/* Puts the waiting frame into one chain, or into several with mergeable buffers. False when there are not
 * enough: the chains taken are put back, the frame stays. */
static bool deliver(struct virtio_net *d)
{
	struct virtqueue *q = virtio_pci_queue(d->v, QUEUE_RX);
	bool merge = has(d, VIRTIO_NET_F_MRG_RXBUF);
	size_t at = 0;
	unsigned n = 0;
	uint64_t first_gpa[2] = {0, 0};

	while (at < d->frame_bytes) {
		const struct virtqueue_chain *c = virtio_pci_pop(d->v, QUEUE_RX);
		size_t part = d->frame_bytes - at;

		if (!c) {
			for (; n; n--)
				virtqueue_unpop(q);
			return false;
		}
		if (c->in_bytes == 0 || (n == 0 && c->in_bytes < HEADER_BYTES)) {
			virtio_pci_broken(d->v, "receive buffer of %llu bytes",
					  (unsigned long long)c->in_bytes);
			return false;
		}
		if (part > c->in_bytes) {
			if (!merge) { /* the driver's buffers are too small for what it negotiated */
				virtqueue_push(q, c->head, 0);
				d->frame_bytes = 0;
				return true;
			}
			part = c->in_bytes;
		}
		virtqueue_chain_write(virtio_pci_memory(d->v), c, 0, d->frame + at, part);
		virtqueue_fill(q, n, c->head, (uint32_t)part);
		if (n++ == 0) {
			/* num_buffers is known at the end only; its two bytes may lie in two segments */
			for (unsigned b = 0; b < 2; b++) {
				uint64_t off = offsetof(struct virtio_net_hdr_v1, num_buffers) + b;
				unsigned i = c->nout;

				for (; off >= c->seg[i].len; i++)
					off -= c->seg[i].len;
				first_gpa[b] = c->seg[i].gpa + off;
			}
		}
		at += part;
	}
	for (unsigned b = 0; b < 2; b++) {
		uint8_t byte = (uint8_t)(n >> (8 * b));

		guest_memory_write(virtio_pci_memory(d->v), first_gpa[b], &byte, 1);
	}
	virtqueue_publish(q, n);
	d->frame_bytes = 0;
	return true;
}

static void receive(struct virtio_net *d)
{
	struct virtqueue *q = virtio_pci_queue(d->v, QUEUE_RX);
	unsigned burst = 0;
	bool pushed = false;

	while (virtio_pci_running(d->v) && q->enabled) {
		if (!d->frame_bytes) {
			ssize_t n;

			if (++burst > BURST) { /* the tap is edge-triggered: come back by ourselves */
				virtio_pci_requeue(d->v, QUEUE_RX);
				break;
			}
			n = read(d->tap_fd, d->frame, sizeof d->frame);
			if (n < 0 && errno == EINTR)
				continue;
			if (n <= (ssize_t)HEADER_BYTES)
				break; /* EAGAIN; or the tap has gone */
			d->frame_bytes = (size_t)n;
		}
		if (deliver(d))
			pushed = true;
		else if (!virtqueue_rearm(q))
			break; /* the driver tells us of new buffers */
	}
	if (pushed)
		virtio_pci_signal(d->v, QUEUE_RX);
}

static void readable(void *dev)
{
	receive(dev);
}

/* ---- from the guest ---- */

static void transmit(struct virtio_net *d)
{
	struct virtqueue *q = virtio_pci_queue(d->v, QUEUE_TX);
	const struct virtqueue_chain *c;
	struct iovec iov[VIRTQUEUE_CHAIN_MAX];
	unsigned burst = 0;
	bool pushed = false;

	do {
		while ((c = virtio_pci_pop(d->v, QUEUE_TX))) {
			if (c->out_bytes > HEADER_BYTES && c->out_bytes <= FRAME_BYTES_MAX) {
				int n = virtqueue_chain_iov(c, false, 0, c->out_bytes, iov);

				/* What the tap does not take is lost, as on a wire. */
				if (writev(d->tap_fd, iov, n) < 0 && errno != EAGAIN)
					log_debug("net: tap write: %s", strerror(errno));
			}
			virtqueue_push(q, c->head, 0);
			pushed = true;
			if (++burst == BURST) {
				virtio_pci_signal(d->v, QUEUE_TX);
				virtio_pci_requeue(d->v, QUEUE_TX);
				return;
			}
		}
	} while (virtio_pci_running(d->v) && virtqueue_rearm(q));
	if (pushed)
		virtio_pci_signal(d->v, QUEUE_TX);
}

/* Only the acknowledgement of an announcement is known (5.1.6.5.4). */
static void control(struct virtio_net *d)
{
	struct virtqueue *q = virtio_pci_queue(d->v, QUEUE_CONTROL);
	const struct virtqueue_chain *c;

	do {
		while ((c = virtio_pci_pop(d->v, QUEUE_CONTROL))) {
			uint8_t header[2], ack = VIRTIO_NET_ERR;

			if (!virtqueue_chain_read(c, 0, header, sizeof header) || c->in_bytes == 0) {
				virtio_pci_broken(d->v, "control command without a header or a status byte");
				return;
			}
			if (header[0] == VIRTIO_NET_CTRL_ANNOUNCE &&
			    header[1] == VIRTIO_NET_CTRL_ANNOUNCE_ACK &&
			    has(d, VIRTIO_NET_F_GUEST_ANNOUNCE)) {
				d->announce = false;
				ack = VIRTIO_NET_OK;
			}
			virtqueue_chain_write(virtio_pci_memory(d->v), c, 0, &ack, 1);
			virtqueue_push(q, c->head, 1);
			virtio_pci_signal(d->v, QUEUE_CONTROL);
		}
	} while (virtio_pci_running(d->v) && virtqueue_rearm(q));
}

static void process(void *dev, unsigned queue)
{
	struct virtio_net *d = dev;

	if (queue == QUEUE_RX)
		receive(d);
	else if (queue == QUEUE_TX)
		transmit(d);
	else
		control(d);
}

static void resumed(void *dev)
{
	struct virtio_net *d = dev;

	if (!d->ask_at_resume)
		return;
	d->ask_at_resume = false;
	if (virtio_pci_running(d->v) && has(d, VIRTIO_NET_F_GUEST_ANNOUNCE)) {
		d->announce = true;
		virtio_pci_config_changed(d->v);
	}
}

static void config_read(void *dev, uint8_t *config)
{
	const struct virtio_net *d = dev;

	memcpy(config, d->mac, sizeof d->mac);
	put_le16(config + 6, (uint16_t)(VIRTIO_NET_S_LINK_UP | (d->announce ? VIRTIO_NET_S_ANNOUNCE : 0)));
}

static void save(void *dev, struct state_writer *w)
{
	const struct virtio_net *d = dev;

	state_put_bytes(w, d->mac, sizeof d->mac);
	state_put_u8(w, d->announce);
}

static int load(void *dev, struct state_reader *r, struct error *err)
{
	struct virtio_net *d = dev;
	uint8_t mac[6], announce;

	state_get_bytes(r, mac, sizeof mac);
	announce = state_get_u8(r);
	if (memcmp(mac, d->mac, sizeof mac))
		return error_set(err, EINVAL, "MAC address is not that of the VM's definition");
	if (announce > 1)
		return error_set(err, EINVAL, "announcement flag is %u", announce);
	d->announce = announce;
	d->ask_at_resume = true;
	return 0;
}

static void destroy(void *dev)
{
	struct virtio_net *d = dev;

	cleanup_fd(&d->tap_fd);
	free(d);
}

static const struct virtio_device_ops net_ops = {
	.device_type = VIRTIO_ID_NET,
	.class_code = 0x02,
	.subclass = 0x00,
	.nqueues = QUEUES,
	.features = OFFLOAD_FEATURES | FEATURE(VIRTIO_NET_F_MAC) | FEATURE(VIRTIO_NET_F_STATUS) |
		    FEATURE(VIRTIO_NET_F_MRG_RXBUF) | FEATURE(VIRTIO_NET_F_CTRL_VQ) |
		    FEATURE(VIRTIO_NET_F_GUEST_ANNOUNCE),
	.config_bytes = CONFIG_BYTES,
	.config_read = config_read,
	.process = process,
	.features_set = features_set,
	.reset = reset,
	.resumed = resumed,
	.save = save,
	.load = load,
	.readable = readable,
	.destroy = destroy,
};

int virtio_net_create(struct machine *m, uint8_t slot, const char *id, int tap_fd, const uint8_t mac[6],
		      struct error *err)
{
	struct virtio_net *d = calloc(1, sizeof *d);
	char section[STATE_NAME_BYTES], label[64];
	int rc, header = HEADER_BYTES;

	snprintf(label, sizeof label, "net %s", id);
	if (!d)
		return error_errno(err, ENOMEM, "%s", label);
	d->tap_fd = tap_fd;
	memcpy(d->mac, mac, sizeof d->mac);
	if (ioctl(tap_fd, TUNSETVNETHDRSZ, &header) < 0) {
		rc = error_errno(err, errno, "%s: header size of the tap", label);
		free(d);
		return rc;
	}
	virtio_pci_section(section, "virtio-net", id, slot);
	rc = virtio_pci_create(m, slot, section, label, &net_ops, d, &d->v, err);
	if (rc < 0) {
		free(d);
		return rc;
	}
	rc = virtio_pci_watch(d->v, tap_fd, err);
	if (rc == 0)
		rc = machine_add_device(m, &virtio_pci_device_ops, d->v, err);
	if (rc < 0) {
		d->tap_fd = -1; /* stays the caller's */
		virtio_pci_device_ops.destroy(d->v);
	}
	return rc;
}
