/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Wire constants and pure parsers of NBD, after https://github.com/NetworkBlockDevice/nbd doc/proto.md. All
 * integers are big-endian. Nothing here does I/O, so unit tests and fuzzers link it directly.
 */
#ifndef NBD_PROTOCOL_H
#define NBD_PROTOCOL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NBD_MAGIC	     UINT64_C(0x4e42444d41474943) /* "NBDMAGIC" */
#define NBD_IHAVEOPT	     UINT64_C(0x49484156454f5054) /* "IHAVEOPT" */
#define NBD_OPTION_REPLY     UINT64_C(0x0003e889045565a9)
#define NBD_REQUEST_MAGIC    0x25609513u
#define NBD_SIMPLE_MAGIC     0x67446698u
#define NBD_STRUCTURED_MAGIC 0x668e33efu

#define NBD_OPTION_HEADER_BYTES	      16
#define NBD_OPTION_REPLY_HEADER_BYTES 20
#define NBD_REQUEST_BYTES	      28
#define NBD_SIMPLE_REPLY_BYTES	      16
#define NBD_CHUNK_HEADER_BYTES	      20

/* Limits of ours. */
#define NBD_NAME_MAX_BYTES	4096	    /* the specification's limit for names and other strings */
#define NBD_OPTION_MAX_BYTES	(64u << 10) /* longer ones are drained and answered ERR_TOO_BIG */
#define NBD_OPTION_DRAIN_BYTES	(1u << 20)  /* longer ones end the connection */
#define NBD_OPTIONS_MAX		64	    /* a connection */
#define NBD_QUERIES_MAX		32
#define NBD_EXTENTS_MAX		1024 /* in one block status reply */
#define NBD_DEFAULT_MAX_REQUEST (32u << 20)
/* Half of what a connection may cost (64 MiB): malloc may keep as much again of what was freed. */
#define NBD_DEFAULT_MAX_FLIGHT (30u << 20)

enum nbd_handshake_flag { NBD_FLAG_FIXED_NEWSTYLE = 1 << 0, NBD_FLAG_NO_ZEROES = 1 << 1 };

enum nbd_option {
	NBD_OPT_EXPORT_NAME = 1,
	NBD_OPT_ABORT = 2,
	NBD_OPT_LIST = 3,
	NBD_OPT_STARTTLS = 5,
	NBD_OPT_INFO = 6,
	NBD_OPT_GO = 7,
	NBD_OPT_STRUCTURED_REPLY = 8,
	NBD_OPT_LIST_META_CONTEXT = 9,
	NBD_OPT_SET_META_CONTEXT = 10,
};

#define NBD_REP_ERROR(n) (UINT32_C(0x80000000) | (n))
enum nbd_rep {
	NBD_REP_ACK = 1,
	NBD_REP_SERVER = 2,
	NBD_REP_INFO = 3,
	NBD_REP_META_CONTEXT = 4,
};
#define NBD_REP_ERR_UNSUP   NBD_REP_ERROR(1)
#define NBD_REP_ERR_POLICY  NBD_REP_ERROR(2)
#define NBD_REP_ERR_INVALID NBD_REP_ERROR(3)
#define NBD_REP_ERR_UNKNOWN NBD_REP_ERROR(6)
#define NBD_REP_ERR_TOO_BIG NBD_REP_ERROR(9)

enum nbd_info { NBD_INFO_EXPORT = 0, NBD_INFO_NAME = 1, NBD_INFO_DESCRIPTION = 2, NBD_INFO_BLOCK_SIZE = 3 };

enum nbd_transmission_flag {
	NBD_FLAG_HAS_FLAGS = 1 << 0,
	NBD_FLAG_READ_ONLY = 1 << 1,
	NBD_FLAG_SEND_FLUSH = 1 << 2,
	NBD_FLAG_SEND_FUA = 1 << 3,
	NBD_FLAG_SEND_TRIM = 1 << 5,
	NBD_FLAG_SEND_WRITE_ZEROES = 1 << 6,
	NBD_FLAG_SEND_DF = 1 << 7,
	NBD_FLAG_CAN_MULTI_CONN = 1 << 8,
	NBD_FLAG_SEND_CACHE = 1 << 10,
	NBD_FLAG_SEND_FAST_ZERO = 1 << 11,
};

enum nbd_command {
	NBD_CMD_READ = 0,
	NBD_CMD_WRITE = 1,
	NBD_CMD_DISC = 2,
	NBD_CMD_FLUSH = 3,
	NBD_CMD_TRIM = 4,
	NBD_CMD_CACHE = 5,
	NBD_CMD_WRITE_ZEROES = 6,
	NBD_CMD_BLOCK_STATUS = 7,
};

enum nbd_command_flag {
	NBD_CMD_FLAG_FUA = 1 << 0,
	NBD_CMD_FLAG_NO_HOLE = 1 << 1,
	NBD_CMD_FLAG_DF = 1 << 2,
	NBD_CMD_FLAG_REQ_ONE = 1 << 3,
	NBD_CMD_FLAG_FAST_ZERO = 1 << 4,
};

enum nbd_chunk {
	NBD_CHUNK_NONE = 0,
	NBD_CHUNK_OFFSET_DATA = 1,
	NBD_CHUNK_OFFSET_HOLE = 2,
	NBD_CHUNK_BLOCK_STATUS = 5,
	NBD_CHUNK_ERROR = 0x8001,
};
#define NBD_CHUNK_FLAG_DONE 1

enum nbd_state_flag { NBD_STATE_HOLE = 1 << 0, NBD_STATE_ZERO = 1 << 1 };

/* Errors as they travel; independent of this host's errno. */
enum nbd_wire_error {
	NBD_EPERM = 1,
	NBD_EIO = 5,
	NBD_ENOMEM = 12,
	NBD_EINVAL = 22,
	NBD_ENOSPC = 28,
	NBD_EOVERFLOW = 75,
	NBD_ENOTSUP = 95,
	NBD_ESHUTDOWN = 108,
};
/* The one errno map: a negative errno (or 0) to the wire. */
uint32_t nbd_wire_error(int errnum);

#define NBD_BASE_ALLOCATION    "base:allocation"
#define NBD_BASE_ALLOCATION_ID 1

struct nbd_option_header {
	uint32_t option;
	uint32_t len_bytes;
};
/* -EPROTO if the magic is wrong. */
int nbd_option_header_decode(const uint8_t raw[NBD_OPTION_HEADER_BYTES], struct nbd_option_header *out);

/* A string within an option's payload; not terminated. */
struct nbd_string {
	const char *ptr;
	uint32_t len;
};

/* Payload of OPT_INFO and OPT_GO. */
struct nbd_info_request {
	struct nbd_string name;
	bool want_name, want_description, want_block_size;
};
/* -EINVAL for lengths that do not add up or a name over the limit. */
int nbd_info_request_decode(const uint8_t *payload, size_t len, struct nbd_info_request *out);

/* Payload of LIST_ and SET_META_CONTEXT. */
struct nbd_meta_request {
	struct nbd_string name;
	uint32_t nqueries;
	bool wants_allocation; /* a query names base:allocation */
	bool wants_base;       /* a query is "base:" */
};
int nbd_meta_request_decode(const uint8_t *payload, size_t len, struct nbd_meta_request *out);

struct nbd_request {
	uint16_t flags;
	uint16_t command;
	uint64_t cookie;
	uint64_t offset_bytes;
	uint32_t len_bytes;
};
/* -EPROTO if the magic is wrong: the stream is lost. */
int nbd_request_decode(const uint8_t raw[NBD_REQUEST_BYTES], struct nbd_request *out);

/* What an export and its connection allow, for nbd_request_validate. */
struct nbd_request_rules {
	uint64_t size_bytes;
	uint32_t request_alignment;
	uint32_t max_request_bytes;
	bool read_only;
	bool structured; /* DF is known */
	bool allocation; /* base:allocation was selected */
};
/*
 * 0, or the wire error that answers the request: EPERM for a change of a read-only export, ENOSPC for a write
 * beyond the end, EINVAL for everything else beyond the end, too long, unaligned, unknown or with flags that
 * were not offered.
 */
uint32_t nbd_request_validate(const struct nbd_request *req, const struct nbd_request_rules *rules);
const char *nbd_command_name(unsigned command);

#endif
