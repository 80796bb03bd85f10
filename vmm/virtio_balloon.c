/* SPDX-License-Identifier: Apache-2.0 */
/*
 * virtio memory balloon (virtio 1.2, 5.5) with reporting of free pages. Memory that the guest gives back, by
 * inflating or by reporting, is taken out of the memfd at once (vmm/balloon.h); what it takes again is
 * faulted in as memory that was never touched is.
 *
 * Queues: 0 inflates, 1 deflates. Reporting is number 4 in the specification, but drivers number the queues
 * that they use without gaps (Linux before 6.11 does, so reporting is their number 2), and some that meant
 * to be compatible with that expect number 3. Statistics and hinting, which 2 and 3 are for, are not offered:
 * all three are taken as reporting.
 *
 * DEFLATE_ON_OOM is the guest's own affair. MUST_TELL_HOST is not offered: a page that is used again without
 * a word is simply there. Neither is PAGE_POISON: a guest that expects something of pages that it reported
 * does not report then.
 *
 * Long requests are done in turns. One that is not at its end stays in the queue (virtqueue_unpop), so
 * nothing is ever in flight: a pause comes between two turns, and after a move such a request begins anew,
 * which is harmless as the guest has not got it back yet.
 *
 * Saved (after what vmm/virtio_pci.h lists): the target and what the driver says it has, in pages.
 * Rebuilt: how far a request had come.
 */
#include <errno.h>
#include <linux/virtio_balloon.h>
#include <linux/virtio_ids.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "vmm/balloon.h"
#include "vmm/virtio.h"
#include "vmm/virtio_pci.h"

enum { QUEUE_INFLATE, QUEUE_DEFLATE, QUEUE_REPORT_FIRST, QUEUES = 5 };
enum { CONFIG_TARGET = 0, CONFIG_ACTUAL = 4, CONFIG_BYTES = 8 };

struct virtio_balloon {
	struct virtio_pci *v;
	/* Read by virtio_balloon_state without the lock, which may be held by a thread that waits for a page
	 * of a guest that has just arrived: atomic. In pages. */
	uint32_t target, actual;
	bool driver;
	/* under the device's lock */
	uint64_t done[QUEUES]; /* of the first request of each queue */
};

static uint32_t total_pages(const struct virtio_balloon *d)
{
	return (uint32_t)(virtio_pci_memory(d->v)->size_bytes >> VIRTIO_BALLOON_PFN_SHIFT);
}

/* True when the request is at its end. */
static bool serve(struct virtio_balloon *d, unsigned queue, const struct virtqueue_chain *c)
{
	struct guest_memory *mem = virtio_pci_memory(d->v);

	if (queue == QUEUE_INFLATE)
		return balloon_inflate(mem, c, &d->done[queue]);
	if (queue >= QUEUE_REPORT_FIRST)
		return balloon_report(mem, c, &d->done[queue]);
	return true;
}

/* One request, or a turn of it, each time that we have the lock. */
static void process(void *dev, unsigned queue)
{
	struct virtio_balloon *d = dev;
	struct virtqueue *q = virtio_pci_queue(d->v, queue);
	const struct virtqueue_chain *c = virtio_pci_pop(d->v, queue);

	if (c && serve(d, queue, c)) {
		d->done[queue] = 0;
		virtqueue_push(q, c->head, 0);
		virtio_pci_signal(d->v, queue);
	} else if (c) {
		virtqueue_unpop(q);
	}
	if (c || (virtio_pci_running(d->v) && virtqueue_rearm(q)))
		virtio_pci_requeue(d->v, queue);
}

static void config_read(void *dev, uint8_t *config)
{
	struct virtio_balloon *d = dev;

	put_le32(config + CONFIG_TARGET, d->target);
	put_le32(config + CONFIG_ACTUAL, d->actual);
}

/* The driver writes `actual` alone, and as a whole. */
static void config_write(void *dev, unsigned offset, const uint8_t *data, unsigned len)
{
	struct virtio_balloon *d = dev;

	if (offset == CONFIG_ACTUAL && len == 4)
		__atomic_store_n(&d->actual, get_le32(data), __ATOMIC_RELAXED);
}

static void features_set(void *dev, uint64_t features)
{
	struct virtio_balloon *d = dev;

	__atomic_store_n(&d->driver, features != 0, __ATOMIC_RELAXED);
}

/* The target is the host's and stays; a new driver has nothing in its balloon. */
static void reset(void *dev)
{
	struct virtio_balloon *d = dev;

	__atomic_store_n(&d->actual, 0, __ATOMIC_RELAXED);
	memset(d->done, 0, sizeof d->done);
}

static void save(void *dev, struct state_writer *w)
{
	struct virtio_balloon *d = dev;

	state_put_u32(w, d->target);
	state_put_u32(w, d->actual);
}

static int load(void *dev, struct state_reader *r, struct error *err)
{
	struct virtio_balloon *d = dev;
	uint32_t target = state_get_u32(r), actual = state_get_u32(r);

	if (target > total_pages(d))
		return error_set(err, EINVAL, "a target of %u pages, where there are %u", target,
				 total_pages(d));
	__atomic_store_n(&d->target, target, __ATOMIC_RELAXED);
	__atomic_store_n(&d->actual, actual, __ATOMIC_RELAXED);
	return 0;
}

static void destroy(void *dev)
{
	free(dev);
}

static const struct virtio_device_ops balloon_ops = {
	.device_type = VIRTIO_ID_BALLOON,
	.class_code = 0x05, /* as others have it: a memory controller, of no other kind */
	.subclass = 0x80,
	.nqueues = QUEUES,
	.features = UINT64_C(1) << VIRTIO_BALLOON_F_DEFLATE_ON_OOM | UINT64_C(1)
									     << VIRTIO_BALLOON_F_REPORTING,
	.config_bytes = CONFIG_BYTES,
	.config_read = config_read,
	.config_write = config_write,
	.process = process,
	.features_set = features_set,
	.reset = reset,
	.save = save,
	.load = load,
	.destroy = destroy,
};

int virtio_balloon_create(struct machine *m, uint8_t slot, struct virtio_balloon **out, struct error *err)
{
	struct virtio_balloon *d = calloc(1, sizeof *d);
	int rc;

	*out = NULL;
	if (!d)
		return error_errno(err, ENOMEM, "balloon");
	rc = virtio_pci_add(m, slot, "virtio-balloon", "balloon", &balloon_ops, d, &d->v, err);
	if (rc < 0)
		return rc;
	*out = d;
	return 0;
}

void virtio_balloon_set_target(struct virtio_balloon *d, uint64_t balloon_bytes)
{
	uint64_t pages = balloon_bytes >> VIRTIO_BALLOON_PFN_SHIFT;

	virtio_pci_lock(d->v);
	__atomic_store_n(&d->target, pages < total_pages(d) ? (uint32_t)pages : total_pages(d),
			 __ATOMIC_RELAXED);
	virtio_pci_config_changed(d->v);
	virtio_pci_unlock(d->v);
}

void virtio_balloon_state(const struct virtio_balloon *d, struct machine_balloon *out)
{
	uint64_t all = total_pages(d), target = __atomic_load_n(&d->target, __ATOMIC_RELAXED),
		 actual = __atomic_load_n(&d->actual, __ATOMIC_RELAXED);

	*out = (struct machine_balloon){
		.target_bytes = (all - target) << VIRTIO_BALLOON_PFN_SHIFT,
		.actual_bytes = (actual < all ? all - actual : 0) << VIRTIO_BALLOON_PFN_SHIFT,
		.driver = __atomic_load_n(&d->driver, __ATOMIC_RELAXED),
	};
}
