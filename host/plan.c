/* SPDX-License-Identifier: Apache-2.0 */
#include "host/plan.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"

#define GIB 1073741824.0

static const char *const order_names[] = {
	[PLAN_BY_PRIORITY] = "priority", [PLAN_BY_SIZE] = "size", [PLAN_FASTEST] = "fastest"};

int plan_order_parse(const char *name, enum plan_order *out)
{
	for (unsigned i = 0; name && i < ARRAY_SIZE(order_names); i++) {
		if (strcmp(name, order_names[i]))
			continue;
		*out = (enum plan_order)i;
		return 0;
	}
	return -EINVAL;
}

const char *plan_order_name(enum plan_order order)
{
	return order_names[order];
}

int plan_init(struct plan *p, size_t nvms, size_t nhosts, struct error *err)
{
	if (nvms > PLAN_VMS_MAX || nhosts > HOST_PEERS_MAX)
		return error_set(err, E2BIG, "a plan has at most %d VMs and %d hosts", PLAN_VMS_MAX,
				 HOST_PEERS_MAX);
	/* one more of each: an empty plan is one, too */
	p->vms = calloc(nvms + 1, sizeof *p->vms);
	p->hosts = calloc(nhosts + 1, sizeof *p->hosts);
	p->pairs = calloc(nvms * nhosts + 1, sizeof *p->pairs);
	p->nvms = nvms;
	p->nhosts = nhosts;
	if (p->vms && p->hosts && p->pairs)
		return 0;
	plan_free(p);
	return error_errno(err, ENOMEM, "plan");
}

void plan_free(struct plan *p)
{
	free(steal_ptr(p->vms));
	free(steal_ptr(p->hosts));
	free(steal_ptr(p->pairs));
}

struct plan_pair *plan_pair(const struct plan *p, size_t vm, size_t host)
{
	return &p->pairs[vm * p->nhosts + host];
}

/* ---- sorting: the arrays are small, and ties keep the order in which the VMs are listed ---- */

typedef bool (*before_fn)(const struct plan *p, size_t a, size_t b);

static void sort(const struct plan *p, size_t *list, size_t n, before_fn before)
{
	for (size_t i = 1; i < n; i++) {
		size_t v = list[i], at = i;
		for (; at > 0 && before(p, v, list[at - 1]); at--)
			list[at] = list[at - 1];
		list[at] = v;
	}
}

static bool places_before(const struct plan *p, size_t a, size_t b)
{
	const struct plan_vm *x = &p->vms[a], *y = &p->vms[b];
	if (x->priority != y->priority)
		return x->priority > y->priority;
	if (x->memory_bytes != y->memory_bytes)
		return x->memory_bytes > y->memory_bytes;
	return x->disk_bytes > y->disk_bytes;
}

static bool larger(const struct plan *p, size_t a, size_t b)
{
	return p->vms[a].travels_bytes > p->vms[b].travels_bytes;
}

static bool more_important(const struct plan *p, size_t a, size_t b)
{
	if (p->vms[a].priority != p->vms[b].priority)
		return p->vms[a].priority > p->vms[b].priority;
	return larger(p, a, b);
}

/* One of unknown length comes last. */
static bool faster(const struct plan *p, size_t a, size_t b)
{
	uint64_t x = plan_pair(p, a, (size_t)p->vms[a].host)->alone_ms,
		 y = plan_pair(p, b, (size_t)p->vms[b].host)->alone_ms;
	return x - 1 < y - 1;
}

/* ---- placing ---- */

struct room {
	uint64_t memory_bytes, disk_bytes;
};

static bool fits(const struct plan_vm *vm, const struct room *r)
{
	return vm->memory_bytes <= r->memory_bytes && vm->disk_bytes <= r->disk_bytes;
}

/* The smaller share of what the host had that stays free. */
static double left_share(const struct plan_vm *vm, const struct plan_host *h, const struct room *r)
{
	double memory = (double)(r->memory_bytes - vm->memory_bytes) / ((double)h->memory_bytes + 1);
	double disk = (double)(r->disk_bytes - vm->disk_bytes) / ((double)h->disk_bytes + 1);
	return memory < disk ? memory : disk;
}

static int choose(const struct plan *p, size_t v, const struct room *room, bool fullest)
{
	const struct plan_vm *vm = &p->vms[v];
	int best = -1;
	double best_left = 0;
	for (size_t h = 0; h < p->nhosts; h++) {
		if (*p->hosts[h].why_not || *plan_pair(p, v, h)->why_not || !fits(vm, &room[h]))
			continue;
		/* the fullest by what is left in bytes: that is what a large VM looks for */
		double left = fullest ? -(double)(room[h].memory_bytes - vm->memory_bytes)
				      : left_share(vm, &p->hosts[h], &room[h]);
		if (best >= 0 && left <= best_left)
			continue;
		best = (int)h;
		best_left = left;
	}
	return best;
}

static struct room *make_room(const struct plan *p)
{
	struct room *room = calloc(p->nhosts + 1, sizeof *room);
	for (size_t h = 0; room && h < p->nhosts; h++)
		room[h] = (struct room){p->hosts[h].memory_bytes, p->hosts[h].disk_bytes};
	return room;
}

/* How many find a place; where[v] is it, or -1. */
static size_t place(const struct plan *p, const size_t *list, size_t n, bool fullest, int *where,
		    struct room *room)
{
	size_t placed = 0;
	for (size_t i = 0; i < n; i++) {
		size_t v = list[i];
		where[v] = choose(p, v, room, fullest);
		if (where[v] < 0)
			continue;
		room[where[v]].memory_bytes -= p->vms[v].memory_bytes;
		room[where[v]].disk_bytes -= p->vms[v].disk_bytes;
		placed++;
	}
	return placed;
}

static void say_where(struct plan_vm *vm, const struct plan_host *h, const struct room *room)
{
	snprintf(vm->why, sizeof vm->why,
		 "fits: after all of the plan %s has %.1f GiB of memory and %.1f GiB of disk left", h->name,
		 (double)room->memory_bytes / GIB, (double)room->disk_bytes / GIB);
}

/* What each host lacks, in the order of the hosts; cut where it becomes too long. */
static void say_why_not(const struct plan *p, size_t v, const struct room *room)
{
	struct plan_vm *vm = &p->vms[v];
	size_t at = 0;
	vm->why[0] = '\0';
	for (size_t h = 0; h < p->nhosts && at < sizeof vm->why - 1; h++) {
		const struct plan_host *host = &p->hosts[h];
		const char *why = *host->why_not ? host->why_not : plan_pair(p, v, h)->why_not;
		const char *sep = at ? "; " : "";
		int n;
		if (*why)
			n = snprintf(vm->why + at, sizeof vm->why - at, "%s%s: %s", sep, host->name, why);
		else if (vm->memory_bytes > room[h].memory_bytes)
			n = snprintf(vm->why + at, sizeof vm->why - at,
				     "%s%s: needs %.1f GiB of memory, %.1f GiB are left", sep, host->name,
				     (double)vm->memory_bytes / GIB, (double)room[h].memory_bytes / GIB);
		else
			n = snprintf(vm->why + at, sizeof vm->why - at,
				     "%s%s: needs %.1f GiB of disk, %.1f GiB are left", sep, host->name,
				     (double)vm->disk_bytes / GIB, (double)room[h].disk_bytes / GIB);
		at += n > 0 ? (size_t)n : 0;
	}
	if (!p->nhosts)
		snprintf(vm->why, sizeof vm->why, "there is no other host");
}

static int place_all(struct plan *p, size_t *list, size_t n)
{
	CLEANUP_FREE int *spread = calloc(p->nvms + 1, sizeof *spread);
	CLEANUP_FREE int *packed = calloc(p->nvms + 1, sizeof *packed);
	CLEANUP_FREE struct room *room = make_room(p), *room_packed = make_room(p);
	int rc = spread && packed && room && room_packed ? 0 : -ENOMEM;
	if (!rc) {
		sort(p, list, n, places_before);
		size_t placed = place(p, list, n, false, spread, room);
		bool pack = placed < n && place(p, list, n, true, packed, room_packed) > placed;
		for (size_t i = 0; i < n; i++) {
			size_t v = list[i];
			const struct room *left = pack ? room_packed : room;
			p->vms[v].host = (pack ? packed : spread)[v];
			if (p->vms[v].host < 0)
				say_why_not(p, v, left);
			else
				say_where(&p->vms[v], &p->hosts[p->vms[v].host], &left[p->vms[v].host]);
		}
	}
	return rc;
}

/* ---- queueing and predicting ---- */

int plan_next(const int *hosts, size_t n, const unsigned *at_host, unsigned under_way, unsigned parallel,
	      unsigned per_host)
{
	if (under_way >= parallel)
		return -1;
	for (size_t i = 0; i < n; i++)
		if (hosts[i] >= 0 && at_host[hosts[i]] < per_host)
			return (int)i;
	return -1;
}

struct simulated {
	size_t vm;
	double fixed_ms, shared_ms; /* still to go, the second if it were alone */
};

struct simulation {
	struct plan *p;
	size_t *queue;
	int *hosts; /* of the queue */
	size_t nqueue;
	struct simulated *moves;
	size_t nmoves;
	unsigned *at_host, *sending; /* under way to it; those of them that use the link */
	unsigned sending_all;
	double now_ms, source_bytes_per_s;
};

/* How many times longer than alone all of them take where processors are short: each is about one's work. */
static double crowding(const struct simulation *s)
{
	double n = s->p->cpus ? (double)s->nmoves / s->p->cpus : 1;
	return n > 1 ? n : 1;
}

/* How many times longer than alone it takes now to send. */
static double slowdown(const struct simulation *s, size_t host)
{
	double link = (double)s->p->hosts[host].link_bytes_per_s, crowd = crowding(s), share;
	if (link < 1) {
		share = s->sending[host];
	} else {
		double of_link = link / s->sending[host], of_source = s->source_bytes_per_s / s->sending_all;
		share = link / (of_link < of_source ? of_link : of_source);
	}
	return share > crowd ? share : crowd;
}

static void begin_due(struct simulation *s)
{
	const struct plan *p = s->p;
	for (;;) {
		int i = plan_next(s->hosts, s->nqueue, s->at_host, (unsigned)s->nmoves, p->parallel,
				  p->per_host);
		if (i < 0)
			return;
		size_t v = s->queue[i];
		struct plan_vm *vm = &p->vms[v];
		s->nqueue--;
		memmove(&s->queue[i], &s->queue[i + 1], (s->nqueue - (size_t)i) * sizeof *s->queue);
		memmove(&s->hosts[i], &s->hosts[i + 1], (s->nqueue - (size_t)i) * sizeof *s->hosts);
		vm->begin_ms = (uint64_t)s->now_ms;
		if (p->deadline_ms && vm->begin_ms >= p->deadline_ms) {
			vm->late = true;
			continue;
		}
		const struct plan_pair *pair = plan_pair(p, v, (size_t)vm->host);
		double alone = (double)pair->alone_ms;
		double fixed = pair->fixed_ms < pair->alone_ms ? (double)pair->fixed_ms : alone;
		s->moves[s->nmoves++] = (struct simulated){v, fixed, alone - fixed};
		s->at_host[vm->host]++;
	}
}

static void count_sending(struct simulation *s)
{
	memset(s->sending, 0, (s->p->nhosts + 1) * sizeof *s->sending);
	s->sending_all = 0;
	for (size_t i = 0; i < s->nmoves; i++) {
		if (s->moves[i].fixed_ms > 0)
			continue;
		s->sending[s->p->vms[s->moves[i].vm].host]++;
		s->sending_all++;
	}
}

static double rest_ms(const struct simulation *s, const struct simulated *m)
{
	if (m->fixed_ms > 0)
		return m->fixed_ms * crowding(s);
	return m->shared_ms * slowdown(s, (size_t)s->p->vms[m->vm].host);
}

/* To the next moment at which one of them ends, or begins to send. */
static void step(struct simulation *s)
{
	count_sending(s);
	double dt = rest_ms(s, &s->moves[0]);
	for (size_t i = 1; i < s->nmoves; i++) {
		double rest = rest_ms(s, &s->moves[i]);
		dt = rest < dt ? rest : dt;
	}
	s->now_ms += dt;
	size_t kept = 0;
	for (size_t i = 0; i < s->nmoves; i++) {
		struct simulated m = s->moves[i];
		struct plan_vm *vm = &s->p->vms[m.vm];
		bool due = rest_ms(s, &m) <= dt, starting = m.fixed_ms > 0;
		if (starting)
			m.fixed_ms = due ? 0 : m.fixed_ms - dt / crowding(s);
		else
			m.shared_ms -= dt / slowdown(s, (size_t)vm->host);
		if (!starting && due) {
			vm->timed = true;
			vm->end_ms = (uint64_t)s->now_ms;
			s->at_host[vm->host]--;
		} else {
			s->moves[kept++] = m;
		}
	}
	s->nmoves = kept;
}

/* queue: those that go, in order; it is used up. */
static int predict(struct plan *p, size_t *queue, size_t n)
{
	CLEANUP_FREE int *hosts = calloc(n + 1, sizeof *hosts);
	CLEANUP_FREE struct simulated *moves = calloc(n + 1, sizeof *moves);
	CLEANUP_FREE unsigned *at_host = calloc(p->nhosts + 1, sizeof *at_host);
	CLEANUP_FREE unsigned *sending = calloc(p->nhosts + 1, sizeof *sending);
	if (!hosts || !moves || !at_host || !sending)
		return -ENOMEM;
	struct simulation s = {.p = p,
			       .queue = queue,
			       .hosts = hosts,
			       .nqueue = n,
			       .moves = moves,
			       .at_host = at_host,
			       .sending = sending};
	for (size_t h = 0; h < p->nhosts; h++)
		if ((double)p->hosts[h].link_bytes_per_s > s.source_bytes_per_s)
			s.source_bytes_per_s = (double)p->hosts[h].link_bytes_per_s;
	for (size_t i = 0; i < n; i++) {
		hosts[i] = p->vms[queue[i]].host;
		if (!plan_pair(p, queue[i], (size_t)hosts[i])->alone_ms)
			return 0; /* nothing is known of its length, so of none behind it */
	}
	for (begin_due(&s); s.nmoves; begin_due(&s))
		step(&s);
	p->total_ms = (uint64_t)s.now_ms;
	return 0;
}

void plan_make(struct plan *p)
{
	static const before_fn orders[] = {
		[PLAN_BY_PRIORITY] = more_important, [PLAN_BY_SIZE] = larger, [PLAN_FASTEST] = faster};
	CLEANUP_FREE size_t *list = calloc(p->nvms + 1, sizeof *list);
	size_t n = 0;
	p->going = 0;
	p->total_ms = 0;
	for (size_t v = 0; v < p->nvms; v++) {
		struct plan_vm *vm = &p->vms[v];
		vm->host = -1;
		vm->late = vm->timed = false;
		snprintf(vm->why, sizeof vm->why, "%s", list ? vm->why_not : "no memory to plan with");
		if (list && !*vm->why_not)
			list[n++] = v;
	}
	if (!list || place_all(p, list, n) < 0)
		return;
	size_t going = 0;
	for (size_t i = 0; i < n; i++)
		if (p->vms[list[i]].host >= 0)
			list[going++] = list[i];
	sort(p, list, going, orders[p->order]);
	for (size_t i = 0; i < going; i++)
		p->vms[list[i]].turn = (unsigned)i;
	p->going = going;
	predict(p, list, going);
}
