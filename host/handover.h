/* SPDX-License-Identifier: Apache-2.0 */
/* interface: the rules of the handover (docs/handover.md), pure functions without I/O */
#ifndef HOST_HANDOVER_H
#define HOST_HANDOVER_H

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "host/record.h"

/* "owner", "handing-over", ...; as they stand in ASK and ANSWER. */
const char *handover_state_name(enum handover_state state);
/* Negative for an unknown name. */
int handover_state_parse(const char *name);
/* The table of allowed transitions, epochs included. HANDOVER_NONE stands for creation and removal. */
bool handover_transition_allowed(enum handover_state from, uint64_t from_epoch, enum handover_state to,
				 uint64_t to_epoch);

/*
 * What the peer said about itself, durable on its side when it said it. ASK and ANSWER carry it in full; the
 * shorter frames stand for one each: RUNNING = owner-unconfirmed and started, MOVED = moved, MOVED_ACK =
 * owner and started, ABANDONED = abandoned, all with the frame's epoch. Only the peer named in the record may
 * be heard: the caller checks the certificate.
 */
struct handover_report {
	bool heard; /* false: nothing was heard, the rest is ignored */
	bool asked; /* it was an ASK: settle, then answer with the record as it is afterwards */
	enum handover_state state;
	uint64_t epoch;
	bool started;	   /* the VM runs there, effects let out (or did since it became owner), with all of
			    * its memory; or it moved while it was stopped, so that there is nothing to start */
	bool attempt_open; /* a live source snvmm still works on the move of `epoch` */
	bool paging; /* its live snvmm takes part in the post-copy of `epoch`. No rule asks for it: the two
		      * ends of the pages do */
};

/* What this side knows of itself, beyond its record. */
struct handover_self {
	bool live;	   /* the VM's snvmm lives (and, where a snvmm decides, it is the one) */
	bool channel_up;   /* live: the control channel of the attempt is alive */
	bool attempt_open; /* source, live: a move of the record's epoch is under way */
	bool commit; /* source, live: a first byte of COMMIT may have left. destination, live: COMMIT was read
		      */
	bool write_failed; /* live: writing the owner record failed; what the medium holds is unknown */
};

/* What to do next. Each names its one durable write; where there is none it says so. */
enum handover_action {
	HANDOVER_ACT_NONE,  /* nothing: go on. No write */
	HANDOVER_ACT_WAIT,  /* an answer or a write is under way: wait for it; a peer's ASK is answered
			       afterwards. No write */
	HANDOVER_ACT_ASK,   /* ask the peer, again every second; start nothing meanwhile (what runs, runs on).
			       No write */
	HANDOVER_ACT_ABORT, /* source in owner, live: end the attempt, the guest runs on. No write */
	HANDOVER_ACT_TAKE_BACK,	   /* source: write owner(e); then a live snvmm resumes the guest, without one
				      the VM has crashed */
	HANDOVER_ACT_RECORD_MOVED, /* source: write moved(e) with handover_note()'s flags, tell the peer; a
				      live snvmm then exits */
	HANDOVER_ACT_NOTE,   /* source in moved: write the flags that handover_note() gives, then decide again
			      */
	HANDOVER_ACT_CLEAN,  /* moved: delete (or keep aside) the VM's files; abandoned: delete the arrival;
				then write FILES_DONE */
	HANDOVER_ACT_FORGET, /* remove the record */
	HANDOVER_ACT_ABANDON,  /* destination: compare-and-set prepared -> abandoned, end the snvmm, say
				  ABANDONED */
	HANDOVER_ACT_CONFIRM,  /* owner-unconfirmed -> owner, tell the peer (MOVED_ACK or ANSWER) */
	HANDOVER_ACT_IN_DOUBT, /* pause; owner-unconfirmed: write HIGHER_SEEN if handover_note() gives it;
				  only resolve goes on */
};
#define HANDOVER_ACTIONS 12
const char *handover_action_name(enum handover_action action);

/*
 * Decide from the own record, the own processes and the peer's report (NULL or !heard: none). Total: every
 * combination has an answer, the safe one where the combination cannot happen. For the source: owner,
 * handing-over, moved. For the destination: prepared, owner-unconfirmed (a forced source too), abandoned. The
 * other states give ACT_NONE.
 */
enum handover_action handover_decide_source(const struct vm_record *rec, const struct handover_self *self,
					    const struct handover_report *report);
enum handover_action handover_decide_destination(const struct vm_record *rec,
						 const struct handover_self *self,
						 const struct handover_report *report);
/* The one of the two that the record's state calls for. What daemon, snvmm and resolve call. */
enum handover_action handover_decide(const struct vm_record *rec, const struct handover_self *self,
				     const struct handover_report *report);
/* rec->flags with what the report teaches added: PEER_STARTED, PEER_ACKED, HIGHER_SEEN (then store the
 * report's epoch as peer_epoch, too). */
uint32_t handover_note(const struct vm_record *rec, const struct handover_report *report);
/* What this side answers: its record, now. rec NULL: no record. */
void handover_describe(const struct vm_record *rec, const struct handover_self *self, bool guest_started,
		       struct handover_report *out);

/* The `state` that users see. */
enum vm_state { VM_ABSENT, VM_RUNNING, VM_PAUSED, VM_STOPPED, VM_CRASHED, VM_INCOMING, VM_IN_DOUBT };
const char *vm_state_name(enum vm_state state);
/* VM_ABSENT: not a VM of this host (moved, abandoned, no record), hence not in the list. */
enum vm_state handover_vm_state(const struct vm_record *rec, const struct handover_self *self,
				bool guest_running);

/* May `snvm start` (no live snvmm) start it, `snvm delete` delete it, a move of it begin? 0, or -EPERM with a
 * sentence that says what to do. */
int handover_may_start(const struct vm_record *rec, struct error *err);
int handover_may_delete(const struct vm_record *rec, struct error *err);
int handover_may_move(const struct vm_record *rec, struct error *err);
/*
 * May a peer's arrival with this epoch begin on top of the record (NULL: none)? 0; -EAGAIN when the record
 * has to be settled or cleaned first (decide, then ask again); -EEXIST when the VM is here; -ESTALE for an
 * epoch that is not higher.
 */
int handover_may_arrive(const struct vm_record *rec, uint64_t epoch, struct error *err);
/*
 * resolve --run-here, after the person confirmed that the other host has no power, and after an ASK brought
 * no answer. Fills *to with what to compare-and-set: owner-unconfirmed, FORCED, an epoch above all that was
 * seen. A live paused snvmm then resumes; without one the VM may be started (by this resolve alone). -EPERM
 * with a sentence where that would risk a second copy.
 */
int handover_run_here(const struct vm_record *rec, const struct handover_self *self, struct vm_record *to,
		      struct error *err);
/*
 * resolve --give-up:
 *   ACT_ABANDON  destination: end the snvmm, compare-and-set to abandoned (a former owner's folder is kept
 *                aside in kept/, never deleted; an arrival's is)
 *   ACT_ASK      end the live snvmm, whose guest's memory is lost with it; the record stays, and asking goes
 *                on: the peer's word settles
 *   ACT_CLEAN    moved: keep the files aside in kept/ at once; abandoned: clean
 *   ACT_FORGET   stop waiting for the acknowledgement: remove the record
 *   ACT_NONE     with err set (-EPERM): nothing to give up, or it could lose the only copy
 */
enum handover_action handover_give_up(const struct vm_record *rec, const struct handover_self *self,
				      struct error *err);

#endif
