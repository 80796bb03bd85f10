/* SPDX-License-Identifier: Apache-2.0 */
#ifndef TESTS_UNIT_NET_PKI_H
#define TESTS_UNIT_NET_PKI_H

/*
 * Certificates for tests, in a fresh temporary folder, made with OpenSSL's API: ca.pem; host1, host2 (also
 * named host2.example), expired, future as NAME.pem and NAME.key, more by pki_issue; stranger of another
 * CA (other-ca.pem); text, damaged.pem, encrypted.key. Header only: unit tests are single files.
 */
#include <check.h>
#include <fcntl.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/rsa.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static inline FILE *pki_open(const char *dir, const char *name, const char *suffix)
{
	char file[512];
	FILE *f;

	snprintf(file, sizeof file, "%s/%s%s", dir, name, suffix);
	f = fopen(file, "w");
	ck_assert_ptr_nonnull(f);
	return f;
}

static inline void pki_extension(X509 *cert, X509 *issuer, int nid, const char *value)
{
	X509V3_CTX ctx;
	X509_EXTENSION *ext;

	X509V3_set_ctx(&ctx, issuer, cert, NULL, NULL, 0);
	ext = X509V3_EXT_conf_nid(NULL, &ctx, nid, value);
	ck_assert_ptr_nonnull(ext);
	X509_add_ext(cert, ext, -1);
	X509_EXTENSION_free(ext);
}

static inline X509 *pki_cert(const char *cn, const char *san, X509 *ca, EVP_PKEY *ca_key, EVP_PKEY *key,
			     long from_s, long to_s)
{
	static long serial = 1;
	X509 *cert = X509_new();
	X509_NAME *name = X509_get_subject_name(cert);

	X509_set_version(cert, 2);
	ASN1_INTEGER_set(X509_get_serialNumber(cert), serial++);
	X509_gmtime_adj(X509_getm_notBefore(cert), from_s);
	X509_gmtime_adj(X509_getm_notAfter(cert), to_s);
	X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, (const unsigned char *)cn, -1, -1, 0);
	X509_set_issuer_name(cert, ca ? X509_get_subject_name(ca) : name);
	X509_set_pubkey(cert, key);
	pki_extension(cert, ca ? ca : cert, NID_basic_constraints,
		      ca ? "critical,CA:FALSE" : "critical,CA:TRUE");
	pki_extension(cert, ca ? ca : cert, NID_subject_key_identifier, "hash");
	pki_extension(cert, ca ? ca : cert, NID_authority_key_identifier, "keyid");
	if (san)
		pki_extension(cert, ca, NID_subject_alt_name, san);
	ck_assert_int_gt(X509_sign(cert, ca_key, EVP_sha256()), 0);
	return cert;
}

static inline void pki_host(const char *dir, const char *name, const char *san, X509 *ca, EVP_PKEY *ca_key,
			    long from_s, long to_s)
{
	EVP_PKEY *key = EVP_EC_gen("P-256");
	X509 *cert = pki_cert(name, san, ca, ca_key, key, from_s, to_s);
	FILE *f = pki_open(dir, name, ".pem");

	PEM_write_X509(f, cert);
	fclose(f);
	f = pki_open(dir, name, ".key");
	PEM_write_PrivateKey(f, key, NULL, NULL, 0, NULL, NULL);
	fclose(f);
	if (strcmp(name, "host1") == 0) {
		f = pki_open(dir, "encrypted", ".key");
		PEM_write_PrivateKey(f, key, EVP_aes_128_cbc(), (unsigned char *)"word", 4, NULL, NULL);
		fclose(f);
	}
	X509_free(cert);
	EVP_PKEY_free(key);
}

static inline char *pki_create(void)
{
	char template[] = "/tmp/snm-pki-XXXXXX";
	char *dir;
	EVP_PKEY *ca_key = EVP_EC_gen("P-256"), *other_key = EVP_EC_gen("P-256");
	X509 *ca = pki_cert("Test CA", NULL, NULL, ca_key, ca_key, -86400, 86400);
	X509 *other = pki_cert("Other CA", NULL, NULL, other_key, other_key, -86400, 86400);
	FILE *f;

	ck_assert_ptr_nonnull(mkdtemp(template));
	dir = strdup(template);
	f = pki_open(dir, "ca", ".pem");
	PEM_write_X509(f, ca);
	fclose(f);
	f = pki_open(dir, "other-ca", ".pem");
	PEM_write_X509(f, other);
	fclose(f);
	pki_host(dir, "host1", "DNS:host1", ca, ca_key, -3600, 3600);
	pki_host(dir, "host2", "DNS:host2,DNS:host2.example,IP:127.0.0.1", ca, ca_key, -3600, 3600);
	pki_host(dir, "expired", "DNS:expired", ca, ca_key, -7200, -3600);
	pki_host(dir, "future", "DNS:future", ca, ca_key, 3600, 7200);
	pki_host(dir, "stranger", "DNS:stranger", other, other_key, -3600, 3600);
	f = pki_open(dir, "text", "");
	fputs("this is no certificate\n", f);
	fclose(f);
	f = pki_open(dir, "damaged", ".pem");
	fputs("-----BEGIN CERTIFICATE-----\nAAAAAAAAAAAAAAAA\n-----END CERTIFICATE-----\n", f);
	fclose(f);
	X509_free(ca);
	X509_free(other);
	EVP_PKEY_free(other_key);
	/* Kept so that a test can issue a certificate whose time is short. */
	f = pki_open(dir, "ca", ".key");
	PEM_write_PrivateKey(f, ca_key, NULL, NULL, 0, NULL, NULL);
	fclose(f);
	EVP_PKEY_free(ca_key);
	return dir;
}

/* A certificate of the same CA for `name`, valid for life_s seconds from now. */
static inline void pki_issue(const char *dir, const char *name, long life_s)
{
	char file[512], san[128];
	FILE *f;
	X509 *ca;
	EVP_PKEY *key;

	snprintf(file, sizeof file, "%s/ca.pem", dir);
	f = fopen(file, "r");
	ca = PEM_read_X509(f, NULL, NULL, NULL);
	fclose(f);
	snprintf(file, sizeof file, "%s/ca.key", dir);
	f = fopen(file, "r");
	key = PEM_read_PrivateKey(f, NULL, NULL, NULL);
	fclose(f);
	snprintf(san, sizeof san, "DNS:%s", name);
	pki_host(dir, name, san, ca, key, -60, life_s);
	X509_free(ca);
	EVP_PKEY_free(key);
}

static inline void pki_remove(char *dir)
{
	char command[512];

	snprintf(command, sizeof command, "rm -rf '%s'", dir);
	if (dir && strncmp(dir, "/tmp/snm-pki-", 13) == 0)
		(void)!system(command);
	free(dir);
}

static inline void pki_connect_raw(int fd, int version)
{
	SSL_CTX *ctx = SSL_CTX_new(TLS_client_method());
	SSL *ssl;
	char byte;

	SSL_CTX_set_min_proto_version(ctx, version);
	SSL_CTX_set_max_proto_version(ctx, version);
	ssl = SSL_new(ctx);
	(void)fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
	SSL_set_fd(ssl, fd);
	if (SSL_connect(ssl) == 1)
		SSL_read(ssl, &byte, 1);
	SSL_free(ssl);
	SSL_CTX_free(ctx);
	close(fd);
}

static inline void pki_connect_without_certificate(int fd)
{
	pki_connect_raw(fd, TLS1_3_VERSION);
}

static inline void pki_connect_with_tls12(int fd)
{
	pki_connect_raw(fd, TLS1_2_VERSION);
}

#endif
