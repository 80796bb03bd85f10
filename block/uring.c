/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <liburing.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "block/raw.h"

#define RING_ENTRIES 256
#define REAP_BATCH   64

struct raw_uring {
	struct io_uring ring;
	struct raw_disk *disk;
	pthread_t thread;
	pthread_mutex_t lock; /* the submission queue and what follows */
	struct raw_op *pending, **pending_tail;
	unsigned inflight; /* in the kernel or the submission queue */
};

/* Debian 12's shared liburing declares io_uring_register_restrictions and io_uring_enable_rings but does not
 * export them. */
static int ring_register(struct io_uring *ring, unsigned opcode, const void *arg, unsigned n)
{
	return syscall(__NR_io_uring_register, ring->ring_fd, opcode, arg, n) < 0 ? -errno : 0;
}

/* The opcodes that a disk needs, each on the one registered file: seccomp does not see what a ring does. */
static int restrict_ring(struct io_uring *ring, int fd)
{
	static const uint8_t ops[] = {IORING_OP_NOP, IORING_OP_READV, IORING_OP_WRITEV, IORING_OP_FSYNC};
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
	int rc = io_uring_register_files(ring, &fd, 1);
	if (rc == 0)
		rc = ring_register(ring, IORING_REGISTER_RESTRICTIONS, res, n);
	if (rc == 0)
		rc = ring_register(ring, IORING_REGISTER_ENABLE_RINGS, NULL, 0);
	return rc;
}

/* Caller holds ring->lock and has counted the operation in inflight. */
static void queue_sqe(struct raw_uring *ring, struct raw_op *op)
{
	/* Never empty-handed: inflight is at most RING_ENTRIES. */
	struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->ring);
	if (!sqe) {
		io_uring_submit(&ring->ring);
		sqe = io_uring_get_sqe(&ring->ring);
	}
	if (!op) {
		io_uring_prep_nop(sqe);
	} else if (op->req->op == BLOCK_FLUSH) {
		io_uring_prep_fsync(sqe, 0, IORING_FSYNC_DATASYNC);
	} else {
		unsigned niov = (unsigned)(op->niov - op->first);
		if (niov > 1024)
			niov = 1024; /* IOV_MAX; the rest counts as a short transfer */
		if (op->req->op == BLOCK_READ) {
			io_uring_prep_readv(sqe, 0, op->iov + op->first, niov, op->offset_bytes);
		} else {
			io_uring_prep_writev(sqe, 0, op->iov + op->first, niov, op->offset_bytes);
			if (op->req->flags & BLOCK_REQ_FUA)
				sqe->rw_flags = RWF_DSYNC;
		}
	}
	sqe->flags |= IOSQE_FIXED_FILE;
	io_uring_sqe_set_data(sqe, op);
}

/* Caller holds ring->lock. */
static void push_sqes(struct raw_uring *ring)
{
	for (unsigned tries = 0; io_uring_sq_ready(&ring->ring); tries++) {
		int rc = io_uring_submit(&ring->ring);
		if (rc >= 0)
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

void raw_uring_submit(struct raw_uring *ring, struct raw_op *op)
{
	SCOPE_LOCK(&ring->lock);
	if (ring->inflight >= RING_ENTRIES) {
		op->next = NULL;
		*ring->pending_tail = op;
		ring->pending_tail = &op->next;
		return;
	}
	ring->inflight++;
	queue_sqe(ring, op);
	push_sqes(ring);
}

struct reaped {
	struct raw_op *op;
	int result;
};

/* Takes up to REAP_BATCH completions; finished ones go to out. Returns their number; sets *stop on the NOP.
 */
static unsigned reap(struct raw_uring *ring, struct reaped *out, bool *stop)
{
	struct io_uring_cqe *cqes[REAP_BATCH];
	struct raw_op *again = NULL, **again_tail = &again;
	unsigned n = io_uring_peek_batch_cqe(&ring->ring, cqes, REAP_BATCH), finished = 0, gone = 0;
#ifdef __SANITIZE_THREAD__
	/* The kernel orders a completion after its submission, which the sanitizer cannot see. */
	pthread_mutex_lock(&ring->lock);
	pthread_mutex_unlock(&ring->lock);
#endif
	for (unsigned i = 0; i < n; i++) {
		struct raw_op *op = io_uring_cqe_get_data(cqes[i]);
		if (!op) {
			*stop = true;
			gone++;
			continue;
		}
		/* ECANCELED: the thread that submitted it ended before the kernel's worker came to it. */
		int res = cqes[i]->res == -ECANCELED ? -EAGAIN : cqes[i]->res, result = 0;
		if (raw_op_advance(op, res, &result)) {
			out[finished++] = (struct reaped){op, result};
			gone++;
		} else {
			op->next = NULL;
			*again_tail = op;
			again_tail = &op->next;
		}
	}
	io_uring_cq_advance(&ring->ring, n);
	SCOPE_LOCK(&ring->lock);
	ring->inflight -= gone;
	while (again) {
		struct raw_op *op = again;
		again = op->next;
		queue_sqe(ring, op);
	}
	while (ring->pending && ring->inflight < RING_ENTRIES) {
		struct raw_op *op = ring->pending;
		ring->pending = op->next;
		if (!ring->pending)
			ring->pending_tail = &ring->pending;
		ring->inflight++;
		queue_sqe(ring, op);
	}
	push_sqes(ring);
	return finished;
}

static void *ring_main(void *arg)
{
	struct raw_uring *ring = arg;
	struct reaped done[REAP_BATCH];
	bool stop = false;
	pthread_setname_np(pthread_self(), "disk-ring");
	while (!stop) {
		struct io_uring_cqe *cqe;
		int rc = io_uring_wait_cqe(&ring->ring, &cqe);
		if (rc < 0 && rc != -EINTR && rc != -EAGAIN) {
			log_error("%s: io_uring wait: %s", ring->disk->block.label, strerror(-rc));
			clock_sleep_ms(10);
		}
		if (rc < 0)
			continue;
		unsigned n = reap(ring, done, &stop);
		for (unsigned i = 0; i < n; i++)
			raw_op_complete(done[i].op, done[i].result);
	}
	return NULL;
}

int raw_uring_create(struct raw_disk *disk, struct raw_uring **out, struct error *err)
{
	CLEANUP_FREE struct raw_uring *ring = calloc(1, sizeof *ring);
	if (!ring)
		return error_errno(err, ENOMEM, "io_uring");
	ring->disk = disk;
	ring->pending_tail = &ring->pending;
	int rc = io_uring_queue_init(RING_ENTRIES, &ring->ring, IORING_SETUP_R_DISABLED);
	if (rc < 0)
		return error_errno(err, rc, "io_uring_setup");
	rc = restrict_ring(&ring->ring, disk->fd);
	if (rc < 0) {
		io_uring_queue_exit(&ring->ring);
		return error_errno(err, rc, "io_uring restrictions");
	}
	pthread_mutex_init(&ring->lock, NULL);
	sigset_t all, old;
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &old);
	rc = pthread_create(&ring->thread, NULL, ring_main, ring);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (rc) {
		io_uring_queue_exit(&ring->ring);
		return error_errno(err, rc, "io_uring completion thread");
	}
	*out = steal_ptr(ring);
	return 0;
}

void raw_uring_free(struct raw_uring *ring)
{
	if (!ring)
		return;
	pthread_mutex_lock(&ring->lock);
	ring->inflight++;
	queue_sqe(ring, NULL);
	push_sqes(ring);
	pthread_mutex_unlock(&ring->lock);
	pthread_join(ring->thread, NULL);
	io_uring_queue_exit(&ring->ring);
	pthread_mutex_destroy(&ring->lock);
	free(ring);
}
