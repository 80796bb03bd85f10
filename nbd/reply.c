/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/log.h"
#include "nbd/server_impl.h"

struct nbd_reply *nbd_reply_create(struct nbd_connection *nc, const struct nbd_request *req)
{
	struct nbd_reply *r = calloc(1, sizeof *r);
	if (!r)
		return NULL;
	r->nc = nc;
	r->req = *req;
	r->cost_bytes = NBD_REQUEST_COST_BYTES;
	if (nbd_command_transfers(req->command))
		r->cost_bytes += nbd_buffer_bytes(req->len_bytes);
	else if (req->command == NBD_CMD_BLOCK_STATUS)
		r->cost_bytes += 8 * NBD_EXTENTS_MAX; /* the reply's payload waits for a slow client */
	/* One that is larger than the whole budget goes alone. */
	SCOPE_LOCK(&nc->lock);
	while (nc->flight_bytes && nc->flight_bytes + r->cost_bytes > nc->server->opt.max_inflight_bytes)
		pthread_cond_wait(&nc->room, &nc->lock);
	nc->flight_bytes += r->cost_bytes;
	/* What is kept for later is within the budget too. */
	size_t max = nc->server->opt.max_inflight_bytes;
	nbd_buffers_trim(nc, max > nc->flight_bytes ? max - nc->flight_bytes : 0);
	return r;
}

struct outgoing {
	uint8_t head[NBD_CHUNK_HEADER_BYTES + 64];
	struct iovec iov[2];
	int niov;
};

static void simple(struct outgoing *out, const struct nbd_request *req, uint32_t error)
{
	put_be32(out->head, NBD_SIMPLE_MAGIC);
	put_be32(out->head + 4, error);
	put_be64(out->head + 8, req->cookie);
	out->iov[0] = (struct iovec){out->head, NBD_SIMPLE_REPLY_BYTES};
	out->niov = 1;
}

/* head_len bytes of the payload follow the chunk header in out->head, tail_len more come from data. */
static void chunk(struct outgoing *out, const struct nbd_request *req, uint16_t type, uint32_t head_len,
		  void *data, uint32_t tail_len)
{
	put_be32(out->head, NBD_STRUCTURED_MAGIC);
	put_be16(out->head + 4, NBD_CHUNK_FLAG_DONE);
	put_be16(out->head + 6, type);
	put_be64(out->head + 8, req->cookie);
	put_be32(out->head + 16, head_len + tail_len);
	out->iov[0] = (struct iovec){out->head, NBD_CHUNK_HEADER_BYTES + head_len};
	out->iov[1] = (struct iovec){data, tail_len};
	out->niov = tail_len ? 2 : 1;
}

static void encode_error(struct outgoing *out, const struct nbd_reply *r, uint32_t error)
{
	uint8_t *p = out->head + NBD_CHUNK_HEADER_BYTES;
	const char *what = nbd_command_name(r->req.command);
	size_t len = strlen(what);
	put_be32(p, error);
	put_be16(p + 4, (uint16_t)len);
	memcpy(p + 6, what, len);
	chunk(out, &r->req, NBD_CHUNK_ERROR, (uint32_t)(6 + len), NULL, 0);
}

static void encode_read(struct outgoing *out, struct nbd_reply *r)
{
	uint8_t *p = out->head + NBD_CHUNK_HEADER_BYTES;
	if (r->req.len_bytes == 0) {
		chunk(out, &r->req, NBD_CHUNK_NONE, 0, NULL, 0);
		return;
	}
	put_be64(p, r->req.offset_bytes);
	if (bytes_all_zero(r->data, r->req.len_bytes)) {
		put_be32(p + 8, r->req.len_bytes);
		chunk(out, &r->req, NBD_CHUNK_OFFSET_HOLE, 12, NULL, 0);
	} else {
		chunk(out, &r->req, NBD_CHUNK_OFFSET_DATA, 8, r->data, r->req.len_bytes);
	}
}

static void encode(struct outgoing *out, struct nbd_reply *r)
{
	uint32_t error = r->error ? r->error : nbd_wire_error(r->result);
	bool structured = r->nc->rules.structured;
	if (error && structured) {
		encode_error(out, r, error);
	} else if (r->req.command == NBD_CMD_READ && !error && structured) {
		encode_read(out, r);
	} else if (r->req.command == NBD_CMD_BLOCK_STATUS && !error) {
		put_be32(out->head + NBD_CHUNK_HEADER_BYTES, NBD_BASE_ALLOCATION_ID);
		chunk(out, &r->req, NBD_CHUNK_BLOCK_STATUS, 4, r->data, r->data_len);
	} else {
		simple(out, &r->req, error);
		if (r->req.command == NBD_CMD_READ && !error && r->req.len_bytes) {
			out->iov[1] = (struct iovec){r->data, r->req.len_bytes};
			out->niov = 2;
		}
	}
}

void nbd_reply_free(struct nbd_reply *r)
{
	struct nbd_connection *nc = r->nc;
	if (nbd_command_transfers(r->req.command))
		nbd_buffer_give(nc, r->data, r->req.len_bytes);
	else
		free(r->data);
	pthread_mutex_lock(&nc->lock);
	nc->flight_bytes -= r->cost_bytes;
	pthread_cond_signal(&nc->room);
	pthread_mutex_unlock(&nc->lock);
	free(r);
}

/* nc->lock held. */
static void append(struct nbd_connection *nc, struct nbd_reply *r)
{
	r->next = NULL;
	*nc->replies_tail = r;
	nc->replies_tail = &r->next;
}

/* No lock held, nc->sending is ours. True: it is on its way, or never will be. */
static bool send_now(struct nbd_reply *r)
{
	struct nbd_connection *nc = r->nc;
	struct outgoing out;
	encode(&out, r);
	if (out.niov > 1)
		return false;
	ssize_t n = conn_write_now(nc->conn, out.iov[0].iov_base, out.iov[0].iov_len, NULL);
	if (n > 0)
		r->sent_bytes = (size_t)n;
	return n == (ssize_t)out.iov[0].iov_len;
}

static bool carries_data(const struct nbd_reply *r)
{
	return r->req.command == NBD_CMD_READ || r->req.command == NBD_CMD_BLOCK_STATUS;
}

void nbd_reply_queue(struct nbd_reply *r)
{
	struct nbd_connection *nc = r->nc;
	bool in_block = r->in_block, sent = false;
	pthread_mutex_lock(&nc->lock);
	if (!carries_data(r) && !nc->replies && !nc->sending && !nc->dead) {
		nc->sending = true;
		pthread_mutex_unlock(&nc->lock);
		sent = send_now(r);
		if (sent)
			nbd_reply_free(r);
		pthread_mutex_lock(&nc->lock);
		nc->sending = false;
		if (!sent) { /* before those that came meanwhile, as a part of it may be sent */
			r->next = nc->replies;
			nc->replies = r;
			if (!r->next)
				nc->replies_tail = &r->next;
		}
	} else {
		append(nc, r);
	}
	if (in_block)
		nc->in_block--;
	/* The writer may have something to send, or to end. */
	if (nc->replies || nc->reader_done)
		pthread_cond_broadcast(&nc->changed);
	pthread_mutex_unlock(&nc->lock);
}

/* What send_now sent of it is not sent again. */
static int send_rest(struct nbd_reply *r, struct error *err)
{
	struct outgoing out;
	encode(&out, r);
	out.iov[0].iov_base = (uint8_t *)out.iov[0].iov_base + r->sent_bytes;
	out.iov[0].iov_len -= r->sent_bytes;
	return conn_writev_full(r->nc->conn, out.iov, out.niov, NBD_STALL_TIMEOUT_MS, err);
}

void *nbd_reply_writer(void *arg)
{
	struct nbd_connection *nc = arg;
	pthread_setname_np(pthread_self(), "nbd-reply");
	pthread_mutex_lock(&nc->lock);
	for (;;) {
		while (nc->sending || (!nc->replies && !(nc->reader_done && !nc->in_block)))
			pthread_cond_wait(&nc->changed, &nc->lock);
		struct nbd_reply *r = nc->replies;
		if (!r)
			break;
		nc->replies = r->next;
		if (!nc->replies)
			nc->replies_tail = &nc->replies;
		bool dead = nc->dead;
		nc->sending = true;
		pthread_mutex_unlock(&nc->lock);
		struct error err = ERROR_INIT;
		int rc = dead ? 0 : send_rest(r, &err);
		if (rc) {
			log_debug("nbd: reply not sent: %s", err.message);
			conn_shutdown(nc->conn);
		}
		nbd_reply_free(r);
		pthread_mutex_lock(&nc->lock);
		nc->dead |= rc != 0;
		nc->sending = false;
	}
	pthread_mutex_unlock(&nc->lock);
	return NULL;
}
