/* SPDX-License-Identifier: Apache-2.0 */
#include "host/pki.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/rand.h>
#include <openssl/x509v3.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "host/fsutil.h"
#include "host/vmdef.h"

#define SERIAL_BYTES 16
/* Clocks of hosts differ. */
#define BACKDATE_SECONDS 86400
#define DAY_SECONDS	 86400
#define HOST_NAMES_BYTES 128

static void free_key(EVP_PKEY **k)
{
	EVP_PKEY_free(*k);
}
static void free_cert(X509 **c)
{
	X509_free(*c);
}
#define CLEANUP_KEY  CLEANUP(free_key)
#define CLEANUP_CERT CLEANUP(free_cert)

static int ssl_error(struct error *err, const char *what)
{
	char text[256] = "unknown error";
	unsigned long code = ERR_get_error();
	if (code)
		ERR_error_string_n(code, text, sizeof text);
	ERR_clear_error();
	return error_set(err, EIO, "%s: %s", what, text);
}

static int open_new(const char *path, mode_t mode, FILE **out, struct error *err)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, mode);
	if (fd < 0)
		return errno == EEXIST
			       ? error_set(err, EEXIST, "%s is there already; it is not overwritten", path)
			       : error_errno(err, errno, "%s", path);
	*out = fdopen(fd, "w");
	return *out ? 0 : error_errno(err, errno, "%s", path);
}

static int close_new(FILE *f, bool good, const char *path, struct error *err)
{
	int rc = good ? 0 : ssl_error(err, path);
	if (!rc && (fflush(f) || fsync(fileno(f))))
		rc = error_errno(err, errno, "%s", path);
	fclose(f);
	if (rc < 0)
		unlink(path);
	return rc;
}

/* Key first: a certificate without its key is useless. */
static int save_pair(const char *dir, const char *name, EVP_PKEY *key, X509 *cert, struct error *err)
{
	char key_path[4200], cert_path[4200];
	FILE *f;
	if (snprintf(key_path, sizeof key_path, "%s/%s.key", dir, name) >= (int)sizeof key_path ||
	    snprintf(cert_path, sizeof cert_path, "%s/%s.pem", dir, name) >= (int)sizeof cert_path)
		return error_errno(err, ENAMETOOLONG, "%.200s", dir);
	if (access(cert_path, F_OK) == 0)
		return error_set(err, EEXIST, "%s is there already; it is not overwritten", cert_path);
	int rc = open_new(key_path, 0600, &f, err);
	if (rc < 0)
		return rc;
	rc = close_new(f, PEM_write_PrivateKey(f, key, NULL, NULL, 0, NULL, NULL) == 1, key_path, err);
	if (!rc) {
		rc = open_new(cert_path, 0644, &f, err);
		if (!rc)
			rc = close_new(f, PEM_write_X509(f, cert) == 1, cert_path, err);
		if (rc < 0)
			unlink(key_path);
	}
	return rc < 0 ? rc : fs_sync_dir(dir, err);
}

static int add_extension(X509 *cert, X509 *issuer, int nid, const char *value, struct error *err)
{
	X509V3_CTX ctx;
	X509V3_set_ctx_nodb(&ctx);
	X509V3_set_ctx(&ctx, issuer, cert, NULL, NULL, 0);
	X509_EXTENSION *ext = X509V3_EXT_conf_nid(NULL, &ctx, nid, value);
	if (!ext)
		return ssl_error(err, value);
	int good = X509_add_ext(cert, ext, -1);
	X509_EXTENSION_free(ext);
	return good ? 0 : ssl_error(err, value);
}

/* Version, serial number, names, validity and public key; NULL with err set on failure. */
static X509 *new_cert(const char *common_name, X509_NAME *issuer, EVP_PKEY *key, int64_t seconds,
		      struct error *err)
{
	unsigned char serial[SERIAL_BYTES];
	X509 *cert = X509_new();
	BIGNUM *bn = NULL;
	bool good = cert && RAND_bytes(serial, sizeof serial) == 1;
	if (good) {
		serial[0] &= 0x7f; /* RFC 5280: positive */
		bn = BN_bin2bn(serial, sizeof serial, NULL);
		X509_NAME *name = X509_get_subject_name(cert);
		/* a validity in the past must still begin before it ends */
		long begin = -BACKDATE_SECONDS + (seconds < 0 ? (long)seconds : 0);
		good = bn && BN_to_ASN1_INTEGER(bn, X509_get_serialNumber(cert)) &&
		       X509_set_version(cert, X509_VERSION_3) &&
		       X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_UTF8,
						  (const unsigned char *)common_name, -1, -1, 0) &&
		       X509_set_issuer_name(cert, issuer ? issuer : name) &&
		       X509_gmtime_adj(X509_getm_notBefore(cert), begin) &&
		       X509_time_adj_ex(X509_getm_notAfter(cert), (int)(seconds / DAY_SECONDS),
					(long)(seconds % DAY_SECONDS), NULL) &&
		       X509_set_pubkey(cert, key);
	}
	BN_free(bn);
	if (good)
		return cert;
	ssl_error(err, common_name);
	X509_free(cert);
	return NULL;
}

int pki_init(const char *dir, int days, struct error *err)
{
	int rc = fs_make_dirs(dir, err);
	if (rc < 0)
		return rc;
	CLEANUP_KEY EVP_PKEY *key = EVP_EC_gen("P-256");
	if (!key)
		return ssl_error(err, "making a key");
	CLEANUP_CERT X509 *cert = new_cert("snmigrate CA", NULL, key, days * (int64_t)DAY_SECONDS, err);
	if (!cert)
		return err ? err->code : -EIO;
	rc = add_extension(cert, cert, NID_basic_constraints, "critical,CA:TRUE,pathlen:0", err);
	if (!rc)
		rc = add_extension(cert, cert, NID_key_usage, "critical,keyCertSign,cRLSign", err);
	if (!rc)
		rc = add_extension(cert, cert, NID_subject_key_identifier, "hash", err);
	if (!rc && !X509_sign(cert, key, EVP_sha256()))
		rc = ssl_error(err, "signing");
	return rc < 0 ? rc : save_pair(dir, "ca", key, cert, err);
}

static int load_ca(const char *dir, EVP_PKEY **key, X509 **cert, struct error *err)
{
	char path[4200];
	snprintf(path, sizeof path, "%.4096s/ca.key", dir);
	CLEANUP_FILE FILE *f = fopen(path, "re");
	if (!f)
		return error_errno(err, errno, "%s (is this a folder that snmigrate pki init made?)", path);
	*key = PEM_read_PrivateKey(f, NULL, NULL, NULL);
	if (!*key)
		return ssl_error(err, path);
	snprintf(path, sizeof path, "%.4096s/ca.pem", dir);
	CLEANUP_FILE FILE *g = fopen(path, "re");
	if (!g)
		return error_errno(err, errno, "%s", path);
	*cert = PEM_read_X509(g, NULL, NULL, NULL);
	return *cert ? 0 : ssl_error(err, path);
}

static bool is_ip(const char *s)
{
	unsigned char buf[16];
	return inet_pton(AF_INET, s, buf) == 1 || inet_pton(AF_INET6, s, buf) == 1;
}

/* A last label of digits is a mistyped IP address (RFC 1123, 2.1). */
static bool is_dns(const char *s)
{
	size_t n = strlen(s);
	const char *last = strrchr(s, '.');
	last = last ? last + 1 : s;
	return n > 0 && n < 254 && s[0] != '.' && *last && !strstr(s, "..") &&
	       strspn(last, "0123456789") != strlen(last) &&
	       strspn(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._") == n;
}

static int alternative_names(const char *name, char *const *addresses, int n, char *out, size_t size,
			     struct error *err)
{
	int at = snprintf(out, size, "DNS:%s", name);
	for (int i = 0; i < n; i++) {
		bool ip = is_ip(addresses[i]);
		if (!ip && !is_dns(addresses[i]))
			return error_set(err, EINVAL, "'%.100s' is neither an IP address nor a host name",
					 addresses[i]);
		if (!strcmp(addresses[i], name))
			continue;
		at += snprintf(out + at, size - (size_t)at, ",%s:%s", ip ? "IP" : "DNS", addresses[i]);
		if ((size_t)at >= size)
			return error_set(err, EINVAL, "too many addresses");
	}
	return 0;
}

static int add_host_extensions(X509 *cert, X509 *issuer, const char *names, struct error *err)
{
	static const struct {
		int nid;
		const char *value;
	} extensions[] = {{NID_basic_constraints, "critical,CA:FALSE"},
			  {NID_key_usage, "critical,digitalSignature"},
			  {NID_ext_key_usage, "serverAuth,clientAuth"},
			  {NID_subject_key_identifier, "hash"},
			  {NID_authority_key_identifier, "keyid"}};
	int rc = 0;
	for (size_t i = 0; !rc && i < ARRAY_SIZE(extensions); i++)
		rc = add_extension(cert, issuer, extensions[i].nid, extensions[i].value, err);
	return rc ? rc : add_extension(cert, issuer, NID_subject_alt_name, names, err);
}

int pki_issue(const char *dir, const char *name, char *const *addresses, int naddresses, int days,
	      struct error *err)
{
	char names[4096];
	if (!name_chars_valid(name) || !strcmp(name, "ca"))
		return error_set(err, EINVAL,
				 "'%.64s' is not a host name (letters, digits, '.', '_', '-'; not \"ca\")",
				 name);
	int rc = alternative_names(name, addresses, naddresses, names, sizeof names, err);
	if (rc < 0)
		return rc;
	CLEANUP_KEY EVP_PKEY *ca_key = NULL;
	CLEANUP_CERT X509 *ca = NULL;
	rc = load_ca(dir, &ca_key, &ca, err);
	if (rc < 0)
		return rc;
	CLEANUP_KEY EVP_PKEY *key = EVP_EC_gen("P-256");
	if (!key)
		return ssl_error(err, "making a key");
	CLEANUP_CERT X509 *cert =
		new_cert(name, X509_get_subject_name(ca), key, days * (int64_t)DAY_SECONDS, err);
	if (!cert)
		return err ? err->code : -EIO;
	rc = add_host_extensions(cert, ca, names, err);
	if (!rc && !X509_sign(cert, ca_key, EVP_sha256()))
		rc = ssl_error(err, "signing");
	return rc < 0 ? rc : save_pair(dir, name, key, cert, err);
}

static int save_both(int dirfd, const char *file, EVP_PKEY *key, X509 *cert, struct error *err)
{
	BIO *bio = BIO_new(BIO_s_mem());
	char *text = NULL;
	if (!bio || PEM_write_bio_X509(bio, cert) != 1 ||
	    PEM_write_bio_PrivateKey(bio, key, NULL, NULL, 0, NULL, NULL) != 1) {
		BIO_free(bio);
		return ssl_error(err, file);
	}
	long len = BIO_get_mem_data(bio, &text);
	int rc = fs_write_file_at(dirfd, file, text, (size_t)len, 0600, err);
	OPENSSL_cleanse(text, (size_t)len);
	BIO_free(bio);
	return rc;
}

int pki_self_signed(int dirfd, const char *file, const char *name, unsigned seconds, struct error *err)
{
	char names[HOST_NAMES_BYTES];
	if (!name_chars_valid(name))
		return error_set(err, EINVAL, "'%.64s' is not a host name", name);
	int rc = alternative_names(name, NULL, 0, names, sizeof names, err);
	if (rc < 0)
		return rc;
	CLEANUP_KEY EVP_PKEY *key = EVP_EC_gen("P-256");
	if (!key)
		return ssl_error(err, "making a key");
	CLEANUP_CERT X509 *cert = new_cert(name, NULL, key, seconds, err);
	if (!cert)
		return err ? err->code : -EIO;
	rc = add_host_extensions(cert, cert, names, err);
	if (!rc && !X509_sign(cert, key, EVP_sha256()))
		rc = ssl_error(err, "signing");
	return rc < 0 ? rc : save_both(dirfd, file, key, cert, err);
}
