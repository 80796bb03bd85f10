/* SPDX-License-Identifier: Apache-2.0 */
/* The I/O thread of a virtio device, and the notifications that wake it. */
#include <errno.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>

#include "base/cleanup.h"
#include "base/confine.h"
#include "base/log.h"
#include "vmm/virtio_pci_internal.h"

/* epoll tags: a queue number, or one of these */
enum { TAG_CONTROL = 1000, TAG_WATCH };

void virtio_pci_kick(int fd)
{
	uint64_t one = 1;

	/* EAGAIN means that the counter is full, so somebody is woken anyway. */
	if (write(fd, &one, sizeof one) < 0 && errno != EAGAIN)
		log_error("virtio: eventfd: %s", strerror(errno));
}

void virtio_pci_requeue(struct virtio_pci *v, unsigned queue)
{
	virtio_pci_kick(v->kick_fd[queue]);
}

static void consume(int fd)
{
	uint64_t count;

	if (read(fd, &count, sizeof count) < 0 && errno != EAGAIN)
		log_error("virtio: eventfd: %s", strerror(errno));
}

/* Lock held. */
static void process_queue(struct virtio_pci *v, unsigned queue)
{
	if (virtio_pci_running(v) && v->queue[queue].enabled)
		v->ops->process(v->dev, queue);
}

static void handle(struct virtio_pci *v, unsigned tag)
{
	if (tag < v->ops->nqueues) {
		consume(v->kick_fd[tag]);
		process_queue(v, tag);
	} else if (tag == TAG_WATCH) {
		/* Edge-triggered: what comes while paused waits in the fd until the look at all. */
		if (virtio_pci_running(v))
			v->ops->readable(v->dev);
	} else if (tag == TAG_CONTROL) {
		consume(v->control_fd);
		if (!v->look_at_all || __atomic_load_n(&v->paused, __ATOMIC_RELAXED))
			return;
		v->look_at_all = false;
		for (unsigned i = 0; i < v->ops->nqueues; i++)
			process_queue(v, i);
		if (v->watch_fd >= 0 && virtio_pci_running(v))
			v->ops->readable(v->dev);
	}
}

static void *io_thread(void *opaque)
{
	struct virtio_pci *v = opaque;
	struct epoll_event ev[16];
	bool stop = false;

	confine_self(CONFINE_DEVICE);
	while (!stop) {
		int n = epoll_wait(v->epoll_fd, ev, ARRAY_SIZE(ev), -1);

		if (n < 0 && errno != EINTR) {
			log_error("%s: epoll: %s", v->label, strerror(errno));
			return NULL;
		}
		for (int i = 0; i < n; i++) {
			virtio_pci_lock(v);
			handle(v, ev[i].data.u32);
			stop = v->stop;
			virtio_pci_unlock(v);
		}
	}
	return NULL;
}

static int watch(struct virtio_pci *v, int fd, uint32_t events, unsigned tag, struct error *err)
{
	struct epoll_event ev = {.events = events, .data.u32 = tag};

	if (epoll_ctl(v->epoll_fd, EPOLL_CTL_ADD, fd, &ev) < 0)
		return error_errno(err, errno, "%s: epoll", v->label);
	return 0;
}

int virtio_pci_watch(struct virtio_pci *v, int fd, struct error *err)
{
	v->watch_fd = fd;
	return watch(v, fd, EPOLLIN | EPOLLET, TAG_WATCH, err);
}

static int new_eventfd(struct virtio_pci *v, int *fd, unsigned tag, struct error *err)
{
	*fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (*fd < 0)
		return error_errno(err, errno, "%s: eventfd", v->label);
	return watch(v, *fd, EPOLLIN, tag, err);
}

int virtio_pci_thread_start(struct virtio_pci *v, struct error *err)
{
	sigset_t all, old;
	int rc;

	v->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (v->epoll_fd < 0)
		return error_errno(err, errno, "%s: epoll", v->label);
	rc = new_eventfd(v, &v->control_fd, TAG_CONTROL, err);
	for (unsigned i = 0; rc == 0 && i < v->ops->nqueues; i++)
		rc = new_eventfd(v, &v->kick_fd[i], i, err);
	if (rc < 0)
		return rc;
	/* Signals belong to the main thread and to the vCPU threads. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	rc = pthread_create(&v->thread, NULL, io_thread, v);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (rc)
		return error_errno(err, rc, "%s: thread", v->label);
	v->thread_started = true;
	return 0;
}

void virtio_pci_thread_stop(struct virtio_pci *v)
{
	if (v->thread_started) {
		virtio_pci_lock(v);
		v->stop = true;
		virtio_pci_unlock(v);
		virtio_pci_kick(v->control_fd);
		pthread_join(v->thread, NULL);
		v->thread_started = false;
	}
}

void virtio_pci_thread_close(struct virtio_pci *v)
{
	for (unsigned i = 0; i < VIRTIO_PCI_QUEUES_MAX; i++)
		cleanup_fd(&v->kick_fd[i]);
	cleanup_fd(&v->control_fd);
	cleanup_fd(&v->epoll_fd);
}

/* 16-bit writes of the queue number, as drivers do; other widths reach the BAR handler. */
static int ioeventfd(struct virtio_pci *v, unsigned queue, uint64_t base, unsigned flags)
{
	struct kvm_ioeventfd ev = {
		.addr = base + REGION_NOTIFY + queue * NOTIFY_MULTIPLIER,
		.len = 2,
		.fd = v->kick_fd[queue],
		.flags = flags,
	};

	return ioctl(machine_vm_fd(v->machine), KVM_IOEVENTFD, &ev) < 0 ? -errno : 0;
}

/* Called by the PCI code, perhaps with its locks held: takes ioevent_lock alone. */
void virtio_pci_mapped(void *opaque, uint64_t base, bool mapped)
{
	struct virtio_pci *v = opaque;
	SCOPE_LOCK(&v->ioevent_lock);

	for (unsigned i = 0; i < v->ops->nqueues; i++) {
		if (v->ioevent_registered[i])
			ioeventfd(v, i, v->mapped_base, KVM_IOEVENTFD_FLAG_DEASSIGN);
		v->ioevent_registered[i] = false;
	}
	v->mapped_base = base;
	for (unsigned i = 0; mapped && machine_vm_fd(v->machine) >= 0 && i < v->ops->nqueues; i++) {
		int rc = ioeventfd(v, i, base, 0);

		v->ioevent_registered[i] = rc == 0;
		if (rc < 0)
			log_warn("%s: ioeventfd at 0x%llx: %s; notifications are slower", v->label,
				 (unsigned long long)base, strerror(-rc));
	}
}
