/* SPDX-License-Identifier: Apache-2.0 */
/* interface: frames of the control channel */
#ifndef NET_FRAME_H
#define NET_FRAME_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "net/conn.h"

/*
 * Control channel frame, big-endian: u32 magic "SNMC", u16 type, u16 flags (0), u64 epoch, u32 payload
 * length, u64 XXH3 of the payload; then the payload: JSON (UTF-8 object) for all types but those that say
 * binary.
 */
enum frame_type {
	FRAME_HELLO = 1, /* source: version range, uuid, name, definition, disks, cpu, memory */
	FRAME_HELLO_OK,	 /* destination: version chosen, tokens, what it opened */
	FRAME_REFUSE,	 /* either: a sentence; nothing was touched */
	FRAME_BEAT,	 /* both, every second */
	FRAME_PHASE,	 /* source tells the phase; destination acknowledges with FRAME_PHASE_OK */
	FRAME_PHASE_OK,
	FRAME_DEVICE_STATE, /* binary, vmm/state.h */
	FRAME_READY,
	FRAME_COMMIT,
	FRAME_RUNNING,
	FRAME_MOVED,
	FRAME_MOVED_ACK,
	FRAME_ABORT,	 /* either side before COMMIT, with a sentence */
	FRAME_ABANDONED, /* the durable promise */
	FRAME_ASK,	 /* about (uuid, epoch) */
	FRAME_ANSWER,
	FRAME_FILE, /* binary: u32 index of hello's "files", u64 offset, bytes; at most 1 MiB of them a frame
		     */
	FRAME_HASH_ASK, /* binary, these three: vmm/move_hashes.h. Source: hashes of a disk's chunks */
	FRAME_HASHES,	/* destination: what its media hold */
	FRAME_SUMS,	/* source, before the device state: what was written since */
	FRAME_CHECK,	/* first on a connection: what would a move of this VM meet? */
	FRAME_FACTS,	/* the answer */
	FRAME_PROBE,  /* binary: an empty one is answered with an empty one, others are taken, to measure the
			 link */
	FRAME_VERIFY, /* for tests, source after READY: hashes of guest memory and device state (binary) */
	FRAME_VERIFIED,	  /* destination: they agree */
	FRAME_RENEW = 30, /* a paired host's next certificate; ANSWER or REFUSE follows */
	FRAME_ADMINISTER, /* a command for the daemon (host/administer.h); likewise */
};

#define FRAME_HEADER_BYTES     28
#define FRAME_JSON_MAX_BYTES   (1u << 20)
#define FRAME_FILE_MAX_BYTES   ((1u << 20) + 12)
#define FRAME_STATE_MAX_BYTES  (64u << 20)
#define FRAME_HASHES_MAX_BYTES (512u << 10)
#define FRAME_PROBE_MAX_BYTES  (256u << 10)

struct frame {
	enum frame_type type;
	uint64_t epoch;
	uint32_t len;
	uint8_t *payload; /* frame_release frees; JSON types are NUL-terminated too */
	json_t *json;	  /* parsed object for JSON types, else NULL */
};

struct frame_header {
	uint16_t type;
	uint64_t epoch;
	uint32_t len;
	uint64_t checksum;
};

const char *frame_type_name(unsigned type);
bool frame_type_is_json(unsigned type);
/* Pure, for unit tests and the fuzzer: validates magic, type, flags, length against the type's limit. */
int frame_header_decode(const uint8_t raw[FRAME_HEADER_BYTES], struct frame_header *out, struct error *err);
void frame_header_encode(uint8_t raw[FRAME_HEADER_BYTES], const struct frame_header *h);

/* Blocking; errors as conn_read_full. -EPROTO for a malformed frame. */
int frame_read(struct conn *conn, unsigned timeout_ms, struct frame *out, struct error *err);
void frame_release(struct frame *frame);
/* json may be NULL (an empty object is sent); not consumed. */
int frame_send_json(struct conn *conn, enum frame_type type, uint64_t epoch, json_t *json,
		    unsigned timeout_ms, struct error *err);
int frame_send_bytes(struct conn *conn, enum frame_type type, uint64_t epoch, const void *buf, uint32_t len,
		     unsigned timeout_ms, struct error *err);

#endif
