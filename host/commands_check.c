/* SPDX-License-Identifier: Apache-2.0 */
/* snmigrate check: the facts of both sides, and the report. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "host/check.h"
#include "host/daemon.h"
#include "host/exit.h"
#include "host/journal.h"
#include "host/recorder.h"

#define DOWNTIME_DEFAULT_MS 50
#define DOWNTIME_MAX_MS	    600000

bool check_measure_dirty(const struct vm_ref *vm, uint64_t *bytes_per_s, uint64_t *set_bytes)
{
	json_t *reply = NULL;
	int rc = vm_call(vm, json_pack("{s:s, s:i}", "cmd", "dirty-rate", "seconds", CHECK_DIRTY_SECONDS),
			 &reply, NULL, NULL);
	const json_t *rate = json_object_get(reply, "dirty_bytes_per_s");
	json_int_t set = json_integer_value(json_object_get(reply, "working_set_bytes"));
	bool known = rc == 0 && json_is_integer(rate) && json_integer_value(rate) >= 0;
	*bytes_per_s = known ? (uint64_t)json_integer_value(rate) : 0;
	*set_bytes = known && set > 0 ? (uint64_t)set : 0;
	json_decref(reply);
	return known;
}

/* Measured now, for a second. */
static bool measure_dirty_rate(struct vm_ref *vm, struct check_facts *f)
{
	f->dirty_now = check_measure_dirty(vm, &f->dirty_bytes_per_s, &f->dirty_set_bytes);
	f->dirty_known |= f->dirty_now;
	return f->dirty_now;
}

/* What the VM dirtied at its last move, here or on its way here. */
static void take_dirty_rate(struct daemon *d, const char *uuid, struct check_facts *f)
{
	struct journal_statement q = {
		.sql = "SELECT json_extract(details, '$.dirty_bytes_per_s') AS rate FROM move WHERE uuid = "
		       "?1 "
		       "AND result = 'moved' AND rate IS NOT NULL ORDER BY begun_ms DESC LIMIT 1",
		.params = json_pack("[s]", uuid)};
	json_t *rows = NULL;
	if (journal_query(recorder_journal(d), &q, 1, &rows, NULL))
		return;
	const json_t *rate = json_object_get(json_array_get(rows, 0), "rate");
	f->dirty_known = json_is_integer(rate) && json_integer_value(rate) >= 0;
	f->dirty_bytes_per_s = f->dirty_known ? (uint64_t)json_integer_value(rate) : 0;
	json_decref(rows);
}

/* Why it could not be moved at all, by what this host knows. */
static void judge_record(struct daemon *d, struct vm_ref *vm, struct check_facts *f)
{
	struct error why = ERROR_INIT;
	json_t *o = vm_describe(d, vm, true);
	const char *state = json_string_value(json_object_get(o, "state"));
	snprintf(f->state, sizeof f->state, "%s", state ? state : "");
	if (vm_check_arrived(d, vm, &why) == 0 && handover_may_move(&vm->rec, &why) == 0) {
		if (json_is_object(json_object_get(o, "migrating")))
			error_set(&why, EBUSY, "VM %s is already being moved", vm->rec.name);
		else if (strcmp(f->state, "running") && strcmp(f->state, "paused") &&
			 strcmp(f->state, "stopped"))
			error_set(&why, ESRCH,
				  "VM %s is %s: only a running, paused or stopped VM can be moved",
				  vm->rec.name, f->state);
	}
	snprintf(f->not_movable, sizeof f->not_movable, "%s", why.message);
	json_decref(o);
}

static void ask_vm(struct vm_ref *vm, struct check_facts *f)
{
	json_t *reply = NULL;
	struct error why = ERROR_INIT;
	int rc = vm_call(vm, json_pack("{s:s}", "cmd", "check"), &reply, NULL, &why);
	if (!rc)
		rc = check_take_vm(f, reply, &why);
	if (rc && !*f->not_movable)
		snprintf(f->not_movable, sizeof f->not_movable, "VM %s does not tell what it needs: %s",
			 vm->rec.name, why.message);
	json_decref(reply);
}

static json_t *make_question(const struct vm_ref *vm, const struct check_facts *f, bool measure)
{
	json_t *bridges = json_array();
	for (unsigned i = 0; i < f->nnets; i++)
		json_array_append_new(bridges, json_string(f->nets[i].bridge));
	json_t *q = json_pack("{s:o, s:b}", "bridges", bridges, "measure", measure);
	if (f->live) {
		json_object_set_new(q, "uuid", json_string(vm->rec.uuid));
		json_object_set_new(q, "name", json_string(vm->rec.name));
		json_object_set_new(q, "memory_bytes", json_integer((json_int_t)f->memory_bytes));
	}
	return q;
}

static void ask_destination(struct daemon *d, const struct vm_ref *vm, bool measure, struct check_facts *f)
{
	struct error why = ERROR_INIT;
	json_t *question = make_question(vm, f, measure), *facts = NULL;
	int rc = check_ask(d->cfg, f->there, question, measure, f, &facts, &why);
	if (!rc)
		rc = check_take_destination(f, facts, &why);
	if (rc)
		snprintf(f->no_answer, sizeof f->no_answer, "%s", why.message);
	json_decref(facts);
	json_decref(question);
}

static json_t *report(const struct check_facts *f)
{
	struct check_line lines[CHECK_LINES_MAX];
	struct check_prediction p;
	unsigned n = check_judge(f, lines);
	enum check_grade worst = CHECK_PASS;
	json_t *list = json_array();
	for (unsigned i = 0; i < n; i++) {
		worst = lines[i].grade > worst ? lines[i].grade : worst;
		json_array_append_new(list, json_pack("{s:s, s:s, s:o, s:o}", "check", lines[i].name,
						      "result", check_grade_name(lines[i].grade), "text",
						      jsonl_text(lines[i].text), "do",
						      jsonl_text(lines[i].what_to_do)));
	}
	check_predict(f, &p);
	return json_pack(
		"{s:s, s:s, s:s, s:s, s:o, s:{s:I, s:I, s:i, s:i}, s:{s:I, s:I, s:I, s:I, s:I, s:I, s:I}}",
		"vm", f->vm, "host", f->here, "destination", f->there, "result", check_grade_name(worst),
		"lines", list, "predicted", "total_ms", (json_int_t)p.total_ms, "quick_ms",
		(json_int_t)p.quick_ms, "downtime_least_ms", (int)p.downtime_least_ms, "downtime_most_ms",
		(int)p.downtime_most_ms, "measured", "link_bytes_per_s", (json_int_t)f->link_bytes_per_s,
		"round_trip_us", (json_int_t)f->round_trip_us, "disk_write_bytes_per_s",
		(json_int_t)f->disk_write_bytes_per_s, "disk_sync_us", (json_int_t)f->disk_sync_us,
		"disk_read_bytes_per_s", (json_int_t)f->disk_read_bytes_per_s, "dial_us",
		(json_int_t)f->dial_us, "clock_offset_ms", (json_int_t)f->clock_offset_ms);
}

void check_collect(struct daemon *d, struct vm_ref *vm, const char *host, unsigned measure,
		   struct check_facts *f)
{
	snprintf(f->vm, sizeof f->vm, "%s", vm->rec.name);
	snprintf(f->here, sizeof f->here, "%s", d->cfg->name);
	snprintf(f->there, sizeof f->there, "%s", host);
	if (!f->max_downtime_ms)
		f->max_downtime_ms = DOWNTIME_DEFAULT_MS;
	host_facts_collect("", &f->own);
	judge_record(d, vm, f);
	bool live = keeper_is_live(vm->keeper);
	if (live)
		ask_vm(vm, f);
	if (!live || !(measure & CHECK_MEASURE_GUEST) || !measure_dirty_rate(vm, f))
		take_dirty_rate(d, vm->rec.uuid, f);
	ask_destination(d, vm, measure & CHECK_MEASURE_HOST, f);
}

int check_quick(struct daemon *d, struct vm_ref *vm, const char *host, json_t *options, struct error *err)
{
	struct check_facts *f = calloc(1, sizeof *f);
	struct check_prediction p;
	const json_t *most = json_object_get(options, "max_downtime_ms");
	json_int_t bandwidth = json_integer_value(json_object_get(options, "bandwidth_bytes_per_s"));
	if (!f)
		return error_errno(err, ENOMEM, "prediction");
	f->without_storage = !json_is_true(json_object_get(options, "with_storage"));
	f->bandwidth_bytes_per_s = bandwidth > 0 ? (uint64_t)bandwidth : 0;
	check_collect(d, vm, host, CHECK_MEASURE_HOST, f);
	check_predict(f, &p);
	int rc = 0;
	if (!p.quick_ms && !json_is_integer(most))
		rc = error_set(
			err, ENODATA,
			"VM %s: for how long it would stand still (--quick) cannot be predicted%s%s; say "
			"for how long it may (--max-downtime), or leave --quick out",
			vm->rec.name, *f->no_answer ? ": " : "", f->no_answer);
	check_facts_free(f);
	free(f);
	if (rc)
		return rc;
	if (p.quick_ms && json_is_integer(most) && (json_int_t)p.quick_ms > json_integer_value(most))
		return error_set(
			err, ETIME,
			"VM %s would stand still for about %.1f s (--quick), and %lld ms are allowed "
			"(--max-downtime): allow more, or leave --quick out",
			vm->rec.name, (double)p.quick_ms / 1000, (long long)json_integer_value(most));
	if (p.quick_ms)
		json_object_set_new(options, "predicted_stop_ms", json_integer((json_int_t)p.quick_ms));
	return 0;
}

int command_check(struct command_context *c, struct error *err)
{
	struct daemon *d = c->daemon;
	const char *name = json_string_value(json_object_get(c->request, "vm"));
	const char *host = json_string_value(json_object_get(c->request, "host"));
	json_int_t downtime = json_integer_value(json_object_get(c->request, "max_downtime_ms"));
	struct vm_ref vm;
	if (!name || !host)
		return error_set(err, EINVAL, "malformed request to check a move"), EXIT_USAGE;
	if (vm_find(d, name, &vm, err) < 0)
		return EXIT_REFUSED;
	if (!strcmp(host, d->cfg->name))
		return error_set(err, EINVAL, "VM %s is on host %s already", vm.rec.name, host), EXIT_REFUSED;
	struct check_facts *f = calloc(1, sizeof *f);
	if (!f)
		return error_errno(err, ENOMEM, "check"), EXIT_FAILED;
	if (downtime > 0 && downtime <= DOWNTIME_MAX_MS)
		f->max_downtime_ms = (unsigned)downtime;
	f->backing_chosen = json_is_true(json_object_get(c->request, "backing"));
	check_collect(d, &vm, host, CHECK_MEASURE_GUEST | CHECK_MEASURE_HOST, f);
	reply_ok(c->client, report(f));
	check_facts_free(f);
	free(f);
	return 0;
}
