/* SPDX-License-Identifier: Apache-2.0 */
/* interface: who goes where, when, and what stays: facts in, plan out */
#ifndef HOST_PLAN_H
#define HOST_PLAN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "host/config.h"
#include "host/vmdef.h"

/*
 * Pure: no clock, no file, no connection.
 *
 * Placing: the VMs in the order of their priority, within it the largest memory first; each goes to the host
 * of those that can take it on which most stays free afterwards (the smaller share of memory and disk
 * counts), so that load and links are spread. If something finds no room that way, all is placed once more
 * with the fullest host that still takes it first (best fit decreasing, which leaves the large holes for
 * large VMs), and that plan is taken if it leaves fewer behind. Bin packing has no fast exact answer, and
 * some tens of VMs on a few hosts rarely need one.
 *
 * Queueing: in the chosen order; at most `parallel` moves at once, and at most `per_host` to one destination:
 * one whose destination is full lets the next go first.
 *
 * Predicting: each move alone takes a fixed time and a time in which it uses the link; the links' time is
 * shared among those that use it at once, and all of it where there are more moves than processors here. The
 * source can send at least as fast as its fastest link.
 */
#define PLAN_VMS_MAX	1024
#define PLAN_TEXT_BYTES 512

enum plan_order {
	PLAN_BY_PRIORITY, /* the highest first, within it the largest */
	PLAN_BY_SIZE,	  /* the largest first: the whole takes the shortest time */
	PLAN_FASTEST,	  /* the shortest move first: most VMs are gone early */
};
/* -EINVAL */
int plan_order_parse(const char *name, enum plan_order *out);
const char *plan_order_name(enum plan_order order);

struct plan_host {
	char name[HOST_NAME_MAX_CHARS + 1];
	char why_not[PLAN_TEXT_BYTES]; /* "": it may be a destination */
	uint64_t memory_bytes;	       /* free for arriving VMs */
	uint64_t disk_bytes;
	uint64_t link_bytes_per_s; /* 0: not measured */
};

/* A VM on a host. */
struct plan_pair {
	char why_not[PLAN_TEXT_BYTES]; /* "": it can go there */
	uint64_t alone_ms;	       /* how long its move takes with nothing beside it; 0: not known */
	uint64_t fixed_ms;	       /* of that, what is not shared with others */
};

struct plan_vm {
	char name[VM_NAME_MAX_CHARS + 1], uuid[VM_UUID_CHARS + 1];
	char why_not[PLAN_TEXT_BYTES]; /* "": it can be moved */
	unsigned priority;
	uint64_t memory_bytes; /* that it needs there */
	uint64_t disk_bytes;   /* likewise; travels, too */
	uint64_t travels_bytes;
	/* the plan */
	int host;		   /* -1: it stays */
	char why[PLAN_TEXT_BYTES]; /* why there, or why it stays */
	unsigned turn;		   /* in the queue, from 0; of those that go */
	bool late;		   /* would begin after the deadline, so it is not begun */
	bool timed;		   /* the following are known */
	uint64_t begin_ms, end_ms; /* after the begin of the whole */
};

struct plan {
	enum plan_order order;
	unsigned parallel, per_host;
	unsigned cpus;	      /* of this host; 0: enough */
	uint64_t deadline_ms; /* 0: none */
	struct plan_host *hosts;
	size_t nhosts;
	struct plan_vm *vms;
	size_t nvms;
	struct plan_pair *pairs; /* nvms * nhosts, a VM's beside one another */
	/* the plan */
	size_t going;
	uint64_t total_ms; /* 0: not known */
};

/* Zeroed arrays. -ENOMEM; -E2BIG above PLAN_VMS_MAX. */
int plan_init(struct plan *p, size_t nvms, size_t nhosts, struct error *err);
void plan_free(struct plan *p);
struct plan_pair *plan_pair(const struct plan *p, size_t vm, size_t host);
/* Fills what is marked "the plan". */
void plan_make(struct plan *p);

/*
 * Which of the n waiting moves, in order of the queue, begins now: the first whose destination takes another
 * one; -1: none. `hosts` are their destinations, `at_host` how many are under way to each of them. Also the
 * daemon's rule when it carries a plan out.
 */
int plan_next(const int *hosts, size_t n, const unsigned *at_host, unsigned under_way, unsigned parallel,
	      unsigned per_host);

#endif
