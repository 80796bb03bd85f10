/* SPDX-License-Identifier: Apache-2.0 */
#ifndef HOST_DAEMON_H
#define HOST_DAEMON_H

#include <jansson.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/error.h"
#include "host/config.h"
#include "host/handover.h"
#include "host/jsonl.h"
#include "host/record.h"
#include "host/registry.h"

/*
 * snmigrated. Private to host/daemon*.c, keeper.c, worker.c and commands*.c, but for daemon_run.
 *
 * The truth is on disk (records, folders) and in the live snvmm, which are asked through their sockets; the
 * daemon keeps in memory only which processes it watches. One thread accepts; one thread a client, a
 * connection in its preamble, a snvmm --incoming, and a VM (its keeper).
 */

/* Serves until SIGTERM or SIGINT; the VMs go on. */
int daemon_run(const struct host_config *cfg, struct error *err);

#define DAEMON_SNVMM_PROTOCOL 1
#define DAEMON_UNPROVEN_MAX   32
#define DAEMON_PREAMBLES_MAX  64
#define DAEMON_PAIRINGS_MAX   4 /* of the unproven ones */
/* One address has at most half of each, so that it cannot keep the others out. */
#define DAEMON_SHARE_OF_ONE	2
#define DAEMON_ADDRESS_CHARS	64
#define DAEMON_CLIENTS_MAX	256
#define DAEMON_GROUP_TIMEOUT_MS 10000
#define DAEMON_ORDERLY_END_MS	5000 /* what a killed snvmm left behind ends by itself */
#define DAEMON_CALL_TIMEOUT_MS	10000
#define DAEMON_START_TIMEOUT_MS 60000
#define DAEMON_SETTLE_TIMEOUT_MS                                                                             \
	30000 /* how long a command waits for a crashed move to settle (docs/handover.md) */
#define TOKENS_PER_WORKER_MAX 192 /* disks, files below them, memory */

struct keeper;
struct worker;
struct pair_codes;
struct arrival;
struct recorder;
struct evacuator;

struct daemon {
	const struct host_config *cfg;
	struct recorder *recorder;   /* host/recorder.h; there before the first thread */
	struct evacuator *evacuator; /* host/evacuate.h; likewise */
	pthread_mutex_t lock;	     /* all that follows, and the fields of keepers and workers that say so */
	pthread_cond_t changed;	     /* CLOCK_MONOTONIC; broadcast when a keeper's state changes */
	struct keeper *keepers;
	struct worker *workers;
	struct arrival *arrivals; /* connections in their preamble */
	unsigned preambles, clients, unproven;
	unsigned next_connection;
	int stop_fd;		  /* eventfd, readable once the daemon ends */
	struct pair_codes *codes; /* has a lock of its own */
};

/*
 * One a VM that is known here: watches its snvmm; when that is dead, empties the VM's group, settles its
 * record, cleans. Never freed, its thread ends when there is nothing left to keep.
 */
struct keeper {
	struct daemon *daemon;
	struct keeper *next;
	char uuid[VM_UUID_CHARS + 1];
	pthread_mutex_t
		op;  /* held while the record is written or a snvmm started; taken before daemon->lock */
	int wake_fd; /* eventfd */
	/* under daemon->lock */
	bool running; /* the thread */
	int pidfd;    /* the live snvmm, or -1 */
	pid_t pid;
	bool settled;		/* nothing to do but wait: an owner, or an answer is not to be had now */
	unsigned rounds;	/* of settling, so that one can wait for a whole one */
	unsigned stops;		/* how often a snvmm was seen to end */
	uint64_t cleaned_epoch; /* of the last move whose source was cleaned here */
	struct error last_ask;	/* why the peer could not be asked; code 0: it answered */
	enum handover_state last_answer; /* what it answered last */
};

struct keeper *keeper_find(struct daemon *d, const char *uuid);
/* Finds or makes it, and starts its thread if it has none. */
struct keeper *keeper_get(struct daemon *d, const char *uuid, struct error *err);
/* A process is the VM's snvmm from now on. pidfd is taken over. */
void keeper_attach(struct keeper *k, pid_t pid, int pidfd);
void keeper_wake(struct keeper *k);
bool keeper_is_live(struct keeper *k);
/* Waits until no snvmm of it lives. False after the time. */
bool keeper_wait_dead(struct keeper *k, unsigned timeout_ms);
/* Waits until a whole round of settling is through. -ETIMEDOUT. */
int keeper_settle_now(struct keeper *k, unsigned timeout_ms);
/* Waits until the source of the move of this epoch was cleaned. False after the time. */
bool keeper_wait_cleaned(struct keeper *k, uint64_t epoch, unsigned timeout_ms);
/* SIGKILL to the VM's group if need be; waits until it is empty. */
int keeper_empty_group(struct keeper *k, struct error *err);
/* Keepers for every record; adopts what lives. */
int keepers_start(struct daemon *d, struct error *err);
void daemon_timed_wait(struct daemon *d, unsigned ms);

/* What the preamble of a control or pair connection wants. */
enum worker_kind { WORKER_CONTROL, WORKER_CONTROL_PAIRED, WORKER_PAIR };
/* host/worker.c: takes the connection over; `from` is its address. */
void worker_start(struct daemon *d, int fd, const char *from, enum worker_kind kind);
/* Passes a data connection (taken over) to the worker that has the token. */
void worker_route(struct daemon *d, const char *channel, const char *token, int fd);

/* host/commands.c: serves one client; takes it over. */
void commands_serve(struct daemon *d, struct jsonl *client);

/* ---- shared by the commands ---- */
struct vm_ref {
	struct vm_record rec;
	struct keeper *keeper;
	char dir[REGISTRY_PATH_BYTES];
};
/* host/vm_find.c. -ENOENT "no VM named X on this host", or where it moved to and when. A UUID works as well
 * as a name. */
int vm_find(struct daemon *d, const char *name, struct vm_ref *out, struct error *err);
/* Neither moved away nor given up. */
bool vm_is_present(const struct vm_record *rec);
/* The "vm" of the request, which has to be this host's. */
int vm_find_present(struct daemon *d, json_t *request, struct vm_ref *vm, struct error *err);
/* As vm_find_present, for what a VM on its way here does not take yet. */
int vm_find_arrived(struct daemon *d, json_t *request, struct vm_ref *vm, struct error *err);
/* -EBUSY while it is arriving here and its snvmm lives: only its source acts on it. */
int vm_check_arrived(struct daemon *d, struct vm_ref *vm, struct error *err);
/* How the newest finished move of the VM with that name or UUID ended (its last line; new reference). */
bool move_result_find(struct daemon *d, const char *name, json_t **out);
/* host/vm_call.c. Connects to the live snvmm of the VM; -ECONNREFUSED or the like when there is none. */
int vm_connect(const struct vm_ref *vm, struct jsonl **out, struct error *err);
/* One request to it. */
int vm_call(const struct vm_ref *vm, json_t *request, json_t **reply, int *exit_status, struct error *err);
json_t *vm_describe(struct daemon *d, struct vm_ref *vm, bool always);
/* host/vm_start.c */
/*
 * The snvmm of a VM that is stopped moves it (docs/handover.md, "Cold"): -EBUSY; or has done so and is
 * ending: it is waited for. Any other may live.
 */
int vm_check_no_cold_move(struct daemon *d, struct vm_ref *vm, struct error *err);
/* FORCED: resolve --run-here. COLD: its guest does not run, it is to be moved. */
enum vm_start_how { VM_START_RUN, VM_START_PAUSED, VM_START_FORCED, VM_START_COLD };
/* Starts snvmm for a VM of the registry and waits until it answers. -EALREADY: it has one. */
int vm_start(struct daemon *d, struct vm_ref *vm, enum vm_start_how how, struct error *err);
int reply_ok(struct jsonl *client, json_t *more);
/* The VM's record as it is now, without its lock: perhaps stale at once. */
int record_hint(const struct host_config *cfg, const char *uuid, struct vm_record *rec);

struct command_context {
	struct daemon *daemon;
	struct jsonl *client;
	json_t *request;
};
/* Each answers the client itself; returns 0, or an exit status with err for the caller to send. */
int command_move(struct command_context *c, struct error *err);
int command_cancel(struct command_context *c, struct error *err);
int command_tune(struct command_context *c, struct error *err);
int command_watch(struct command_context *c, struct error *err);
int command_resolve(struct command_context *c, struct error *err);
/* host/commands_dirty_rate.c */
int command_dirty_rate(struct command_context *c, struct error *err);
/* host/commands_cpu.c */
int command_baseline(struct command_context *c, struct error *err);
int command_set(struct command_context *c, struct error *err);
int command_balloon(struct command_context *c, struct error *err);
/* host/commands_check.c */
int command_check(struct command_context *c, struct error *err);
/* What takes a second or two each: the guest's dirty rate; the other host's disk and the link to it. */
#define CHECK_MEASURE_GUEST 1u
#define CHECK_MEASURE_HOST  2u
/* What its snvmm sees it dirty in CHECK_DIRTY_SECONDS; false: not known. Blocking; needs vm->dir only. */
bool check_measure_dirty(const struct vm_ref *vm, uint64_t *bytes_per_s, uint64_t *set_bytes);
/* The facts of both sides into *f, zeroed but for how it would be moved. */
struct check_facts;
void check_collect(struct daemon *d, struct vm_ref *vm, const char *host, unsigned measure,
		   struct check_facts *f);
/*
 * A move with --quick: for how long the guest will stand still, by what both hosts and the link tell now,
 * goes into its options ("predicted_stop_ms"); -ETIME where that is known to be longer than they allow,
 * -ENODATA where neither is known.
 */
int check_quick(struct daemon *d, struct vm_ref *vm, const char *host, json_t *options, struct error *err);
/* host/commands_evacuate.c */
int command_evacuate(struct command_context *c, struct error *err);
int command_return(struct command_context *c, struct error *err);
int command_plan(struct command_context *c, struct error *err);
int command_maintenance(struct command_context *c, struct error *err);
/* host/commands_status.c */
int command_history(struct command_context *c, struct error *err);
int command_status(struct command_context *c, struct error *err);
/* host/commands_trust.c */
int command_pair_open(struct command_context *c, struct error *err);
int command_pair_join(struct command_context *c, struct error *err);
int command_peer_list(struct command_context *c, struct error *err);
int command_peer_set(struct command_context *c, struct error *err);
/* "remote": what another host's daemon answers (host/administer.h). */
int command_remote(struct command_context *c, struct error *err);
int command_unpair(struct command_context *c, struct error *err);
/* host/commands_partial.c */
int command_partial_list(struct command_context *c, struct error *err);
int command_partial_delete(struct command_context *c, struct error *err);

#endif
