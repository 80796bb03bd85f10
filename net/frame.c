/* SPDX-License-Identifier: Apache-2.0 */
#include "net/frame.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "base/bytes.h"
#include "base/cleanup.h"

#define FRAME_MAGIC UINT32_C(0x534e4d43) /* "SNMC" */

static const char *const type_names[] = {
	[FRAME_HELLO] = "hello",
	[FRAME_HELLO_OK] = "hello-ok",
	[FRAME_REFUSE] = "refuse",
	[FRAME_BEAT] = "beat",
	[FRAME_PHASE] = "phase",
	[FRAME_PHASE_OK] = "phase-ok",
	[FRAME_DEVICE_STATE] = "device-state",
	[FRAME_READY] = "ready",
	[FRAME_COMMIT] = "commit",
	[FRAME_RUNNING] = "running",
	[FRAME_MOVED] = "moved",
	[FRAME_MOVED_ACK] = "moved-ack",
	[FRAME_ABORT] = "abort",
	[FRAME_ABANDONED] = "abandoned",
	[FRAME_ASK] = "ask",
	[FRAME_ANSWER] = "answer",
	[FRAME_FILE] = "file",
	[FRAME_HASH_ASK] = "hash-ask",
	[FRAME_HASHES] = "hashes",
	[FRAME_SUMS] = "sums",
	[FRAME_CHECK] = "check",
	[FRAME_FACTS] = "facts",
	[FRAME_PROBE] = "probe",
	[FRAME_VERIFY] = "verify",
	[FRAME_VERIFIED] = "verified",
	[FRAME_RENEW] = "renew",
	[FRAME_ADMINISTER] = "administer",
};

static bool type_known(unsigned type)
{
	return type < ARRAY_SIZE(type_names) && type_names[type];
}

bool frame_type_is_json(unsigned type)
{
	return type != FRAME_DEVICE_STATE && type != FRAME_FILE && type != FRAME_HASH_ASK &&
	       type != FRAME_HASHES && type != FRAME_SUMS && type != FRAME_PROBE && type != FRAME_VERIFY;
}

static uint32_t type_max_bytes(unsigned type)
{
	if (type == FRAME_DEVICE_STATE)
		return FRAME_STATE_MAX_BYTES;
	if (type == FRAME_FILE)
		return FRAME_FILE_MAX_BYTES;
	if (type == FRAME_PROBE)
		return FRAME_PROBE_MAX_BYTES;
	return frame_type_is_json(type) ? FRAME_JSON_MAX_BYTES : FRAME_HASHES_MAX_BYTES;
}

const char *frame_type_name(unsigned type)
{
	return type_known(type) ? type_names[type] : "unknown";
}

int frame_header_decode(const uint8_t raw[FRAME_HEADER_BYTES], struct frame_header *out, struct error *err)
{
	struct frame_header h = {.type = get_be16(raw + 4),
				 .epoch = get_be64(raw + 8),
				 .len = get_be32(raw + 16),
				 .checksum = get_be64(raw + 20)};
	uint16_t flags = get_be16(raw + 6);

	if (get_be32(raw) != FRAME_MAGIC)
		return error_set(err, EPROTO, "control frame: magic is %08x, not SNMC", get_be32(raw));
	if (!type_known(h.type))
		return error_set(err, EPROTO, "control frame: unknown type %u", h.type);
	if (flags)
		return error_set(err, EPROTO, "control frame %s: unknown flags %04x", type_names[h.type],
				 flags);
	if (h.len > type_max_bytes(h.type))
		return error_set(err, EPROTO, "control frame %s: %u bytes, at most %u are allowed",
				 type_names[h.type], h.len, type_max_bytes(h.type));
	*out = h;
	return 0;
}

void frame_header_encode(uint8_t raw[FRAME_HEADER_BYTES], const struct frame_header *h)
{
	put_be32(raw, FRAME_MAGIC);
	put_be16(raw + 4, h->type);
	put_be16(raw + 6, 0);
	put_be64(raw + 8, h->epoch);
	put_be32(raw + 16, h->len);
	put_be64(raw + 20, h->checksum);
}

void frame_release(struct frame *frame)
{
	free(frame->payload);
	json_decref(frame->json);
	*frame = (struct frame){0};
}

static int parse_payload(struct frame *frame, struct error *err)
{
	json_error_t why;

	frame->json = json_loadb((const char *)frame->payload, frame->len, JSON_REJECT_DUPLICATES, &why);
	if (!frame->json)
		return error_set(err, EPROTO, "control frame %s: byte %d of its JSON: %s",
				 frame_type_name(frame->type), why.position, why.text);
	if (!json_is_object(frame->json))
		return error_set(err, EPROTO, "control frame %s: its JSON is not an object",
				 frame_type_name(frame->type));
	return 0;
}

int frame_read(struct conn *conn, unsigned timeout_ms, struct frame *out, struct error *err)
{
	uint8_t raw[FRAME_HEADER_BYTES];
	struct frame_header h;
	struct frame frame = {0};
	int ret;

	*out = frame;
	ret = conn_read_full(conn, raw, sizeof raw, timeout_ms, err);
	if (ret < 0)
		return ret;
	ret = frame_header_decode(raw, &h, err);
	if (ret < 0)
		return ret;
	frame.type = (enum frame_type)h.type;
	frame.epoch = h.epoch;
	frame.len = h.len;
	frame.payload = malloc((size_t)h.len + 1);
	if (!frame.payload)
		return error_errno(err, ENOMEM, "control frame %s of %u bytes", type_names[h.type], h.len);
	frame.payload[h.len] = '\0';
	ret = conn_read_full(conn, frame.payload, h.len, timeout_ms, err);
	if (ret == -ENODATA) /* not the orderly end that it is between frames */
		ret = error_set(err, ECONNRESET,
				"control frame %s: the peer closed the connection in the middle",
				type_names[h.type]);
	if (ret == 0 && XXH3_64bits(frame.payload, h.len) != h.checksum)
		ret = error_set(err, EPROTO, "control frame %s: checksum does not match", type_names[h.type]);
	if (ret == 0 && frame_type_is_json(h.type))
		ret = parse_payload(&frame, err);
	if (ret < 0) {
		frame_release(&frame);
		return ret;
	}
	*out = frame;
	return 0;
}

int frame_send_bytes(struct conn *conn, enum frame_type type, uint64_t epoch, const void *buf, uint32_t len,
		     unsigned timeout_ms, struct error *err)
{
	uint8_t raw[FRAME_HEADER_BYTES];
	struct frame_header h = {
		.type = (uint16_t)type, .epoch = epoch, .len = len, .checksum = XXH3_64bits(buf, len)};
	struct iovec iov[2] = {{.iov_base = raw, .iov_len = sizeof raw},
			       {.iov_base = (void *)buf, .iov_len = len}};

	if (!type_known(type) || len > type_max_bytes(type))
		return error_set(err, EINVAL, "control frame %s of %u bytes cannot be sent",
				 frame_type_name(type), len);
	frame_header_encode(raw, &h);
	return conn_writev_full(conn, iov, 2, timeout_ms, err);
}

int frame_send_json(struct conn *conn, enum frame_type type, uint64_t epoch, json_t *json,
		    unsigned timeout_ms, struct error *err)
{
	CLEANUP_FREE char *text = NULL;
	size_t len;

	if (!frame_type_is_json(type) || (json && !json_is_object(json)))
		return error_set(err, EINVAL, "control frame %s: not a JSON object", frame_type_name(type));
	text = json ? json_dumps(json, JSON_COMPACT) : strdup("{}");
	if (!text)
		return error_set(err, EINVAL,
				 "control frame %s: its JSON cannot be written (memory or UTF-8)",
				 frame_type_name(type));
	len = strlen(text);
	if (len > FRAME_JSON_MAX_BYTES)
		return error_set(err, EMSGSIZE, "control frame %s: %zu bytes of JSON, at most %u are allowed",
				 frame_type_name(type), len, FRAME_JSON_MAX_BYTES);
	return frame_send_bytes(conn, type, epoch, text, (uint32_t)len, timeout_ms, err);
}
