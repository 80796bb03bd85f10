/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#include "base/cleanup.h"
#include "base/cond.h"
#include "base/confine.h"
#include "base/log.h"
#include "net/conn_impl.h"

#define PUMP_BUFFER_BYTES (256u << 10)
#define PUMP_SOCKET_BYTES (1 << 20)
/* How long the peer may take to answer our end of data with its own. */
#define PUMP_LINGER_MS 5000
/* A peer that takes nothing for this long is gone: the local side may have closed meanwhile, unseen. */
#define PUMP_STALL_MS 60000

/*
 * Two threads, one a direction. `out` (local to conn) owns the end: it waits for `in`, closes everything. An
 * error in either direction ends both; an end of data travels on as an end of data.
 */
struct pump {
	struct conn *conn;
	int fd; /* our end of the socket pair; blocking */
	pthread_t in_thread;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	bool in_done;
	uint8_t *out_buf, *in_buf;
};

static bool local_send(int fd, const uint8_t *p, size_t len)
{
	while (len) {
		ssize_t n = send(fd, p, len, MSG_NOSIGNAL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return false;
		p += n;
		len -= (size_t)n;
	}
	return true;
}

static void *pump_in(void *arg)
{
	struct pump *p = arg;
	bool local_gone = false;
	struct error err = ERROR_INIT;
	ssize_t n;

	confine_self(CONFINE_NBD);
	/* After the local side has gone what still comes is read and dropped, so that closing does not reset
	 * the connection over data on its way to the peer. */
	while ((n = conn_read_some(p->conn, p->in_buf, PUMP_BUFFER_BYTES, 0, &err)) > 0) {
		if (!local_gone)
			local_gone = !local_send(p->fd, p->in_buf, (size_t)n);
	}
	if (n < 0 && n != -ESHUTDOWN)
		log_debug("pump: %s", err.message);
	/* On an error the local side must not take what it has for all there was to come, but a socket pair
	 * knows no reset: shutting both ways makes its next write fail too. */
	shutdown(p->fd, n == 0 ? SHUT_WR : SHUT_RDWR);
	pthread_mutex_lock(&p->lock);
	p->in_done = true;
	pthread_cond_signal(&p->changed);
	pthread_mutex_unlock(&p->lock);
	return NULL;
}

static void *pump_out(void *arg)
{
	struct pump *p = arg;
	struct error err = ERROR_INIT;
	struct timespec until;
	int ret = 0;

	confine_self(CONFINE_NBD);
	for (;;) {
		ssize_t n = recv(p->fd, p->out_buf, PUMP_BUFFER_BYTES, 0);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			break;
		ret = conn_write_full(p->conn, p->out_buf, (size_t)n, PUMP_STALL_MS, &err);
		if (ret < 0) {
			log_debug("pump: %s", err.message);
			break;
		}
	}
	if (ret < 0)
		conn_shutdown(p->conn);
	else
		conn_end_write(p->conn);
	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += PUMP_LINGER_MS / 1000;
	pthread_mutex_lock(&p->lock);
	while (!p->in_done && pthread_cond_timedwait(&p->changed, &p->lock, &until) == 0)
		;
	pthread_mutex_unlock(&p->lock);
	conn_shutdown(p->conn);
	shutdown(p->fd, SHUT_RDWR);
	pthread_join(p->in_thread, NULL);
	conn_close(p->conn);
	close(p->fd);
	pthread_cond_destroy(&p->changed);
	pthread_mutex_destroy(&p->lock);
	free(p->out_buf);
	free(p->in_buf);
	free(p);
	return NULL;
}

int conn_pump_start(struct conn *conn, int *fd_out, struct error *err)
{
	int pair[2] = {-1, -1}, size = PUMP_SOCKET_BYTES, e;
	pthread_t out_thread;
	struct pump *p;

	*fd_out = -1;
	if (!conn_is_tls(conn)) {
		*fd_out = conn_take_fd(conn);
		return 0;
	}
	p = calloc(1, sizeof *p);
	if (p) {
		p->out_buf = malloc(PUMP_BUFFER_BYTES);
		p->in_buf = malloc(PUMP_BUFFER_BYTES);
	}
	if (!p || !p->out_buf || !p->in_buf) {
		e = ENOMEM;
		goto fail;
	}
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0) {
		e = errno;
		goto fail;
	}
	for (int i = 0; i < 2; i++)
		(void)setsockopt(pair[i], SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
	p->conn = conn;
	p->fd = pair[0];
	pthread_mutex_init(&p->lock, NULL);
	cond_init_monotonic(&p->changed);
	e = pthread_create(&p->in_thread, NULL, pump_in, p);
	if (e)
		goto fail;
	e = pthread_create(&out_thread, NULL, pump_out, p);
	if (e) {
		conn_shutdown(conn);
		pthread_join(p->in_thread, NULL);
		goto fail;
	}
	pthread_detach(out_thread);
	*fd_out = pair[1];
	return 0;
fail:
	if (pair[0] >= 0)
		close(pair[0]);
	if (pair[1] >= 0)
		close(pair[1]);
	if (p) {
		free(p->out_buf);
		free(p->in_buf);
		free(p);
	}
	conn_close(conn);
	return error_errno(err, e, "connection pump");
}
