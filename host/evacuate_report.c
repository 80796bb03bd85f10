/* SPDX-License-Identifier: Apache-2.0 */
/* How a plan looks to whoever follows it, and how it ended. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/cleanup.h"
#include "host/daemon.h"
#include "host/evacuate.h"
#include "host/exit.h"

static const char *const kinds[] = {[RUN_EVACUATION] = "evacuation", [RUN_RETURN] = "return"};
static const char *const states[] = {[RUN_WAITING] = "waiting",	    [RUN_MOVING] = "moving",
				     [RUN_MOVED] = "moved",	    [RUN_OFF] = "off",
				     [RUN_STAYS] = "stays",	    [RUN_FAILED] = "failed",
				     [RUN_CANCELLED] = "cancelled", [RUN_IN_DOUBT] = "in-doubt",
				     [RUN_CRASHED] = "crashed"};

const char *run_kind_name(enum run_kind kind)
{
	return kinds[kind];
}

const char *run_state_name(enum run_state state)
{
	return states[state];
}

int run_state_parse(const char *name, enum run_state *out)
{
	for (unsigned i = 0; i < ARRAY_SIZE(states); i++) {
		if (strcmp(name, states[i]))
			continue;
		*out = (enum run_state)i;
		return 0;
	}
	return -EINVAL;
}

bool run_state_is_final(enum run_state state)
{
	return state != RUN_WAITING && state != RUN_MOVING;
}

static json_t *known(bool is, uint64_t n)
{
	return is ? json_integer((json_int_t)n) : json_null();
}

json_t *run_vm_to_json(const struct run *run, const struct run_vm *vm)
{
	bool moving = vm->state == RUN_MOVING;
	return json_pack(
		"{s:s, s:s, s:s, s:s, s:o, s:b, s:i, s:i, s:i, s:o, s:o, s:o, s:o, s:s, s:o}", "vm", vm->name,
		"uuid", vm->uuid, "destination", vm->destination, "state", run_state_name(vm->state),
		"reason", jsonl_text(vm->reason), "late", vm->late, "priority", (int)vm->priority, "attempts",
		(int)vm->attempts, "exit", vm->exit, "predicted_begin_ms",
		known(vm->timed, vm->predicted_begin_ms), "predicted_end_ms",
		known(vm->timed, vm->predicted_end_ms), "begin_ms",
		known(vm->begun_ms >= run->begun_ms && vm->begun_ms, vm->begun_ms - run->begun_ms), "end_ms",
		known(vm->ended_ms >= run->begun_ms && vm->ended_ms, vm->ended_ms - run->begun_ms), "phase",
		moving ? vm->phase : "", "percent", moving ? json_real(vm->percent) : json_null());
}

json_t *run_to_json(const struct daemon *d, const struct run *run)
{
	json_t *vms = json_array();
	bool over = run->ended_ms != 0;
	for (size_t i = 0; i < run->nvms; i++)
		json_array_append_new(vms, run_vm_to_json(run, &run->vms[i]));
	return json_pack("{s:I, s:s, s:s, s:s, s:i, s:s, s:I, s:o, s:I, s:o, s:b, s:s, s:o, s:o, s:o, s:o}",
			 "id", (json_int_t)run->id, "kind", run_kind_name(run->kind), "host", d->cfg->name,
			 "peer", run->peer, "parallel", (int)run->parallel, "order",
			 plan_order_name(run->order), "deadline_ms", (json_int_t)run->deadline_ms,
			 "predicted_ms", known(run->predicted_ms != 0, run->predicted_ms), "begun_ms",
			 (json_int_t)run->begun_ms, "total_ms",
			 known(over && run->ended_ms >= run->begun_ms, run->ended_ms - run->begun_ms),
			 "cancelled", run->cancelled, "result", over ? run->result : "", "exit",
			 over ? json_integer(run->exit) : json_null(), "reason", jsonl_text(run->reason),
			 "warning", *run->unwritten ? jsonl_text(run->unwritten) : json_null(), "vms", vms);
}

static unsigned count(const struct run *run, enum run_state state)
{
	unsigned n = 0;
	for (size_t i = 0; i < run->nvms; i++)
		n += run->vms[i].state == state;
	return n;
}

json_t *run_summary(const struct run *run)
{
	return json_pack("{s:s, s:i, s:i, s:i, s:i}", "kind", run_kind_name(run->kind), "vms", (int)run->nvms,
			 "moved", (int)count(run, RUN_MOVED), "moving", (int)count(run, RUN_MOVING),
			 "waiting", (int)count(run, RUN_WAITING));
}

static void conclude(struct run *run, const char *result, int exit_status)
{
	snprintf(run->result, sizeof run->result, "%s", result);
	run->exit = exit_status;
}

void run_conclude(struct run *run, unsigned others)
{
	unsigned moved = count(run, RUN_MOVED), off = count(run, RUN_OFF), doubt = count(run, RUN_IN_DOUBT),
		 crashed = count(run, RUN_CRASHED), uncleaned = 0;
	unsigned stay = count(run, RUN_STAYS) + count(run, RUN_FAILED) + count(run, RUN_CANCELLED);
	for (size_t i = 0; i < run->nvms; i++)
		uncleaned += run->vms[i].state == RUN_MOVED && run->vms[i].exit == EXIT_NOT_CLEANED;
	/* what became of VMs nobody planned for matters to whoever wants the host empty */
	if (run->kind == RUN_RETURN)
		others = 0;
	if (crashed)
		conclude(run, "crashed", EXIT_CRASHED);
	else if (doubt)
		conclude(run, "in-doubt", EXIT_IN_DOUBT);
	else if (run->cancelled && stay)
		conclude(run, "cancelled", EXIT_CANCELLED);
	else if (stay || others)
		conclude(run, "incomplete", EXIT_FAILED);
	else
		conclude(run, "moved", uncleaned ? EXIT_NOT_CLEANED : EXIT_MOVED);
	int at = snprintf(run->reason, sizeof run->reason, "%u moved, %u stay", moved, stay);
	const struct {
		unsigned n;
		const char *what;
	} more[] = {{off, "not running"},
		    {doubt, "in doubt"},
		    {crashed, "crashed"},
		    {uncleaned, "of those moved not cleaned up here"},
		    {others, "started or arrived here meanwhile"}};
	for (size_t i = 0; i < ARRAY_SIZE(more); i++)
		if (more[i].n)
			at += snprintf(run->reason + at, sizeof run->reason - (size_t)at, ", %u %s",
				       more[i].n, more[i].what);
}
