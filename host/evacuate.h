/* SPDX-License-Identifier: Apache-2.0 */
/* interface: plans that the daemon carries out: a host is emptied, its VMs come back */
#ifndef HOST_EVACUATE_H
#define HOST_EVACUATE_H

#include <jansson.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "host/config.h"
#include "host/plan.h"
#include "host/vmdef.h"

/*
 * One plan at a time. The daemon moves each VM as a person would, through its own control socket, so that
 * nothing here decides about a VM: it only asks for moves, and each move's own end says how it went. The plan
 * is written down (tables plan and plan_vm), and a new daemon takes it up; what it does with each VM then is
 * judged by the VM's record and its snvmm, never by the row.
 */
struct daemon;

enum run_kind { RUN_EVACUATION, RUN_RETURN };
/* evacuation, return */
const char *run_kind_name(enum run_kind kind);

enum run_state {
	RUN_WAITING,
	RUN_MOVING,
	RUN_MOVED,     /* runs elsewhere */
	RUN_OFF,       /* does not run, so there was nothing to move */
	RUN_STAYS,     /* could not be moved, or was not begun */
	RUN_FAILED,    /* its moves failed; it runs here as before */
	RUN_CANCELLED, /* likewise */
	RUN_IN_DOUBT,
	RUN_CRASHED,
};
const char *run_state_name(enum run_state state);
/* -EINVAL */
int run_state_parse(const char *name, enum run_state *out);
/* Nothing more is done about it. */
bool run_state_is_final(enum run_state state);

#define RUN_TRIED_BYTES 512

struct run_vm {
	char name[VM_NAME_MAX_CHARS + 1], uuid[VM_UUID_CHARS + 1];
	char destination[HOST_NAME_MAX_CHARS + 1]; /* "": none */
	char tried[RUN_TRIED_BYTES];		   /* hosts that refused it, separated by commas */
	char reason[PLAN_TEXT_BYTES];		   /* why it is where it is, or why it stays */
	unsigned priority, attempts;
	enum run_state state;
	int exit; /* of its last move */
	bool timed;
	uint64_t predicted_begin_ms, predicted_end_ms; /* after the plan's begin */
	uint64_t begun_ms, ended_ms;		       /* since 1970; 0: not */
	/* not written down */
	uint64_t not_before_ms; /* clock_now_ms: the next attempt */
	uint64_t version;	/* of the run, when it was changed last */
	bool cancel_sent;
	bool late; /* of a dry run: it would not be begun */
	double percent;
	char phase[32];
};

/* All but what is constant is under evacuator_lock. */
struct run {
	int64_t id;
	enum run_kind kind;
	char peer[HOST_NAME_MAX_CHARS + 1]; /* of a return: whose VMs go home */
	json_t *to;			    /* names of the destinations allowed */
	unsigned parallel;
	enum plan_order order;
	bool with_storage;
	char backing[16];     /* --backing, or "" */
	uint64_t deadline_ms; /* since 1970; 0: none */
	uint64_t begun_ms;
	struct run_vm *vms; /* in order of the queue, those that stay at the end */
	size_t nvms;
	uint64_t predicted_ms; /* of all; 0: not known */

	bool cancelled;
	uint64_t ended_ms; /* 0: under way */
	char result[16];   /* moved, incomplete, cancelled, in-doubt, crashed */
	int exit;
	char reason[PLAN_TEXT_BYTES];
	char unwritten[ERROR_MESSAGE_BYTES]; /* why it would not be taken up by a new daemon; "" */
	unsigned users;
	uint64_t version;
};

/* Takes up what an earlier daemon left. */
int evacuator_start(struct daemon *d, struct error *err);
/* Waits until that is known, seconds at the most. */
void evacuator_lock(struct daemon *d);
void evacuator_unlock(struct daemon *d);
/* Locked; returns locked. Until something changes, or the time has passed. */
void evacuator_wait(struct daemon *d, unsigned ms);
/* Locked. The one under way, or the last of this daemon's life; NULL. */
struct run *evacuator_run(struct daemon *d);
/* -EBUSY while a plan is under way. */
int evacuator_is_free(struct daemon *d, struct error *err);
/* For status: null with no plan under way (as far as is known yet: it does not wait). New reference. */
json_t *evacuator_summary(struct daemon *d);
/* Takes the run over; sets id and the like. -EBUSY while another one is under way; then it stays the
 * caller's. */
int evacuator_begin(struct daemon *d, struct run *run, struct error *err);
/* Nothing more is begun, and what is under way is cancelled. -ENOENT. */
int evacuator_cancel(struct daemon *d, struct error *err);

/* Locked. Keeps it while it is followed. */
void run_hold(struct run *run);
void run_release(struct run *run);

/* ---- host/evacuate_report.c ---- */

/* Locked. New references. */
json_t *run_vm_to_json(const struct run *run, const struct run_vm *vm);
json_t *run_to_json(const struct daemon *d, const struct run *run);
/* kind, vms, moved, moving and waiting (numbers). */
json_t *run_summary(const struct run *run);
/* Locked. Sets result, exit and reason by how the VMs ended; others: how many VMs run here that the plan did
 * not know. */
void run_conclude(struct run *run, unsigned others);

/* ---- host/evacuate_rows.c ---- */

/* Locked. Writes the plan and the VM (NULL: all of them). `wait`: durably, else later. */
int run_store(struct daemon *d, struct run *run, const struct run_vm *vm, bool wait, struct error *err);
/* The plan that has no end yet; NULL when there is none. */
int run_load_open(struct daemon *d, struct run **out, struct error *err);
/* The last one that ended, likewise. */
int run_load_last(struct daemon *d, struct run **out, struct error *err);
/* UUIDs of the VMs whose last way here, if not a return, was an evacuation of that host. New reference. */
int run_came_from(struct daemon *d, const char *host, json_t **uuids, struct error *err);
/* How many times longer than predicted the VM's last moves took, or else those of others, rather to that host
 * than elsewhere; 1 when nothing is known. vm: what is known of it now, and measured. */
struct check_facts;
double run_learned_factor(struct daemon *d, const char *uuid, const char *peer, const struct check_facts *vm);
/* The moves that it goes by, as run_factor_from wants them. New reference. */
struct journal;
int run_earlier_moves(struct journal *j, const char *uuid, const char *peer, json_t **rows,
		      struct error *err);
/* Pure: of those rows (total_ms, disk_bytes, mirrored_bytes, populated_bytes, dirty_bytes_per_s, disks, and
 * others: how many ran beside it), those of the VM first. */
double run_factor_from(const json_t *rows, const char *uuid, const struct check_facts *vm);
struct run *run_new(size_t nvms);

/* ---- host/evacuate_survey.c ---- */

struct survey {
	const json_t *uuids; /* of the VMs */
	const json_t *hosts; /* names */
	bool with_storage, backing_chosen;
};
/* Asks the VMs and the hosts (seconds), and makes the plan. p: order, parallel and deadline are given. */
int survey_plan(struct daemon *d, const struct survey *s, struct plan *p, struct error *err);

/* What is to be done about a VM, by its record and its snvmm. */
enum vm_verdict { VM_TO_BEGIN, VM_TO_WATCH, VM_IS_OVER };
/* VM_TO_WATCH: since which epoch (0: the one under way), and to where. VM_IS_OVER: state and reason, of a
 * moved one where it went. What is not set stays as it is. */
enum vm_verdict survey_judge(struct daemon *d, const char *uuid, uint64_t *epoch, enum run_state *state,
			     char reason[PLAN_TEXT_BYTES], char destination[HOST_NAME_MAX_CHARS + 1]);
/* UUIDs of the VMs that are here (running: that run or are paused). New reference. */
json_t *survey_present(struct daemon *d, bool running);

#endif
