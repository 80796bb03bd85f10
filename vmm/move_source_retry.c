/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A lost link does not end a move before the handover: every channel is closed and, after a wait, a new
 * attempt with a new epoch begins from hello. Meanwhile the guest runs with its local disks alone. What the
 * destination kept of the disks is compared, not sent again.
 */
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "host/jsonl.h"
#include "vmm/move_source.h"

#define WAIT_FIRST_MS 500
#define WAIT_MOST_MS  15000

bool source_link_lost(const struct error *why)
{
	static const int codes[] = {ETIMEDOUT,	  ECONNRESET,  EPIPE,	  ECONNREFUSED,
				    EHOSTUNREACH, ENETUNREACH, ENETDOWN,  EHOSTDOWN,
				    ENOTCONN,	  ESHUTDOWN,   ENETRESET, EADDRNOTAVAIL};
	for (size_t i = 0; i < ARRAY_SIZE(codes); i++)
		if (why->code == -codes[i])
			return true;
	return false;
}

static uint64_t synced_bytes(struct move *mv)
{
	uint64_t n = 0;
	for (unsigned i = 0; i < mv->vm->def.ndisks; i++) {
		struct mirror_stats st;
		mirror_stats(mv->vm->disks[i].mirror, &st);
		n += st.synced_bytes;
	}
	return n;
}

/* The time that is left for trying; begins anew with every attempt that came further than all before it, or
 * to the memory: that the disks agreed once is all that an attempt can show. */
static uint64_t left_ms(struct move *mv)
{
	uint64_t now = clock_now_ms(), synced = mv->negotiated_now ? synced_bytes(mv) : 0;
	if (!mv->retry_until_ms || synced > mv->best_synced || mv->t_memory_ms) {
		mv->retry_until_ms = now + mv->opt.retry_for_s * UINT64_C(1000);
		mv->best_synced = synced;
	}
	if (mv->negotiated_now)
		mv->retries_in_vain = 0;
	return mv->retry_until_ms > now ? mv->retry_until_ms - now : 0;
}

static void say(struct move *mv, const struct error *why, uint64_t left, uint64_t wait)
{
	log_warn("move to %s: %s; trying again in %" PRIu64 " ms, for another %" PRIu64 " s", mv->opt.peer,
		 why->message, wait, left / 1000);
	json_t *ev = json_pack("{s:s, s:o, s:I, s:I, s:i, s:s}", "event", "retry", "reason",
			       jsonl_text(why->message), "left_ms", (json_int_t)left, "wait_ms",
			       (json_int_t)wait, "attempt", (int)mv->tries + 1, "peer", mv->opt.peer);
	move_events_emit(mv->events, ev, false);
}

/* The time is over, or the move was ended by somebody: then its reason. */
static int rest(struct move *mv, uint64_t ms, struct error *err)
{
	uint64_t at = clock_now_ns() + ms * UINT64_C(1000000);
	struct timespec until = clock_timespec(at);
	SCOPE_LOCK(&mv->lock);
	while (!mv->interrupted && clock_now_ns() < at)
		pthread_cond_timedwait(&mv->changed, &mv->lock, &until);
	if (mv->interrupted)
		error_copy(err, &mv->why);
	return mv->interrupted ? mv->why.code : 0;
}

/* Everything of the attempt is closed; what interrupted it is forgotten, unless it was more than the link. */
static int begin_anew(struct move *mv, struct error *err)
{
	SCOPE_LOCK(&mv->lock);
	if (mv->interrupted && !source_link_lost(&mv->why)) {
		error_copy(err, &mv->why);
		return mv->why.code;
	}
	mv->interrupted = false;
	mv->why = ERROR_INIT;
	mv->opt.epoch++;
	mv->tries++;
	mv->negotiated_now = false;
	mv->mem = (struct mem_stats){0};
	mv->t_memory_ms = 0;
	mv->phase = MOVE_CONNECT;
	return 0;
}

bool source_try_again(struct move *mv, struct error *err)
{
	/* A first connection that is not to be had is a wrong address or a host that is down: said at once.
	 */
	if (!mv->opt.retry_for_s || !mv->negotiated || mv->handover_begun || !source_link_lost(err))
		return false;
	uint64_t left = left_ms(mv);
	if (!left) {
		error_prefix(err, "the link was lost, and trying again for %u s did not help",
			     mv->opt.retry_for_s);
		return false;
	}
	uint64_t wait = (uint64_t)WAIT_FIRST_MS << (mv->retries_in_vain < 5 ? mv->retries_in_vain : 5);
	mv->retries_in_vain++;
	if (wait > WAIT_MOST_MS)
		wait = WAIT_MOST_MS;
	if (wait > left)
		wait = left;
	say(mv, err, left, wait);
	if (mv->link) {
		json_t *o =
			json_pack("{s:s}", "reason", "the link was lost; the source begins a new attempt");
		move_link_send(mv->link, FRAME_ABORT, o, NULL);
		json_decref(o);
	}
	source_close_channels(mv);
	source_proof_free(mv);
	source_unpause(mv); /* --quick */
	mv->pause_us = 0;
	struct error e = ERROR_INIT;
	int rc = begin_anew(mv, &e);
	if (!rc)
		rc = rest(mv, wait, &e);
	if (rc) {
		*err = e;
		return false;
	}
	source_set_phase(mv, MOVE_CONNECT, "connect");
	return true;
}
