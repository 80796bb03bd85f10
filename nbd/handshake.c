/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "nbd/server_impl.h"

struct haggle {
	struct nbd_connection *nc;
	uint64_t deadline_ms;
	struct error *err;
	/* The export that SET_META_CONTEXT named: the choice counts for that name alone. */
	char *meta_name;
	uint32_t meta_len;
};

static int time_left(struct haggle *h, unsigned *ms)
{
	uint64_t now = clock_now_ms();
	if (now >= h->deadline_ms)
		return error_set(h->err, ETIMEDOUT, "NBD handshake took longer than %u ms",
				 h->nc->server->opt.handshake_timeout_ms);
	*ms = (unsigned)(h->deadline_ms - now);
	return 0;
}

/* By pieces, so that the deadline holds against a client that drips. */
static int read_bytes(struct haggle *h, void *buf, size_t len)
{
	uint8_t *p = buf;
	while (len) {
		unsigned ms = 0;
		int rc = time_left(h, &ms);
		if (rc)
			return rc;
		ssize_t n = conn_read_some(h->nc->conn, p, len, ms, h->err);
		if (n < 0)
			return (int)n;
		if (n == 0)
			return error_set(h->err, ECONNRESET,
					 "NBD handshake: the client closed the connection");
		p += n;
		len -= (size_t)n;
	}
	return 0;
}

static int write_bytes(struct haggle *h, const void *buf, size_t len)
{
	unsigned ms = 0;
	int rc = time_left(h, &ms);
	return rc ? rc : conn_write_full(h->nc->conn, buf, len, ms, h->err);
}

static int reply(struct haggle *h, uint32_t option, uint32_t type, const void *data, uint32_t len)
{
	uint8_t raw[NBD_OPTION_REPLY_HEADER_BYTES + 2 * NBD_NAME_MAX_BYTES + 16];
	if (len > sizeof raw - NBD_OPTION_REPLY_HEADER_BYTES)
		return error_set(h->err, EOVERFLOW, "NBD option reply too long");
	put_be64(raw, NBD_OPTION_REPLY);
	put_be32(raw + 8, option);
	put_be32(raw + 12, type);
	put_be32(raw + 16, len);
	if (len)
		memcpy(raw + NBD_OPTION_REPLY_HEADER_BYTES, data, len);
	return write_bytes(h, raw, NBD_OPTION_REPLY_HEADER_BYTES + len);
}

static int reply_error(struct haggle *h, uint32_t option, uint32_t type, const char *why)
{
	return reply(h, option, type, why, (uint32_t)strlen(why));
}

static int drain(struct haggle *h, uint32_t len)
{
	uint8_t buf[4096];
	while (len) {
		uint32_t n = len < sizeof buf ? len : sizeof buf;
		int rc = read_bytes(h, buf, n);
		if (rc)
			return rc;
		len -= n;
	}
	return 0;
}

static bool name_is_ours(const struct haggle *h, const char *name, uint32_t len)
{
	const char *ours = h->nc->server->export_name;
	return len == 0 || (len == strlen(ours) && memcmp(name, ours, len) == 0);
}

static uint16_t transmission_flags(const struct nbd_connection *nc)
{
	uint16_t flags = nc->server->transmission_flags;
	if (nc->rules.structured)
		flags |= NBD_FLAG_SEND_DF;
	return flags;
}

static int reply_list(struct haggle *h, uint32_t len)
{
	if (len)
		return reply_error(h, NBD_OPT_LIST, NBD_REP_ERR_INVALID, "LIST takes no data");
	const struct nbd_server *s = h->nc->server;
	size_t name_len = strlen(s->export_name), desc_len = strlen(s->description);
	uint8_t buf[4 + 2 * NBD_NAME_MAX_BYTES];
	put_be32(buf, (uint32_t)name_len);
	memcpy(buf + 4, s->export_name, name_len);
	memcpy(buf + 4 + name_len, s->description, desc_len);
	int rc = reply(h, NBD_OPT_LIST, NBD_REP_SERVER, buf, (uint32_t)(4 + name_len + desc_len));
	return rc ? rc : reply(h, NBD_OPT_LIST, NBD_REP_ACK, NULL, 0);
}

static int reply_info_string(struct haggle *h, uint32_t option, uint16_t what, const char *text)
{
	uint8_t buf[2 + NBD_NAME_MAX_BYTES];
	size_t len = strlen(text);
	put_be16(buf, what);
	memcpy(buf + 2, text, len);
	return reply(h, option, NBD_REP_INFO, buf, (uint32_t)(2 + len));
}

static int reply_export(struct haggle *h, uint32_t option, const struct nbd_info_request *info)
{
	struct nbd_connection *nc = h->nc;
	const struct nbd_server *s = nc->server;
	uint8_t buf[16];
	put_be16(buf, NBD_INFO_EXPORT);
	put_be64(buf + 2, nc->rules.size_bytes);
	put_be16(buf + 10, transmission_flags(nc));
	int rc = reply(h, option, NBD_REP_INFO, buf, 12);
	if (rc == 0 && info->want_name)
		rc = reply_info_string(h, option, NBD_INFO_NAME, s->export_name);
	if (rc == 0 && info->want_description && s->description[0])
		rc = reply_info_string(h, option, NBD_INFO_DESCRIPTION, s->description);
	if (rc)
		return rc;
	/* Sent unasked as well, so that no client has to guess the largest request. */
	uint32_t min = nc->rules.request_alignment;
	put_be16(buf, NBD_INFO_BLOCK_SIZE);
	put_be32(buf + 2, min);
	put_be32(buf + 6, min > 4096 ? min : 4096);
	put_be32(buf + 10, nc->rules.max_request_bytes);
	rc = reply(h, option, NBD_REP_INFO, buf, 14);
	return rc ? rc : reply(h, option, NBD_REP_ACK, NULL, 0);
}

/* 1: OPT_GO was granted. */
static int info_or_go(struct haggle *h, uint32_t option, const uint8_t *payload, uint32_t len)
{
	struct nbd_info_request info;
	if (nbd_info_request_decode(payload, len, &info))
		return reply_error(h, option, NBD_REP_ERR_INVALID, "malformed option data");
	if (!name_is_ours(h, info.name.ptr, info.name.len))
		return reply_error(h, option, NBD_REP_ERR_UNKNOWN, "no such export");
	if (option == NBD_OPT_GO && (!h->meta_name || h->meta_len != info.name.len ||
				     memcmp(h->meta_name, info.name.ptr, info.name.len)))
		h->nc->rules.allocation = false;
	int rc = reply_export(h, option, &info);
	return rc ? rc : option == NBD_OPT_GO;
}

static int meta_context(struct haggle *h, uint32_t option, const uint8_t *payload, uint32_t len)
{
	struct nbd_connection *nc = h->nc;
	bool set = option == NBD_OPT_SET_META_CONTEXT;
	if (set)
		nc->rules.allocation = false;
	if (!nc->rules.structured)
		return reply_error(h, option, NBD_REP_ERR_INVALID, "structured replies were not negotiated");
	struct nbd_meta_request meta;
	if (nbd_meta_request_decode(payload, len, &meta))
		return reply_error(h, option, NBD_REP_ERR_INVALID, "malformed option data");
	if (!name_is_ours(h, meta.name.ptr, meta.name.len))
		return reply_error(h, option, NBD_REP_ERR_UNKNOWN, "no such export");
	bool grant = meta.wants_allocation;
	if (!set)
		grant = grant || meta.nqueries == 0 || meta.wants_base;
	if (grant) {
		uint8_t buf[4 + sizeof NBD_BASE_ALLOCATION - 1];
		put_be32(buf, set ? NBD_BASE_ALLOCATION_ID : 0);
		memcpy(buf + 4, NBD_BASE_ALLOCATION, sizeof NBD_BASE_ALLOCATION - 1);
		int rc = reply(h, option, NBD_REP_META_CONTEXT, buf, sizeof buf);
		if (rc)
			return rc;
	}
	if (set && grant) {
		free(h->meta_name);
		h->meta_len = meta.name.len;
		h->meta_name = malloc((size_t)meta.name.len + 1);
		if (!h->meta_name)
			return error_errno(h->err, ENOMEM, "NBD handshake");
		memcpy(h->meta_name, meta.name.ptr, meta.name.len);
		nc->rules.allocation = true;
	}
	return reply(h, option, NBD_REP_ACK, NULL, 0);
}

/* The old way in: no reply header, and a wrong name can only be answered by closing. */
static int export_name(struct haggle *h, const uint8_t *payload, uint32_t len)
{
	if (!name_is_ours(h, (const char *)payload, len))
		return error_set(h->err, ENOENT, "NBD client asked for an unknown export");
	/* Without OPT_GO no context can be in force under a name that was agreed. */
	if (!h->meta_name || h->meta_len != len || memcmp(h->meta_name, payload, len))
		h->nc->rules.allocation = false;
	uint8_t buf[10 + 124] = {0};
	put_be64(buf, h->nc->rules.size_bytes);
	put_be16(buf + 8, transmission_flags(h->nc));
	int rc = write_bytes(h, buf, h->nc->no_zeroes ? 10 : sizeof buf);
	return rc ? rc : 1;
}

/* 1: transmission begins. 0: go on. -ESHUTDOWN without a message: aborted in good order. */
static int one_option(struct haggle *h, bool *aborted)
{
	uint8_t raw[NBD_OPTION_HEADER_BYTES];
	int rc = read_bytes(h, raw, sizeof raw);
	if (rc)
		return rc;
	struct nbd_option_header head;
	if (nbd_option_header_decode(raw, &head))
		return error_set(h->err, EPROTO, "NBD client sent garbage instead of an option");
	if (head.len_bytes > NBD_OPTION_DRAIN_BYTES)
		return error_set(h->err, EPROTO, "NBD client sent an option of %u bytes", head.len_bytes);
	if (head.len_bytes > NBD_OPTION_MAX_BYTES) {
		rc = drain(h, head.len_bytes);
		return rc ? rc : reply_error(h, head.option, NBD_REP_ERR_TOO_BIG, "option too long");
	}
	CLEANUP_FREE uint8_t *payload = malloc(head.len_bytes + 1);
	if (!payload)
		return error_errno(h->err, ENOMEM, "NBD option");
	rc = read_bytes(h, payload, head.len_bytes);
	if (rc)
		return rc;
	switch (head.option) {
	case NBD_OPT_EXPORT_NAME:
		return export_name(h, payload, head.len_bytes);
	case NBD_OPT_ABORT:
		*aborted = true;
		/* The client may be gone already. */
		reply(h, head.option, NBD_REP_ACK, NULL, 0);
		return 0;
	case NBD_OPT_LIST:
		return reply_list(h, head.len_bytes);
	case NBD_OPT_INFO:
	case NBD_OPT_GO:
		return info_or_go(h, head.option, payload, head.len_bytes);
	case NBD_OPT_STRUCTURED_REPLY:
		if (head.len_bytes)
			return reply_error(h, head.option, NBD_REP_ERR_INVALID,
					   "STRUCTURED_REPLY takes no data");
		h->nc->rules.structured = true;
		return reply(h, head.option, NBD_REP_ACK, NULL, 0);
	case NBD_OPT_LIST_META_CONTEXT:
	case NBD_OPT_SET_META_CONTEXT:
		return meta_context(h, head.option, payload, head.len_bytes);
	default:
		return reply_error(h, head.option, NBD_REP_ERR_UNSUP, "option not supported");
	}
}

static int greet(struct haggle *h)
{
	uint8_t hello[18], answer[4];
	put_be64(hello, NBD_MAGIC);
	put_be64(hello + 8, NBD_IHAVEOPT);
	put_be16(hello + 16, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
	int rc = write_bytes(h, hello, sizeof hello);
	if (rc == 0)
		rc = read_bytes(h, answer, sizeof answer);
	if (rc)
		return rc;
	uint32_t flags = get_be32(answer);
	if (flags & ~(uint32_t)(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES))
		return error_set(h->err, EPROTO, "NBD client sent unknown handshake flags 0x%x", flags);
	h->nc->no_zeroes = flags & NBD_FLAG_NO_ZEROES;
	return 0;
}

int nbd_handshake(struct nbd_connection *nc, struct error *err)
{
	struct haggle h = {
		.nc = nc, .deadline_ms = clock_now_ms() + nc->server->opt.handshake_timeout_ms, .err = err};
	int rc = greet(&h);
	bool aborted = false;
	for (unsigned n = 0; rc == 0 && !aborted; n++) {
		if (n == NBD_OPTIONS_MAX)
			rc = error_set(err, EPROTO, "NBD client sent more than %d options", NBD_OPTIONS_MAX);
		else
			rc = one_option(&h, &aborted);
	}
	free(h.meta_name);
	return rc;
}
