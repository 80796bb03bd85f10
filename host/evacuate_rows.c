/* SPDX-License-Identifier: Apache-2.0 */
/* Plans in the journal: written, read again, and what earlier moves teach. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "host/check.h"
#include "host/daemon.h"
#include "host/evacuate.h"
#include "host/journal.h"
#include "host/recorder.h"

#define STORE_TIMEOUT_MS 3000
#define PLANS_KEPT	 100
#define LEARN_FROM	 16 /* moves, the latest */
#define LEARN_FROM_OWN	 3  /* of the VM itself */
#define FACTOR_MIN	 0.2
#define FACTOR_MAX	 20.0

struct run *run_new(size_t nvms)
{
	struct run *run = calloc(1, sizeof *run);
	struct run_vm *vms = calloc(nvms + 1, sizeof *vms);
	if (!run || !vms) {
		free(run);
		free(vms);
		return NULL;
	}
	run->vms = vms;
	run->nvms = nvms;
	run->users = 1;
	return run;
}

/* ---- writing ---- */

static json_t *number_or_null(bool known, uint64_t n)
{
	return known ? json_integer((json_int_t)n) : json_null();
}

static struct journal_statement plan_row(const struct run *run)
{
	json_t *options = json_pack(
		"{s:O, s:i, s:s, s:b, s:s, s:I, s:I}", "to", run->to, "parallel", (int)run->parallel, "order",
		plan_order_name(run->order), "with_storage", run->with_storage, "backing", run->backing,
		"deadline_ms", (json_int_t)run->deadline_ms, "predicted_ms", (json_int_t)run->predicted_ms);
	return (struct journal_statement){
		.sql = "INSERT OR REPLACE INTO plan (id, kind, peer, options, cancelled, begun_ms, ended_ms, "
		       "result, exit, "
		       "reason) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
		.params = json_pack(
			"[I, s, s, o, b, I, o, o, o, o]", (json_int_t)run->id, run_kind_name(run->kind),
			run->peer, options, run->cancelled, (json_int_t)run->begun_ms,
			number_or_null(run->ended_ms != 0, run->ended_ms),
			run->ended_ms ? json_string(run->result) : json_null(),
			run->ended_ms ? json_integer(run->exit) : json_null(), jsonl_text(run->reason))};
}

static struct journal_statement vm_row(const struct run *run, const struct run_vm *vm)
{
	return (struct journal_statement){
		.sql = "INSERT OR REPLACE INTO plan_vm (plan, turn, uuid, name, priority, destination, "
		       "tried, state, attempts, exit, "
		       "reason, predicted_begin_ms, predicted_end_ms, begun_ms, ended_ms) VALUES (?1, ?2, "
		       "?3, ?4, ?5, ?6, ?7, ?8, "
		       "?9, ?10, ?11, ?12, ?13, ?14, ?15)",
		.params = json_pack("[I, I, s, s, i, s, s, s, i, i, o, o, o, o, o]", (json_int_t)run->id,
				    (json_int_t)(vm - run->vms), vm->uuid, vm->name, (int)vm->priority,
				    vm->destination, vm->tried, run_state_name(vm->state), (int)vm->attempts,
				    vm->exit, jsonl_text(vm->reason),
				    number_or_null(vm->timed, vm->predicted_begin_ms),
				    number_or_null(vm->timed, vm->predicted_end_ms),
				    number_or_null(vm->begun_ms != 0, vm->begun_ms),
				    number_or_null(vm->ended_ms != 0, vm->ended_ms))};
}

static const char prune_vms[] =
	"DELETE FROM plan_vm WHERE plan NOT IN (SELECT id FROM plan ORDER BY id DESC LIMIT ?1)";
static const char prune_plans[] =
	"DELETE FROM plan WHERE id NOT IN (SELECT id FROM plan ORDER BY id DESC LIMIT ?1)";

int run_store(struct daemon *d, struct run *run, const struct run_vm *vm, bool wait, struct error *err)
{
	size_t n = 0;
	CLEANUP_FREE struct journal_statement *s = calloc(run->nvms + 3, sizeof *s);
	if (!s)
		return error_errno(err, ENOMEM, "plan");
	s[n++] = plan_row(run);
	for (size_t i = 0; i < run->nvms; i++)
		if (!vm || vm == &run->vms[i])
			s[n++] = vm_row(run, &run->vms[i]);
	if (!vm) {
		s[n++] = (struct journal_statement){prune_vms, json_pack("[i]", PLANS_KEPT)};
		s[n++] = (struct journal_statement){prune_plans, json_pack("[i]", PLANS_KEPT)};
	}
	return journal_write(recorder_journal(d), s, (unsigned)n, wait ? JOURNAL_WAIT : JOURNAL_DURABLE,
			     STORE_TIMEOUT_MS, err);
}

/* ---- reading ---- */

static const char *text(const json_t *o, const char *key)
{
	const char *s = json_string_value(json_object_get(o, key));
	return s ? s : "";
}

static uint64_t number(const json_t *o, const char *key)
{
	json_int_t n = json_integer_value(json_object_get(o, key));
	return n > 0 ? (uint64_t)n : 0;
}

static void read_vm(struct run_vm *vm, const json_t *row)
{
	snprintf(vm->uuid, sizeof vm->uuid, "%s", text(row, "uuid"));
	snprintf(vm->name, sizeof vm->name, "%s", text(row, "name"));
	snprintf(vm->destination, sizeof vm->destination, "%s", text(row, "destination"));
	snprintf(vm->tried, sizeof vm->tried, "%s", text(row, "tried"));
	snprintf(vm->reason, sizeof vm->reason, "%s", text(row, "reason"));
	vm->priority = (unsigned)number(row, "priority");
	vm->attempts = (unsigned)number(row, "attempts");
	vm->exit = (int)number(row, "exit");
	vm->timed = json_is_integer(json_object_get(row, "predicted_end_ms"));
	vm->predicted_begin_ms = number(row, "predicted_begin_ms");
	vm->predicted_end_ms = number(row, "predicted_end_ms");
	vm->begun_ms = number(row, "begun_ms");
	vm->ended_ms = number(row, "ended_ms");
	/* an unknown one of a newer program: looked at again */
	if (run_state_parse(text(row, "state"), &vm->state) < 0)
		vm->state = RUN_WAITING;
}

static int read_run(const json_t *row, const json_t *vms, struct run **out, struct error *err)
{
	json_t *options = json_loads(text(row, "options"), 0, NULL), *vm;
	struct run *run = run_new(json_array_size(vms));
	if (!run || !json_is_object(options)) {
		json_decref(options);
		if (run)
			run_release(run);
		return error_set(err, EUCLEAN, "a plan in the journal cannot be read");
	}
	run->id = json_integer_value(json_object_get(row, "id"));
	run->kind = strcmp(text(row, "kind"), run_kind_name(RUN_RETURN)) ? RUN_EVACUATION : RUN_RETURN;
	snprintf(run->peer, sizeof run->peer, "%s", text(row, "peer"));
	run->to = json_incref(json_object_get(options, "to"));
	run->parallel = (unsigned)number(options, "parallel");
	if (!run->parallel)
		run->parallel = 1;
	if (!json_is_array(run->to)) {
		json_decref(run->to);
		run->to = json_array();
	}
	plan_order_parse(text(options, "order"), &run->order);
	run->with_storage = json_is_true(json_object_get(options, "with_storage"));
	snprintf(run->backing, sizeof run->backing, "%s", text(options, "backing"));
	run->deadline_ms = number(options, "deadline_ms");
	run->predicted_ms = number(options, "predicted_ms");
	run->cancelled = number(row, "cancelled") != 0;
	run->begun_ms = number(row, "begun_ms");
	run->ended_ms = number(row, "ended_ms");
	snprintf(run->result, sizeof run->result, "%s", text(row, "result"));
	run->exit = (int)number(row, "exit");
	snprintf(run->reason, sizeof run->reason, "%s", text(row, "reason"));
	size_t i;
	json_array_foreach(vms, i, vm) read_vm(&run->vms[i], vm);
	json_decref(options);
	*out = run;
	return 0;
}

static int load(struct daemon *d, const char *sql, struct run **out, struct error *err)
{
	struct journal_statement q = {.sql = sql};
	json_t *rows = NULL, *vms = NULL;
	*out = NULL;
	journal_flush(recorder_journal(d), STORE_TIMEOUT_MS, NULL);
	int rc = journal_query(recorder_journal(d), &q, 1, &rows, err);
	if (!rc && json_array_size(rows)) {
		q = (struct journal_statement){
			.sql = "SELECT * FROM plan_vm WHERE plan = ?1 ORDER BY turn",
			.params = json_pack("[O]", json_object_get(json_array_get(rows, 0), "id"))};
		rc = journal_query(recorder_journal(d), &q, PLAN_VMS_MAX, &vms, err);
		if (!rc)
			rc = read_run(json_array_get(rows, 0), vms, out, err);
	}
	json_decref(rows);
	json_decref(vms);
	return rc;
}

int run_load_open(struct daemon *d, struct run **out, struct error *err)
{
	return load(d, "SELECT * FROM plan WHERE ended_ms IS NULL ORDER BY id DESC LIMIT 1", out, err);
}

int run_load_last(struct daemon *d, struct run **out, struct error *err)
{
	return load(d, "SELECT * FROM plan WHERE ended_ms IS NOT NULL ORDER BY id DESC LIMIT 1", out, err);
}

int run_came_from(struct daemon *d, const char *host, json_t **uuids, struct error *err)
{
	struct journal_statement q = {/* with max(), SQLite takes the other columns of the row that has it */
				      .sql = "SELECT uuid FROM (SELECT uuid, peer, purpose, max(begun_ms) "
					     "FROM (SELECT uuid, peer, begun_ms, "
					     "coalesce(json_extract(details, '$.purpose'), '') AS purpose "
					     "FROM move WHERE direction = 'in' AND "
					     "result = 'moved') WHERE purpose <> ?2 GROUP BY uuid) WHERE "
					     "peer = ?1 AND purpose = ?3",
				      .params = json_pack("[s, s, s]", host, move_purpose_name(MOVE_RETURN),
							  move_purpose_name(MOVE_EVACUATION))};
	json_t *rows = NULL, *row;
	size_t i;
	journal_flush(recorder_journal(d), STORE_TIMEOUT_MS, NULL);
	int rc = journal_query(recorder_journal(d), &q, PLAN_VMS_MAX, &rows, err);
	*uuids = json_array();
	json_array_foreach(rows, i, row) if (vm_uuid_valid(text(row, "uuid")))
		json_array_append_new(*uuids, json_string(text(row, "uuid")));
	json_decref(rows);
	return rc;
}

/* ---- what earlier moves teach ---- */

/* How much longer it took than such a move is said to take now, beside what ran beside it. vm: what is known
 * of the VM in question, and measured; own: the row is of that. */
static double factor_of(const json_t *row, const struct check_facts *vm, bool own)
{
	struct check_prediction ahead;
	CLEANUP_FREE struct check_facts *f = malloc(sizeof *f);
	double took = json_number_value(json_object_get(row, "total_ms"));
	double others = json_number_value(json_object_get(row, "others"));
	uint64_t copied = number(row, "disk_bytes"), mirrored = number(row, "mirrored_bytes");
	uint64_t populated = number(row, "populated_bytes");
	if (!f || took <= 0)
		return 0;
	*f = *vm;
	f->ndisks = (unsigned)number(row, "disks");
	f->ndisks = f->ndisks > VM_DISKS_MAX ? VM_DISKS_MAX : f->ndisks;
	for (unsigned i = 0; i < f->ndisks; i++)
		f->disks[i].allocated_bytes = 0;
	/* what there was to copy, not what the guest wrote and dirtied meanwhile: that much is known ahead */
	if (f->ndisks)
		f->disks[0].allocated_bytes = copied > mirrored ? copied - mirrored : 0;
	f->populated_bytes = populated ? populated : number(row, "memory_bytes");
	if (!own) {
		f->dirty_known = true;
		f->dirty_bytes_per_s = number(row, "dirty_bytes_per_s");
	}
	check_predict(f, &ahead);
	double fixed = (double)ahead.fixed_ms, shared = (double)ahead.total_ms - fixed;
	/* as the plan sees it: the link is shared, and processors where they are fewer than moves */
	double crowd = f->own.cpus ? (1 + others) / f->own.cpus : 1;
	crowd = crowd > 1 ? crowd : 1;
	return ahead.total_ms ? took / (fixed * crowd + shared * (1 + others)) : 0;
}

static int compare(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return x < y ? -1 : x > y;
}

double run_factor_from(const json_t *rows, const char *uuid, const struct check_facts *vm)
{
	double factors[LEARN_FROM];
	size_t n = 0, own = 0, i;
	const json_t *row;
	json_array_foreach(rows, i, row)
	{
		bool is_own = !strcmp(text(row, "uuid"), uuid);
		double factor = factor_of(row, vm, is_own);
		if (factor <= 0)
			continue;
		/* its own come first, and are enough */
		if (n == LEARN_FROM || (own && (!is_own || own == LEARN_FROM_OWN)))
			break;
		own += is_own;
		factors[n++] = factor;
	}
	if (!n)
		return 1;
	qsort(factors, n, sizeof *factors, compare);
	double factor = n % 2 ? factors[n / 2] : (factors[n / 2 - 1] + factors[n / 2]) / 2;
	return factor < FACTOR_MIN ? FACTOR_MIN : factor > FACTOR_MAX ? FACTOR_MAX : factor;
}

int run_earlier_moves(struct journal *j, const char *uuid, const char *peer, json_t **rows, struct error *err)
{
	struct journal_statement q = {
		.sql = "SELECT uuid, json_extract(details, '$.total_ms') AS total_ms, "
		       "json_extract(details, '$.disk_bytes') AS disk_bytes, "
		       "json_extract(details, '$.mirrored_bytes') AS mirrored_bytes, "
		       "json_extract(details, '$.memory_bytes') AS memory_bytes, "
		       "json_extract(details, '$.populated_bytes') AS populated_bytes, "
		       "json_extract(details, '$.dirty_bytes_per_s') AS dirty_bytes_per_s, "
		       "coalesce(json_extract(details, '$.disk_count'), 1) AS disks, "
		       "(SELECT coalesce(sum(min(o.ended_ms, m.ended_ms) - max(o.begun_ms, m.begun_ms)), 0) "
		       "FROM move o WHERE o.id <> m.id AND o.begun_ms < m.ended_ms AND o.ended_ms > "
		       "m.begun_ms) "
		       "* 1.0 / max(m.ended_ms - m.begun_ms, 1) AS others "
		       /* what ran beside an arrival that was part of a plan, only its source knows */
		       "FROM move m WHERE result IN ('moved', 'rehearsed') AND ended_ms IS NOT NULL "
		       "AND (direction = 'out' OR json_extract(details, '$.purpose') IS NULL) "
		       "ORDER BY uuid = ?1 DESC, peer = ?2 DESC, begun_ms DESC LIMIT ?3",
		.params = json_pack("[s, s, i]", uuid, peer, LEARN_FROM)};
	return journal_query(j, &q, LEARN_FROM, rows, err);
}

double run_learned_factor(struct daemon *d, const char *uuid, const char *peer, const struct check_facts *vm)
{
	json_t *rows = NULL;
	run_earlier_moves(recorder_journal(d), uuid, peer, &rows, NULL);
	double factor = run_factor_from(rows, uuid, vm);
	json_decref(rows);
	return factor;
}
