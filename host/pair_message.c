/* SPDX-License-Identifier: Apache-2.0 */
#include <ctype.h>
#include <errno.h>
#include <jansson.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "host/pair.h"
#include "host/vmdef.h"

static void cleanup_json(json_t **o)
{
	json_decref(*o);
}

/* Whoever nests a message deeper than this has nothing to say; jansson recurses. */
#define NESTING_MAX 4

static bool nests_deeply(const char *text, size_t len)
{
	unsigned depth = 0;
	for (size_t i = 0; i < len; i++) {
		if (text[i] == '{' || text[i] == '[') {
			if (++depth > NESTING_MAX)
				return true;
		} else if ((text[i] == '}' || text[i] == ']') && depth) {
			depth--;
		}
	}
	return false;
}

static json_t *parse(const char *text, size_t len, struct error *err)
{
	json_t *o = len <= PAIR_MESSAGE_MAX_BYTES && !nests_deeply(text, len)
			    ? json_loadb(text, len, JSON_REJECT_DUPLICATES, NULL)
			    : NULL;
	if (!json_is_object(o)) {
		json_decref(o);
		error_set(err, EPROTO, "a message of pairing that is no small JSON object");
		return NULL;
	}
	return o;
}

static const char *text_of(const json_t *o, const char *key, size_t size, struct error *err)
{
	const char *s = json_string_value(json_object_get(o, key));
	if (s && strlen(s) < size)
		return s;
	error_set(err, EPROTO, "a message of pairing without a proper \"%s\"", key);
	return NULL;
}

static int read_name(const json_t *o, char name[HOST_NAME_MAX_CHARS + 1], struct error *err)
{
	const char *s = text_of(o, "name", HOST_NAME_MAX_CHARS + 1, err);
	if (!s)
		return -EPROTO;
	if (!name_chars_valid(s))
		return error_set(err, EPROTO, "a message of pairing with a name that no host can have");
	strcpy(name, s);
	return 0;
}

static int read_proof(const json_t *o, uint8_t proof[PAIR_PROOF_BYTES], struct error *err)
{
	const char *s = text_of(o, "proof", 2 * PAIR_PROOF_BYTES + 1, err);
	if (!s)
		return -EPROTO;
	return pair_unhex(s, proof, PAIR_PROOF_BYTES)
		       ? 0
		       : error_set(err, EPROTO, "a message of pairing with a malformed proof");
}

static int read_versions(const json_t *o, struct pair_hello *out, struct error *err)
{
	const json_t *range = json_object_get(o, "versions");
	json_int_t min = json_integer_value(json_array_get(range, 0)),
		   max = json_integer_value(json_array_get(range, 1));
	if (json_array_size(range) != 2 || min < 1 || max < min || max > 65535)
		return error_set(err, EPROTO, "a message of pairing without a proper \"versions\"");
	out->version_min = (unsigned)min;
	out->version_max = (unsigned)max;
	if (min > PAIR_VERSION)
		return error_set(
			err, EPROTO,
			"the other host speaks pairing protocol %u and later, this one %u: upgrade snmigrate "
			"here",
			out->version_min, PAIR_VERSION);
	return 0;
}

/* Only what a configuration file may have, too. */
static int read_address(const json_t *o, struct pair_hello *out, struct error *err)
{
	const char *s = text_of(o, "address", sizeof out->address, err);
	json_int_t port = json_integer_value(json_object_get(o, "port"));
	if (!s)
		return -EPROTO;
	for (const char *p = s; *p; p++)
		if (!isgraph((unsigned char)*p))
			return error_set(err, EPROTO, "a message of pairing with a malformed address");
	if (*s && host_address_normalize(s, out->address, sizeof out->address, NULL) < 0)
		return error_set(err, EPROTO, "a message of pairing with a malformed address");
	if (!*s)
		out->address[0] = '\0';
	if (port < 0 || port > 65535)
		return error_set(err, EPROTO, "a message of pairing without a proper \"port\"");
	out->port = (unsigned)port;
	return 0;
}

int pair_hello_parse(const char *text, size_t len, struct pair_hello *out, struct error *err)
{
	*out = (struct pair_hello){0};
	CLEANUP(cleanup_json) json_t *o = parse(text, len, err);
	if (!o)
		return -EPROTO;
	int rc = read_versions(o, out, err);
	if (!rc)
		rc = read_name(o, out->name, err);
	if (!rc)
		rc = read_address(o, out, err);
	return rc ? rc : read_proof(o, out->proof, err);
}

int pair_reply_parse(const char *text, size_t len, struct pair_reply *out, struct error *err)
{
	*out = (struct pair_reply){0};
	CLEANUP(cleanup_json) json_t *o = parse(text, len, err);
	if (!o)
		return -EPROTO;
	out->ok = json_is_true(json_object_get(o, "ok"));
	if (out->ok) {
		int rc = read_name(o, out->name, err);
		return rc ? rc : read_proof(o, out->proof, err);
	}
	const char *s = text_of(o, "error", sizeof out->reason, err);
	if (!s)
		return -EPROTO;
	strcpy(out->reason, s);
	for (char *p = out->reason; *p; p++)
		if (!isprint((unsigned char)*p))
			*p = '?';
	return 0;
}

char *pair_hello_text(const struct pair_hello *h)
{
	char proof[2 * PAIR_PROOF_BYTES + 1];
	pair_hex(h->proof, sizeof h->proof, proof);
	CLEANUP(cleanup_json)
	json_t *o = json_pack("{s:[i,i], s:s, s:s, s:i, s:s}", "versions", (int)h->version_min,
			      (int)h->version_max, "name", h->name, "address", h->address, "port",
			      (int)h->port, "proof", proof);
	return o ? json_dumps(o, JSON_COMPACT) : NULL;
}

char *pair_reply_text(const struct pair_reply *r)
{
	char proof[2 * PAIR_PROOF_BYTES + 1];
	pair_hex(r->proof, sizeof r->proof, proof);
	CLEANUP(cleanup_json)
	json_t *o = r->ok ? json_pack("{s:b, s:i, s:s, s:s}", "ok", 1, "version", PAIR_VERSION, "name",
				      r->name, "proof", proof)
			  : json_pack("{s:b, s:s}", "ok", 0, "error", r->reason);
	return o ? json_dumps(o, JSON_COMPACT) : NULL;
}

/* What is left of the time; 1 ms when nothing is, since 0 would be for ever. */
static unsigned left_ms(uint64_t deadline_ms)
{
	uint64_t now = clock_now_ms();
	return now < deadline_ms ? (unsigned)(deadline_ms - now) : 1;
}

int pair_send(struct conn *conn, const char *text, uint64_t deadline_ms, struct error *err)
{
	uint8_t buf[4 + PAIR_MESSAGE_MAX_BYTES];
	size_t len = strlen(text);
	if (len > PAIR_MESSAGE_MAX_BYTES)
		return error_set(err, EMSGSIZE, "a message of pairing of %zu bytes", len);
	put_be32(buf, (uint32_t)len);
	memcpy(buf + 4, text, len);
	return conn_write_full(conn, buf, 4 + len, left_ms(deadline_ms), err);
}

/* Byte by byte is progress too: the time is for all of it. */
static int read_until(struct conn *conn, void *buf, size_t len, uint64_t deadline_ms, struct error *err)
{
	for (size_t at = 0; at < len;) {
		if (clock_now_ms() >= deadline_ms)
			return error_set(err, ETIMEDOUT, "pairing took longer than %d ms", PAIR_TIMEOUT_MS);
		ssize_t n = conn_read_some(conn, (uint8_t *)buf + at, len - at, left_ms(deadline_ms), err);
		if (n < 0)
			return (int)n;
		if (n == 0)
			return error_set(err, ECONNRESET, "the other host closed the connection");
		at += (size_t)n;
	}
	return 0;
}

int pair_receive(struct conn *conn, char buf[PAIR_MESSAGE_MAX_BYTES], size_t *len, uint64_t deadline_ms,
		 struct error *err)
{
	uint8_t head[4];
	int rc = read_until(conn, head, sizeof head, deadline_ms, err);
	if (rc < 0)
		return rc;
	*len = get_be32(head);
	if (*len > PAIR_MESSAGE_MAX_BYTES)
		return error_set(err, EPROTO, "a message of pairing of %zu bytes, at most %d are allowed",
				 *len, PAIR_MESSAGE_MAX_BYTES);
	return read_until(conn, buf, *len, deadline_ms, err);
}
