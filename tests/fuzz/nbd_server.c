/* SPDX-License-Identifier: Apache-2.0 */
/* A whole connection: the handshake and the requests as the server reads them, over a block in memory. */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "nbd/nbd.h"
#include "nbd/protocol.h"

#define DISK_BYTES 65536

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint8_t disk[DISK_BYTES];

struct memory {
	struct block block;
	pthread_mutex_t lock;
	pthread_cond_t more;
	struct block_request *head, **tail;
};

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
		if (req->op == BLOCK_READ)
			memcpy(req->iov->iov_base, disk + req->offset_bytes, req->len_bytes);
		else if (req->op == BLOCK_WRITE)
			memcpy(disk + req->offset_bytes, req->iov->iov_base, req->len_bytes);
		else if (req->op != BLOCK_FLUSH)
			memset(disk + req->offset_bytes, 0, req->len_bytes);
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

static const struct block_ops memory_ops = {.name = "memory", .submit = memory_submit};
static struct memory memory = {.block = {.ops = &memory_ops,
					 .size_bytes = DISK_BYTES,
					 .limits = {.request_alignment = 1, .max_zeroes_bytes = 4096}},
			       .lock = PTHREAD_MUTEX_INITIALIZER,
			       .more = PTHREAD_COND_INITIALIZER,
			       .tail = &memory.head};

static void swallow(int fd)
{
	char buf[65536];
	struct pollfd pfd = {.fd = fd, .events = POLLIN};
	while (poll(&pfd, 1, 5000) > 0 && recv(fd, buf, sizeof buf, 0) > 0)
		;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static bool started;
	pthread_t thread;
	if (!started) {
		setenv("SNM_LOG", "error", 1);
		if (pthread_create(&thread, NULL, complete, &memory))
			abort();
		started = true;
	}
	if (size < 1 || size > 60000)
		return 0;
	struct nbd_server_options opt = {.export_name = "x",
					 .block = &memory.block,
					 .read_only = data[0] & 2,
					 .max_inflight_bytes = 65536,
					 .handshake_timeout_ms = 2000};
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
	return 0;
}
