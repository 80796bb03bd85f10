/* SPDX-License-Identifier: Apache-2.0 */
/*
 * virtio entropy device (virtio 1.2, 5.4) over getrandom(2).
 *
 * Saved: what vmm/virtio_pci.h lists, nothing more.
 */
#include <errno.h>
#include <linux/virtio_ids.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "base/cleanup.h"
#include "vmm/virtio.h"
#include "vmm/virtio_pci.h"

/* A request may be answered in part (5.4.6.2): bounds the time under the lock. */
#define RNG_BYTES_MAX 4096u

struct virtio_rng {
	struct virtio_pci *v;
};

static void serve(struct virtio_rng *d, const struct virtqueue_chain *c)
{
	uint8_t buf[RNG_BYTES_MAX];
	size_t want = c->in_bytes < sizeof buf ? c->in_bytes : sizeof buf, got = 0;

	/* A call of up to 256 bytes is never cut short; larger ones may be, by signals. */
	while (got < want) {
		ssize_t n = getrandom(buf + got, want - got, 0);

		if (n < 0 && errno != EINTR)
			break;
		if (n > 0)
			got += (size_t)n;
	}
	virtqueue_chain_write(virtio_pci_memory(d->v), c, 0, buf, got);
	explicit_bzero(buf, got);
	virtqueue_push(virtio_pci_queue(d->v, 0), c->head, (uint32_t)got);
	virtio_pci_signal(d->v, 0);
}

static void process(void *dev, unsigned queue)
{
	struct virtio_rng *d = dev;
	const struct virtqueue_chain *c;

	do {
		while ((c = virtio_pci_pop(d->v, queue)))
			serve(d, c);
	} while (virtio_pci_running(d->v) && virtqueue_rearm(virtio_pci_queue(d->v, queue)));
}

static void destroy(void *dev)
{
	free(dev);
}

static const struct virtio_device_ops rng_ops = {
	.device_type = VIRTIO_ID_RNG,
	.class_code = 0x00,
	.subclass = 0xff,
	.nqueues = 1,
	.process = process,
	.destroy = destroy,
};

int virtio_rng_create(struct machine *m, uint8_t slot, struct error *err)
{
	struct virtio_rng *d = calloc(1, sizeof *d);

	if (!d)
		return error_errno(err, ENOMEM, "rng");
	return virtio_pci_add(m, slot, "virtio-rng", "rng", &rng_ops, d, &d->v, err);
}
