/* SPDX-License-Identifier: Apache-2.0 */
#include "net/conn.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "net/conn_impl.h"

#define IOV_BATCH 64

int conn_alloc(int fd, struct conn **out, struct error *err)
{
	CLEANUP_FD int owned = fd;
	CLEANUP_FD int wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	int one = 1, flags;
	struct conn *conn;

	*out = NULL;
	if (wake < 0)
		return error_errno(err, errno, "eventfd");
	flags = fcntl(owned, F_GETFL);
	if (flags < 0 || fcntl(owned, F_SETFL, flags | O_NONBLOCK) < 0)
		return error_errno(err, errno, "connection: non-blocking mode");
	/* A Unix socket refuses it, rightly. */
	(void)setsockopt(owned, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	conn = calloc(1, sizeof *conn);
	if (!conn)
		return error_errno(err, ENOMEM, "connection");
	pthread_mutex_init(&conn->ssl_lock, NULL);
	conn->fd = steal_fd(&owned);
	conn->wake_fd = steal_fd(&wake);
	*out = conn;
	return 0;
}

int conn_from_fd(int fd, struct conn **out, struct error *err)
{
	return conn_alloc(fd, out, err);
}

void conn_close(struct conn *conn)
{
	if (!conn)
		return;
	if (conn->ssl)
		tls_release(conn);
	if (conn->fd >= 0)
		close(conn->fd);
	close(conn->wake_fd);
	pthread_mutex_destroy(&conn->ssl_lock);
	free(conn);
}

int conn_take_fd(struct conn *conn)
{
	int fd = conn->fd, flags = fcntl(fd, F_GETFL);

	if (flags >= 0)
		(void)fcntl(fd, F_SETFL, flags & ~O_NONBLOCK);
	conn->fd = -1;
	conn_close(conn);
	return fd;
}

void conn_end_write(struct conn *conn)
{
	if (atomic_exchange(&conn->write_ended, true))
		return;
	if (conn->ssl)
		tls_send_close_notify(conn);
	shutdown(conn->fd, SHUT_WR);
}

void conn_shutdown(struct conn *conn)
{
	uint64_t one = 1;
	ssize_t n;

	if (atomic_exchange(&conn->shut, true))
		return;
	conn_end_write(conn);
	n = write(conn->wake_fd, &one, sizeof one);
	(void)n; /* an eventfd at 0 takes it */
}

int conn_wait(struct conn *conn, short events, uint64_t deadline_ns, struct error *err)
{
	struct pollfd pfd[2] = {{.fd = conn->fd, .events = events}, {.fd = conn->wake_fd, .events = POLLIN}};

	for (;;) {
		int wait_ms = -1, n;

		if (deadline_ns) {
			uint64_t now = clock_now_ns();
			uint64_t left = now < deadline_ns ? (deadline_ns - now + 999999) / 1000000 : 0;

			wait_ms = left > 1000000 ? 1000000 : (int)left;
		}
		n = poll(pfd, 2, wait_ms);
		if (n < 0 && errno != EINTR)
			return error_errno(err, errno, "poll");
		if (pfd[1].revents || atomic_load(&conn->shut))
			return error_set(err, ESHUTDOWN, "connection was shut down here");
		if (n > 0 && pfd[0].revents)
			return 0;
		if (deadline_ns && clock_now_ns() >= deadline_ns)
			return error_set(err, ETIMEDOUT, "connection timed out");
	}
}

static ssize_t plain_readv_step(struct conn *conn, const struct iovec *iov, int niov, short *events,
				struct error *err)
{
	struct msghdr msg = {.msg_iov = (struct iovec *)iov,
			     .msg_iovlen = (size_t)(niov < IOV_BATCH ? niov : IOV_BATCH)};
	ssize_t n;

	do {
		n = recvmsg(conn->fd, &msg, 0);
	} while (n < 0 && errno == EINTR);
	if (n >= 0) {
		atomic_fetch_add_explicit(&conn->received_bytes, (uint64_t)n, memory_order_relaxed);
		return n;
	}
	*events = POLLIN;
	if (errno == EAGAIN || errno == EWOULDBLOCK)
		return -EAGAIN;
	return error_errno(err, errno, "connection: read");
}

static ssize_t plain_writev_step(struct conn *conn, const struct iovec *iov, int niov, short *events,
				 struct error *err)
{
	struct msghdr msg = {.msg_iov = (struct iovec *)iov,
			     .msg_iovlen = (size_t)(niov < IOV_BATCH ? niov : IOV_BATCH)};
	ssize_t n;

	do {
		n = sendmsg(conn->fd, &msg, MSG_NOSIGNAL);
	} while (n < 0 && errno == EINTR);
	if (n >= 0) {
		atomic_fetch_add_explicit(&conn->sent_bytes, (uint64_t)n, memory_order_relaxed);
		return n;
	}
	*events = POLLOUT;
	if (errno == EAGAIN || errno == EWOULDBLOCK)
		return -EAGAIN;
	/* One code for "the peer is gone", whichever call noticed. */
	return error_errno(err, errno == EPIPE ? ECONNRESET : errno, "connection: write");
}

static uint64_t deadline_after(unsigned timeout_ms)
{
	return timeout_ms ? clock_now_ns() + (uint64_t)timeout_ms * 1000000 : 0;
}

/* Either one buffer over TLS or several without. At least one byte; 0 = orderly close. */
static ssize_t readv_some(struct conn *conn, const struct iovec *iov, int niov, unsigned timeout_ms,
			  struct error *err)
{
	uint64_t deadline = 0;

	for (;;) {
		short events = POLLIN;
		ssize_t n;
		int ret;

		if (atomic_load(&conn->shut))
			return error_set(err, ESHUTDOWN, "connection was shut down here");
		n = conn->ssl ? tls_read_step(conn, iov->iov_base, iov->iov_len, &events, err)
			      : plain_readv_step(conn, iov, niov, &events, err);
		if (n != -EAGAIN)
			return n;
		if (!deadline)
			deadline = deadline_after(timeout_ms);
		ret = conn_wait(conn, events, deadline, err);
		if (ret == -ETIMEDOUT)
			return error_set(err, ETIMEDOUT, "nothing received for %u ms", timeout_ms);
		if (ret < 0)
			return ret;
	}
}

ssize_t conn_read_some(struct conn *conn, void *buf, size_t len, unsigned timeout_ms, struct error *err)
{
	struct iovec iov = {.iov_base = buf, .iov_len = len};

	if (!len)
		return error_set(err, EINVAL, "connection: read of no bytes");
	return readv_some(conn, &iov, 1, timeout_ms, err);
}

/* Drops n bytes, and with them what is empty, from the front. */
static void iov_advance(struct iovec **iov, int *niov, size_t n)
{
	while (*niov && n >= (*iov)->iov_len) {
		n -= (*iov)->iov_len;
		(*iov)++;
		(*niov)--;
	}
	if (*niov) {
		(*iov)->iov_base = (uint8_t *)(*iov)->iov_base + n;
		(*iov)->iov_len -= n;
	}
}

int conn_readv_full(struct conn *conn, struct iovec *iov, int niov, unsigned timeout_ms, struct error *err)
{
	size_t done = 0, left = 0;

	for (int i = 0; i < niov; i++)
		left += iov[i].iov_len;
	for (iov_advance(&iov, &niov, 0); niov;) {
		ssize_t n = readv_some(conn, iov, niov, timeout_ms, err);

		if (n < 0)
			return (int)n;
		if (n == 0 && done == 0)
			return error_set(err, ENODATA, "the peer closed the connection");
		if (n == 0)
			return error_set(err, ECONNRESET,
					 "the peer closed the connection in the middle (%zu of %zu bytes)",
					 done, done + left);
		done += (size_t)n;
		left -= (size_t)n;
		iov_advance(&iov, &niov, (size_t)n);
	}
	return 0;
}

int conn_read_full(struct conn *conn, void *buf, size_t len, unsigned timeout_ms, struct error *err)
{
	struct iovec iov = {.iov_base = buf, .iov_len = len};

	return conn_readv_full(conn, &iov, 1, timeout_ms, err);
}

/* Either one buffer over TLS or several without. more: so is there, in a moment (TLS). */
static int write_step_wait(struct conn *conn, struct iovec *iov, int niov, bool more, unsigned timeout_ms,
			   size_t *written, struct error *err)
{
	uint64_t deadline = 0;

	for (;;) {
		short events = POLLOUT;
		ssize_t n;
		int ret;

		if (atomic_load(&conn->shut))
			return error_set(err, ESHUTDOWN, "connection was shut down here");
		n = conn->ssl ? tls_write_step(conn, iov->iov_base, iov->iov_len, more, &events, err)
			      : plain_writev_step(conn, iov, niov, &events, err);
		if (n >= 0) {
			*written = (size_t)n;
			return 0;
		}
		if (n != -EAGAIN)
			return (int)n;
		if (!deadline)
			deadline = deadline_after(timeout_ms);
		ret = conn_wait(conn, events, deadline, err);
		if (ret == -ETIMEDOUT)
			return error_set(err, ETIMEDOUT, "the peer took nothing for %u ms", timeout_ms);
		if (ret < 0)
			return ret;
	}
}

static int write_one(struct conn *conn, void *buf, size_t len, bool more, unsigned timeout_ms,
		     struct error *err)
{
	struct iovec iov = {.iov_base = buf, .iov_len = len};

	while (iov.iov_len) {
		size_t n = 0;
		/* OpenSSL writes a record at a time */
		int ret = write_step_wait(conn, &iov, 1, more || iov.iov_len > TLS_RECORD_BYTES, timeout_ms,
					  &n, err);

		if (ret < 0)
			return ret;
		iov.iov_base = (uint8_t *)iov.iov_base + n;
		iov.iov_len -= n;
	}
	return 0;
}

int conn_write_full(struct conn *conn, const void *buf, size_t len, unsigned timeout_ms, struct error *err)
{
	return write_one(conn, (void *)buf, len, false, timeout_ms, err);
}

ssize_t conn_write_now(struct conn *conn, const void *buf, size_t len, struct error *err)
{
	struct iovec iov = {.iov_base = (void *)buf, .iov_len = len};
	short events;

	if (atomic_load(&conn->shut))
		return error_set(err, ESHUTDOWN, "connection was shut down here");
	return conn->ssl ? tls_write_step(conn, buf, len, false, &events, err)
			 : plain_writev_step(conn, &iov, 1, &events, err);
}

bool conn_has_input(struct conn *conn)
{
	struct pollfd p = {.fd = conn->fd, .events = POLLIN};
	if (conn->ssl) {
		SCOPE_LOCK(&conn->ssl_lock);
		if (SSL_has_pending(conn->ssl))
			return true;
	}
	return poll(&p, 1, 0) != 0;
}

/* Small pieces are joined into whole records; large ones go as they are. */
static int tls_writev(struct conn *conn, const struct iovec *iov, int niov, unsigned timeout_ms,
		      struct error *err)
{
	size_t held = 0, after = 0;
	int ret;

	for (int i = 0; i < niov; i++)
		after += iov[i].iov_len;
	for (int i = 0; i < niov; i++) {
		uint8_t *p = iov[i].iov_base;
		size_t left = iov[i].iov_len;

		while (left) {
			size_t n;

			if (!held && left >= TLS_RECORD_BYTES) {
				n = left - left % TLS_RECORD_BYTES;
				after -= n;
				ret = write_one(conn, p, n, after > 0, timeout_ms, err);
				if (ret < 0)
					return ret;
			} else {
				n = TLS_RECORD_BYTES - held < left ? TLS_RECORD_BYTES - held : left;
				memcpy(conn->gather + held, p, n);
				held += n;
				after -= n;
				if (held == TLS_RECORD_BYTES) {
					ret = write_one(conn, conn->gather, held, after > 0, timeout_ms, err);
					if (ret < 0)
						return ret;
					held = 0;
				}
			}
			p += n;
			left -= n;
		}
	}
	return held ? write_one(conn, conn->gather, held, false, timeout_ms, err) : 0;
}

int conn_writev_full(struct conn *conn, struct iovec *iov, int niov, unsigned timeout_ms, struct error *err)
{
	if (conn->ssl)
		return tls_writev(conn, iov, niov, timeout_ms, err);
	for (iov_advance(&iov, &niov, 0); niov;) {
		size_t n = 0;
		int ret = write_step_wait(conn, iov, niov, false, timeout_ms, &n, err);

		if (ret < 0)
			return ret;
		iov_advance(&iov, &niov, n);
	}
	return 0;
}

bool conn_is_tls(const struct conn *conn)
{
	return conn->ssl != NULL;
}

int conn_fd(const struct conn *conn)
{
	return conn->fd;
}

const char *conn_peer_name(const struct conn *conn)
{
	return conn->peer_name;
}

const char *conn_peer_fingerprint(const struct conn *conn)
{
	return conn->peer_fingerprint;
}

const char *conn_own_fingerprint(const struct conn *conn)
{
	return conn->own_fingerprint;
}

uint64_t conn_bytes_sent(const struct conn *conn)
{
	return atomic_load_explicit(&conn->sent_bytes, memory_order_relaxed);
}

uint64_t conn_bytes_received(const struct conn *conn)
{
	return atomic_load_explicit(&conn->received_bytes, memory_order_relaxed);
}
