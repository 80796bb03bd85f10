/* SPDX-License-Identifier: Apache-2.0 */
/* interface: connections */
#ifndef NET_CONN_H
#define NET_CONN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "base/error.h"

struct conn;
struct tls_context;

/*
 * A connected byte stream, plain or TLS 1.3, with timeouts. One thread may read while another writes (an SSL
 * * is not safe for that: a lock inside covers it, waiting is done outside the lock). The fd is non-blocking.
 */

/* Context from PEM files. Errors name the file. role-free: one context both connects and accepts. */
int tls_context_create(const char *ca_path, const char *cert_path, const char *key_path,
		       struct tls_context **out, struct error *err);
/* -EKEYREJECTED when the context's own certificate is not for this name: peers that expect it will refuse. */
int tls_context_check_name(struct tls_context *ctx, const char *name, struct error *err);
/* For a side that only accepts: its own certificate may be out of date. The peer refuses it and can say so to
 * the person who waits there; a server that hangs up could not. */
int tls_context_create_server(const char *ca_path, const char *cert_path, const char *key_path,
			      struct tls_context **out, struct error *err);
/*
 * Without a CA: who is believed is the caller's to say. The other side has proved that its certificate's key
 * is its own, and the certificate is in date; `judge` says whether that certificate is the one wanted, -errno
 * with the sentence if not. Called within handshakes, from their threads. Of this side's own certificate the
 * dates are checked here unless it only accepts.
 */
struct tls_claim {
	const char *fingerprint;   /* SHA-256 of the certificate, hex */
	const char *names;	   /* "host1, host2" or "none"; printable */
	const char *expected_name; /* of conn_tls_connect; "" when accepting */
};
typedef int (*tls_judge_fn)(void *opaque, const struct tls_claim *claim, struct error *err);
int tls_context_create_judged(const char *cert_path, const char *key_path, bool only_accepts,
			      tls_judge_fn judge, void *opaque, struct tls_context **out, struct error *err);
void tls_context_free(struct tls_context *ctx);
/* SHA-256 in hex, and the end of the validity (seconds since 1970), of a certificate file. */
int tls_certificate_file(const char *path, char fingerprint[65], int64_t *not_before, int64_t *not_after,
			 char *names, size_t names_size, struct error *err);

/* Takes the fd over (closed on error too). No TLS. */
int conn_from_fd(int fd, struct conn **out, struct error *err);
/*
 * TLS handshake as client over fd (taken over, closed on error too). The peer's certificate must chain to the
 * CA, be in date and carry expected_name (DNS SAN, the [peer NAME] of the configuration). Errors say which
 * failed, with the name found.
 */
int conn_tls_connect(int fd, struct tls_context *ctx, const char *expected_name, unsigned timeout_ms,
		     struct conn **out, struct error *err);
/* As server; demands a client certificate. Its name: conn_peer_name; the caller checks it against its peers.
 */
int conn_tls_accept(int fd, struct tls_context *ctx, unsigned timeout_ms, struct conn **out,
		    struct error *err);

/* First DNS SAN of the peer's certificate (or "" for plain); SHA-256 of the certificate in hex (or ""). Valid
 * for the conn's life. */
const char *conn_peer_name(const struct conn *conn);
const char *conn_peer_fingerprint(const struct conn *conn);
/* When its validity ends, seconds since 1970; 0 for plain. */
int64_t conn_peer_not_after(const struct conn *conn);
/* Likewise of this side's own certificate. */
const char *conn_own_fingerprint(const struct conn *conn);
/* True if the peer's certificate carries the DNS SAN `name` (any of its SANs). False for plain. */
bool conn_peer_has_name(const struct conn *conn, const char *name);
bool conn_is_tls(const struct conn *conn);
/* 32 bytes that only the two ends of this TLS session can know (RFC 8446, 7.5); they do not cover the
 * client's certificate. */
#define CONN_EXPORTED_BYTES 32
int conn_export(struct conn *conn, const char *label, uint8_t out[CONN_EXPORTED_BYTES], struct error *err);
int conn_fd(const struct conn *conn);

/*
 * Read exactly / write all. timeout_ms bounds the time without a single byte of progress (0 = for ever).
 * -ETIMEDOUT, -ECONNRESET for a close in the middle, -ENODATA for an orderly close before the first byte,
 * -ESHUTDOWN after conn_shutdown. One reading and one writing thread at a time.
 */
int conn_read_full(struct conn *conn, void *buf, size_t len, unsigned timeout_ms, struct error *err);
/* Into several places, one after the other. Uses iov up, as conn_writev_full does. */
int conn_readv_full(struct conn *conn, struct iovec *iov, int niov, unsigned timeout_ms, struct error *err);
int conn_write_full(struct conn *conn, const void *buf, size_t len, unsigned timeout_ms, struct error *err);
int conn_writev_full(struct conn *conn, struct iovec *iov, int niov, unsigned timeout_ms, struct error *err);
/* Sends what the socket takes at once, without waiting: bytes sent, less than all perhaps, -EAGAIN for none,
 * or an error. What is left must come next, unchanged. */
ssize_t conn_write_now(struct conn *conn, const void *buf, size_t len, struct error *err);
/* Whether a read would find something now: bytes, or that there will be none. The reading thread's. */
bool conn_has_input(struct conn *conn);
/* At least one byte, at most len; 0 = orderly close. */
ssize_t conn_read_some(struct conn *conn, void *buf, size_t len, unsigned timeout_ms, struct error *err);
/* Wakes blocked readers and writers with -ESHUTDOWN, and closes the sending direction. Any thread, not a
 * signal handler. */
void conn_shutdown(struct conn *conn);
void conn_close(struct conn *conn); /* NULL is fine; no other thread may be inside */
/* Bytes on the wire so far (TLS overhead included). */
uint64_t conn_bytes_sent(const struct conn *conn);
uint64_t conn_bytes_received(const struct conn *conn);

/* TCP with TCP_NODELAY, TCP_USER_TIMEOUT = timeout_ms; address "HOST:PORT" or "[V6]:PORT". Returns an fd. */
int net_connect(const char *address, unsigned timeout_ms, struct error *err);
/* From the host part of `local` ("" = whatever the kernel takes), if that is of the same family. */
int net_connect_from(const char *local, const char *address, unsigned timeout_ms, struct error *err);
/* Returns a listening fd (SO_REUSEADDR). */
int net_listen(const char *address, int backlog, struct error *err);

/*
 * A plain, blocking socket that speaks for `conn`, which is taken over (on error too). For libnbd, whose own
 * TLS is not trusted (CVE-2024-7383), and any fd-only library. Without TLS it is the connection's own socket.
 * With TLS it is one end of a socket pair, pumped by threads of its own in both directions until either side
 * closes.
 */
int conn_pump_start(struct conn *conn, int *fd_out, struct error *err);

#endif
