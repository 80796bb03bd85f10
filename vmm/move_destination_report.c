/* SPDX-License-Identifier: Apache-2.0 */
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
	return names[__atomic_load_n(&a->stage, __ATOMIC_RELAXED)];
}

/* The peer's word, so only numbers that can be, and only those that we know. */
static void add_figures(json_t *line, const json_t *figures)
{
	static const char *const known[] = {
		"total_ms",	   "storage_ms",	"memory_ms",	  "downtime_ms", "memory_bytes",
		"unchanged_bytes", "disk_bytes",	"mirrored_bytes", "wire_bytes",	 "rounds",
		"attempts",	   "dirty_bytes_per_s", "delta_pages",	  "delta_bytes"};
	for (size_t i = 0; i < ARRAY_SIZE(known); i++) {
		json_t *v = json_object_get(figures, known[i]);
		if (json_is_number(v) && json_number_value(v) >= 0 && json_number_value(v) <= FIGURE_MAX)
			json_object_set(line, known[i], v);
	}
}

void arrival_note_end(struct arrival *a, const char *result, int exit_status, const char *reason,
		      const json_t *figures)
{
	const struct vm_definition *def = &a->vm->def;
	/* before the daemon admitted it, the UUID may be that of any VM */
	if (!a->admitted)
		return;
	json_t *line =
		json_pack("{s:s, s:s, s:i, s:o, s:s, s:s, s:s, s:I, s:s, s:I}", "event", "end", "result",
			  result, "exit", exit_status, "reason", jsonl_text(reason), "vm", def->name, "uuid",
			  def->uuid, "source", a->peer, "epoch", (json_int_t)a->epoch, "phase",
			  exit_status == EXIT_MOVED ? "cleanup" : arrival_stage_name(a), "total_ms",
			  (json_int_t)(clock_now_ms() - a->begun_ms));
	struct error err = ERROR_INIT;
	if (line && a->purpose != MOVE_BY_ITSELF)
		json_object_set_new(line, "purpose", json_string(move_purpose_name(a->purpose)));
	if (line)
		add_figures(line, figures);
	if (line && registry_arrival_store(a->vm->cfg, def->uuid, line, &err))
		log_warn("%s", err.message);
	json_decref(line);
}

json_t *move_arrival_describe(struct vm *vm)
{
	struct arrival *a = vm->arrival;
	if (!a || vm->state != VM_INCOMING)
		return json_null();
	return json_pack("{s:s, s:I, s:s, s:I}", "source", a->peer, "epoch", (json_int_t)a->epoch, "phase",
			 arrival_stage_name(a), "elapsed_ms", (json_int_t)(clock_now_ms() - a->begun_ms));
}
