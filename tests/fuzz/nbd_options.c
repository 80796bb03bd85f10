/* SPDX-License-Identifier: Apache-2.0 */
/* The pure parsers: first byte chooses, the rest is what arrives. qcow2's header is one more of their kind.
 */
#include <stdint.h>
#include <stdlib.h>

#include "base/bytes.h"
#include "block/qcow2_header.h"
#include "nbd/protocol.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check_string(const struct nbd_string *s, const uint8_t *data, size_t size)
{
	if (s->len > NBD_NAME_MAX_BYTES || (const uint8_t *)s->ptr < data ||
	    (const uint8_t *)s->ptr + s->len > data + size)
		abort();
}

static void request(const uint8_t *raw, unsigned bits)
{
	struct nbd_request_rules rules = {.size_bytes = UINT64_C(1) << (bits % 63),
					  .request_alignment = bits & 64 ? 512 : 1,
					  .max_request_bytes = 32u << 20,
					  .read_only = bits & 128,
					  .structured = bits & 1,
					  .allocation = bits & 2};
	struct nbd_request req;
	uint8_t copy[NBD_REQUEST_BYTES];
	memcpy(copy, raw, sizeof copy);
	put_be32(copy, NBD_REQUEST_MAGIC);
	if (nbd_request_decode(copy, &req))
		abort();
	if (nbd_request_validate(&req, &rules) || req.command == NBD_CMD_FLUSH || req.command == NBD_CMD_DISC)
		return;
	if (req.offset_bytes > rules.size_bytes || req.len_bytes > rules.size_bytes - req.offset_bytes)
		abort();
	if (req.command <= NBD_CMD_WRITE && req.len_bytes > rules.max_request_bytes)
		abort();
	if (rules.read_only && (req.command == NBD_CMD_WRITE || req.command == NBD_CMD_TRIM ||
				req.command == NBD_CMD_WRITE_ZEROES))
		abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct nbd_info_request info;
	struct nbd_meta_request meta;
	struct nbd_option_header option;
	struct qcow2_header qcow2;
	struct error err = ERROR_INIT;
	if (size < 2)
		return 0;
	unsigned which = data[0] % 5, bits = data[1];
	data += 2;
	size -= 2;
	if (which == 0 && nbd_info_request_decode(data, size, &info) == 0)
		check_string(&info.name, data, size);
	if (which == 1 && nbd_meta_request_decode(data, size, &meta) == 0)
		check_string(&meta.name, data, size);
	if (which == 2 && size >= NBD_OPTION_HEADER_BYTES)
		(void)nbd_option_header_decode(data, &option);
	if (which == 3 && size >= NBD_REQUEST_BYTES)
		request(data, bits);
	if (which == 4 && qcow2_header_decode(data, size, &qcow2, &err) == 0 &&
	    (qcow2.cluster_bytes < 512 || qcow2.cluster_bytes > 2u << 20 || qcow2.refcount_bits < 1 ||
	     qcow2.refcount_bits > 64 || qcow2.header_bytes > qcow2.cluster_bytes))
		abort();
	return 0;
}
