/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A whole connection: the handshake and the requests as the server reads them, over a block in memory. It has
 * to end when the client stops sending, and under a sanitizer it may hold less than 64 MiB at any time.
 *
 * The first byte: 1: begin in the transmission phase; 2: read-only; 4: a large disk, and the server's own
 * limits instead of small ones.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "nbd/nbd.h"
#include "nbd/protocol.h"

#define DISK_BYTES	 65536
#define LARGE_BYTES	 (UINT64_C(1) << 40)
#define CONNECTION_BYTES (64L << 20)
#define HANG_MS		 5000

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint8_t disk[DISK_BYTES];

/* --- what is allocated; of a sanitizer, where there is one --- */

int __sanitizer_install_malloc_and_free_hooks(void (*allocated)(const volatile void *, size_t),
					      void (*freed)(const volatile void *)) __attribute__((weak));
size_t __sanitizer_get_allocated_size(const volatile void *p) __attribute__((weak));

static atomic_long held, most;

static void allocated(const volatile void *p, size_t len)
{
	long now = atomic_fetch_add(&held, (long)len) + (long)len, before = atomic_load(&most);
	while (now > before && !atomic_compare_exchange_weak(&most, &before, now))
		;
}

static void freed(const volatile void *p)
{
	if (p)
		atomic_fetch_sub(&held, (long)__sanitizer_get_allocated_size(p));
}

/* --- the disk --- */

struct memory {
	struct block block;
	pthread_mutex_t lock;
	pthread_cond_t more;
	struct block_request *head, **tail;
};

/* The large disk keeps nothing, and reads as what is at hand. */
static void execute(struct memory *m, struct block_request *req)
{
	if (m->block.size_bytes != DISK_BYTES)
		return;
	if (req->op == BLOCK_READ)
		memcpy(req->iov->iov_base, disk + req->offset_bytes, req->len_bytes);
	else if (req->op == BLOCK_WRITE)
		memcpy(disk + req->offset_bytes, req->iov->iov_base, req->len_bytes);
	else if (req->op != BLOCK_FLUSH)
		memset(disk + req->offset_bytes, 0, req->len_bytes);
}

/* Completions come from a thread of its own, as the contract has it. */
static void *complete(void *arg)
{
	struct memory *m = arg;
	for (;;) {
		pthread_mutex_lock(&m->lock);
		while (!m->head)
			pthread_cond_wait(&m->more, &m->lock);
		struct block_request *req = m->head;
		m->head = (struct block_request *)(uintptr_t)req->driver[0];
		if (!m->head)
			m->tail = &m->head;
		pthread_mutex_unlock(&m->lock);
		execute(m, req);
		req->done(req, 0);
	}
	return NULL;
}

static int memory_submit(struct block *blk, struct block_request *req)
{
	struct memory *m = (struct memory *)blk;
	SCOPE_LOCK(&m->lock);
	req->driver[0] = 0;
	*m->tail = req;
	m->tail = (struct block_request **)(void *)&req->driver[0];
	pthread_cond_signal(&m->more);
	return 0;
}

/* The worst reply to block status. */
static int memory_extents(struct block *blk, uint64_t offset, uint64_t len, struct block_extent *ext,
			  unsigned *n, struct error *err)
{
	unsigned i = 0;
	for (; i < *n && len; i++) {
		uint64_t piece = len < 512 ? len : 512;
		ext[i] = (struct block_extent){.len_bytes = piece, .hole = i % 2, .zero = i % 2};
		len -= piece;
	}
	*n = i;
	return 0;
}

static const struct block_ops memory_ops = {
	.name = "memory", .submit = memory_submit, .extents = memory_extents};
static struct memory memory = {.block = {.ops = &memory_ops,
					 .size_bytes = DISK_BYTES,
					 .limits = {.request_alignment = 1, .max_zeroes_bytes = 4096}},
			       .lock = PTHREAD_MUTEX_INITIALIZER,
			       .more = PTHREAD_COND_INITIALIZER,
			       .tail = &memory.head};

/* --- the client --- */

/* Everything the server says, until it closes. */
static void swallow(int fd)
{
	static char buf[1 << 20];
	struct pollfd pfd = {.fd = fd, .events = POLLIN};
	for (;;) {
		int rc = poll(&pfd, 1, HANG_MS);
		if (rc == 0) {
			fprintf(stderr, "the server neither answers nor closes\n");
			abort();
		}
		if (rc > 0 && recv(fd, buf, sizeof buf, 0) <= 0)
			return;
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static bool started;
	pthread_t thread;
	if (!started) {
		setenv("SNM_LOG", "error", 1);
		if (pthread_create(&thread, NULL, complete, &memory))
			abort();
		if (__sanitizer_install_malloc_and_free_hooks)
			__sanitizer_install_malloc_and_free_hooks(allocated, freed);
		started = true;
	}
	if (size < 1 || size > 60000)
		return 0;
	bool large = data[0] & 4;
	memory.block.size_bytes = large ? LARGE_BYTES : DISK_BYTES;
	struct nbd_server_options opt = {.export_name = "x",
					 .block = &memory.block,
					 .read_only = data[0] & 2,
					 .max_inflight_bytes = large ? 0 : 65536,
					 .handshake_timeout_ms = 2000};
	long before = atomic_load(&held);
	atomic_store(&most, before);
	struct nbd_server *server;
	struct conn *conn;
	int fds[2];
	if (nbd_server_create(&opt, &server, NULL) || socketpair(AF_UNIX, SOCK_STREAM, 0, fds) ||
	    conn_from_fd(fds[1], &conn, NULL) || nbd_server_add(server, conn, NULL))
		abort();
	/* Half of the inputs begin in the transmission phase, which few would reach by themselves. */
	if (data[0] & 1) {
		uint8_t go[4 + 16 + 6] = {0};
		put_be32(go, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
		put_be64(go + 4, NBD_IHAVEOPT);
		put_be32(go + 12, NBD_OPT_GO);
		put_be32(go + 16, 6);
		(void)!send(fds[0], go, sizeof go, MSG_NOSIGNAL);
	}
	(void)!send(fds[0], data + 1, size - 1, MSG_NOSIGNAL | MSG_DONTWAIT);
	shutdown(fds[0], SHUT_WR);
	swallow(fds[0]);
	close(fds[0]);
	nbd_server_free(server);
	if (atomic_load(&most) > before + CONNECTION_BYTES) {
		fprintf(stderr, "a connection held %ld bytes\n", atomic_load(&most) - before);
		abort();
	}
	return 0;
}
