/* SPDX-License-Identifier: Apache-2.0 */
#ifndef HOST_ASK_H
#define HOST_ASK_H

#include <jansson.h>
#include <stdint.h>

#include "base/error.h"
#include "host/config.h"
#include "host/handover.h"
#include "host/record.h"

/*
 * Asking the other side about a VM, and answering. ASK and ANSWER carry the same object, what a side says
 * about itself:
 *   {"uuid", "state", "epoch", "started", "attempt_open"}, and "paging" where it is true
 */

/* New reference. */
json_t *ask_report_to_json(const char *uuid, const struct handover_report *report);
/* Hostile input: -EPROTO. Sets heard; asked as given. */
int ask_report_from_json(const json_t *obj, bool asked, char uuid[VM_UUID_CHARS + 1],
			 struct handover_report *out, struct error *err);

/*
 * Connects to the peer (by name from the configuration; its present address there goes before `address`,
 * which may be NULL), proves both certificates, says `own` about the VM and takes the answer. Blocks up to
 * timeout_ms.
 */
int ask_peer(const struct host_config *cfg, const char *peer, const char *address, const char *uuid,
	     const struct handover_report *own, unsigned timeout_ms, struct handover_report *answer,
	     struct error *err);

/*
 * What this host answers to the ASK of peer_name (as its certificate says): settles the record as
 * docs/handover.md demands, durably, when no snvmm lives, else lets the live one answer through its socket.
 * Only a configured peer gets an answer, and only the peer named in the record changes anything. -EAGAIN: not
 * now (the asker asks again). *answer: new reference.
 */
int ask_answer_local(const struct host_config *cfg, const char *peer_name, const json_t *ask, json_t **answer,
		     struct error *err);
/* One try of it: -EAGAIN when the snvmm that holds the record does not answer now (3 s). */
int ask_answer_once(const struct host_config *cfg, const char *peer_name, const json_t *ask, json_t **answer,
		    struct error *err);

/*
 * No snvmm lives; r is locked. Applies the durable steps that handover_decide gives until it asks for
 * something else, which it returns in *next (NONE, ASK, CLEAN, IN_DOUBT, or FORGET after which the record is
 * removed); *rec is what is durable then. report may be NULL.
 */
int settle_record(struct record *r, struct vm_record *rec, const struct handover_report *report,
		  enum handover_action *next, struct error *err);

#endif
