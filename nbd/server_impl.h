/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Private to the server. server.c: life of the server and its connections; handshake.c: option haggling;
 * serve.c: requests in; reply.c: replies out; buffer.c: their payload.
 *
 * A connection has two threads. The reader does the handshake, reads requests and submits them to the block;
 * completion callbacks send a reply without data themselves if the socket takes it at once, and append it to
 * the reply queue if not; the writer sends what is there. So a slow socket never holds up a completion
 * thread, and the flight budget holds up the reader when the client does not take its replies.
 */
#ifndef NBD_SERVER_IMPL_H
#define NBD_SERVER_IMPL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "block/block.h"
#include "nbd/nbd.h"
#include "nbd/protocol.h"
#include "net/conn.h"

/* A client that takes or gives no byte of a message for that long is gone. */
#define NBD_STALL_TIMEOUT_MS 60000
/* What a request counts against the flight budget at least, which bounds their number too. */
#define NBD_REQUEST_COST_BYTES 4096
/* Buffers that a connection keeps between requests: of this capacity, that of a mirror's largest piece, and
 * so many. */
#define NBD_KEPT_BUFFER_BYTES ((size_t)256 << 10)
#define NBD_KEPT_BUFFERS      32

struct nbd_server {
	struct nbd_server_options opt; /* with defaults filled in; strings are ours */
	char *export_name;
	char *description;
	struct nbd_request_rules rules; /* what holds for all connections */
	uint16_t transmission_flags;
	pthread_mutex_t lock;
	pthread_cond_t idle;
	struct nbd_connection *connections;
	unsigned nconnections;
	bool stopping;
};

struct nbd_reply {
	struct nbd_reply *next;
	struct nbd_connection *nc;
	struct nbd_request req;
	struct block_request io;
	struct iovec iov;
	uint8_t *data;	     /* payload of a read or write (nbd_buffer_take), or an encoded block status */
	uint32_t data_len;   /* of what block status sends */
	size_t sent_bytes;   /* of it, before it came to the writer */
	size_t cost_bytes;   /* charged to the budget */
	uint64_t left_bytes; /* zeroes and discards go in pieces that the block takes */
	bool in_block;	     /* counted in the connection's in_block */
	int result;	     /* negative errno */
	uint32_t error;	     /* wire error decided before the block was asked; wins over result */
};

struct nbd_connection {
	struct nbd_connection *next, **prev; /* server->lock */
	struct nbd_server *server;
	struct conn *conn;
	struct nbd_request_rules rules;
	bool no_zeroes;
	pthread_t writer;

	pthread_mutex_t lock;	/* what follows */
	pthread_cond_t changed; /* for the writer */
	pthread_cond_t room;	/* in the budget, for the reader */
	struct nbd_reply *replies, **replies_tail;
	bool sending; /* somebody is */
	size_t flight_bytes;
	uint8_t *slab;	       /* of NBD_KEPT_BUFFERS; NULL before the first that is used */
	uint32_t slab_used;    /* a bit for each buffer */
	unsigned slab_touched; /* so many were used since the slab was empty */
	unsigned in_block;     /* requests that the block has */
	bool reader_done;      /* no request will come any more */
	bool dead;	       /* sending failed: replies are dropped */
};

/* 1: transmission begins. 0: the client left in good order. Negative errno: it did not. */
int nbd_handshake(struct nbd_connection *nc, struct error *err);
/* Reads and submits requests until the client disconnects (0) or the stream is lost (negative errno). */
int nbd_serve_requests(struct nbd_connection *nc, struct error *err);

/* A request or its reply carries data of the request's length. */
static inline bool nbd_command_transfers(unsigned command)
{
	return command == NBD_CMD_READ || command == NBD_CMD_WRITE;
}

/* buffer.c. What a buffer for so many bytes takes. */
size_t nbd_buffer_bytes(size_t len_bytes);
/* A page-aligned buffer of at least len_bytes, kept from an earlier request or new; its content is whatever
 * that left there. NULL: no memory. */
uint8_t *nbd_buffer_take(struct nbd_connection *nc, size_t len_bytes);
/* Gives one back, taken for the same length; NULL is fine. */
void nbd_buffer_give(struct nbd_connection *nc, uint8_t *buf, size_t len_bytes);
/* nc->lock held. Gives up the pages of what waits for a request, if that is more than keep_bytes. */
void nbd_buffers_trim(struct nbd_connection *nc, size_t keep_bytes);
void nbd_buffers_free(struct nbd_connection *nc);

/* Waits for room in the budget. NULL: no memory. */
struct nbd_reply *nbd_reply_create(struct nbd_connection *nc, const struct nbd_request *req);
/* The budget and the memory of a request back; its answer was sent, or never will be. */
void nbd_reply_free(struct nbd_reply *reply);
/* Any thread; the reply is taken over. */
void nbd_reply_queue(struct nbd_reply *reply);
/* The writer thread: sends until reader_done and nothing is left. */
void *nbd_reply_writer(void *nc);

#endif
