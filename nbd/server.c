/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/confine.h"
#include "base/log.h"
#include "nbd/server_impl.h"

#define DEFAULT_CONNECTIONS	     16
#define DEFAULT_HANDSHAKE_TIMEOUT_MS 10000

static uint16_t flags_for(const struct nbd_server *s)
{
	uint16_t flags = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_CACHE;
	if (s->rules.read_only)
		return flags | NBD_FLAG_READ_ONLY | NBD_FLAG_CAN_MULTI_CONN;
	flags |= NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO;
	if (s->opt.block->limits.can_multi_conn)
		flags |= NBD_FLAG_CAN_MULTI_CONN;
	return flags;
}

int nbd_server_create(const struct nbd_server_options *opt, struct nbd_server **out, struct error *err)
{
	const char *name = opt->export_name ? opt->export_name : "";
	const char *description = opt->description ? opt->description : "";
	if (strlen(name) > NBD_NAME_MAX_BYTES || strlen(description) > NBD_NAME_MAX_BYTES)
		return error_set(err, EINVAL, "NBD export name or description longer than %d bytes",
				 NBD_NAME_MAX_BYTES);
	struct nbd_server *s = calloc(1, sizeof *s);
	if (!s)
		return error_errno(err, ENOMEM, "NBD server");
	s->opt = *opt;
	s->export_name = strdup(name);
	s->description = strdup(description);
	if (!s->export_name || !s->description) {
		free(s->export_name);
		free(s->description);
		free(s);
		return error_errno(err, ENOMEM, "NBD server");
	}
	if (!s->opt.max_connections)
		s->opt.max_connections = DEFAULT_CONNECTIONS;
	if (!s->opt.handshake_timeout_ms)
		s->opt.handshake_timeout_ms = DEFAULT_HANDSHAKE_TIMEOUT_MS;
	if (!s->opt.max_inflight_bytes)
		s->opt.max_inflight_bytes = NBD_DEFAULT_MAX_FLIGHT;
	const struct block_limits *lim = &opt->block->limits;
	uint32_t max = s->opt.max_request_bytes ? s->opt.max_request_bytes : NBD_DEFAULT_MAX_REQUEST;
	if (lim->max_transfer_bytes && max > lim->max_transfer_bytes)
		max = lim->max_transfer_bytes;
	s->rules = (struct nbd_request_rules){
		.size_bytes = opt->block->size_bytes,
		.request_alignment = lim->request_alignment ? lim->request_alignment : 1,
		.max_request_bytes = max,
		.read_only = opt->read_only || lim->read_only,
	};
	s->transmission_flags = flags_for(s);
	pthread_mutex_init(&s->lock, NULL);
	pthread_cond_init(&s->idle, NULL);
	*out = s;
	return 0;
}

static void transmission(struct nbd_connection *nc)
{
	struct error err = ERROR_INIT;
	int rc = pthread_create(&nc->writer, NULL, nbd_reply_writer, nc);
	if (rc) {
		log_error("nbd: reply thread: %s", strerror(rc));
		return;
	}
	rc = nbd_serve_requests(nc, &err);
	if (rc && rc != -ESHUTDOWN)
		log_warn("nbd: connection lost: %s", err.message);
	pthread_mutex_lock(&nc->lock);
	nc->reader_done = true;
	pthread_cond_broadcast(&nc->changed);
	pthread_mutex_unlock(&nc->lock);
	pthread_join(nc->writer, NULL);
}

static void *connection_main(void *arg)
{
	struct nbd_connection *nc = arg;
	struct nbd_server *s = nc->server;
	struct error err = ERROR_INIT;
	pthread_setname_np(pthread_self(), "nbd-request");
	confine_self(CONFINE_NBD);
	int rc = nbd_handshake(nc, &err);
	if (rc < 0 && rc != -ESHUTDOWN)
		log_info("nbd: %s", err.message);
	if (rc > 0)
		transmission(nc);

	pthread_mutex_lock(&s->lock);
	*nc->prev = nc->next;
	if (nc->next)
		nc->next->prev = nc->prev;
	pthread_mutex_unlock(&s->lock);
	/* Off the list, so that nobody shuts down what is being freed; still counted, so that stop waits. */
	conn_shutdown(nc->conn);
	conn_close(nc->conn);
	nbd_buffers_free(nc); /* no other thread is left */
	pthread_mutex_destroy(&nc->lock);
	pthread_cond_destroy(&nc->changed);
	pthread_cond_destroy(&nc->room);
	free(nc);

	pthread_mutex_lock(&s->lock);
	s->nconnections--;
	pthread_cond_broadcast(&s->idle);
	pthread_mutex_unlock(&s->lock);
	return NULL;
}

static int start_thread(struct nbd_connection *nc)
{
	pthread_attr_t attr;
	pthread_t thread;
	sigset_t all, old;
	pthread_attr_init(&attr);
	pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &old); /* inherited by the writer too */
	int rc = pthread_create(&thread, &attr, connection_main, nc);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	pthread_attr_destroy(&attr);
	return rc;
}

int nbd_server_add(struct nbd_server *s, struct conn *conn, struct error *err)
{
	struct nbd_connection *nc = calloc(1, sizeof *nc);
	if (!nc) {
		conn_close(conn);
		return error_errno(err, ENOMEM, "NBD connection");
	}
	nc->server = s;
	nc->conn = conn;
	nc->rules = s->rules;
	nc->replies_tail = &nc->replies;
	pthread_mutex_init(&nc->lock, NULL);
	pthread_cond_init(&nc->changed, NULL);
	pthread_cond_init(&nc->room, NULL);

	pthread_mutex_lock(&s->lock);
	int rc = 0;
	if (s->stopping)
		rc = error_set(err, ESHUTDOWN, "the NBD server is stopping");
	else if (s->nconnections >= s->opt.max_connections)
		rc = error_set(err, EBUSY, "already %u NBD connections", s->nconnections);
	if (rc == 0) {
		nc->prev = &s->connections;
		nc->next = s->connections;
		if (nc->next)
			nc->next->prev = &nc->next;
		s->connections = nc;
		s->nconnections++;
		int e = start_thread(nc);
		if (e) {
			rc = error_errno(err, e, "NBD connection thread");
			*nc->prev = nc->next;
			if (nc->next)
				nc->next->prev = nc->prev;
			s->nconnections--;
		}
	}
	pthread_mutex_unlock(&s->lock);
	if (rc) {
		conn_close(conn);
		pthread_mutex_destroy(&nc->lock);
		pthread_cond_destroy(&nc->changed);
		pthread_cond_destroy(&nc->room);
		free(nc);
	}
	return rc;
}

unsigned nbd_server_connections(struct nbd_server *s)
{
	SCOPE_LOCK(&s->lock);
	return s->nconnections;
}

void nbd_server_stop(struct nbd_server *s)
{
	SCOPE_LOCK(&s->lock);
	s->stopping = true;
	for (struct nbd_connection *nc = s->connections; nc; nc = nc->next)
		conn_shutdown(nc->conn);
	while (s->nconnections)
		pthread_cond_wait(&s->idle, &s->lock);
}

void nbd_server_free(struct nbd_server *s)
{
	if (!s)
		return;
	nbd_server_stop(s);
	pthread_mutex_destroy(&s->lock);
	pthread_cond_destroy(&s->idle);
	free(s->export_name);
	free(s->description);
	free(s);
}
