/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/log.h"
#include "nbd/server_impl.h"

static void leave_block(struct nbd_reply *r, int result)
{
	r->result = result;
	nbd_reply_queue(r);
}

/* The next piece of a zeroes or discard that is longer than the block takes at once. */
static int submit_piece(struct nbd_reply *r)
{
	struct block *blk = r->nc->server->opt.block;
	uint64_t n = r->left_bytes, max = blk->limits.max_zeroes_bytes;
	if (max && n > max)
		n = max - max % (blk->limits.request_alignment ? blk->limits.request_alignment : 1);
	r->io.len_bytes = n;
	return block_submit(blk, &r->io);
}

static void io_done(struct block_request *io, int result)
{
	struct nbd_reply *r = io->opaque;
	if (r->left_bytes && result == 0) {
		r->left_bytes -= io->len_bytes;
		if (r->left_bytes) {
			io->offset_bytes += io->len_bytes;
			result = submit_piece(r);
			if (result == 0)
				return;
		}
	}
	leave_block(r, result);
}

static void submit(struct nbd_reply *r, enum block_op op)
{
	struct nbd_connection *nc = r->nc;
	unsigned flags = 0;
	if (r->req.flags & NBD_CMD_FLAG_FUA)
		flags |= BLOCK_REQ_FUA;
	if (op == BLOCK_WRITE_ZEROES) {
		if (!(r->req.flags & NBD_CMD_FLAG_NO_HOLE))
			flags |= BLOCK_REQ_MAY_UNMAP;
		if (r->req.flags & NBD_CMD_FLAG_FAST_ZERO)
			flags |= BLOCK_REQ_NO_FALLBACK;
	}
	r->io = (struct block_request){.op = op,
				       .flags = flags,
				       .offset_bytes = r->req.offset_bytes,
				       .len_bytes = r->req.len_bytes,
				       .done = io_done,
				       .opaque = r};
	if (op == BLOCK_READ || op == BLOCK_WRITE) {
		/* With no request behind it, this thread has nothing better to do. */
		if (!conn_has_input(nc->conn))
			r->io.flags |= BLOCK_REQ_MAY_WAIT;
		r->iov = (struct iovec){r->data, r->req.len_bytes};
		r->io.iov = &r->iov;
		r->io.niov = 1;
	}
	const struct nbd_server_options *opt = &nc->server->opt;
	if (opt->observe && op != BLOCK_READ && op != BLOCK_FLUSH)
		opt->observe(opt->observer, r->req.offset_bytes, r->req.len_bytes,
			     op == BLOCK_WRITE ? r->data : NULL);
	pthread_mutex_lock(&nc->lock);
	nc->in_block++;
	r->in_block = true;
	pthread_mutex_unlock(&nc->lock);
	int rc;
	if (op == BLOCK_WRITE_ZEROES || op == BLOCK_DISCARD) {
		r->left_bytes = r->req.len_bytes;
		rc = submit_piece(r);
	} else {
		rc = block_submit(nc->server->opt.block, &r->io);
	}
	/* Once submitted, it may be answered and gone. */
	if (rc)
		leave_block(r, rc);
}

static void block_status(struct nbd_reply *r)
{
	bool one = r->req.flags & NBD_CMD_FLAG_REQ_ONE;
	struct block_extent ext[NBD_EXTENTS_MAX];
	unsigned n = one ? 1 : NBD_EXTENTS_MAX;
	struct error err = ERROR_INIT;
	r->result =
		block_extents(r->nc->server->opt.block, r->req.offset_bytes, r->req.len_bytes, ext, &n, &err);
	if (r->result == 0) {
		r->data = malloc(8 * (size_t)n);
		r->result = r->data ? 0 : -ENOMEM;
	} else {
		log_warn("nbd: %s", err.message);
	}
	for (unsigned i = 0; r->result == 0 && i < n; i++) {
		put_be32(r->data + 8 * i, (uint32_t)ext[i].len_bytes);
		put_be32(r->data + 8 * i + 4,
			 (ext[i].hole ? NBD_STATE_HOLE : 0u) | (ext[i].zero ? NBD_STATE_ZERO : 0u));
		r->data_len = 8 * (i + 1);
	}
	nbd_reply_queue(r);
}

/* The payload of a refused write must leave the stream, whatever its length. */
static int drain_payload(struct nbd_connection *nc, uint32_t len, struct error *err)
{
	uint8_t buf[16384];
	while (len) {
		uint32_t n = len < sizeof buf ? len : sizeof buf;
		int rc = conn_read_full(nc->conn, buf, n, NBD_STALL_TIMEOUT_MS, err);
		if (rc)
			return rc;
		len -= n;
	}
	return 0;
}

static int one_request(struct nbd_connection *nc, const struct nbd_request *req, struct error *err)
{
	struct nbd_reply *r = nbd_reply_create(nc, req);
	if (!r)
		return error_errno(err, ENOMEM, "NBD request");
	r->error = nbd_request_validate(req, &nc->rules);
	if (!r->error && nbd_command_transfers(req->command) &&
	    !(r->data = nbd_buffer_take(nc, req->len_bytes)))
		r->error = NBD_ENOMEM;
	if (req->command == NBD_CMD_WRITE) {
		int rc = r->error ? drain_payload(nc, req->len_bytes, err)
				  : conn_read_full(nc->conn, r->data, req->len_bytes, NBD_STALL_TIMEOUT_MS,
						   err);
		if (rc) {
			nbd_reply_free(r);
			return error_prefix(err, "payload of a write");
		}
	}
	/* A length of zero is a no-op to us; the specification leaves it open. */
	if (r->error || (req->len_bytes == 0 && req->command != NBD_CMD_FLUSH)) {
		nbd_reply_queue(r);
		return 0;
	}
	switch (req->command) {
	case NBD_CMD_READ:
		submit(r, BLOCK_READ);
		break;
	case NBD_CMD_WRITE:
		submit(r, BLOCK_WRITE);
		break;
	case NBD_CMD_FLUSH:
		submit(r, BLOCK_FLUSH);
		break;
	case NBD_CMD_TRIM:
		submit(r, BLOCK_DISCARD);
		break;
	case NBD_CMD_WRITE_ZEROES:
		submit(r, BLOCK_WRITE_ZEROES);
		break;
	case NBD_CMD_BLOCK_STATUS:
		block_status(r);
		break;
	default: /* NBD_CMD_CACHE is a hint, and the page cache has its own mind */
		nbd_reply_queue(r);
		break;
	}
	return 0;
}

int nbd_serve_requests(struct nbd_connection *nc, struct error *err)
{
	for (;;) {
		uint8_t raw[NBD_REQUEST_BYTES];
		int rc = conn_read_full(nc->conn, raw, sizeof raw, nc->server->opt.idle_timeout_ms, err);
		if (rc == -ENODATA)
			return 0; /* closed between requests */
		if (rc)
			return rc;
		struct nbd_request req;
		if (nbd_request_decode(raw, &req))
			return error_set(err, EPROTO, "NBD client sent garbage instead of a request");
		if (req.command == NBD_CMD_DISC)
			return 0;
		rc = one_request(nc, &req, err);
		if (rc)
			return rc;
	}
}
