/* SPDX-License-Identifier: Apache-2.0 */
#include "nbd/protocol.h"

#include <errno.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"

uint32_t nbd_wire_error(int errnum)
{
	switch (errnum < 0 ? -errnum : errnum) {
	case 0:
		return 0;
	case EPERM:
	case EROFS:
	case EACCES:
		return NBD_EPERM;
	case ENOMEM:
		return NBD_ENOMEM;
	case EINVAL:
		return NBD_EINVAL;
	case ENOSPC:
	case EDQUOT:
	case EFBIG:
		return NBD_ENOSPC;
	case EOVERFLOW:
		return NBD_EOVERFLOW;
	case EOPNOTSUPP:
		return NBD_ENOTSUP;
	case ESHUTDOWN:
		return NBD_ESHUTDOWN;
	default:
		return NBD_EIO;
	}
}

int nbd_option_header_decode(const uint8_t raw[NBD_OPTION_HEADER_BYTES], struct nbd_option_header *out)
{
	if (get_be64(raw) != NBD_IHAVEOPT)
		return -EPROTO;
	out->option = get_be32(raw + 8);
	out->len_bytes = get_be32(raw + 12);
	return 0;
}

/* A string with its 32-bit length before it; moves *pos on. */
static int take_string(const uint8_t *payload, size_t len, size_t *pos, struct nbd_string *out)
{
	if (len - *pos < 4)
		return -EINVAL;
	uint32_t n = get_be32(payload + *pos);
	*pos += 4;
	if (n > NBD_NAME_MAX_BYTES || n > len - *pos)
		return -EINVAL;
	*out = (struct nbd_string){(const char *)payload + *pos, n};
	*pos += n;
	return 0;
}

int nbd_info_request_decode(const uint8_t *payload, size_t len, struct nbd_info_request *out)
{
	size_t pos = 0;
	*out = (struct nbd_info_request){0};
	if (take_string(payload, len, &pos, &out->name) || len - pos < 2)
		return -EINVAL;
	unsigned n = get_be16(payload + pos);
	pos += 2;
	if (len - pos != 2 * (size_t)n)
		return -EINVAL;
	for (; pos < len; pos += 2) {
		switch (get_be16(payload + pos)) {
		case NBD_INFO_NAME:
			out->want_name = true;
			break;
		case NBD_INFO_DESCRIPTION:
			out->want_description = true;
			break;
		case NBD_INFO_BLOCK_SIZE:
			out->want_block_size = true;
			break;
		default: /* the specification: ignore what you do not know */
			break;
		}
	}
	return 0;
}

static bool string_is(const struct nbd_string *s, const char *what)
{
	return s->len == strlen(what) && memcmp(s->ptr, what, s->len) == 0;
}

int nbd_meta_request_decode(const uint8_t *payload, size_t len, struct nbd_meta_request *out)
{
	size_t pos = 0;
	*out = (struct nbd_meta_request){0};
	if (take_string(payload, len, &pos, &out->name) || len - pos < 4)
		return -EINVAL;
	out->nqueries = get_be32(payload + pos);
	pos += 4;
	if (out->nqueries > NBD_QUERIES_MAX)
		return -EINVAL;
	for (uint32_t i = 0; i < out->nqueries; i++) {
		struct nbd_string query;
		if (take_string(payload, len, &pos, &query))
			return -EINVAL;
		if (string_is(&query, NBD_BASE_ALLOCATION))
			out->wants_allocation = true;
		if (string_is(&query, "base:"))
			out->wants_base = true;
	}
	return pos == len ? 0 : -EINVAL;
}

int nbd_request_decode(const uint8_t raw[NBD_REQUEST_BYTES], struct nbd_request *out)
{
	if (get_be32(raw) != NBD_REQUEST_MAGIC)
		return -EPROTO;
	*out = (struct nbd_request){
		.flags = get_be16(raw + 4),
		.command = get_be16(raw + 6),
		.cookie = get_be64(raw + 8),
		.offset_bytes = get_be64(raw + 16),
		.len_bytes = get_be32(raw + 24),
	};
	return 0;
}

struct command_rule {
	const char *name;
	uint16_t flags;	 /* allowed */
	bool changes;	 /* refused on a read-only export */
	bool transfers;	 /* len is bounded by max_request_bytes */
	bool ranged;	 /* offset and len are checked */
	uint32_t beyond; /* answer to a range beyond the end */
};

/* FUA is allowed everywhere: the specification has servers that offer it ignore it where nothing is written.
 */
static const struct command_rule rules_of[] = {
	[NBD_CMD_READ] = {"read", NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_DF, false, true, true, NBD_EINVAL},
	[NBD_CMD_WRITE] = {"write", NBD_CMD_FLAG_FUA, true, true, true, NBD_ENOSPC},
	[NBD_CMD_DISC] = {"disconnect", NBD_CMD_FLAG_FUA, false, false, false, 0},
	[NBD_CMD_FLUSH] = {"flush", NBD_CMD_FLAG_FUA, false, false, false, 0},
	[NBD_CMD_TRIM] = {"trim", NBD_CMD_FLAG_FUA, true, false, true, NBD_EINVAL},
	[NBD_CMD_CACHE] = {"cache", NBD_CMD_FLAG_FUA, false, false, true, NBD_EINVAL},
	[NBD_CMD_WRITE_ZEROES] = {"write zeroes",
				  NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO, true,
				  false, true, NBD_ENOSPC},
	[NBD_CMD_BLOCK_STATUS] = {"block status", NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_REQ_ONE, false, false, true,
				  NBD_EINVAL},
};

const char *nbd_command_name(unsigned command)
{
	return command < ARRAY_SIZE(rules_of) ? rules_of[command].name : "unknown command";
}

uint32_t nbd_request_validate(const struct nbd_request *req, const struct nbd_request_rules *rules)
{
	if (req->command >= ARRAY_SIZE(rules_of))
		return NBD_EINVAL;
	const struct command_rule *rule = &rules_of[req->command];
	uint16_t allowed = rule->flags;
	if (!rules->structured)
		allowed &= (uint16_t)~NBD_CMD_FLAG_DF;
	if (req->flags & ~allowed)
		return NBD_EINVAL;
	if (rule->changes && rules->read_only)
		return NBD_EPERM;
	if (req->command == NBD_CMD_BLOCK_STATUS && !rules->allocation)
		return NBD_EINVAL;
	if (req->command == NBD_CMD_BLOCK_STATUS && req->len_bytes == 0)
		return NBD_EINVAL;
	if (!rule->ranged)
		return 0;
	if (rule->transfers && req->len_bytes > rules->max_request_bytes)
		return NBD_EINVAL;
	if (rules->request_alignment > 1 &&
	    ((req->offset_bytes | req->len_bytes) & (rules->request_alignment - 1)))
		return NBD_EINVAL;
	if (!range_fits(req->offset_bytes, req->len_bytes, rules->size_bytes))
		return rule->beyond;
	return 0;
}
