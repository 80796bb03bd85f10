/* SPDX-License-Identifier: Apache-2.0 */
/* interface: what a move would meet, before it begins */
#ifndef HOST_CHECK_H
#define HOST_CHECK_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "host/config.h"
#include "host/cpu.h"
#include "host/facts.h"
#include "host/vmdef.h"

/* ---- the facts of both sides ---- */

#define CHECK_REFUSALS_MAX 8
#define CHECK_TEXT_BYTES   640

struct check_disk {
	char id[32];
	uint64_t allocated_bytes;
	bool backing;
};

struct check_net {
	char id[32];
	char bridge[16];
	unsigned mtu_here, mtu_there; /* 0: not known */
	char error[CHECK_TEXT_BYTES]; /* of the destination's bridge */
};

struct check_cpu {
	struct kvm_cpuid2 *table; /* NULL: not known */
	uint32_t tsc_khz;
	bool scales_tsc;
};

#define CHECK_LINK_LEAST (UINT64_C(1) << 20) /* bytes a second; as MOVE_BANDWIDTH_MIN */

struct check_facts {
	char vm[VM_NAME_MAX_CHARS + 1], here[HOST_NAME_MAX_CHARS + 1], there[HOST_NAME_MAX_CHARS + 1];

	/* the VM; live: its snvmm told */
	char state[16];
	char not_movable[CHECK_TEXT_BYTES]; /* why its record, or its state, forbids a move; "" */
	bool live;
	unsigned protocol, cpus;
	uint64_t memory_bytes, populated_bytes;
	uint64_t files_bytes; /* kernel and initrd, which travel along; 0: not known */
	struct check_disk disks[VM_DISKS_MAX];
	unsigned ndisks;
	struct check_net nets[VM_NETS_MAX];
	unsigned nnets;
	struct check_cpu guest;
	struct host_facts own;

	/* the destination; answered: it told */
	bool answered;
	char no_answer[CHECK_TEXT_BYTES]; /* why not */
	char program[32];
	unsigned protocol_min, protocol_max;
	struct host_facts theirs;
	struct check_cpu host;
	char cpu_error[CHECK_TEXT_BYTES];
	uint64_t disk_free_bytes, disk_kept_bytes;
	uint64_t disk_write_bytes_per_s, disk_sync_us; /* 0: not measured, and why: */
	uint64_t disk_read_bytes_per_s;		       /* likewise; an older program does not tell */
	char disk_error[CHECK_TEXT_BYTES];
	char refusals[CHECK_REFUSALS_MAX][CHECK_TEXT_BYTES];
	unsigned nrefusals;
	int64_t clock_offset_ms; /* theirs less ours */

	/* the link, measured on one encrypted connection; 0: not measured, and why: */
	uint64_t link_bytes_per_s, round_trip_us;
	uint64_t dial_us; /* how long the connection took, a process there and the proofs of both; 0: no */
	char link_error[CHECK_TEXT_BYTES];

	uint64_t dirty_bytes_per_s;  /* of its memory, by the guest */
	uint64_t dirty_set_bytes;    /* that it dirtied at all in CHECK_DIRTY_SECONDS; 0: not known */
	bool dirty_known, dirty_now; /* now: measured for the check, not at its last move */

	/* how it would be moved */
	unsigned max_downtime_ms;	/* aimed at */
	bool backing_chosen;		/* --backing was given */
	bool without_storage;		/* its disks are not copied */
	uint64_t bandwidth_bytes_per_s; /* a limit that is set; 0: none */
};

#define CHECK_DIRTY_SECONDS 1

/* Hostile input, both: -EPROTO. What is left out stays as it is. */
int check_take_vm(struct check_facts *f, const json_t *o, struct error *err);
int check_take_destination(struct check_facts *f, const json_t *o, struct error *err);
void check_facts_free(struct check_facts *f);

/* ---- the judgement, pure ---- */

enum check_grade { CHECK_PASS, CHECK_WARNING, CHECK_FAILURE };
const char *check_grade_name(enum check_grade grade);

struct check_line {
	const char *name; /* a literal */
	enum check_grade grade;
	char text[CHECK_TEXT_BYTES];
	char what_to_do[CHECK_TEXT_BYTES]; /* "" for a pass */
};

#define CHECK_LINES_MAX 24
struct check_prediction {
	uint64_t total_ms; /* 0: not known */
	uint64_t fixed_ms; /* of these, what is not bytes on the link or the disks */
	unsigned downtime_least_ms, downtime_most_ms;
	uint64_t quick_ms; /* with --quick, how long the guest stands still; 0: not known */
};

/* Every line, in order; returns how many. */
unsigned check_judge(const struct check_facts *f, struct check_line lines[CHECK_LINES_MAX]);
/* host/check_predict.c */
void check_predict(const struct check_facts *f, struct check_prediction *out);

/* ---- asking the other host ---- */

/*
 * Connects to the peer, proves both sides, asks with `question` (not consumed; docs/protocol.md, CHECK) and,
 * if `measure`, measures the link. *facts: the peer's answer (new reference), not looked at. In f: link_*,
 * dial_us and clock_offset_ms.
 */
int check_ask(const struct host_config *cfg, const char *peer, json_t *question, bool measure,
	      struct check_facts *f, json_t **facts, struct error *err);

#endif
