/* SPDX-License-Identifier: Apache-2.0 */
#ifndef VMM_MOVE_LINK_H
#define VMM_MOVE_LINK_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "net/conn.h"
#include "net/frame.h"

/*
 * One end of a control channel in use: a thread beats every second (or a third of the silence limit), a
 * thread reads. The channel fails once, for one reason: silence for silence_ms, a closed connection, a
 * malformed frame, a frame of another epoch, FRAME_ABORT from the peer, or link_fail. After that sends and
 * waits return the reason.
 *
 * Sends from any thread. Waits from one thread at a time.
 */
struct move_link;

struct move_link_options {
	struct conn *conn; /* taken over */
	uint64_t epoch;
	unsigned silence_ms;
	/* Called once from the reading or beating thread when the channel failed; must not wait for that
	 * thread. */
	void (*failed)(void *opaque, const struct error *why);
	/* Called from the reading thread for frames that nobody waits for by type (FRAME_FILE,
	 * FRAME_HASH_ASK, FRAME_HASHES): return 0, or an error that fails the channel. The frame is released
	 * by the link. Optional. */
	int (*frame)(void *opaque, const struct frame *frame, struct error *err);
	void *opaque;
};

int move_link_start(const struct move_link_options *opt, struct move_link **out, struct error *err);
int move_link_send(struct move_link *l, enum frame_type type, json_t *json, struct error *err);
int move_link_send_bytes(struct move_link *l, enum frame_type type, const void *buf, uint32_t len,
			 struct error *err);
/*
 * Waits for the next frame of one of the types in mask (1 << type); the caller releases it. Frames of other
 * types are an error that fails the channel. timeout_ms 0 = as long as the channel lives. -ECONNABORTED when
 * the peer sent ABORT (err is its sentence).
 */
int move_link_wait(struct move_link *l, uint32_t mask, unsigned timeout_ms, struct frame *out,
		   struct error *err);
/* Ends the channel from this side; the first reason stays. */
void move_link_fail(struct move_link *l, const struct error *why);
bool move_link_failed(struct move_link *l, struct error *why);
/* The peer's ABORT said that it had got as far as it was meant to. */
bool move_link_rehearsed(struct move_link *l);
struct conn *move_link_conn(struct move_link *l);
/* Joins the threads and closes. NULL is fine. */
void move_link_free(struct move_link *l);

#endif
