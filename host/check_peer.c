/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "host/check.h"
#include "host/trust.h"
#include "net/conn.h"
#include "net/frame.h"

#define DIAL_TIMEOUT_MS	    5000
#define ANSWER_TIMEOUT_MS   40000 /* the daemon there may be busy, and its disk is tried out */
#define PROBE_TIMEOUT_MS    10000
#define ROUND_TRIPS	    8
#define WARM_UP_MS	    100 /* so that the connection has grown its window */
#define BURST_MS	    400
#define BURSTS_MOST	    3
#define BURST_BYTES_MAX	    (UINT64_C(192) << 20)
#define CLOCK_OFFSET_MAX_MS (INT64_C(1000) * 86400 * 3650)

static int dial(const struct host_config *cfg, const char *name, struct conn **out, struct error *err)
{
	struct trust_peer peer;
	int rc = trust_peer_find(cfg, name, &peer, err);
	if (!rc && !peer.may_receive)
		rc = trust_refuse_receive(cfg, &peer, err);
	return rc ? rc : trust_dial(cfg, &peer, peer.address, DIAL_TIMEOUT_MS, out, err);
}

static int ask(struct conn *conn, json_t *question, struct check_facts *f, json_t **facts, struct error *err)
{
	int rc = frame_send_json(conn, FRAME_CHECK, 1, question, DIAL_TIMEOUT_MS, err);
	struct frame reply = {0};
	if (!rc)
		rc = frame_read(conn, ANSWER_TIMEOUT_MS, &reply, err);
	if (rc == -ENODATA || rc == -ECONNRESET)
		return error_set(err, EPROTONOSUPPORT,
				 "%s ended the connection instead of telling what it has: perhaps its "
				 "program is older than this one, %s",
				 f->there, SNM_VERSION);
	if (rc)
		return rc;
	if (reply.type == FRAME_REFUSE) {
		const char *why = json_string_value(json_object_get(reply.json, "reason"));
		rc = error_set(err, EPERM, "%s refused: %s", f->there, why ? why : "no reason given");
	} else if (reply.type != FRAME_FACTS) {
		rc = error_set(err, EPROTO, "%s instead of facts", frame_type_name(reply.type));
	} else {
		*facts = json_incref(reply.json);
	}
	frame_release(&reply);
	return rc;
}

/* An empty probe there and back. */
static int round_trip(struct conn *conn, uint64_t *us, struct error *err)
{
	struct frame f = {0};
	uint64_t begin = clock_now_us();
	int rc = frame_send_bytes(conn, FRAME_PROBE, 1, NULL, 0, PROBE_TIMEOUT_MS, err);
	if (!rc)
		rc = frame_read(conn, PROBE_TIMEOUT_MS, &f, err);
	*us = clock_now_us() - begin;
	if (!rc && (f.type != FRAME_PROBE || f.len))
		rc = error_set(err, EPROTO, "%s instead of an empty probe", frame_type_name(f.type));
	frame_release(&f);
	return rc;
}

/* Sends for so long, and waits until it has arrived. */
static int burst(struct conn *conn, const void *buf, unsigned ms, uint64_t *bytes, uint64_t *us,
		 struct error *err)
{
	uint64_t begin = clock_now_us(), back;
	int rc = 0;
	*bytes = 0;
	while (!rc && *bytes < BURST_BYTES_MAX && clock_now_us() - begin < ms * UINT64_C(1000)) {
		rc = frame_send_bytes(conn, FRAME_PROBE, 1, buf, FRAME_PROBE_MAX_BYTES, PROBE_TIMEOUT_MS,
				      err);
		*bytes += FRAME_PROBE_MAX_BYTES;
	}
	if (!rc)
		rc = round_trip(conn, &back, err);
	*us = clock_now_us() - begin;
	return rc;
}

static int measure_link(struct conn *conn, struct check_facts *f, struct error *err)
{
	uint64_t best = UINT64_MAX, us = 0, bytes = 0;
	int rc = 0;
	for (unsigned i = 0; !rc && i < ROUND_TRIPS; i++) {
		rc = round_trip(conn, &us, err);
		best = us < best ? us : best;
	}
	CLEANUP_FREE uint32_t *buf = malloc(FRAME_PROBE_MAX_BYTES);
	if (!rc && !buf)
		rc = error_errno(err, ENOMEM, "probe");
	/* nothing that a tunnel on the way could pack */
	uint32_t x = (uint32_t)clock_now_us() | 1;
	for (size_t i = 0; buf && i < FRAME_PROBE_MAX_BYTES / sizeof *buf; i++)
		buf[i] = x = x * 1664525u + 1013904223u;
	if (!rc)
		rc = burst(conn, buf, WARM_UP_MS, &bytes, &us, err);
	uint64_t rate = 0;
	/* too little for any move is looked at again: either host may have been busy with something else */
	for (unsigned i = 0; !rc && i < BURSTS_MOST && rate < CHECK_LINK_LEAST; i++) {
		rc = burst(conn, buf, BURST_MS, &bytes, &us, err);
		us = us > best ? us - best : 1; /* the last word's way is not the bytes' */
		if (!rc && bytes * 1000000 / us > rate)
			rate = bytes * 1000000 / us;
	}
	if (rc)
		return rc;
	f->round_trip_us = best ? best : 1;
	f->link_bytes_per_s = rate;
	return 0;
}

int check_ask(const struct host_config *cfg, const char *peer, json_t *question, bool measure,
	      struct check_facts *f, json_t **facts, struct error *err)
{
	struct conn *conn = NULL;
	struct error why = ERROR_INIT;
	*facts = NULL;
	uint64_t begin_us = clock_now_us();
	int rc = dial(cfg, peer, &conn, err);
	f->dial_us = rc ? 0 : clock_now_us() - begin_us;
	if (!rc)
		rc = ask(conn, question, f, facts, err);
	uint64_t heard_ns = clock_realtime_ns();
	if (!rc && measure && measure_link(conn, f, &why))
		snprintf(f->link_error, sizeof f->link_error, "%s", why.message);
	conn_close(conn);
	json_int_t theirs = json_integer_value(json_object_get(*facts, "clock_ns"));
	int64_t offset = theirs > 0 ? (theirs - (int64_t)heard_ns) / 1000000 : -CLOCK_OFFSET_MAX_MS;
	offset += (int64_t)(f->round_trip_us / 2000);
	f->clock_offset_ms = offset > CLOCK_OFFSET_MAX_MS    ? CLOCK_OFFSET_MAX_MS
			     : offset < -CLOCK_OFFSET_MAX_MS ? -CLOCK_OFFSET_MAX_MS
							     : offset;
	return rc;
}
