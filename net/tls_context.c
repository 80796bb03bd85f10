/* SPDX-License-Identifier: Apache-2.0 */
/* Certificates and keys from files, and the judgement of the peer's certificate. */
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <string.h>
#include <time.h>

#include "base/cleanup.h"
#include "net/conn_impl.h"
#include "net/tls.h"

#define NAME_TEXT_BYTES		      160
#define JUDGED_CERTIFICATES_MAX_BYTES 16384
/* In our order, which counts where we connect; why 128 bits come first: docs/security.md. */
#define CIPHER_SUITES "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"

static void make_printable(char *s)
{
	for (; *s; s++) {
		if (!isprint((unsigned char)*s))
			*s = '?';
	}
}

static void list_names(X509 *cert, size_t max_names, char *buf, size_t size)
{
	GENERAL_NAMES *names = X509_get_ext_d2i(cert, NID_subject_alt_name, NULL, NULL);
	size_t used = 0, found = 0;

	buf[0] = '\0';
	for (int i = 0; names && i < sk_GENERAL_NAME_num(names) && found < max_names; i++) {
		const GENERAL_NAME *name = sk_GENERAL_NAME_value(names, i);
		const char *text;
		size_t len;

		if (name->type != GEN_DNS)
			continue;
		text = (const char *)ASN1_STRING_get0_data(name->d.dNSName);
		len = (size_t)ASN1_STRING_length(name->d.dNSName);
		/* A NUL inside is the old trick to look like another name. */
		if (!len || memchr(text, 0, len) || used + len + 3 > size)
			continue;
		used += (size_t)snprintf(buf + used, size - used, "%s%.*s", found ? ", " : "", (int)len,
					 text);
		found++;
	}
	make_printable(buf);
	GENERAL_NAMES_free(names);
}

void tls_certificate_first_name(X509 *cert, char *buf, size_t size)
{
	list_names(cert, 1, buf, size);
}

void tls_certificate_names(X509 *cert, char *buf, size_t size)
{
	list_names(cert, 16, buf, size);
	if (!*buf)
		snprintf(buf, size, "none");
}

void tls_certificate_fingerprint(X509 *cert, char hex[65])
{
	uint8_t digest[EVP_MAX_MD_SIZE];
	unsigned len = 0;

	hex[0] = '\0';
	if (X509_digest(cert, EVP_sha256(), digest, &len) != 1 || len != 32)
		return;
	for (unsigned i = 0; i < len; i++)
		snprintf(hex + 2 * i, 3, "%02x", digest[i]);
}

static int64_t seconds(const ASN1_TIME *t)
{
	struct tm tm;

	return t && ASN1_TIME_to_tm(t, &tm) == 1 ? (int64_t)timegm(&tm) : 0;
}

int64_t tls_certificate_not_after(X509 *cert)
{
	return seconds(X509_get0_notAfter(cert));
}

static void time_text(const ASN1_TIME *t, char *buf, size_t size)
{
	struct tm tm;

	if (!t || ASN1_TIME_to_tm(t, &tm) != 1 || !strftime(buf, size, "%Y-%m-%d %H:%M:%S UTC", &tm))
		snprintf(buf, size, "an unreadable date");
}

/* Writes the sentence while OpenSSL still holds the certificate that it refuses. */
static int verify_callback(int ok, X509_STORE_CTX *store)
{
	SSL *ssl = X509_STORE_CTX_get_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx());
	struct conn *conn = ssl ? SSL_get_app_data(ssl) : NULL;
	X509 *leaf = X509_STORE_CTX_get0_cert(store);
	X509 *current = X509_STORE_CTX_get_current_cert(store);
	int depth = X509_STORE_CTX_get_error_depth(store);
	int code = X509_STORE_CTX_get_error(store);
	char names[NAME_TEXT_BYTES] = "none", issuer[NAME_TEXT_BYTES] = "nobody", date[40];
	const char *which = depth ? "a CA certificate of the peer" : "the peer's certificate";

	if (ok || !conn)
		return ok;
	if (leaf) {
		tls_certificate_names(leaf, names, sizeof names);
		X509_NAME_oneline(X509_get_issuer_name(leaf), issuer, sizeof issuer);
		make_printable(issuer);
	}
	conn->verify_code = -EKEYREJECTED;
	switch (code) {
	case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT:
	case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY:
	case X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE:
	case X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT:
	case X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN:
	case X509_V_ERR_CERT_SIGNATURE_FAILURE:
	case X509_V_ERR_CERT_UNTRUSTED:
		snprintf(conn->verify_message, sizeof conn->verify_message,
			 "the peer's certificate (name %s, issuer %s) is not issued by the CA in %s", names,
			 issuer, conn->ca_path);
		break;
	case X509_V_ERR_CERT_HAS_EXPIRED:
		time_text(current ? X509_get0_notAfter(current) : NULL, date, sizeof date);
		conn->verify_code = -EKEYEXPIRED;
		snprintf(conn->verify_message, sizeof conn->verify_message, "%s (name %s) expired on %s",
			 which, names, date);
		break;
	case X509_V_ERR_CERT_NOT_YET_VALID:
		time_text(current ? X509_get0_notBefore(current) : NULL, date, sizeof date);
		snprintf(conn->verify_message, sizeof conn->verify_message,
			 "%s (name %s) is not valid before %s; are both clocks right?", which, names, date);
		break;
	case X509_V_ERR_HOSTNAME_MISMATCH:
		snprintf(conn->verify_message, sizeof conn->verify_message,
			 "expected a peer named %s, but the certificate found is for: %s",
			 conn->expected_name ?: "?", names);
		break;
	default:
		snprintf(conn->verify_message, sizeof conn->verify_message, "%s (name %s) is refused: %s",
			 which, names, X509_verify_cert_error_string(code));
	}
	return 0;
}

/* In the place of OpenSSL's own verification: dates, then whoever made the context. */
static int judge_callback(X509_STORE_CTX *store, void *opaque)
{
	struct tls_context *ctx = opaque;
	SSL *ssl = X509_STORE_CTX_get_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx());
	struct conn *conn = ssl ? SSL_get_app_data(ssl) : NULL;
	X509 *leaf = X509_STORE_CTX_get0_cert(store);
	char names[NAME_TEXT_BYTES], fingerprint[65], date[40];
	int verdict = X509_V_OK;

	if (!conn || !leaf) {
		X509_STORE_CTX_set_error(store, X509_V_ERR_UNSPECIFIED);
		return 0;
	}
	tls_certificate_names(leaf, names, sizeof names);
	tls_certificate_fingerprint(leaf, fingerprint);
	struct error why = ERROR_INIT;
	struct tls_claim claim = {
		.fingerprint = fingerprint, .names = names, .expected_name = conn->expected_name ?: ""};
	/* Whose certificate it is comes first: that of a stranger is no more welcome when it is in date. */
	if (ctx->judge(ctx->judge_opaque, &claim, &why) < 0) {
		verdict = X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY; /* alert unknown_ca */
	} else if (X509_cmp_current_time(X509_get0_notAfter(leaf)) < 0) {
		verdict = X509_V_ERR_CERT_HAS_EXPIRED;
		time_text(X509_get0_notAfter(leaf), date, sizeof date);
		error_set(&why, EKEYEXPIRED, "the peer's certificate (name %s) expired on %s", names, date);
	} else if (X509_cmp_current_time(X509_get0_notBefore(leaf)) > 0) {
		verdict = X509_V_ERR_CERT_NOT_YET_VALID;
		time_text(X509_get0_notBefore(leaf), date, sizeof date);
		error_set(&why, EKEYREJECTED,
			  "the peer's certificate (name %s) is not valid before %s; are both clocks right?",
			  names, date);
	}
	X509_STORE_CTX_set_error(store, verdict);
	if (verdict == X509_V_OK)
		return 1;
	conn->verify_code = why.code ? why.code : -EKEYREJECTED;
	snprintf(conn->verify_message, sizeof conn->verify_message, "%s", why.message);
	return 0;
}

/* OpenSSL would ask the terminal. */
static int no_passphrase(char *buf, int size, int rwflag, void *opaque)
{
	*(bool *)opaque = true;
	return -1;
}

static BIO *open_pem(const char *what, const char *path, struct error *err)
{
	CLEANUP_FD int fd = -1;
	BIO *bio;

	if (!path || !*path) {
		error_set(err, EINVAL, "TLS: no %s file is configured", what);
		return NULL;
	}
	fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
	if (fd < 0) {
		error_errno(err, errno, "%s file %s", what, path);
		return NULL;
	}
	bio = BIO_new_fd(fd, BIO_CLOSE);
	if (!bio) {
		error_errno(err, ENOMEM, "%s file %s", what, path);
		return NULL;
	}
	fd = -1;
	return bio;
}

/* First sentence if the file has no PEM at all, second if what is in it is broken. */
static int pem_failure(const char *what, const char *path, const char *wanted, struct error *err)
{
	unsigned long e = ERR_peek_last_error();

	/* The key decoders of OpenSSL 3 say "unsupported" where the others find no start line. */
	if ((ERR_GET_LIB(e) == ERR_LIB_PEM && ERR_GET_REASON(e) == PEM_R_NO_START_LINE) ||
	    ERR_GET_REASON(e) == ERR_R_UNSUPPORTED)
		return error_set(err, EINVAL, "%s file %s holds no PEM %s", what, path, wanted);
	return error_set(err, EINVAL, "%s file %s: the %s in it is damaged: %s", what, path, wanted,
			 ERR_reason_error_string(e) ?: "unknown reason");
}

static int check_dates(const char *what, const char *path, X509 *cert, struct error *err)
{
	char date[40];

	if (X509_cmp_current_time(X509_get0_notAfter(cert)) < 0) {
		time_text(X509_get0_notAfter(cert), date, sizeof date);
		return error_set(err, EKEYEXPIRED, "%s file %s: the certificate expired on %s", what, path,
				 date);
	}
	if (X509_cmp_current_time(X509_get0_notBefore(cert)) > 0) {
		time_text(X509_get0_notBefore(cert), date, sizeof date);
		return error_set(err, EKEYREJECTED,
				 "%s file %s: the certificate is not valid before %s; is the clock right?",
				 what, path, date);
	}
	return 0;
}

/* One usable CA is enough: a file may carry the old one beside the new. */
static int load_ca(struct tls_context *ctx, const char *path, struct error *err)
{
	X509_STORE *store = SSL_CTX_get_cert_store(ctx->ssl_ctx);
	BIO *bio = open_pem("CA certificate", path, err);
	unsigned found = 0, usable = 0;
	struct error expired = ERROR_INIT;
	X509 *cert;
	int ret = 0;

	if (!bio)
		return err ? err->code : -EINVAL;
	ERR_clear_error();
	while ((cert = PEM_read_bio_X509(bio, NULL, NULL, NULL))) {
		found++;
		if (check_dates("CA certificate", path, cert, &expired) == 0) {
			usable++;
			if (X509_STORE_add_cert(store, cert) != 1)
				ret = error_errno(err, ENOMEM, "CA certificate file %s", path);
		}
		X509_free(cert);
	}
	if (!found || ERR_GET_REASON(ERR_peek_last_error()) != PEM_R_NO_START_LINE)
		ret = pem_failure("CA certificate", path, "certificate", err);
	else if (!usable) {
		error_copy(err, &expired);
		ret = expired.code;
	}
	BIO_free(bio);
	ERR_clear_error();
	return ret;
}

static int load_certificate(struct tls_context *ctx, const char *path, bool in_date, struct error *err)
{
	BIO *bio = open_pem("certificate", path, err);
	X509 *cert, *extra;
	int ret;

	if (!bio)
		return err ? err->code : -EINVAL;
	ERR_clear_error();
	cert = PEM_read_bio_X509(bio, NULL, NULL, NULL);
	if (!cert) {
		BIO_free(bio);
		return pem_failure("certificate", path, "certificate", err);
	}
	ret = in_date ? check_dates("certificate", path, cert, err) : 0;
	if (ret == 0 && SSL_CTX_use_certificate(ctx->ssl_ctx, cert) != 1)
		ret = error_set(err, EINVAL, "certificate file %s cannot be used: %s", path,
				ERR_reason_error_string(ERR_peek_last_error()) ?: "unknown reason");
	while (ret == 0 && (extra = PEM_read_bio_X509(bio, NULL, NULL, NULL))) {
		if (SSL_CTX_add0_chain_cert(ctx->ssl_ctx, extra) != 1) {
			X509_free(extra);
			ret = error_errno(err, ENOMEM, "certificate file %s", path);
		}
	}
	tls_certificate_names(cert, ctx->own_names, sizeof ctx->own_names);
	X509_free(cert);
	BIO_free(bio);
	ERR_clear_error();
	return ret;
}

static int load_key(struct tls_context *ctx, const char *path, const char *cert_path, struct error *err)
{
	BIO *bio = open_pem("key", path, err);
	bool encrypted = false;
	EVP_PKEY *key;
	X509 *cert = SSL_CTX_get0_certificate(ctx->ssl_ctx);
	int ret = 0;

	if (!bio)
		return err ? err->code : -EINVAL;
	ERR_clear_error();
	key = PEM_read_bio_PrivateKey(bio, NULL, no_passphrase, &encrypted);
	BIO_free(bio);
	if (!key && encrypted)
		return error_set(err, EINVAL,
				 "key file %s is encrypted; a key without a passphrase is needed", path);
	if (!key)
		return pem_failure("key", path, "private key", err);
	if (X509_check_private_key(cert, key) != 1)
		ret = error_set(err, EKEYREJECTED, "key file %s does not belong to certificate file %s", path,
				cert_path);
	else if (SSL_CTX_use_PrivateKey(ctx->ssl_ctx, key) != 1)
		ret = error_set(err, EINVAL, "key file %s cannot be used: %s", path,
				ERR_reason_error_string(ERR_peek_last_error()) ?: "unknown reason");
	EVP_PKEY_free(key);
	ERR_clear_error();
	return ret;
}

int tls_context_check_name(struct tls_context *ctx, const char *name, struct error *err)
{
	char names[256];
	X509 *cert = SSL_CTX_get0_certificate(ctx->ssl_ctx);
	if (cert && X509_check_host(cert, name, 0, TLS_HOST_FLAGS, NULL) == 1)
		return 0;
	snprintf(names, sizeof names, "none");
	if (cert)
		tls_certificate_names(cert, names, sizeof names);
	return error_set(err, EKEYREJECTED, "the certificate is for %s, not for %s", names, name);
}

/* All but the certificates. */
static int context_new(const char *ca_path, const char *cert_path, struct tls_context **out,
		       struct error *err)
{
	struct tls_context *ctx = calloc(1, sizeof *ctx);

	*out = NULL;
	if (!ctx)
		return error_errno(err, ENOMEM, "TLS context");
	/* A thread may still be closing a connection when the process exits: OpenSSL must not clean up under
	 * it. */
	OPENSSL_init_crypto(OPENSSL_INIT_NO_ATEXIT, NULL);
	ctx->ssl_ctx = SSL_CTX_new(TLS_method());
	ctx->ca_path = strdup(ca_path ?: "");
	ctx->cert_path = strdup(cert_path ?: "");
	if (!ctx->ssl_ctx || !ctx->ca_path || !ctx->cert_path) {
		tls_context_free(ctx);
		return error_errno(err, ENOMEM, "TLS context");
	}
	SSL_CTX_set_min_proto_version(ctx->ssl_ctx, TLS1_3_VERSION);
	SSL_CTX_set_max_proto_version(ctx->ssl_ctx, TLS1_3_VERSION);
	if (SSL_CTX_set_ciphersuites(ctx->ssl_ctx, CIPHER_SUITES) != 1) {
		tls_context_free(ctx);
		return error_set(err, ENOTSUP, "TLS: OpenSSL knows none of the ciphers " CIPHER_SUITES);
	}
	/* Every connection proves both certificates anew. */
	SSL_CTX_set_options(ctx->ssl_ctx, SSL_OP_NO_TICKET | SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION);
	SSL_CTX_set_num_tickets(ctx->ssl_ctx, 0);
	SSL_CTX_set_session_cache_mode(ctx->ssl_ctx, SSL_SESS_CACHE_OFF);
	SSL_CTX_set_max_early_data(ctx->ssl_ctx, 0);
	SSL_CTX_set_mode(ctx->ssl_ctx, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
	SSL_CTX_set_read_ahead(ctx->ssl_ctx, 1);
	SSL_CTX_set_default_read_buffer_len(ctx->ssl_ctx, 4 * TLS_RECORD_BYTES);
	SSL_CTX_set_verify(ctx->ssl_ctx, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, verify_callback);
	*out = ctx;
	return 0;
}

static int load_own(struct tls_context *ctx, const char *cert_path, const char *key_path, bool in_date,
		    struct error *err)
{
	int ret = load_certificate(ctx, cert_path, in_date, err);

	return ret ? ret : load_key(ctx, key_path, cert_path, err);
}

static int context_create(const char *ca_path, const char *cert_path, const char *key_path, bool in_date,
			  struct tls_context **out, struct error *err)
{
	struct error local = ERROR_INIT;
	struct tls_context *ctx;
	int ret;

	if (!err)
		err = &local;
	ret = context_new(ca_path, cert_path, &ctx, err);
	if (ret == 0)
		ret = load_ca(ctx, ca_path, err);
	if (ret == 0)
		ret = load_own(ctx, cert_path, key_path, in_date, err);
	if (ret < 0) {
		tls_context_free(ctx);
		ctx = NULL;
	}
	*out = ctx;
	return ret;
}

int tls_context_create(const char *ca_path, const char *cert_path, const char *key_path,
		       struct tls_context **out, struct error *err)
{
	return context_create(ca_path, cert_path, key_path, true, out, err);
}

int tls_context_create_server(const char *ca_path, const char *cert_path, const char *key_path,
			      struct tls_context **out, struct error *err)
{
	return context_create(ca_path, cert_path, key_path, false, out, err);
}

int tls_context_create_judged(const char *cert_path, const char *key_path, bool only_accepts,
			      tls_judge_fn judge, void *opaque, struct tls_context **out, struct error *err)
{
	struct error local = ERROR_INIT;
	struct tls_context *ctx;
	int ret;

	if (!err)
		err = &local;
	ret = context_new("", cert_path, &ctx, err);
	if (ret == 0) {
		ctx->judge = judge;
		ctx->judge_opaque = opaque;
		SSL_CTX_set_cert_verify_callback(ctx->ssl_ctx, judge_callback, ctx);
		/* one certificate is all that is looked at */
		SSL_CTX_set_max_cert_list(ctx->ssl_ctx, JUDGED_CERTIFICATES_MAX_BYTES);
		ret = load_own(ctx, cert_path, key_path, !only_accepts, err);
	}
	if (ret < 0) {
		tls_context_free(ctx);
		ctx = NULL;
	}
	*out = ctx;
	return ret;
}

int tls_certificate_file(const char *path, char fingerprint[65], int64_t *not_before, int64_t *not_after,
			 char *names, size_t names_size, struct error *err)
{
	struct error local = ERROR_INIT;
	BIO *bio = open_pem("certificate", path, err ? err : &local);

	if (!bio)
		return err ? err->code : local.code;
	ERR_clear_error();
	X509 *cert = PEM_read_bio_X509(bio, NULL, NULL, NULL);
	int ret = cert ? 0 : pem_failure("certificate", path, "certificate", err);
	if (cert) {
		tls_certificate_fingerprint(cert, fingerprint);
		*not_before = seconds(X509_get0_notBefore(cert));
		*not_after = tls_certificate_not_after(cert);
		tls_certificate_names(cert, names, names_size);
	}
	X509_free(cert);
	BIO_free(bio);
	ERR_clear_error();
	return ret;
}

void tls_context_free(struct tls_context *ctx)
{
	if (!ctx)
		return;
	SSL_CTX_free(ctx->ssl_ctx);
	free(ctx->ca_path);
	free(ctx->cert_path);
	free(ctx);
}
