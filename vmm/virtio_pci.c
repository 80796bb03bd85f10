/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/virtio_pci.h"

#include <errno.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/cleanup.h"
#include "base/cond.h"
#include "base/log.h"
#include "vmm/virtio_pci_internal.h"

#define VIRTIO_PCI_STATE_VERSION 1
#define VIRTIO_PCI_VENDOR	 0x1af4
#define VIRTIO_PCI_DEVICE_BASE	 0x1040
#define FAULTS_LOGGED_MAX	 16
#define DESTROY_TIMEOUT_MS	 30000

void virtio_pci_lock(struct virtio_pci *v)
{
	pthread_mutex_lock(&v->lock);
}

void virtio_pci_unlock(struct virtio_pci *v)
{
	uint64_t raise = v->raise;
	struct pci_device *pci = v->pci;

	v->raise = 0;
	pthread_mutex_unlock(&v->lock);
	for (unsigned i = 0; raise; i++, raise >>= 1)
		if (raise & 1)
			pci_msix_trigger(pci, i);
}

struct virtqueue *virtio_pci_queue(struct virtio_pci *v, unsigned queue)
{
	return &v->queue[queue];
}

struct guest_memory *virtio_pci_memory(struct virtio_pci *v)
{
	return v->mem;
}

uint64_t virtio_pci_features(const struct virtio_pci *v)
{
	return v->driver_features;
}

bool virtio_pci_running(const struct virtio_pci *v)
{
	return !__atomic_load_n(&v->paused, __ATOMIC_RELAXED) && !v->reset_pending &&
	       (v->status & VIRTIO_CONFIG_S_DRIVER_OK) && !(v->status & VIRTIO_CONFIG_S_NEEDS_RESET);
}

struct virtqueue_chain *virtio_pci_pop(struct virtio_pci *v, unsigned queue)
{
	struct error err = ERROR_INIT;
	int rc;

	if (!virtio_pci_running(v))
		return NULL;
	rc = virtqueue_pop(&v->queue[queue], &v->chain, &err);
	if (rc < 0)
		virtio_pci_broken(v, "queue %u: %s", queue, err.message);
	return rc > 0 ? &v->chain : NULL;
}

static void raise_vector(struct virtio_pci *v, uint16_t vector)
{
	if (vector <= v->ops->nqueues)
		v->raise |= UINT64_C(1) << vector;
}

void virtio_pci_signal(struct virtio_pci *v, unsigned queue)
{
	if (!v->queue[queue].enabled || !virtqueue_should_signal(&v->queue[queue]))
		return;
	v->isr |= ISR_QUEUE;
	raise_vector(v, v->queue[queue].vector);
}

void virtio_pci_config_changed(struct virtio_pci *v)
{
	v->generation++;
	v->isr |= ISR_CONFIG;
	raise_vector(v, v->config_vector);
}

void virtio_pci_broken(struct virtio_pci *v, const char *fmt, ...)
{
	char text[256];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof text, fmt, ap);
	va_end(ap);
	/* A guest can do this as often as it likes; the log must not grow with it. */
	if (v->faults_logged < FAULTS_LOGGED_MAX)
		log_warn("%s: %s; the device needs a reset by its driver%s", v->label, text,
			 ++v->faults_logged == FAULTS_LOGGED_MAX ? " (not logged any more)" : "");
	v->status |= VIRTIO_CONFIG_S_NEEDS_RESET;
	if (v->status & VIRTIO_CONFIG_S_DRIVER_OK)
		virtio_pci_config_changed(v);
}

void virtio_pci_inflight_begin(struct virtio_pci *v)
{
	v->inflight++;
}

void virtio_pci_inflight_cancel(struct virtio_pci *v)
{
	if (--v->inflight == 0) {
		if (v->reset_pending)
			virtio_pci_reset_now(v);
		pthread_cond_broadcast(&v->idle);
	}
}

void virtio_pci_inflight_end(struct virtio_pci *v)
{
	virtio_pci_lock(v);
	virtio_pci_inflight_cancel(v);
	/* Not virtio_pci_unlock: from here on a destroyer may free everything but the mutex's last touch. */
	pthread_mutex_unlock(&v->lock);
}

void virtio_pci_section(char name[STATE_NAME_BYTES], const char *kind, const char *id, uint8_t slot)
{
	int n = snprintf(name, STATE_NAME_BYTES, "%s.%s", kind, id);

	if (n >= STATE_NAME_BYTES)
		snprintf(name + STATE_NAME_BYTES - 4, 4, "~%02u", slot % 100u);
}

static void device_pause(void *dev)
{
	struct virtio_pci *v = dev;

	/* The I/O thread takes requests under the lock only: once we had it, nothing more is taken. It sees
	 * this before: it would take the lock again at once, and go on with a queue of long requests. */
	__atomic_store_n(&v->paused, true, __ATOMIC_RELAXED);
	virtio_pci_lock(v);
	virtio_pci_unlock(v);
}

static int device_drain(void *dev, unsigned timeout_ms)
{
	struct virtio_pci *v = dev;
	struct timespec until;
	int rc = 0;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += timeout_ms / 1000;
	until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
	if (until.tv_nsec >= 1000000000) {
		until.tv_sec++;
		until.tv_nsec -= 1000000000;
	}
	virtio_pci_lock(v);
	while (v->inflight && rc == 0)
		rc = pthread_cond_timedwait(&v->idle, &v->lock, &until);
	rc = 0;
	if (v->inflight) {
		log_warn("%s: %u requests in flight for more than %u ms", v->label, v->inflight, timeout_ms);
		rc = -ETIMEDOUT;
	}
	virtio_pci_unlock(v);
	return rc;
}

static void device_resume(void *dev)
{
	struct virtio_pci *v = dev;

	virtio_pci_lock(v);
	__atomic_store_n(&v->paused, false, __ATOMIC_RELAXED);
	v->look_at_all = true;
	if (v->ops->resumed)
		v->ops->resumed(v->dev);
	/* An interrupt or a notification may have been lost on the way: a spurious one costs nothing. */
	for (unsigned i = 0; i < v->ops->nqueues; i++)
		if (v->queue[i].enabled && (v->status & VIRTIO_CONFIG_S_DRIVER_OK))
			raise_vector(v, v->queue[i].vector);
	if (v->isr & ISR_CONFIG)
		raise_vector(v, v->config_vector);
	virtio_pci_kick(v->control_fd);
	virtio_pci_unlock(v);
}

static int device_save(void *dev, struct state_writer *w, struct error *err)
{
	struct virtio_pci *v = dev;
	int rc = 0;

	virtio_pci_lock(v);
	if (!__atomic_load_n(&v->paused, __ATOMIC_RELAXED) || v->inflight) {
		rc = error_set(err, EBUSY, "%s: %u requests in flight, or not paused", v->label, v->inflight);
		virtio_pci_unlock(v);
		return rc;
	}
	state_section_begin(w, v->section, VIRTIO_PCI_STATE_VERSION);
	state_put_u32(w, v->device_feature_select);
	state_put_u32(w, v->driver_feature_select);
	state_put_u64(w, v->driver_features);
	state_put_u16(w, v->config_vector);
	state_put_u16(w, v->queue_select);
	state_put_u8(w, v->status);
	state_put_u8(w, v->generation);
	state_put_u8(w, v->isr);
	state_put_bytes(w, v->cfg_cap, sizeof v->cfg_cap);
	state_put_u8(w, (uint8_t)v->ops->nqueues);
	for (unsigned i = 0; i < v->ops->nqueues; i++)
		virtqueue_save(&v->queue[i], w);
	if (v->ops->save)
		v->ops->save(v->dev, w);
	virtio_pci_unlock(v);
	/* Not under our lock: see the order of locks in the header. */
	pci_device_save(v->pci, w);
	state_section_end(w);
	return 0;
}

static int load_queues(struct virtio_pci *v, struct state_reader *r, struct error *err)
{
	bool event_idx = v->driver_features & UINT64_C(1) << VIRTIO_RING_F_EVENT_IDX;
	bool indirect = v->driver_features & UINT64_C(1) << VIRTIO_RING_F_INDIRECT_DESC;
	bool drained = !(v->status & VIRTIO_CONFIG_S_NEEDS_RESET);
	unsigned n = state_get_u8(r);

	if (n != v->ops->nqueues)
		return error_set(err, EINVAL, "%u queues instead of %u", n, v->ops->nqueues);
	for (unsigned i = 0; i < n; i++) {
		struct virtqueue *q = &v->queue[i];

		if (virtqueue_load(q, r, event_idx, indirect, drained, err) < 0)
			return error_prefix(err, "queue %u", i);
		if (q->vector != VIRTQUEUE_NO_VECTOR && q->vector > v->ops->nqueues)
			return error_set(err, EINVAL, "queue %u: vector %u does not exist", i, q->vector);
	}
	return 0;
}

static int load_locked(struct virtio_pci *v, struct state_reader *r, struct error *err)
{
	uint8_t cap[VIRTIO_PCI_CAP_BYTES];
	int rc;

	v->device_feature_select = state_get_u32(r);
	v->driver_feature_select = state_get_u32(r);
	v->driver_features = state_get_u64(r);
	v->config_vector = state_get_u16(r);
	v->queue_select = state_get_u16(r);
	v->status = state_get_u8(r);
	v->generation = state_get_u8(r);
	v->isr = state_get_u8(r);
	state_get_bytes(r, cap, sizeof cap);
	v->cfg_cap[4] = cap[4];
	memcpy(v->cfg_cap + 8, cap + 8, 8);
	if ((v->status & VIRTIO_CONFIG_S_FEATURES_OK) &&
	    ((v->driver_features & ~virtio_pci_offered(v)) ||
	     !(v->driver_features & UINT64_C(1) << VIRTIO_F_VERSION_1)))
		return error_set(err, EINVAL, "features 0x%llx are not among the 0x%llx offered",
				 (unsigned long long)v->driver_features,
				 (unsigned long long)virtio_pci_offered(v));
	if (v->config_vector != VIRTQUEUE_NO_VECTOR && v->config_vector > v->ops->nqueues)
		return error_set(err, EINVAL, "configuration vector %u does not exist", v->config_vector);
	rc = load_queues(v, r, err);
	if (rc == 0 && v->ops->load)
		rc = v->ops->load(v->dev, r, err);
	if (rc == 0 && v->ops->features_set)
		v->ops->features_set(v->dev,
				     v->status & VIRTIO_CONFIG_S_FEATURES_OK ? v->driver_features : 0);
	return rc;
}

static int device_load(void *dev, struct state_reader *r, struct error *err)
{
	struct virtio_pci *v = dev;
	uint32_t version;
	int rc;

	rc = state_reader_section(r, v->section, VIRTIO_PCI_STATE_VERSION, &version, err);
	if (rc < 0)
		return rc;
	virtio_pci_lock(v);
	virtio_pci_reset_now(v);
	rc = load_locked(v, r, err);
	if (rc < 0)
		virtio_pci_reset_now(v);
	virtio_pci_unlock(v);
	if (rc == 0)
		rc = pci_device_load(v->pci, r, err);
	if (rc < 0)
		return error_prefix(err, "%s", v->label);
	return state_reader_section_end(r, err);
}

static void device_reset(void *dev)
{
	struct virtio_pci *v = dev;

	virtio_pci_lock(v);
	if (v->inflight)
		v->reset_pending = true; /* the last completion does it */
	else
		virtio_pci_reset_now(v);
	virtio_pci_unlock(v);
	pci_device_reset(v->pci);
}

static void free_device(struct virtio_pci *v)
{
	virtio_pci_thread_stop(v);
	/* Unmaps the BAR, which takes the ioeventfds back, so these are closed after it. */
	if (v->pci)
		pci_device_destroy(v->pci);
	virtio_pci_thread_close(v);
	pthread_cond_destroy(&v->idle);
	pthread_mutex_destroy(&v->lock);
	pthread_mutex_destroy(&v->ioevent_lock);
	free(v);
}

static void device_destroy(void *dev)
{
	struct virtio_pci *v = dev;
	const struct virtio_device_ops *ops = v->ops;
	void *own = v->dev;

	device_pause(v);
	if (device_drain(v, DESTROY_TIMEOUT_MS) < 0) {
		/* The block still owns requests that point at us and into guest memory. */
		log_error("%s: requests still in flight after %u s; its memory stays allocated", v->label,
			  DESTROY_TIMEOUT_MS / 1000);
		return;
	}
	free_device(v);
	if (ops->destroy)
		ops->destroy(own);
}

const struct device_ops virtio_pci_device_ops = {
	.name = "virtio",
	.pause = device_pause,
	.drain = device_drain,
	.resume = device_resume,
	.save = device_save,
	.load = device_load,
	.reset = device_reset,
	.destroy = device_destroy,
};

static int create_pci(struct virtio_pci *v, uint8_t slot, struct error *err)
{
	struct pci_device_config cfg = {
		.slot = slot,
		.vendor_id = VIRTIO_PCI_VENDOR,
		.device_id = VIRTIO_PCI_DEVICE_BASE + v->ops->device_type,
		.subsystem_vendor_id = VIRTIO_PCI_VENDOR,
		.subsystem_id = VIRTIO_PCI_DEVICE_BASE + v->ops->device_type,
		.revision = 1,
		.class_code = v->ops->class_code,
		.subclass = v->ops->subclass,
		.msix_bar = VIRTIO_MSIX_BAR,
		.msix_vectors = v->ops->nqueues + 1,
	};

	cfg.bar[VIRTIO_BAR].size_bytes = VIRTIO_BAR_BYTES;
	cfg.bar[VIRTIO_BAR].handler = virtio_pci_bar_handler;
	cfg.bar[VIRTIO_BAR].handler.opaque = v;
	cfg.bar[VIRTIO_BAR].mapped = virtio_pci_mapped;
	return pci_device_create(machine_pci(v->machine), &cfg, &v->pci, err);
}

int virtio_pci_create(struct machine *m, uint8_t slot, const char *section, const char *label,
		      const struct virtio_device_ops *ops, void *dev, struct virtio_pci **out,
		      struct error *err)
{
	struct virtio_pci *v = calloc(1, sizeof *v);
	int rc;

	*out = NULL;
	if (!v)
		return error_errno(err, ENOMEM, "%s", label);
	v->machine = m;
	v->mem = machine_memory(m);
	v->ops = ops;
	v->dev = dev;
	v->paused = true;
	v->config_vector = VIRTQUEUE_NO_VECTOR;
	v->epoll_fd = v->control_fd = v->watch_fd = -1;
	snprintf(v->section, sizeof v->section, "%s", section);
	snprintf(v->label, sizeof v->label, "%s", label);
	pthread_mutex_init(&v->lock, NULL);
	pthread_mutex_init(&v->ioevent_lock, NULL);
	cond_init_monotonic(&v->idle);
	for (unsigned i = 0; i < VIRTIO_PCI_QUEUES_MAX; i++)
		v->kick_fd[i] = -1;
	for (unsigned i = 0; i < ops->nqueues; i++)
		virtqueue_init(&v->queue[i], v->mem, VIRTQUEUE_SIZE_MAX);
	rc = virtio_pci_thread_start(v, err);
	if (rc == 0)
		rc = create_pci(v, slot, err);
	if (rc == 0)
		rc = virtio_pci_add_capabilities(v, err);
	if (rc < 0) {
		free_device(v);
		return error_prefix(err, "%s", label);
	}
	*out = v;
	return 0;
}

int virtio_pci_add(struct machine *m, uint8_t slot, const char *section, const char *label,
		   const struct virtio_device_ops *ops, void *dev, struct virtio_pci **out, struct error *err)
{
	int rc = virtio_pci_create(m, slot, section, label, ops, dev, out, err);

	if (rc < 0) {
		ops->destroy(dev);
		return rc;
	}
	rc = machine_add_device(m, &virtio_pci_device_ops, *out, err);
	if (rc < 0)
		virtio_pci_device_ops.destroy(*out); /* and dev, which *out may be in */
	return rc;
}
