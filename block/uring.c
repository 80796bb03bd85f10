/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <liburing.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/confine.h"
#include "base/log.h"
#include "block/raw.h"

#define RING_ENTRIES 256 /* operations in the kernel at a time */
#define REAP_BATCH   64

enum ring_file { FILE_DISK, FILE_WAKE, RING_FILES };

/*
 * One thread submits and reaps. A completion runs in the context of the thread that submitted, so one that
 * submits and then does something else (sends to a socket, waits for a lock) would hold its completions up,
 * and be interrupted by them.
 */
struct raw_uring {
	struct io_uring ring;
	struct raw_disk *disk;
	pthread_t thread;
	int wake; /* eventfd: there is something to submit, the thread sleeps */
	uint64_t woken;
	struct iovec woken_iov;
	unsigned inflight; /* of the thread */

	pthread_mutex_t lock; /* what follows */
	pthread_cond_t started;
	struct raw_op *pending, **pending_tail;
	bool asleep, stopping, running;
	int start_result;
};

/* Debian 12's shared liburing declares io_uring_register_restrictions and io_uring_enable_rings but does not
 * export them. */
static int ring_register(struct io_uring *ring, unsigned opcode, const void *arg, unsigned n)
{
	return syscall(__NR_io_uring_register, ring->ring_fd, opcode, arg, n) < 0 ? -errno : 0;
}

/* The opcodes that a disk needs, each on the one registered file: seccomp does not see what a ring does. */
static int restrict_ring(struct io_uring *ring, int disk_fd, int wake_fd)
{
	static const uint8_t ops[] = {IORING_OP_READV, IORING_OP_WRITEV, IORING_OP_FSYNC};
	const int files[RING_FILES] = {[FILE_DISK] = disk_fd, [FILE_WAKE] = wake_fd};
	struct io_uring_restriction res[ARRAY_SIZE(ops) + 2];
	memset(res, 0, sizeof res);
	unsigned n = 0;
	for (; n < ARRAY_SIZE(ops); n++) {
		res[n].opcode = IORING_RESTRICTION_SQE_OP;
		res[n].sqe_op = ops[n];
	}
	res[n].opcode = IORING_RESTRICTION_SQE_FLAGS_ALLOWED;
	res[n++].sqe_flags = IOSQE_FIXED_FILE;
	res[n].opcode = IORING_RESTRICTION_SQE_FLAGS_REQUIRED;
	res[n++].sqe_flags = IOSQE_FIXED_FILE;
	int rc = io_uring_register_files(ring, files, RING_FILES);
	if (rc == 0)
		rc = ring_register(ring, IORING_REGISTER_RESTRICTIONS, res, n);
	if (rc == 0)
		rc = ring_register(ring, IORING_REGISTER_ENABLE_RINGS, NULL, 0);
	return rc;
}

/* By the thread that will use it. */
static int open_ring(struct raw_uring *ring)
{
	static const unsigned flags[] = {
		IORING_SETUP_R_DISABLED | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
		IORING_SETUP_R_DISABLED, /* Linux before 6.1 */
	};
	int rc = -EINVAL;
	for (unsigned i = 0; i < ARRAY_SIZE(flags) && rc == -EINVAL; i++)
		rc = io_uring_queue_init(RING_ENTRIES, &ring->ring, flags[i]);
	if (rc < 0)
		return rc;
	rc = restrict_ring(&ring->ring, ring->disk->fd, ring->wake);
	if (rc < 0)
		io_uring_queue_exit(&ring->ring);
	return rc;
}

/* Gives the kernel what is queued, and waits until `wait` completions are there. */
static void push_sqes(struct raw_uring *ring, unsigned wait)
{
	for (unsigned tries = 0;; tries++) {
		int rc = io_uring_submit_and_wait(&ring->ring, wait);
		if (rc >= 0 && !io_uring_sq_ready(&ring->ring))
			return;
		if (rc >= 0 || rc == -EINTR)
			continue;
		if (tries == 1000)
			log_error("%s: io_uring_submit: %s; still trying", ring->disk->block.label,
				  strerror(-rc));
		if (tries < 100)
			sched_yield();
		else
			clock_sleep_ms(1); /* the kernel is short of memory */
	}
}

static void wake_thread(struct raw_uring *ring)
{
	uint64_t one = 1;
	ssize_t n;
	do
		n = write(ring->wake, &one, sizeof one);
	while (n < 0 && errno == EINTR);
}

static struct io_uring_sqe *next_sqe(struct raw_uring *ring)
{
	/* Never empty-handed after a submission: there are more entries than operations. */
	struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->ring);
	while (!sqe) {
		push_sqes(ring, 0);
		sqe = io_uring_get_sqe(&ring->ring);
	}
	return sqe;
}

static void queue_op(struct raw_uring *ring, struct raw_op *op)
{
	struct io_uring_sqe *sqe = next_sqe(ring);
	if (op->req->op == BLOCK_FLUSH) {
		io_uring_prep_fsync(sqe, FILE_DISK, IORING_FSYNC_DATASYNC);
	} else {
		unsigned niov = (unsigned)(op->niov - op->first);
		if (niov > 1024)
			niov = 1024; /* IOV_MAX; the rest counts as a short transfer */
		if (op->req->op == BLOCK_READ) {
			io_uring_prep_readv(sqe, FILE_DISK, op->iov + op->first, niov, op->offset_bytes);
		} else {
			io_uring_prep_writev(sqe, FILE_DISK, op->iov + op->first, niov, op->offset_bytes);
			if (op->req->flags & BLOCK_REQ_FUA)
				sqe->rw_flags = RWF_DSYNC;
		}
	}
	sqe->flags |= IOSQE_FIXED_FILE;
	io_uring_sqe_set_data(sqe, op);
}

static void listen_for_wake(struct raw_uring *ring)
{
	ring->woken_iov = (struct iovec){.iov_base = &ring->woken, .iov_len = sizeof ring->woken};
	struct io_uring_sqe *sqe = next_sqe(ring);
	io_uring_prep_readv(sqe, FILE_WAKE, &ring->woken_iov, 1, 0);
	sqe->flags |= IOSQE_FIXED_FILE;
	io_uring_sqe_set_data(sqe, NULL);
}

void raw_uring_submit(struct raw_uring *ring, struct raw_op *op)
{
	op->next = NULL;
	/* From a completion: at once, or the disk would idle until all are dealt with. */
	if (pthread_equal(pthread_self(), ring->thread) && ring->inflight < RING_ENTRIES) {
		ring->inflight++;
		queue_op(ring, op);
		push_sqes(ring, 0);
		return;
	}
	pthread_mutex_lock(&ring->lock);
	*ring->pending_tail = op;
	ring->pending_tail = &op->next;
	bool wake = ring->asleep;
	ring->asleep = false;
	pthread_mutex_unlock(&ring->lock);
	if (wake)
		wake_thread(ring);
}

/* Moves what is pending to the submission queue. False: the ring is to end, and nothing is left. */
static bool take_pending(struct raw_uring *ring)
{
	SCOPE_LOCK(&ring->lock);
	while (ring->pending && ring->inflight < RING_ENTRIES) {
		struct raw_op *op = ring->pending;
		ring->pending = op->next;
		if (!ring->pending)
			ring->pending_tail = &ring->pending;
		ring->inflight++;
		queue_op(ring, op);
	}
	ring->asleep = !ring->pending;
	return ring->inflight || ring->pending || !ring->stopping;
}

struct reaped {
	struct raw_op *op;
	int result;
};

/* Takes up to REAP_BATCH completions; those that are finished go to out. Returns their number. */
static unsigned reap(struct raw_uring *ring, struct reaped *out)
{
	struct io_uring_cqe *cqes[REAP_BATCH];
	struct raw_op *again = NULL, **again_tail = &again;
	bool woken = false;
	unsigned n = io_uring_peek_batch_cqe(&ring->ring, cqes, REAP_BATCH), finished = 0;
	for (unsigned i = 0; i < n; i++) {
		struct raw_op *op = io_uring_cqe_get_data(cqes[i]);
		int result = 0;
		if (!op) {
			woken = true;
		} else if (raw_op_advance(op, cqes[i]->res, &result)) {
			out[finished++] = (struct reaped){op, result};
		} else {
			op->next = NULL;
			*again_tail = op;
			again_tail = &op->next;
		}
	}
	io_uring_cq_advance(&ring->ring, n);
	ring->inflight -= finished;
	if (woken)
		listen_for_wake(ring);
	while (again) {
		struct raw_op *op = again;
		again = op->next;
		queue_op(ring, op);
	}
	return finished;
}

static void started(struct raw_uring *ring, int result)
{
	SCOPE_LOCK(&ring->lock);
	ring->running = true;
	ring->start_result = result;
	pthread_cond_signal(&ring->started);
}

static void *ring_main(void *arg)
{
	struct raw_uring *ring = arg;
	struct reaped done[REAP_BATCH];
	pthread_setname_np(pthread_self(), "disk-ring");
	int rc = open_ring(ring);
	if (!rc)
		confine_self(CONFINE_DISK);
	started(ring, rc);
	if (rc < 0)
		return NULL;
	listen_for_wake(ring);
	while (take_pending(ring)) {
		push_sqes(ring, 1);
		unsigned n = reap(ring, done);
		for (unsigned i = 0; i < n; i++)
			raw_op_complete(done[i].op, done[i].result);
	}
	io_uring_queue_exit(&ring->ring);
	return NULL;
}

static void destroy(struct raw_uring *ring)
{
	pthread_cond_destroy(&ring->started);
	pthread_mutex_destroy(&ring->lock);
	close(ring->wake);
	free(ring);
}

static int start_thread(struct raw_uring *ring)
{
	sigset_t all, old;
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &old);
	int rc = pthread_create(&ring->thread, NULL, ring_main, ring);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (rc)
		return -rc;
	pthread_mutex_lock(&ring->lock);
	while (!ring->running)
		pthread_cond_wait(&ring->started, &ring->lock);
	rc = ring->start_result;
	pthread_mutex_unlock(&ring->lock);
	if (rc < 0)
		pthread_join(ring->thread, NULL);
	return rc;
}

int raw_uring_create(struct raw_disk *disk, struct raw_uring **out, struct error *err)
{
	struct raw_uring *ring = calloc(1, sizeof *ring);
	if (!ring)
		return error_errno(err, ENOMEM, "io_uring");
	ring->disk = disk;
	ring->pending_tail = &ring->pending;
	ring->wake = eventfd(0, EFD_CLOEXEC);
	if (ring->wake < 0) {
		int code = errno;
		free(ring);
		return error_errno(err, code, "io_uring: eventfd");
	}
	pthread_mutex_init(&ring->lock, NULL);
	pthread_cond_init(&ring->started, NULL);
	int rc = start_thread(ring);
	if (rc < 0) {
		destroy(ring);
		return error_errno(err, rc, "io_uring");
	}
	*out = ring;
	return 0;
}

void raw_uring_free(struct raw_uring *ring)
{
	if (!ring)
		return;
	pthread_mutex_lock(&ring->lock);
	ring->stopping = true;
	pthread_mutex_unlock(&ring->lock);
	wake_thread(ring);
	pthread_join(ring->thread, NULL);
	destroy(ring);
}
