/* SPDX-License-Identifier: Apache-2.0 */
#include "host/pair.h"

#include <ctype.h>
#include <errno.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>

#include "base/cleanup.h"

#define CODE_BITS     125
#define CODE_LETTERS  25
#define CODE_GROUP    5
#define BODY_BYTES    (PAIR_SECRET_BYTES + PAIR_TAG_BYTES)
#define CRC5_POLYNOME 0x05 /* x^5 + x^2 + 1: finds every wrong letter */
#define EXPORT_LABEL  "EXPORTER-snmigrate-pair-1"

static const char letters[] = "0123456789ABCDEFGHJKMNPQRSTVWXYZ";

/* ---- the code ---- */

void pair_hex(const uint8_t *raw, size_t n, char *out)
{
	for (size_t i = 0; i < n; i++)
		snprintf(out + 2 * i, 3, "%02x", raw[i]);
}

static int nibble(char c)
{
	return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

bool pair_unhex(const char *hex, uint8_t *out, size_t n)
{
	if (strlen(hex) != 2 * n)
		return false;
	for (size_t i = 0; i < n; i++) {
		int high = nibble(hex[2 * i]), low = nibble(hex[2 * i + 1]);
		if (high < 0 || low < 0)
			return false;
		out[i] = (uint8_t)(high << 4 | low);
	}
	return true;
}

static unsigned bit_of(const uint8_t *body, unsigned i)
{
	return body[i / 8] >> (7 - i % 8) & 1;
}

static uint8_t crc5(const uint8_t body[BODY_BYTES])
{
	unsigned crc = 0x1f;
	for (unsigned i = 0; i < 8 * BODY_BYTES; i++) {
		unsigned out = (crc >> 4 & 1) ^ bit_of(body, i);
		crc = (crc << 1 & 0x1f) ^ (out ? CRC5_POLYNOME : 0);
	}
	return (uint8_t)crc;
}

static void make_tag(const uint8_t secret[PAIR_SECRET_BYTES], const uint8_t sha256[PAIR_SHA256_BYTES],
		     uint8_t tag[PAIR_TAG_BYTES])
{
	static const char what[] = "snmigrate pair 1 certificate";
	uint8_t text[sizeof what + PAIR_SHA256_BYTES], mac[EVP_MAX_MD_SIZE];
	memcpy(text, what, sizeof what);
	memcpy(text + sizeof what, sha256, PAIR_SHA256_BYTES);
	HMAC(EVP_sha256(), secret, PAIR_SECRET_BYTES, text, sizeof text, mac, NULL);
	memcpy(tag, mac, PAIR_TAG_BYTES);
}

int pair_code_make(const char *listener_sha256, struct pair_code *out, struct error *err)
{
	uint8_t sha256[PAIR_SHA256_BYTES];
	if (!pair_unhex(listener_sha256, sha256, sizeof sha256))
		return error_set(err, EINVAL, "'%.80s' is no SHA-256", listener_sha256);
	if (getrandom(out->secret, sizeof out->secret, 0) != (ssize_t)sizeof out->secret)
		return error_errno(err, errno, "getrandom");
	make_tag(out->secret, sha256, out->tag);
	return 0;
}

bool pair_code_is_of(const struct pair_code *code, const char *listener_sha256)
{
	uint8_t sha256[PAIR_SHA256_BYTES], tag[PAIR_TAG_BYTES];
	if (!pair_unhex(listener_sha256, sha256, sizeof sha256))
		return false;
	make_tag(code->secret, sha256, tag);
	return CRYPTO_memcmp(tag, code->tag, sizeof tag) == 0;
}

void pair_code_format(const struct pair_code *code, char out[PAIR_CODE_CHARS + 1])
{
	uint8_t body[BODY_BYTES + 1];
	memcpy(body, code->secret, PAIR_SECRET_BYTES);
	memcpy(body + PAIR_SECRET_BYTES, code->tag, PAIR_TAG_BYTES);
	body[BODY_BYTES] = (uint8_t)(crc5(body) << 3);
	for (unsigned i = 0; i < CODE_LETTERS; i++) {
		unsigned v = 0;
		for (unsigned k = 0; k < 5; k++)
			v = v << 1 | bit_of(body, 5 * i + k);
		if (i && i % CODE_GROUP == 0)
			*out++ = '-';
		*out++ = letters[v];
	}
	*out = '\0';
}

static int letter_value(char c)
{
	c = (char)toupper((unsigned char)c);
	if (c == 'O')
		return 0;
	if (c == 'I' || c == 'L')
		return 1;
	const char *at = c ? strchr(letters, c) : NULL;
	return at ? (int)(at - letters) : -1;
}

int pair_code_parse(const char *text, struct pair_code *out, struct error *err)
{
	uint8_t body[BODY_BYTES + 1] = {0};
	unsigned n = 0;
	for (; *text; text++) {
		if (*text == '-' || *text == ' ')
			continue;
		int v = letter_value(*text);
		if (v < 0)
			return error_set(err, EINVAL, "a code has no '%c'",
					 isprint((unsigned char)*text) ? *text : '?');
		for (unsigned k = 0; k < 5 && n < CODE_LETTERS; k++)
			if (v >> (4 - k) & 1)
				body[(5 * n + k) / 8] |= (uint8_t)(0x80 >> (5 * n + k) % 8);
		n++;
	}
	if (n != CODE_LETTERS)
		return error_set(err, EINVAL, "a code has %d letters and digits, not %u", CODE_LETTERS, n);
	if (body[BODY_BYTES] >> 3 != crc5(body))
		return error_set(err, EINVAL, "the code is mistyped");
	memcpy(out->secret, body, PAIR_SECRET_BYTES);
	memcpy(out->tag, body + PAIR_SECRET_BYTES, PAIR_TAG_BYTES);
	return 0;
}

/* ---- proofs ---- */

int pair_binding_of(struct conn *conn, bool caller, struct pair_binding *out, struct error *err)
{
	if (!pair_unhex(conn_own_fingerprint(conn), caller ? out->caller : out->listener,
			PAIR_SHA256_BYTES) ||
	    !pair_unhex(conn_peer_fingerprint(conn), caller ? out->listener : out->caller, PAIR_SHA256_BYTES))
		return error_set(err, EIO, "pairing: a certificate without fingerprint");
	return conn_export(conn, EXPORT_LABEL, out->exported, err);
}

/* what, the two zero-terminated texts and the number: nothing of it can pass for another split of the same
 * bytes. */
static void prove(const struct pair_code *code, const char *what, const struct pair_binding *b,
		  const char *name, const char *address, unsigned port, uint8_t out[PAIR_PROOF_BYTES])
{
	uint8_t text[1024];
	size_t n = 0;
	const struct {
		const void *at;
		size_t len;
	} parts[] = {{what, strlen(what) + 1},	    {b->exported, sizeof b->exported},
		     {b->caller, sizeof b->caller}, {b->listener, sizeof b->listener},
		     {name, strlen(name) + 1},	    {address, strlen(address) + 1}};
	for (size_t i = 0; i < ARRAY_SIZE(parts); i++) {
		memcpy(text + n, parts[i].at, parts[i].len);
		n += parts[i].len;
	}
	text[n++] = (uint8_t)(port >> 8);
	text[n++] = (uint8_t)port;
	HMAC(EVP_sha256(), code->secret, PAIR_SECRET_BYTES, text, n, out, NULL);
}

void pair_prove_hello(const struct pair_code *code, const struct pair_binding *b, const struct pair_hello *h,
		      uint8_t out[PAIR_PROOF_BYTES])
{
	prove(code, "snmigrate pair 1 caller", b, h->name, h->address, h->port, out);
}

void pair_prove_reply(const struct pair_code *code, const struct pair_binding *b, const struct pair_reply *r,
		      uint8_t out[PAIR_PROOF_BYTES])
{
	prove(code, "snmigrate pair 1 listener", b, r->name, "", 0, out);
}

bool pair_proofs_equal(const uint8_t a[PAIR_PROOF_BYTES], const uint8_t b[PAIR_PROOF_BYTES])
{
	return CRYPTO_memcmp(a, b, PAIR_PROOF_BYTES) == 0;
}
