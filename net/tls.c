/* SPDX-License-Identifier: Apache-2.0 */
/* TLS 1.3 over a connection's socket: handshake, steps, and what to say when it fails. */
#include <errno.h>
#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/x509v3.h>
#include <string.h>
#include <sys/socket.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "net/conn_impl.h"
#include "net/tls.h"

/* AES-GCM is good for about 2^24.5 records of 16 KiB under one key; ours is changed well before. */
#define KEY_UPDATE_BYTES (UINT64_C(64) << 30)
#define JOINED_BYTES	 (8u * TLS_RECORD_BYTES)

/*
 * A BIO of our own: OpenSSL's socket BIO writes with write(2), which raises SIGPIPE in a program that did not
 * ignore it. It counts the bytes on the wire too, and joins records: OpenSSL writes each by itself, and a
 * call and a wake-up of the peer for each cost more than the encryption.
 */
static bool keep_record(struct conn *conn, const char *buf, size_t len)
{
	if (!conn->more_follows || len > JOINED_BYTES - conn->joined_bytes)
		return false;
	if (!conn->joined && !(conn->joined = malloc(JOINED_BYTES)))
		return false;
	memcpy(conn->joined + conn->joined_bytes, buf, len);
	conn->joined_bytes += len;
	return true;
}

static int bio_write(BIO *bio, const char *buf, int len)
{
	struct conn *conn = BIO_get_data(bio);
	size_t kept = conn->joined_bytes;
	struct iovec iov[2] = {{.iov_base = conn->joined, .iov_len = kept},
			       {.iov_base = (char *)buf, .iov_len = (size_t)len}};
	struct msghdr msg = {.msg_iov = iov + !kept, .msg_iovlen = 1 + !!kept};
	ssize_t n;

	BIO_clear_retry_flags(bio);
	if (keep_record(conn, buf, (size_t)len))
		return len;
	do {
		n = sendmsg(conn->fd, &msg, MSG_NOSIGNAL | (conn->more_follows ? MSG_MORE : 0));
	} while (n < 0 && errno == EINTR);
	if (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK) {
		conn->bio_errno = errno == EPIPE ? ECONNRESET : errno;
		return -1;
	}
	if (n > 0)
		atomic_fetch_add_explicit(&conn->sent_bytes, (uint64_t)n, memory_order_relaxed);
	if (n > 0 && (size_t)n > kept) {
		conn->joined_bytes = 0;
		return (int)((size_t)n - kept);
	}
	if (n > 0) {
		conn->joined_bytes -= (size_t)n;
		memmove(conn->joined, conn->joined + n, conn->joined_bytes);
	}
	BIO_set_retry_write(bio);
	return -1;
}

static int bio_read(BIO *bio, char *buf, int len)
{
	struct conn *conn = BIO_get_data(bio);
	ssize_t n;

	BIO_clear_retry_flags(bio);
	do {
		n = recv(conn->fd, buf, (size_t)len, 0);
	} while (n < 0 && errno == EINTR);
	if (n > 0) {
		atomic_fetch_add_explicit(&conn->received_bytes, (uint64_t)n, memory_order_relaxed);
		return (int)n;
	}
	if (n == 0) {
		conn->bio_eof = true;
		return 0;
	}
	if (errno == EAGAIN || errno == EWOULDBLOCK)
		BIO_set_retry_read(bio);
	else
		conn->bio_errno = errno;
	return -1;
}

static long bio_ctrl(BIO *bio, int cmd, long num, void *ptr)
{
	struct conn *conn = BIO_get_data(bio);

	if (cmd == BIO_CTRL_FLUSH)
		return 1;
	if (cmd == BIO_CTRL_EOF)
		return conn->bio_eof;
	return 0;
}

static BIO_METHOD *bio_method;
static pthread_once_t bio_once = PTHREAD_ONCE_INIT;

static void bio_method_create(void)
{
	bio_method = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "snmigrate socket");
	if (!bio_method)
		return;
	BIO_meth_set_write(bio_method, bio_write);
	BIO_meth_set_read(bio_method, bio_read);
	BIO_meth_set_ctrl(bio_method, bio_ctrl);
}

/* What an alert about our certificate means for who reads the message; NULL for any other reason. */
static const char *certificate_alert(int reason)
{
	switch (reason) {
	case SSL_R_TLSV1_ALERT_UNKNOWN_CA:
		return "it is not issued by the CA that the peer trusts (alert unknown_ca)";
	case SSL_R_SSLV3_ALERT_CERTIFICATE_EXPIRED:
		return "it has expired by the peer's clock (alert certificate_expired)";
	case SSL_R_SSLV3_ALERT_CERTIFICATE_REVOKED:
		return "it is revoked (alert certificate_revoked)";
	case SSL_R_SSLV3_ALERT_BAD_CERTIFICATE:
		return "the peer expected another name, or it is not valid yet (alert bad_certificate)";
	case SSL_R_SSLV3_ALERT_UNSUPPORTED_CERTIFICATE:
		return "its key usage does not allow this (alert unsupported_certificate)";
	case SSL_R_SSLV3_ALERT_CERTIFICATE_UNKNOWN:
		return "the peer does not say why (alert certificate_unknown)";
	case SSL_R_TLSV1_ALERT_ACCESS_DENIED:
		return "the peer denies it access (alert access_denied)";
	default:
		return NULL;
	}
}

static bool reason_is_not_tls(int reason)
{
	switch (reason) {
	case SSL_R_WRONG_VERSION_NUMBER:
	case SSL_R_WRONG_SSL_VERSION:
	case SSL_R_HTTP_REQUEST:
	case SSL_R_HTTPS_PROXY_REQUEST:
	case SSL_R_BAD_RECORD_TYPE:
	case SSL_R_UNEXPECTED_RECORD:
	case SSL_R_PACKET_LENGTH_TOO_LONG:
	case SSL_R_RECORD_LENGTH_MISMATCH:
	case SSL_R_LENGTH_TOO_LONG:
	case SSL_R_LENGTH_TOO_SHORT:
	case SSL_R_ENCRYPTED_LENGTH_TOO_LONG:
#ifdef SSL_R_RECORD_TOO_SMALL
	case SSL_R_RECORD_TOO_SMALL:
#endif
		return true;
	default:
		return false;
	}
}

/* The sentence for a failed OpenSSL call; called under ssl_lock by the thread that failed. */
static int tls_describe(struct conn *conn, int ssl_error, struct error *err)
{
	const char *when = conn->handshake_done ? "TLS" : "TLS handshake";
	unsigned long queued = ERR_peek_error();
	int reason = ERR_GET_LIB(queued) == ERR_LIB_SSL ? ERR_GET_REASON(queued) : 0;
	const char *alert = conn->judged && reason == SSL_R_TLSV1_ALERT_UNKNOWN_CA
				    ? "this host is not paired there, or not any more (alert unknown_ca)"
				    : certificate_alert(reason);
	char text[160];

	if (conn->verify_code)
		return error_set(err, conn->verify_code, "%s", conn->verify_message);
	if (alert)
		return error_set(err, EACCES, "%s: the peer refuses our certificate %s (name %s): %s", when,
				 conn->cert_path, conn->own_names, alert);
	if (reason == SSL_R_TLSV13_ALERT_CERTIFICATE_REQUIRED)
		return error_set(err, EACCES, "%s: the peer demands a certificate and we sent none", when);
	if (reason == SSL_R_PEER_DID_NOT_RETURN_A_CERTIFICATE && conn->judged)
		return error_set(err, EKEYREJECTED, "%s: the peer sent no certificate", when);
	if (reason == SSL_R_PEER_DID_NOT_RETURN_A_CERTIFICATE)
		return error_set(err, EKEYREJECTED,
				 "%s: the peer sent no certificate (one issued by the CA in %s is needed)",
				 when, conn->ca_path);
	if (reason == SSL_R_UNSUPPORTED_PROTOCOL || reason == SSL_R_TLSV1_ALERT_PROTOCOL_VERSION)
		return error_set(err, EPROTO, "%s: the peer does not speak TLS 1.3", when);
	if (!conn->handshake_done && reason_is_not_tls(reason))
		return error_set(err, EPROTO, "%s: the peer does not speak TLS", when);
	if (reason == SSL_R_UNEXPECTED_EOF_WHILE_READING || (ssl_error == SSL_ERROR_SYSCALL && conn->bio_eof))
		return error_set(err, ECONNRESET,
				 conn->handshake_done
					 ? "%s: the peer's connection ended without a goodbye"
					 : "%s: the peer closed the connection before the handshake was done",
				 when);
	if (conn->bio_errno)
		return error_errno(err, conn->bio_errno, "%s", when);
	if (!queued)
		return error_set(err, EPROTO, "%s failed (SSL_get_error %d)", when, ssl_error);
	ERR_error_string_n(queued, text, sizeof text);
	return error_set(err, EPROTO, "%s: %s%s", when, ERR_reason_error_string(queued) ?: text,
			 conn->handshake_done && reason == SSL_R_DECRYPTION_FAILED_OR_BAD_RECORD_MAC
				 ? " (data was changed on the way)"
				 : "");
}

/* Shared end of the steps; ssl_lock held. */
static ssize_t tls_step_result(struct conn *conn, int ret, short *events, struct error *err)
{
	int e = SSL_get_error(conn->ssl, ret);

	switch (e) {
	case SSL_ERROR_WANT_READ:
		*events = POLLIN;
		return -EAGAIN;
	case SSL_ERROR_WANT_WRITE:
		*events = POLLOUT;
		return -EAGAIN;
	case SSL_ERROR_ZERO_RETURN:
		return 0;
	default:
		return tls_describe(conn, e, err);
	}
}

ssize_t tls_read_step(struct conn *conn, void *buf, size_t len, short *events, struct error *err)
{
	SCOPE_LOCK(&conn->ssl_lock);
	size_t n = 0;
	int ret;

	ERR_clear_error();
	ret = SSL_read_ex(conn->ssl, buf, len, &n);
	if (ret == 1) {
		conn->read_anything = true;
		return (ssize_t)n;
	}
	return tls_step_result(conn, ret, events, err);
}

ssize_t tls_write_step(struct conn *conn, const void *buf, size_t len, bool more, short *events,
		       struct error *err)
{
	SCOPE_LOCK(&conn->ssl_lock);
	size_t n = 0;
	ssize_t result;
	int ret;

	ERR_clear_error();
	if (conn->bytes_since_key_update >= KEY_UPDATE_BYTES &&
	    SSL_key_update(conn->ssl, SSL_KEY_UPDATE_NOT_REQUESTED) == 1)
		conn->bytes_since_key_update = 0;
	/* One record a call: a retry first ends the record that waited, and would write the rest of a longer
	 * buffer in the same call, as if more followed that. */
	len = len < TLS_RECORD_BYTES ? len : TLS_RECORD_BYTES;
	conn->more_follows = more;
	ret = SSL_write_ex(conn->ssl, buf, len, &n);
	conn->more_follows = false;
	if (ret == 1) {
		conn->bytes_since_key_update += n;
		return (ssize_t)n;
	}
	result = tls_step_result(conn, ret, events, err);
	if (result == 0)
		return error_set(err, ECONNRESET, "TLS: the peer has closed the connection");
	if (result == -ECONNRESET && !conn->read_anything) {
		/* A server that refuses our certificate says so in an alert and hangs up: the write meets the
		 * hang-up, the reason lies in the receive buffer. */
		struct error alert = ERROR_INIT;
		uint8_t byte;

		ERR_clear_error();
		ret = SSL_peek_ex(conn->ssl, &byte, 1, &n);
		if (ret != 1 && SSL_get_error(conn->ssl, ret) == SSL_ERROR_SSL &&
		    tls_describe(conn, SSL_ERROR_SSL, &alert) == -EACCES) {
			error_copy(err, &alert);
			return -EACCES;
		}
	}
	return result;
}

void tls_send_close_notify(struct conn *conn)
{
	SCOPE_LOCK(&conn->ssl_lock);

	if (!conn->handshake_done)
		return;
	ERR_clear_error();
	SSL_shutdown(conn->ssl);
	ERR_clear_error();
}

void tls_release(struct conn *conn)
{
	if (!atomic_load(&conn->write_ended))
		tls_send_close_notify(conn);
	SSL_free(conn->ssl);
	X509_free(conn->peer_cert);
	free(conn->gather);
	free(conn->joined);
	free(conn->ca_path);
	free(conn->cert_path);
	free(conn->expected_name);
}

static int tls_prepare(struct conn *conn, struct tls_context *ctx, const char *expected_name,
		       struct error *err)
{
	BIO *bio;

	pthread_once(&bio_once, bio_method_create);
	conn->ssl = SSL_new(ctx->ssl_ctx);
	conn->gather = malloc(TLS_RECORD_BYTES);
	conn->ca_path = strdup(ctx->ca_path);
	conn->cert_path = strdup(ctx->cert_path);
	if (expected_name)
		conn->expected_name = strdup(expected_name);
	if (!conn->ssl || !conn->gather || !conn->ca_path || !conn->cert_path || !bio_method ||
	    (expected_name && !conn->expected_name))
		return error_errno(err, ENOMEM, "TLS connection");
	memcpy(conn->own_names, ctx->own_names, sizeof conn->own_names);
	conn->judged = ctx->judge != NULL;
	bio = BIO_new(bio_method);
	if (!bio)
		return error_errno(err, ENOMEM, "TLS connection");
	BIO_set_data(bio, conn);
	BIO_set_init(bio, 1);
	SSL_set_bio(conn->ssl, bio, bio);
	SSL_set_app_data(conn->ssl, conn);
	if (expected_name && !ctx->judge) {
		SSL_set_hostflags(conn->ssl, TLS_HOST_FLAGS);
		/* An empty name would switch the check off. */
		if (!*expected_name || SSL_set1_host(conn->ssl, expected_name) != 1)
			return error_set(err, EINVAL, "'%s' is not a name that a certificate can carry",
					 expected_name);
	}
	return 0;
}

static int tls_handshake(struct conn *conn, unsigned timeout_ms, struct error *err)
{
	uint64_t deadline = timeout_ms ? clock_now_ns() + (uint64_t)timeout_ms * 1000000 : 0;

	for (;;) {
		short events = 0;
		ssize_t n;
		int ret;

		ERR_clear_error();
		ret = conn->is_server ? SSL_accept(conn->ssl) : SSL_connect(conn->ssl);
		if (ret == 1)
			return 0;
		n = tls_step_result(conn, ret, &events, err);
		if (n == 0)
			return error_set(err, ECONNRESET, "TLS handshake: the peer closed the connection");
		if (n != -EAGAIN)
			return (int)n;
		ret = conn_wait(conn, events, deadline, err);
		if (ret == -ETIMEDOUT)
			return error_set(err, ETIMEDOUT,
					 "TLS handshake: no answer from the peer within %u ms", timeout_ms);
		if (ret < 0)
			return ret;
	}
}

static int tls_open(int fd, struct tls_context *ctx, bool is_server, const char *expected_name,
		    unsigned timeout_ms, struct conn **out, struct error *err)
{
	struct conn *conn;
	int ret = conn_alloc(fd, &conn, err);

	*out = NULL;
	if (ret < 0)
		return ret;
	conn->is_server = is_server;
	ret = tls_prepare(conn, ctx, expected_name, err);
	if (ret == 0)
		ret = tls_handshake(conn, timeout_ms, err);
	if (ret == 0) {
		conn->peer_cert = SSL_get1_peer_certificate(conn->ssl);
		if (!conn->peer_cert || SSL_get_verify_result(conn->ssl) != X509_V_OK)
			ret = error_set(err, EKEYREJECTED,
					"TLS handshake: the peer's certificate is not verified");
	}
	if (ret < 0) {
		if (!conn->ssl) {
			free(conn->gather);
			free(conn->ca_path);
			free(conn->cert_path);
			free(conn->expected_name);
		}
		conn_close(conn);
		return ret;
	}
	conn->handshake_done = true;
	tls_certificate_first_name(conn->peer_cert, conn->peer_name, sizeof conn->peer_name);
	tls_certificate_fingerprint(conn->peer_cert, conn->peer_fingerprint);
	X509 *own = SSL_get_certificate(conn->ssl);
	if (own)
		tls_certificate_fingerprint(own, conn->own_fingerprint);
	*out = conn;
	return 0;
}

int conn_tls_connect(int fd, struct tls_context *ctx, const char *expected_name, unsigned timeout_ms,
		     struct conn **out, struct error *err)
{
	return tls_open(fd, ctx, false, expected_name ?: "", timeout_ms, out, err);
}

int conn_tls_accept(int fd, struct tls_context *ctx, unsigned timeout_ms, struct conn **out,
		    struct error *err)
{
	return tls_open(fd, ctx, true, NULL, timeout_ms, out, err);
}

bool conn_peer_has_name(const struct conn *conn, const char *name)
{
	return conn->peer_cert && *name &&
	       X509_check_host(conn->peer_cert, name, strlen(name), TLS_HOST_FLAGS, NULL) == 1;
}

int64_t conn_peer_not_after(const struct conn *conn)
{
	return conn->peer_cert ? tls_certificate_not_after(conn->peer_cert) : 0;
}

int conn_export(struct conn *conn, const char *label, uint8_t out[CONN_EXPORTED_BYTES], struct error *err)
{
	if (!conn->ssl)
		return error_set(err, EINVAL, "%s: the connection is not TLS", label);
	SCOPE_LOCK(&conn->ssl_lock);
	if (SSL_export_keying_material(conn->ssl, out, CONN_EXPORTED_BYTES, label, strlen(label), NULL, 0,
				       0) != 1)
		return error_set(err, EIO, "%s: TLS gives no key", label);
	return 0;
}
