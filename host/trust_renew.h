/* SPDX-License-Identifier: Apache-2.0 */
#ifndef HOST_TRUST_RENEW_H
#define HOST_TRUST_RENEW_H

#include "host/trust.h"
#include "net/frame.h"

/*
 * The certificate by which paired hosts know this one is replaced by itself: when a third of its time is left
 * a new key and certificate are made (STATE/trust/next.pem), every paired host is told the new SHA-256 over a
 * channel that the present certificate proves, and when all know it, or a twelfth is left, the new one takes
 * the present one's place. Who was not to be reached in all that time has to be paired again.
 */

/* Looks now. Returns after how many milliseconds to look again. Any thread, one at a time. */
unsigned trust_renew(const struct host_config *cfg);

/* The other side: the peer, whose connection this is, sends FRAME_RENEW. Answers it. */
int trust_renew_answer(const struct host_config *cfg, const struct trust_peer *peer, struct conn *conn,
		       const struct frame *frame, struct error *err);

#endif
