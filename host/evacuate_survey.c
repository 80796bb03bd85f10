/* SPDX-License-Identifier: Apache-2.0 */
/* What is to be known before a plan: of the VMs here, and of the hosts that they might go to. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "host/check.h"
#include "host/daemon.h"
#include "host/evacuate.h"
#include "host/fsutil.h"

#define HOST_RESERVE_BYTES (UINT64_C(64) << 20) /* as the destination's admission keeps for itself */
#define KEEPER_WAIT_MS	   5000

/* ---- the VMs that are here ---- */

struct present {
	struct daemon *daemon;
	json_t *uuids;
	bool running;
};

static const char *state_of(const json_t *described)
{
	const char *state = json_string_value(json_object_get(described, "state"));
	return state ? state : "";
}

static bool runs(const char *state)
{
	return !strcmp(state, "running") || !strcmp(state, "paused");
}

static int add_present(void *opaque, const char *uuid)
{
	struct present *p = opaque;
	struct vm_ref vm = {0};
	if (record_hint(p->daemon->cfg, uuid, &vm.rec) < 0 || vm.rec.state == HANDOVER_MOVED ||
	    vm.rec.state == HANDOVER_ABANDONED)
		return 0;
	if (p->running) {
		if (registry_path(p->daemon->cfg, vm.rec.folder, vm.dir, NULL) < 0)
			return 0;
		json_t *o = vm_describe(p->daemon, &vm, true);
		bool is = vm.rec.state != HANDOVER_PREPARED && runs(state_of(o));
		json_decref(o);
		if (!is)
			return 0;
	}
	json_array_append_new(p->uuids, json_string(uuid));
	return 0;
}

json_t *survey_present(struct daemon *d, bool running)
{
	struct present p = {.daemon = d, .uuids = json_array(), .running = running};
	record_list(d->cfg->state_dir, add_present, &p, NULL);
	return p.uuids;
}

/* ---- what is to be done about one ---- */

/* The daemon may have begun just now: its keeper finds the snvmm first. */
static void wait_for_keeper(struct vm_ref *vm)
{
	uint64_t deadline = clock_now_ms() + KEEPER_WAIT_MS;
	while (!keeper_is_live(vm->keeper) && !vm->keeper->rounds && clock_now_ms() < deadline)
		clock_sleep_ms(50);
}

static enum vm_verdict over(enum run_state what, enum run_state *state, char reason[PLAN_TEXT_BYTES],
			    const char *text)
{
	*state = what;
	snprintf(reason, PLAN_TEXT_BYTES, "%s", text);
	return VM_IS_OVER;
}

static enum vm_verdict judge_gone(struct daemon *d, const char *uuid, enum run_state *state,
				  char reason[PLAN_TEXT_BYTES], char destination[HOST_NAME_MAX_CHARS + 1])
{
	json_t *end = NULL;
	const char *result = NULL, *where = NULL;
	if (move_result_find(d, uuid, &end)) {
		result = json_string_value(json_object_get(end, "result"));
		where = json_string_value(json_object_get(end, "destination"));
	}
	bool moved = result && where && !strcmp(result, "moved");
	if (moved)
		snprintf(destination, HOST_NAME_MAX_CHARS + 1, "%s", where);
	json_decref(end);
	return moved ? over(RUN_MOVED, state, reason, "")
		     : over(RUN_OFF, state, reason, "it is not here any more");
}

static enum vm_verdict judge_owner(struct daemon *d, struct vm_ref *vm, enum run_state *state,
				   char reason[PLAN_TEXT_BYTES], char destination[HOST_NAME_MAX_CHARS + 1])
{
	wait_for_keeper(vm);
	json_t *o = vm_describe(d, vm, true);
	char seen[24], text[PLAN_TEXT_BYTES];
	snprintf(seen, sizeof seen, "%s", state_of(o));
	json_t *move = json_object_get(o, "migrating");
	const char *where = json_string_value(json_object_get(move, "destination"));
	bool moving = json_is_object(move);
	if (moving && where)
		snprintf(destination, HOST_NAME_MAX_CHARS + 1, "%s", where);
	json_decref(o);
	if (!strcmp(seen, "in-doubt"))
		return over(RUN_IN_DOUBT, state, reason, "it is in doubt: see snmigrate status");
	if (moving)
		return VM_TO_WATCH;
	if (runs(seen))
		return VM_TO_BEGIN;
	snprintf(text, sizeof text, "it is %s: only a running or paused VM is moved away", seen);
	return over(RUN_OFF, state, reason, text);
}

enum vm_verdict survey_judge(struct daemon *d, const char *uuid, uint64_t *epoch, enum run_state *state,
			     char reason[PLAN_TEXT_BYTES], char destination[HOST_NAME_MAX_CHARS + 1])
{
	struct vm_ref vm;
	struct error err = ERROR_INIT;
	char text[PLAN_TEXT_BYTES];
	*epoch = 0;
	int rc = vm_find(d, uuid, &vm, &err);
	if (rc == -ENOENT)
		return judge_gone(d, uuid, state, reason, destination);
	if (rc < 0)
		return over(RUN_STAYS, state, reason, err.message);
	switch (vm.rec.state) {
	case HANDOVER_ABANDONED:
		return judge_gone(d, uuid, state, reason, destination);
	case HANDOVER_MOVED:
	case HANDOVER_HANDING_OVER:
		*epoch = vm.rec.epoch;
		snprintf(destination, HOST_NAME_MAX_CHARS + 1, "%s", vm.rec.peer);
		return VM_TO_WATCH;
	case HANDOVER_PREPARED:
		snprintf(text, sizeof text,
			 "it is arriving from host %s (to end that: snmigrate cancel %s, there)", vm.rec.peer,
			 vm.rec.name);
		return over(RUN_STAYS, state, reason, text);
	default:
		return judge_owner(d, &vm, state, reason, destination);
	}
}

/* ---- asking ---- */

/* What a guest dirties, looked at for a second. */
struct sample {
	char dir[REGISTRY_PATH_BYTES];
	pthread_t thread;
	bool begun, known;
	uint64_t bytes_per_s, set_bytes;
};

struct asking {
	struct daemon *daemon;
	const struct survey *survey;
	struct plan *plan;
	struct sample *samples;	      /* one a VM */
	struct check_facts *measured; /* a host's: link and disk */
	struct check_facts facts;     /* of the pair */
};

static void begin_facts(struct asking *a)
{
	memset(&a->facts, 0, sizeof a->facts);
	a->facts.backing_chosen = a->survey->backing_chosen;
}

/* What is wanting so that it could go anywhere; fills what the definition says. */
static void look_at_vm(struct asking *a, const char *uuid, struct plan_vm *vm, struct vm_ref *ref)
{
	struct error err = ERROR_INIT;
	CLEANUP_FREE struct vm_definition *def = malloc(sizeof *def);
	snprintf(vm->uuid, sizeof vm->uuid, "%s", uuid);
	snprintf(vm->name, sizeof vm->name, "%s", uuid);
	if (vm_find(a->daemon, uuid, ref, &err) < 0) {
		snprintf(vm->why_not, sizeof vm->why_not, "%s", err.message);
		return;
	}
	snprintf(vm->name, sizeof vm->name, "%s", ref->rec.name);
	CLEANUP_FD int dirfd = fs_open_dir(ref->dir, &err);
	if (!def || dirfd < 0 || registry_load_definition(dirfd, ref->dir, def, &err) < 0) {
		snprintf(vm->why_not, sizeof vm->why_not, "%s", err.message);
		return;
	}
	vm->priority = def->priority;
	vm->memory_bytes = def->memory_bytes;
	if (def->ndisks && !a->survey->with_storage)
		snprintf(vm->why_not, sizeof vm->why_not, "has local disks: --with-storage is needed");
}

/* The first answer of a host counts for all VMs: later ones would see what is on its way already. */
static void take_host(struct plan_host *h, const struct check_facts *f, struct check_facts *measured)
{
	uint64_t memory = f->theirs.memory_available_bytes, disk = f->disk_free_bytes;
	h->memory_bytes = memory > HOST_RESERVE_BYTES ? memory - HOST_RESERVE_BYTES : 0;
	h->disk_bytes = disk > HOST_RESERVE_BYTES ? disk - HOST_RESERVE_BYTES : 0;
	h->link_bytes_per_s = f->link_bytes_per_s;
	*measured = (struct check_facts){.live = true,
					 .answered = true,
					 .link_bytes_per_s = f->link_bytes_per_s,
					 .round_trip_us = f->round_trip_us,
					 .dial_us = f->dial_us,
					 .disk_read_bytes_per_s = f->disk_read_bytes_per_s,
					 .disk_write_bytes_per_s = f->disk_write_bytes_per_s,
					 .disk_sync_us = f->disk_sync_us};
}

static void take_vm(struct plan_vm *vm, const struct check_facts *f)
{
	vm->memory_bytes = f->memory_bytes;
	vm->disk_bytes = 0;
	for (unsigned i = 0; i < f->ndisks; i++)
		vm->disk_bytes += f->disks[i].allocated_bytes;
	vm->travels_bytes = vm->disk_bytes + f->populated_bytes;
}

/* The lines of a check that would end a move. */
static void take_failures(struct plan_pair *pair, const struct check_facts *f)
{
	CLEANUP_FREE struct check_line *lines = calloc(CHECK_LINES_MAX, sizeof *lines);
	unsigned n = lines ? check_judge(f, lines) : 0;
	size_t at = 0;
	for (unsigned i = 0; i < n && at < sizeof pair->why_not - 1; i++) {
		if (lines[i].grade != CHECK_FAILURE)
			continue;
		int put = snprintf(pair->why_not + at, sizeof pair->why_not - at, "%s%s", at ? "; " : "",
				   lines[i].text);
		at += put > 0 ? (size_t)put : 0;
	}
}

static void *take_sample(void *arg)
{
	struct sample *s = arg;
	struct vm_ref vm = {0};
	snprintf(vm.dir, sizeof vm.dir, "%s", s->dir);
	s->known = check_measure_dirty(&vm, &s->bytes_per_s, &s->set_bytes);
	return NULL;
}

/* All at once: a host with many VMs is not looked at for minutes. One that does not run has nothing to tell.
 */
static void sample_all(struct asking *a, const struct vm_ref *refs)
{
	for (size_t v = 0; v < a->plan->nvms; v++) {
		struct sample *s = &a->samples[v];
		if (*a->plan->vms[v].why_not || !keeper_is_live(refs[v].keeper))
			continue;
		snprintf(s->dir, sizeof s->dir, "%s", refs[v].dir);
		s->begun = pthread_create(&s->thread, NULL, take_sample, s) == 0;
	}
	for (size_t v = 0; v < a->plan->nvms; v++)
		if (a->samples[v].begun)
			pthread_join(a->samples[v].thread, NULL);
}

static void ask_pair(struct asking *a, struct vm_ref *ref, size_t v, size_t h)
{
	struct plan_host *host = &a->plan->hosts[h];
	struct plan_vm *vm = &a->plan->vms[v];
	struct plan_pair *pair = plan_pair(a->plan, v, h);
	struct check_facts *f = &a->facts, *measured = &a->measured[h];
	if (*host->why_not)
		return;
	begin_facts(a);
	check_collect(a->daemon, ref, host->name, measured->answered ? 0 : CHECK_MEASURE_HOST, f);
	if (*f->not_movable) {
		snprintf(vm->why_not, sizeof vm->why_not, "%s", f->not_movable);
	} else if (!f->live) {
		/* One that is off has a command of its own, and nothing is lost by the host's reboot. */
		snprintf(vm->why_not, sizeof vm->why_not,
			 "it is %s: only a running or paused VM is moved away",
			 *f->state ? f->state : "not running");
	} else if (!f->answered) {
		snprintf(host->why_not, sizeof host->why_not, "%s", f->no_answer);
	} else {
		if (!measured->answered)
			take_host(host, f, measured);
		f->link_bytes_per_s = measured->link_bytes_per_s;
		f->round_trip_us = measured->round_trip_us;
		f->dial_us = measured->dial_us;
		f->disk_read_bytes_per_s = measured->disk_read_bytes_per_s;
		f->disk_write_bytes_per_s = measured->disk_write_bytes_per_s;
		f->disk_sync_us = measured->disk_sync_us;
		a->plan->cpus = f->own.cpus;
		take_vm(vm, f);
		take_failures(pair, f);
		if (a->samples[v].known) {
			f->dirty_known = f->dirty_now = true;
			f->dirty_bytes_per_s = a->samples[v].bytes_per_s;
			f->dirty_set_bytes = a->samples[v].set_bytes;
		}
		struct check_prediction ahead;
		check_predict(f, &ahead);
		double factor = run_learned_factor(a->daemon, vm->uuid, host->name, f);
		pair->alone_ms = (uint64_t)((double)ahead.total_ms * factor);
		pair->fixed_ms = (uint64_t)((double)ahead.fixed_ms * factor);
	}
	check_facts_free(f);
}

static void ask_all(struct asking *a, struct vm_ref *refs)
{
	size_t v, h;
	json_t *uuid, *name;
	json_array_foreach(a->survey->hosts, h, name) snprintf(
		a->plan->hosts[h].name, sizeof a->plan->hosts[h].name, "%s", json_string_value(name));
	json_array_foreach(a->survey->uuids, v, uuid)
		look_at_vm(a, json_string_value(uuid), &a->plan->vms[v], &refs[v]);
	sample_all(a, refs);
	for (v = 0; v < a->plan->nvms; v++)
		for (h = 0; h < a->plan->nhosts && !*a->plan->vms[v].why_not; h++)
			ask_pair(a, &refs[v], v, h);
}

int survey_plan(struct daemon *d, const struct survey *s, struct plan *p, struct error *err)
{
	int rc = plan_init(p, json_array_size(s->uuids), json_array_size(s->hosts), err);
	if (rc < 0)
		return rc;
	struct asking *a = calloc(1, sizeof *a);
	struct check_facts *measured = calloc(p->nhosts + 1, sizeof *measured);
	struct sample *samples = calloc(p->nvms + 1, sizeof *samples);
	struct vm_ref *refs = calloc(p->nvms + 1, sizeof *refs);
	if (a && measured && samples && refs) {
		*a = (struct asking){
			.daemon = d, .survey = s, .plan = p, .samples = samples, .measured = measured};
		ask_all(a, refs);
		plan_make(p);
	} else {
		plan_free(p);
		rc = error_errno(err, ENOMEM, "plan");
	}
	free(refs);
	free(samples);
	free(measured);
	free(a);
	return rc;
}
