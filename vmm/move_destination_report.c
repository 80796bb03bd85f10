/* SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "host/exit.h"
#include "vmm/move_destination.h"

/* No figure of a move is larger: milliseconds of 30000 years, bytes of a thousand disks. */
#define FIGURE_MAX 1e15

const char *arrival_stage_name(struct arrival *a)
{
	static const char *const names[] = {[ARRIVAL_OPENED] = "connect",
					    [ARRIVAL_STORAGE] = "storage",
					    [ARRIVAL_MEMORY] = "memory",
					    [ARRIVAL_PREPARED] = "handover",
					    [ARRIVAL_LOADED] = "handover"};
	if (__atomic_load_n(&a->owner, __ATOMIC_RELAXED) && arrival_is_paging(a))
		return "postcopy";
	return names[__atomic_load_n(&a->stage, __ATOMIC_RELAXED)];
}

/* The peer's word, so only numbers that can be, and only those that we know. */
static void add_figures(json_t *line, const json_t *figures)
{
	static const char *const known[] = {
		"total_ms",	"storage_ms",	   "memory_ms",	      "downtime_ms",
		"memory_bytes", "unchanged_bytes", "disk_bytes",      "mirrored_bytes",
		"wire_bytes",	"rounds",	   "attempts",	      "dirty_bytes_per_s",
		"delta_pages",	"delta_bytes",	   "populated_bytes", "disk_count"};
	for (size_t i = 0; i < ARRAY_SIZE(known); i++) {
		json_t *v = json_object_get(figures, known[i]);
		if (json_is_number(v) && json_number_value(v) >= 0 && json_number_value(v) <= FIGURE_MAX)
			json_object_set(line, known[i], v);
	}
}

/* What came after the guest, which the source's figures at MOVED do not have yet. */
static void add_postcopy(struct arrival *a, json_t *line)
{
	struct mem_postcopy_stats st;
	if (!arrival_postcopy_stats(a, &st) || !st.total_pages)
		return;
	json_int_t before = json_integer_value(json_object_get(line, "memory_bytes"));
	json_int_t bytes = (json_int_t)((st.total_pages - st.missing_pages) * MEM_PAGE_BYTES);
	json_object_set_new(line, "memory_bytes", json_integer(before + bytes));
	json_object_set_new(line, "total_ms", json_integer((json_int_t)(clock_now_ms() - a->begun_ms)));
	json_object_set_new(line, "postcopy",
			    json_pack("{s:I, s:I, s:I, s:I, s:I, s:i}", "pages", (json_int_t)st.total_pages,
				      "remaining_bytes", (json_int_t)(st.missing_pages * MEM_PAGE_BYTES),
				      "faults", (json_int_t)st.faults, "fault_median_us",
				      (json_int_t)st.fault_median_us, "fault_worst_us",
				      (json_int_t)st.fault_worst_us, "sessions", (int)st.sessions));
}

/* NULL before the daemon admitted it: until then the UUID may be that of any VM. */
static json_t *make_line(struct arrival *a, const char *result, int exit_status, const char *reason,
			 const char *phase, const json_t *figures)
{
	const struct vm_definition *def = &a->vm->def;
	if (!a->admitted)
		return NULL;
	json_t *line =
		json_pack("{s:s, s:s, s:i, s:o, s:s, s:s, s:s, s:I, s:s, s:I}", "event", "end", "result",
			  result, "exit", exit_status, "reason", jsonl_text(reason), "vm", def->name, "uuid",
			  def->uuid, "source", a->peer, "epoch", (json_int_t)a->epoch, "phase", phase,
			  "total_ms", (json_int_t)(clock_now_ms() - a->begun_ms));
	if (line && a->purpose != MOVE_BY_ITSELF)
		json_object_set_new(line, "purpose", json_string(move_purpose_name(a->purpose)));
	if (line)
		add_figures(line, figures);
	return line;
}

static void store_line(struct arrival *a, json_t *line)
{
	struct error err = ERROR_INIT;
	if (line && registry_arrival_store(a->vm->cfg, a->vm->def.uuid, line, &err))
		log_warn("%s", err.message);
	json_decref(line);
}

void arrival_note_end(struct arrival *a, const char *result, int exit_status, const char *reason,
		      const json_t *figures)
{
	store_line(a, make_line(a, result, exit_status, reason, arrival_stage_name(a), figures));
}

void arrival_note_owned(struct arrival *a, const json_t *figures)
{
	SCOPE_LOCK(&a->note_lock);
	if (figures) {
		json_decref(a->figures);
		a->figures = json_deep_copy(figures);
	}
	char why[HOST_NAME_MAX_CHARS + 80];
	snprintf(why, sizeof why, "it ended before the last of its memory had come from %s", a->peer);
	bool paging = arrival_is_paging(a);
	json_t *line = paging ? make_line(a, "crashed", EXIT_CRASHED, why, "postcopy", a->figures)
			      : make_line(a, "moved", EXIT_MOVED, "", "cleanup", a->figures);
	if (line && paging)
		json_object_set_new(line, "provisional", json_true());
	if (line)
		add_postcopy(a, line);
	store_line(a, line);
}

json_t *move_arrival_describe(struct vm *vm)
{
	struct arrival *a = vm->arrival;
	bool paging = a && vm->state != VM_INCOMING && arrival_is_paging(a);
	if (!a || (vm->state != VM_INCOMING && !paging))
		return json_null();
	return json_pack("{s:s, s:I, s:s, s:I}", "source", a->peer, "epoch", (json_int_t)a->epoch, "phase",
			 arrival_stage_name(a), "elapsed_ms", (json_int_t)(clock_now_ms() - a->begun_ms));
}
