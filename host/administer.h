/* SPDX-License-Identifier: Apache-2.0 */
#ifndef HOST_ADMINISTER_H
#define HOST_ADMINISTER_H

#include <jansson.h>

#include "host/trust.h"
#include "net/frame.h"

/*
 * Commands sent from one host to another (snmigrate --on HOST, snvm --on HOST), which must let the first one
 * administer it. One request, one reply, of those that need no descriptor and tell no events. Trust itself is
 * not among them: whom a host trusts is decided on that host.
 */

/* In the daemon where the command was typed: what the peer's daemon answers to `request` (new reference), an
 * error reply of its included. */
int administer_ask(const struct host_config *cfg, const char *host, json_t *request, json_t **reply,
		   struct error *err);

/* The other side: the peer, whose connection this is, sends FRAME_ADMINISTER. Answers it. */
int administer_answer(const struct host_config *cfg, const struct trust_peer *peer, struct conn *conn,
		      const struct frame *frame, struct error *err);

#endif
