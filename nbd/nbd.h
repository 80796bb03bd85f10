/* SPDX-License-Identifier: Apache-2.0 */
/* interface: NBD server and client */
#ifndef NBD_NBD_H
#define NBD_NBD_H

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "block/block.h"
#include "net/conn.h"

/* --- server: one export over a struct block, any number of connections --- */
struct nbd_server;

struct nbd_server_options {
	const char *export_name; /* "" = default export; clients may ask for "" too */
	const char *description;
	struct block *block; /* stays the caller's, must outlive the server */
	bool read_only;
	unsigned max_connections;      /* 0 = 16 */
	unsigned handshake_timeout_ms; /* 0 = 10 s */
	unsigned idle_timeout_ms;      /* 0 = none: silence between requests is normal in NBD */
	uint32_t max_request_bytes;    /* 0 = 32 MiB */
	size_t max_inflight_bytes;     /* per connection, 0 = 30 MiB; a larger request goes alone */
	/* Sees every valid change as it was received, before the block has it; data: of a write, NULL for
	 * zeroes and trims. From the connections' threads. Optional. */
	void (*observe)(void *observer, uint64_t offset_bytes, uint64_t len_bytes, const void *data);
	void *observer;
};

int nbd_server_create(const struct nbd_server_options *opt, struct nbd_server **out, struct error *err);
/* Serves conn (taken over) in threads of its own until the client leaves. -EBUSY above max_connections. */
int nbd_server_add(struct nbd_server *s, struct conn *conn, struct error *err);
unsigned nbd_server_connections(struct nbd_server *s);
/* Stops taking requests, waits for those in flight on the block, closes every connection. Idempotent: the
 * fence. */
void nbd_server_stop(struct nbd_server *s);
void nbd_server_free(struct nbd_server *s); /* stops first */

/* --- client: a struct block on libnbd --- */
struct nbd_client_options {
	const char *export_name;
	const char *label;
	unsigned timeout_ms; /* a request without a reply for that long fails the connection (-ETIMEDOUT); 0 =
				10 s */
	bool allocation_depth; /* ask for qemu:allocation-depth as well: block_extent.backing */
};
/* fds: connected plain sockets (conn_pump_start for TLS), taken over, also on error; one libnbd handle each,
 * requests spread over them (nfds 1..16; more than one needs the server's CAN_MULTI_CONN). Handshake
 * included. */
int nbd_client_open(const int *fds, unsigned nfds, const struct nbd_client_options *opt, struct block **out,
		    struct error *err);
/* Connects to a Unix socket with nconn connections. */
int nbd_client_open_unix(const char *path, unsigned nconn, const struct nbd_client_options *opt,
			 struct block **out, struct error *err);

#endif
