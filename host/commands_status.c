/* SPDX-License-Identifier: Apache-2.0 */
/* What this host is doing, and what it did: status and history. Both only look. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "base/cleanup.h"
#include "host/daemon.h"
#include "host/evacuate.h"
#include "host/exit.h"
#include "host/journal.h"
#include "host/maintenance.h"
#include "host/partial.h"
#include "host/recorder.h"
#include "host/status.h"

#define FLUSH_TIMEOUT_MS  1000
#define HISTORY_LIMIT	  20
#define HISTORY_LIMIT_MAX 10000
#define STATUS_LAST_MOVES 5
#define MOVES_COLUMNS                                                                                        \
	"direction, uuid, name, peer, epoch, last_epoch, begun_ms, ended_ms, phase, result, exit, reason, "  \
	"details"

/* ---- history ---- */

/* The details are kept as text; what was proved is the receipt's to show. */
static void unfold(json_t *row)
{
	const char *text = json_string_value(json_object_get(row, "details"));
	json_t *details = text ? json_loads(text, 0, NULL) : NULL;
	if (json_is_object(details))
		json_object_del(details, "proof");
	json_object_set_new(row, "details", json_is_object(details) ? details : json_null());
	if (!json_is_object(details))
		json_decref(details);
}

/* The newest `limit`, oldest first. */
static int read_moves(struct daemon *d, const char *vm, json_int_t since_ms, json_int_t limit, json_t **out,
		      struct error *err)
{
	struct journal_statement q = {
		.sql = "SELECT * FROM (SELECT id, " MOVES_COLUMNS " FROM move "
		       "WHERE (?1 IS NULL OR name = ?1 OR uuid = ?1) AND (ended_ms IS NULL OR ended_ms >= "
		       "?2) "
		       "ORDER BY begun_ms DESC, id DESC LIMIT ?3) ORDER BY begun_ms, id",
		.params = json_pack("[s?, I, I]", vm, since_ms, limit)};
	journal_flush(recorder_journal(d), FLUSH_TIMEOUT_MS, NULL);
	int rc = journal_query(recorder_journal(d), &q, (size_t)limit, out, err);
	size_t i;
	json_t *row;
	json_array_foreach(*out, i, row)
	{
		unfold(row);
		json_object_del(row, "id");
	}
	return rc;
}

/* One move a line, so that no number of them makes one too long. */
int command_history(struct command_context *c, struct error *err)
{
	const char *vm = json_string_value(json_object_get(c->request, "vm"));
	json_int_t since = json_integer_value(json_object_get(c->request, "since_ms"));
	json_int_t limit = json_integer_value(json_object_get(c->request, "limit"));
	if (limit <= 0)
		limit = HISTORY_LIMIT;
	if (limit > HISTORY_LIMIT_MAX)
		limit = HISTORY_LIMIT_MAX;
	json_t *rows = NULL, *row;
	size_t i;
	if (read_moves(c->daemon, vm, since, limit, &rows, err) < 0)
		return EXIT_FAILED;
	int rc = reply_ok(c->client, json_pack("{s:s}", "host", c->daemon->cfg->name));
	json_array_foreach(rows, i, row) if (rc >= 0) rc = jsonl_write(c->client, row, -1, NULL);
	json_t *end = json_pack("{s:b}", "end", 1);
	if (rc >= 0)
		jsonl_write(c->client, end, -1, NULL);
	json_decref(end);
	json_decref(rows);
	return 0;
}

/* ---- status ---- */

struct collect {
	struct daemon *daemon;
	json_t *moving, *waiting;
};

static void add_moving(struct collect *c, const struct vm_record *rec, json_t *work, const char *direction)
{
	json_t *o = json_deep_copy(work);
	json_t *peer = json_object_get(o, !strcmp(direction, "in") ? "source" : "destination");
	json_object_set(o, "peer", peer);
	json_object_del(o, "source");
	json_object_del(o, "destination");
	json_object_set_new(o, "vm", json_string(rec->name));
	json_object_set_new(o, "uuid", json_string(rec->uuid));
	json_object_set_new(o, "direction", json_string(direction));
	json_array_append_new(c->moving, o);
}

static int look_at(void *opaque, const char *uuid)
{
	struct collect *c = opaque;
	struct vm_ref vm = {0};
	if (record_hint(c->daemon->cfg, uuid, &vm.rec) < 0 ||
	    registry_path(c->daemon->cfg, vm.rec.folder, vm.dir, NULL) < 0)
		return 0;
	struct keeper *k = keeper_find(c->daemon, uuid);
	json_t *o = vm_describe(c->daemon, &vm, true);
	const char *state = json_string_value(json_object_get(o, "state"));
	json_t *out = json_object_get(o, "migrating"), *in = json_object_get(o, "arriving");
	if (json_is_object(out))
		add_moving(c, &vm.rec, out, "out");
	if (json_is_object(in))
		add_moving(c, &vm.rec, in, "in");
	struct status_advice advice;
	struct error asked = ERROR_INIT;
	if (k) {
		SCOPE_LOCK(&c->daemon->lock);
		asked = k->last_ask;
	}
	if (status_advise(&vm.rec, k && keeper_is_live(k), state ? state : "", &advice)) {
		const char *why = json_string_value(json_object_get(o, "state_reason"));
		json_array_append_new(c->waiting,
				      json_pack("{s:s, s:s, s:s, s:s, s:s, s:I, s:b, s:s, s:s, s:o, s:o}",
						"vm", vm.rec.name, "uuid", uuid, "state", state ? state : "",
						"record", handover_state_name(vm.rec.state), "peer",
						vm.rec.peer, "epoch", (json_int_t)vm.rec.epoch, "needs_you",
						advice.needs_you, "what", advice.what, "do",
						advice.what_to_do, "why",
						jsonl_text(why && *why ? why : vm.rec.reason), "peer_error",
						asked.code ? jsonl_text(asked.message) : json_null()));
	}
	json_decref(o);
	return 0;
}

static int add_partial(void *opaque, const struct partial *p)
{
	int64_t left = p->since_s + (int64_t)p->keep_s - (int64_t)time(NULL);
	json_array_append_new(opaque,
			      json_pack("{s:s, s:s, s:s, s:I, s:I}", "vm", p->name, "uuid", p->uuid, "peer",
					p->peer, "allocated_bytes", (json_int_t)p->allocated_bytes,
					"expires_s", (json_int_t)(left > 0 ? left : 0)));
	return 0;
}

int command_status(struct command_context *c, struct error *err)
{
	struct daemon *d = c->daemon;
	struct collect all = {.daemon = d, .moving = json_array(), .waiting = json_array()};
	json_t *partials = json_array(), *last = NULL;
	struct error journal = ERROR_INIT;
	int rc = record_list(d->cfg->state_dir, look_at, &all, err);
	if (!rc)
		partial_each(d->cfg, add_partial, partials);
	if (!rc && read_moves(d, NULL, 0, STATUS_LAST_MOVES, &last, &journal) < 0)
		last = json_array();
	if (rc < 0) {
		json_decref(all.moving);
		json_decref(all.waiting);
		json_decref(partials);
		return EXIT_FAILED;
	}
	reply_ok(c->client, json_pack("{s:s, s:b, s:o, s:s, s:o, s:o, s:o, s:o, s:o}", "host", d->cfg->name,
				      "maintenance", maintenance_is_on(d->cfg), "plan", evacuator_summary(d),
				      "program", SNM_VERSION, "moving", all.moving, "waiting", all.waiting,
				      "partials", partials, "last", last, "journal_error",
				      journal.code ? jsonl_text(journal.message) : json_null()));
	return 0;
}
