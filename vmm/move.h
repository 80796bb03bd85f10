/* SPDX-License-Identifier: Apache-2.0 */
#ifndef VMM_MOVE_H
#define VMM_MOVE_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "host/config.h"
#include "host/handover.h"
#include "host/jsonl.h"
#include "host/registry.h"
#include "host/vmdef.h"
#include "vmm/move_disk.h"
#include "memxfer/memxfer.h"
#include "vmm/move_events.h"

/* The two ends of a move. docs/design.md "A move, message by message", docs/handover.md. */

#define MOVE_PROTOCOL_MIN  1 /* of a source; 1 knows no proof */
#define MOVE_PROTOCOL_MOST 2 /* what a source of this program speaks, */
#define MOVE_PROTOCOL_COLD 3 /* but for a VM that is stopped, or disks that both hosts see */
#define MOVE_PROTOCOL_MAX  3

/* A disk is copied and proved in chunks of this size, or of the smallest power of two that makes no more of
 * them than a host keeps tables for (48 bytes each). */
#define MOVE_CHUNK_BYTES UINT32_C(262144)
#define MOVE_CHUNKS_MAX	 (UINT64_C(1) << 20)

/* Slower than this, a region of memory would take longer than silence may. */
#define MOVE_BANDWIDTH_MIN (UINT64_C(1) << 20)

#define MOVE_AS_CONFIGURED UINT32_MAX

/* Of former copies of pages (--delta-cache). */
#define MOVE_DELTA_AUTO	     UINT64_MAX
#define MOVE_DELTA_MIN_BYTES (UINT64_C(1) << 20)
#define MOVE_DELTA_MAX_BYTES (UINT64_C(64) << 30)

struct vm;

/* --backing: what becomes of files that are below a disk. */
enum move_backing_choice {
	MOVE_BACKING_REFUSE,
	MOVE_BACKING_FLATTEN,
	MOVE_BACKING_CHAIN,
	MOVE_BACKING_REUSE
};

/* --priority: how far the guest may be slowed when it dirties faster than the link carries. */
enum move_priority { MOVE_PRIORITY_GUEST, MOVE_PRIORITY_BALANCED, MOVE_PRIORITY_FINISH };

/* --on-exceed: what becomes of a move whose predicted downtime breaks the budget at the limits of pre-copy.
 */
enum move_exceed { MOVE_EXCEED_THROTTLE, MOVE_EXCEED_CANCEL, MOVE_EXCEED_POSTCOPY /* as --postcopy auto */ };

/* --postcopy: whether the guest may go before its memory has. */
enum move_postcopy {
	MOVE_POSTCOPY_NEVER,
	MOVE_POSTCOPY_AUTO, /* when pre-copy does not get what is left below the downtime aimed at */
	MOVE_POSTCOPY_NOW,  /* after one round */
};

struct move_to_disk {
	char id[32];
	char path[MOVE_DEVICE_PATH_BYTES];
};

struct move_options {
	char address[128]; /* of the destination's daemon */
	char peer[HOST_NAME_MAX_CHARS + 1];
	uint64_t epoch;
	unsigned max_downtime_ms; /* the budget; 0 = default 50 */
	enum move_priority priority;
	enum move_exceed on_exceed;
	unsigned streams;     /* 0 = by the number of processors */
	unsigned max_rounds;  /* 0 = default 30 */
	unsigned max_time_ms; /* of pre-copy; 0 = none */
	enum mem_compress compress;
	int zstd_level;			/* default 1 */
	uint64_t delta_cache_bytes;	/* 0: no deltas; MOVE_DELTA_AUTO (default): by the guest's memory */
	uint64_t bandwidth_bytes_per_s; /* 0 = unlimited */
	uint64_t mirror_buffer_bytes;	/* of all disks; 0 = default 64 MiB */
	bool mirror_buffered;		/* a guest's writes do not wait for the destination */
	unsigned retry_for_s; /* after a lost link; MOVE_AS_CONFIGURED: as this host's configuration says */
	unsigned keep_partial_s;    /* by the destination; MOVE_AS_CONFIGURED: as its configuration says */
	bool with_storage;	    /* else its disks are to be seen by both hosts */
	bool quick;		    /* the guest stands still from before its disks are copied */
	uint64_t quick_most_ms;	    /* for no longer than that; 0 = not known */
	bool quick_limited;	    /* which a person said */
	uint64_t predicted_stop_ms; /* of that; 0 = not known */
	bool keep_source;
	bool rehearse; /* ends when the guest would be stopped */
	bool suspend;  /* the guest stays paused at the destination */
	bool no_tls;   /* data channels only */
	enum move_postcopy postcopy;
	enum move_purpose purpose;
	enum move_backing_choice backing;
	struct move_to_disk to_disk[VM_DISKS_MAX]; /* --to-disk ID=PATH */
	unsigned nto_disk;
};

/* Parses the options object of {"cmd":"migrate"}. */
int move_options_parse(json_t *request, struct move_options *opt, struct error *err);

/* --- source --- */

/* Starts the move in a thread of its own: -EBUSY when one is under way. Its events: move_source_events. */
int move_source_start(struct vm *vm, const struct move_options *opt, struct error *err);
/* NULL before the first move. Stays valid until the process ends. */
struct move_events *move_source_events(struct vm *vm);
/* -EBUSY after COMMIT, -ENOENT when there is none. Returns at once; the move ends as "cancelled". */
int move_source_cancel(struct vm *vm, struct error *err);
/* {"cmd":"tune"}: changes what the request names of the move under way; -ENOENT when there is none. */
int move_source_tune(struct vm *vm, json_t *request, struct error *err);
/* The guest powered off or crashed: ends a move before COMMIT. Waits for its end. */
void move_source_guest_gone(struct vm *vm, const char *what);
/* From the pause of the guest on until the outcome is known. */
bool move_is_deciding(struct vm *vm);
bool move_is_running(struct vm *vm);
/* Object or null. New reference. */
json_t *move_describe(struct vm *vm);
/* {"cmd":"resolve"} for a source in doubt: "ask", "run-here" (the caller had it confirmed), "give-up". */
int move_source_resolve(struct vm *vm, const char *how, struct error *err);
/* {"cmd":"check"}: what the VM needs of a destination. New reference, or NULL with err. */
json_t *move_check_describe(struct vm *vm, struct error *err);
/* Joins the thread; before vm_release. */
void move_source_free(struct vm *vm);
/* The guest runs elsewhere, and has pages to fetch here. */
bool move_source_is_paging(struct vm *vm);

/* --- destination --- */

/*
 * Serves one control connection (fd, taken over) that the daemon passed on; `daemon` is the stream to it (may
 * die); `paired`: the other side proves itself as a paired host, not by the CA. Answers a question and
 * returns 0 with *became_owner false, or receives a VM into vm: then *became_owner is true and the VM belongs
 * to this process. On failure everything that the arrival made has been removed.
 */
int move_destination_serve(struct vm *vm, int fd, struct jsonl *daemon, bool paired, bool *became_owner,
			   struct error *err);
/* vm->lock held. An object while it arrives, else null. New reference. */
json_t *move_arrival_describe(struct vm *vm);
/* After became_owner MOVED is awaited (or asked for) in the background. Before vm_release: */
void move_destination_free(struct vm *vm);
/* The guest runs, and has pages to fetch from the source still. */
bool move_destination_is_paging(struct vm *vm);
/* Whether the token is of a channel for such pages; and such a channel, fd taken over. */
bool move_destination_knows(struct vm *vm, const char *token);
int move_destination_channel(struct vm *vm, const char *token, int fd, struct error *err);
/* Before anything of the VM is taken down: does not return while pages are missing. Threads may wait for
 * them, which nothing but the process's end ends without giving them something else to read. */
void move_destination_leave(struct vm *vm, int exit_status);
/* {"cmd":"resolve"} for an owner in doubt. */
int move_destination_resolve(struct vm *vm, const char *how, struct error *err);

/* --- an owner by resolve --run-here, at either end --- */

/* Asks the other host in the background until the record is no longer owner-unconfirmed. Any thread. */
int move_forced_start(struct vm *vm, struct error *err);
/* One step by the rules with what the other host said. Any thread. */
int move_forced_settle(struct vm *vm, const struct handover_report *report, struct error *err);
/* Before vm_release. */
void move_forced_free(struct vm *vm);

/* {"cmd":"ask"}, the object of host/ask.h inside: settles what the rules demand, then answers from this
 * process's record. New reference, or NULL with err (-EAGAIN: not now). */
json_t *move_answer(struct vm *vm, json_t *request, struct error *err);

#endif
