/* SPDX-License-Identifier: Apache-2.0 */
#ifndef NET_CONN_IMPL_H
#define NET_CONN_IMPL_H

#include <openssl/ssl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>

#include "net/conn.h"

/* Private to net/. */

#define TLS_RECORD_BYTES 16384u
#define PEER_NAME_BYTES	 256

struct tls_context {
	SSL_CTX *ssl_ctx;
	char *ca_path, *cert_path;
	char own_names[PEER_NAME_BYTES];
	tls_judge_fn judge; /* NULL: the CA judges */
	void *judge_opaque;
};

struct conn {
	int fd;
	int wake_fd; /* eventfd; readable for ever once conn_shutdown was called */
	atomic_bool shut;
	atomic_bool write_ended;
	_Atomic uint64_t sent_bytes, received_bytes;

	/* TLS only, else NULL. An SSL is not safe for a reader beside a writer: every call is under ssl_lock,
	 * waiting never is. */
	SSL *ssl;
	pthread_mutex_t ssl_lock;
	uint8_t *gather;		 /* the writer's: TLS_RECORD_BYTES to join small pieces */
	uint8_t *joined;		 /* records that wait for those that follow; NULL: never any */
	size_t joined_bytes;		 /* under ssl_lock, as what is in there */
	uint64_t bytes_since_key_update; /* the writer's */
	bool more_follows;		 /* of what is being written; under ssl_lock */
	bool is_server, judged, handshake_done, read_anything;
	bool bio_eof;
	int bio_errno; /* of the failed socket call below OpenSSL */
	char *ca_path, *cert_path, *expected_name;
	char own_names[PEER_NAME_BYTES];
	X509 *peer_cert;
	char peer_name[PEER_NAME_BYTES];
	char peer_fingerprint[65], own_fingerprint[65];
	int verify_code; /* negative errno when the peer's certificate was refused here, with the sentence */
	char verify_message[ERROR_MESSAGE_BYTES];
};

/* Waits for events on the fd until deadline_ns (0 = for ever). 0, -ETIMEDOUT, -ESHUTDOWN. */
int conn_wait(struct conn *conn, short events, uint64_t deadline_ns, struct error *err);
/* Orderly end of the sending direction alone; reading goes on. */
void conn_end_write(struct conn *conn);
/* A plain connection's socket, blocking; the rest of the connection is gone. */
int conn_take_fd(struct conn *conn);
int conn_alloc(int fd, struct conn **out, struct error *err);

/* One non-blocking step. Bytes moved, 0 = orderly end (read only), -EAGAIN with *events to wait for, or an
 * error. more: other bytes follow at once, so packets may wait for them. */
ssize_t tls_read_step(struct conn *conn, void *buf, size_t len, short *events, struct error *err);
ssize_t tls_write_step(struct conn *conn, const void *buf, size_t len, bool more, short *events,
		       struct error *err);
void tls_send_close_notify(struct conn *conn);
void tls_release(struct conn *conn);

#endif
