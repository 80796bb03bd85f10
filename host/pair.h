/* SPDX-License-Identifier: Apache-2.0 */
#ifndef HOST_PAIR_H
#define HOST_PAIR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "host/config.h"
#include "net/conn.h"

/*
 * Pairing: the code that one host prints and a person types at the other, and what the two hosts say to one
 * another by it. Why it is safe: docs/security.md; the messages: docs/protocol.md, "Pairing". All here is
 * pure.
 *
 * A code is 25 letters of Crockford's base 32, in groups of five: 80 random bits (the secret), 40 bits of
 * HMAC-SHA256(secret, certificate of the listening host), 5 bits of CRC against slips of the pen.
 */
#define PAIR_VERSION	       1
#define PAIR_SECRET_BYTES      10
#define PAIR_TAG_BYTES	       5
#define PAIR_CODE_CHARS	       29 /* with the hyphens */
#define PAIR_PROOF_BYTES       32
#define PAIR_SHA256_BYTES      32
#define PAIR_MESSAGE_MAX_BYTES 4096
#define PAIR_TIMEOUT_MS	       10000 /* for all of it */
#define PAIR_REASON_BYTES      400

struct pair_code {
	uint8_t secret[PAIR_SECRET_BYTES];
	uint8_t tag[PAIR_TAG_BYTES];
};

/* A new one, for the host whose certificate has this SHA-256 (hex). */
int pair_code_make(const char *listener_sha256, struct pair_code *out, struct error *err);
void pair_code_format(const struct pair_code *code, char out[PAIR_CODE_CHARS + 1]);
/* Hyphens and spaces do not matter, nor does case; O is 0, I and L are 1. -EINVAL: mistyped. */
int pair_code_parse(const char *text, struct pair_code *out, struct error *err);
/* Whether the code was made by the host with this certificate. */
bool pair_code_is_of(const struct pair_code *code, const char *listener_sha256);

/* What a proof is good for: one TLS session between two certificates. */
struct pair_binding {
	uint8_t exported[CONN_EXPORTED_BYTES];
	uint8_t caller[PAIR_SHA256_BYTES], listener[PAIR_SHA256_BYTES]; /* SHA-256 of the certificates */
};
int pair_binding_of(struct conn *conn, bool caller, struct pair_binding *out, struct error *err);

/* The first message, of the host where the code was typed. */
struct pair_hello {
	unsigned version_min, version_max;
	char name[HOST_NAME_MAX_CHARS + 1];
	char address[128]; /* HOST:PORT; "" = as the connection came, with the port */
	unsigned port;
	uint8_t proof[PAIR_PROOF_BYTES];
};
/* The answer. */
struct pair_reply {
	bool ok;
	char reason[PAIR_REASON_BYTES]; /* unless ok; printable */
	char name[HOST_NAME_MAX_CHARS + 1];
	uint8_t proof[PAIR_PROOF_BYTES];
};

/* Over the binding and what the message says besides the proof. */
void pair_prove_hello(const struct pair_code *code, const struct pair_binding *b,
		      const struct pair_hello *hello, uint8_t out[PAIR_PROOF_BYTES]);
void pair_prove_reply(const struct pair_code *code, const struct pair_binding *b,
		      const struct pair_reply *reply, uint8_t out[PAIR_PROOF_BYTES]);
/* In constant time. */
bool pair_proofs_equal(const uint8_t a[PAIR_PROOF_BYTES], const uint8_t b[PAIR_PROOF_BYTES]);

/* A message is a u32 length, big-endian, and so many bytes of JSON. Hostile input: -EPROTO. The fuzzer links
 * the parsers. */
int pair_hello_parse(const char *text, size_t len, struct pair_hello *out, struct error *err);
int pair_reply_parse(const char *text, size_t len, struct pair_reply *out, struct error *err);
/* New strings; NULL without memory. */
char *pair_hello_text(const struct pair_hello *hello);
char *pair_reply_text(const struct pair_reply *reply);
/* Over a connection; text of at most PAIR_MESSAGE_MAX_BYTES. timeout_ms bounds the whole message, from the
 * deadline. */
int pair_send(struct conn *conn, const char *text, uint64_t deadline_ms, struct error *err);
int pair_receive(struct conn *conn, char buf[PAIR_MESSAGE_MAX_BYTES], size_t *len, uint64_t deadline_ms,
		 struct error *err);

void pair_hex(const uint8_t *raw, size_t n, char *out);
/* Exactly 2n hex digits. */
bool pair_unhex(const char *hex, uint8_t *out, size_t n);

#endif
