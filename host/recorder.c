/* SPDX-License-Identifier: Apache-2.0 */
#include "host/recorder.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/cond.h"
#include "base/log.h"
#include "host/daemon.h"
#include "host/journal.h"
#include "host/registry.h"

#define LOOK_INTERVAL_MS 500
#define LOAD_INTERVAL_MS 5000
#define IDLE_INTERVAL_MS 60000
#define INFO_TIMEOUT_MS	 1000
#define CLOSE_TIMEOUT_MS 2000
#define PATIENCE_MS	 10000 /* for what a snvmm writes after it has told how it ended */
#define MOVES_KEPT	 10000
#define OPEN_MOVES_MAX	 4096 /* read of an earlier daemon's */

/* A move that is not over. All but the list is the thread's alone. */
struct entry {
	struct entry *next;
	bool incoming;
	char uuid[VM_UUID_CHARS + 1], name[VM_NAME_MAX_CHARS + 1], peer[HOST_NAME_MAX_CHARS + 1];
	uint64_t epoch, last_epoch;
	uint64_t begun_ms; /* since 1970 */
	char phase[32];
	struct move_outcome outcome;
	uint64_t quiet_since_ms; /* nobody works on it any more; 0: somebody does */
};

struct recorder {
	struct daemon *daemon;
	struct journal *journal;
	pthread_t thread;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	struct entry *begun; /* lock: told of, not taken yet */
	bool closing, ended; /* lock */
	/* the thread's alone */
	struct entry *open;
	bool loaded;
};

static uint64_t realtime_ms(void)
{
	return clock_realtime_ns() / 1000000;
}

static struct entry *make_entry(bool incoming, const char *uuid, const char *name, const char *peer,
				uint64_t epoch, uint64_t begun_ms)
{
	struct entry *e = calloc(1, sizeof *e);
	if (!e)
		return NULL;
	e->incoming = incoming;
	snprintf(e->uuid, sizeof e->uuid, "%s", uuid);
	snprintf(e->name, sizeof e->name, "%s", name);
	snprintf(e->peer, sizeof e->peer, "%s", peer);
	e->epoch = e->last_epoch = epoch;
	e->begun_ms = begun_ms;
	return e;
}

/* ---- rows ---- */

static void put_row(struct recorder *r, const struct entry *e, uint64_t ended_ms, json_t *details)
{
	static const char sql[] =
		"INSERT INTO move (direction, uuid, name, peer, epoch, last_epoch, begun_ms, ended_ms, "
		"phase, "
		"result, exit, reason, details) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, "
		"?13) "
		"ON CONFLICT (direction, uuid, epoch) DO UPDATE SET last_epoch = excluded.last_epoch, "
		"ended_ms = excluded.ended_ms, phase = excluded.phase, result = excluded.result, "
		"exit = excluded.exit, reason = excluded.reason, "
		"details = coalesce(excluded.details, details)";
	static const char prune[] = "DELETE FROM move WHERE ended_ms IS NOT NULL AND "
				    "id <= (SELECT max(id) FROM move) - ?1";
	const struct move_outcome *o = &e->outcome;
	bool result = *o->result;
	json_t *params = json_pack(
		"[s, s, s, s, I, I, I, o, s, o, o, o, o]", e->incoming ? "in" : "out", e->uuid, e->name,
		e->peer, (json_int_t)e->epoch, (json_int_t)e->last_epoch, (json_int_t)e->begun_ms,
		ended_ms ? json_integer((json_int_t)ended_ms) : json_null(), e->phase,
		result ? json_string(o->result) : json_null(), result ? json_integer(o->exit) : json_null(),
		jsonl_text(o->reason), details ? json_incref(details) : json_null());
	struct journal_statement s[] = {
		{.sql = sql, .params = params},
		{.sql = prune, .params = ended_ms ? json_pack("[i]", MOVES_KEPT) : NULL},
	};
	if (params)
		journal_write(r->journal, s, ended_ms ? 2 : 1, ended_ms ? JOURNAL_DURABLE : JOURNAL_LATER, 0,
			      NULL);
}

static struct entry *find(struct recorder *r, bool incoming, const char *uuid, uint64_t epoch)
{
	for (struct entry *e = r->open; e; e = e->next)
		if (e->incoming == incoming && !strcmp(e->uuid, uuid) && epoch >= e->epoch &&
		    (!incoming || epoch == e->epoch))
			return e;
	return NULL;
}

/* ---- looking ---- */

struct seen {
	struct vm_record rec;
	bool recorded;
	json_t *stored, *info;
	struct move_facts facts;
};

static json_t *load_stored(struct recorder *r, const struct entry *e)
{
	json_t *o = NULL;
	const struct host_config *cfg = r->daemon->cfg;
	int rc = e->incoming ? registry_arrival_load(cfg, e->uuid, &o, NULL)
			     : registry_result_load(cfg, e->uuid, &o, NULL);
	if (rc < 0 || move_line_matches(o, e->incoming, e->epoch))
		return rc < 0 ? NULL : o;
	json_decref(o);
	return NULL;
}

static json_t *ask_snvmm(struct recorder *r, const struct entry *e, const struct seen *s)
{
	struct vm_ref vm = {0};
	char rel[REGISTRY_FOLDER_BYTES];
	struct jsonl *j = NULL;
	json_t *reply = NULL, *request = json_pack("{s:s}", "cmd", "info");
	/* an arrival has no record of its own before it is prepared */
	if (s->recorded && (!e->incoming || s->rec.epoch >= e->epoch))
		snprintf(rel, sizeof rel, "%s", s->rec.folder);
	else
		registry_incoming_rel(e->uuid, e->epoch, rel);
	if (!registry_path(r->daemon->cfg, rel, vm.dir, NULL) && !vm_connect(&vm, &j, NULL) &&
	    jsonl_call(j, request, &reply, NULL, INFO_TIMEOUT_MS, NULL))
		reply = NULL;
	jsonl_close(j);
	json_decref(request);
	return reply;
}

/* What the snvmm works on, if it is this move. */
static void note_work(struct entry *e, struct seen *s)
{
	json_t *work = json_object_get(s->info, e->incoming ? "arriving" : "migrating");
	json_int_t epoch = json_integer_value(json_object_get(work, "epoch"));
	const char *phase = json_string_value(json_object_get(work, "phase"));
	const char *state = json_string_value(json_object_get(s->info, "state"));
	s->facts.doubt = state && !strcmp(state, "in-doubt");
	s->facts.busy =
		epoch > 0 && (e->incoming ? (uint64_t)epoch == e->epoch : (uint64_t)epoch >= e->epoch);
	if (!s->facts.busy)
		return;
	e->last_epoch = (uint64_t)epoch;
	if (phase)
		snprintf(e->phase, sizeof e->phase, "%s", phase);
}

static void look(struct recorder *r, struct entry *e, struct seen *s)
{
	struct daemon *d = r->daemon;
	struct keeper *k = keeper_find(d, e->uuid);
	*s = (struct seen){.facts = {.incoming = e->incoming, .epoch = e->epoch, .peer = e->peer}};
	s->facts.live = k && keeper_is_live(k);
	/* after a start of the daemon, one that it has not adopted yet */
	struct record *record = NULL;
	if (!s->facts.live && !record_open(d->cfg->state_dir, e->uuid, &record, NULL))
		s->facts.live = record_is_held(record, NULL) == 1;
	record_close(record);
	/* the last line before the record, so that what is read together belongs together or is too old */
	s->stored = load_stored(r, e);
	s->recorded = !record_hint(d->cfg, e->uuid, &s->rec);
	s->facts.record = s->recorded ? &s->rec : NULL;
	s->facts.stored = s->stored;
	if (s->facts.live)
		s->info = ask_snvmm(r, e, s);
	if (s->info)
		note_work(e, s);
	/* one that is being born, or that does not answer now, may still work on it */
	bool quiet = s->info ? !s->facts.busy : !s->facts.live;
	uint64_t now = clock_now_ms();
	e->quiet_since_ms = !quiet ? 0 : e->quiet_since_ms ? e->quiet_since_ms : now;
	s->facts.patient = !quiet || now - e->quiet_since_ms < PATIENCE_MS;
}

static void seen_free(struct seen *s)
{
	json_decref(s->stored);
	json_decref(s->info);
}

/* The phase that it reached: what the snvmm wrote down, or at least what the record tells. */
static void note_phase(struct entry *e, const struct seen *s)
{
	const char *phase = json_string_value(json_object_get(s->stored, "phase"));
	if (phase)
		snprintf(e->phase, sizeof e->phase, "%s", phase);
	else if (!e->incoming && s->recorded && s->rec.state == HANDOVER_HANDING_OVER)
		snprintf(e->phase, sizeof e->phase, "handover");
	json_int_t last = json_integer_value(json_object_get(s->stored, "epoch"));
	if (last > 0 && (uint64_t)last > e->last_epoch)
		e->last_epoch = (uint64_t)last;
}

/* True: it is over. */
static bool follow(struct recorder *r, struct entry *e)
{
	struct seen s;
	char phase[sizeof e->phase];
	struct move_outcome before = e->outcome;
	snprintf(phase, sizeof phase, "%s", e->phase);
	look(r, e, &s);
	move_judge(&s.facts, &e->outcome);
	if (!s.facts.busy)
		note_phase(e, &s);
	bool over = e->outcome.verdict == MOVE_OVER;
	if (over) {
		uint64_t ended = s.stored ? registry_result_time_ms(r->daemon->cfg, e->uuid, e->incoming) : 0;
		put_row(r, e, ended > e->begun_ms ? ended : realtime_ms(), s.stored);
		log_set_vm(e->name);
		if (e->incoming || strcmp(e->outcome.result, "moved"))
			log_info("journal: VM %s, %s %s, epoch %" PRIu64 ": %s%s%s", e->name,
				 e->incoming ? "from" : "to", e->peer, e->epoch, e->outcome.result,
				 *e->outcome.reason ? ": " : "", e->outcome.reason);
	} else if (strcmp(phase, e->phase) || strcmp(before.result, e->outcome.result) ||
		   strcmp(before.reason, e->outcome.reason)) {
		put_row(r, e, 0, s.stored);
	}
	seen_free(&s);
	return over;
}

/* ---- what an earlier daemon left ---- */

static const char *column(const json_t *row, const char *key)
{
	const char *s = json_string_value(json_object_get(row, key));
	return s ? s : "";
}

static void add_open(struct recorder *r, struct entry *e)
{
	if (!e || find(r, e->incoming, e->uuid, e->epoch)) {
		free(e);
		return;
	}
	e->next = r->open;
	r->open = e;
}

static int load_open(struct recorder *r)
{
	struct journal_statement q = {.sql = "SELECT * FROM move WHERE ended_ms IS NULL"};
	json_t *rows = NULL, *row;
	size_t i;
	int rc = journal_query(r->journal, &q, OPEN_MOVES_MAX, &rows, NULL);
	json_array_foreach(rows, i, row)
	{
		if (!vm_uuid_valid(column(row, "uuid")))
			continue;
		struct entry *e = make_entry(!strcmp(column(row, "direction"), "in"), column(row, "uuid"),
					     column(row, "name"), column(row, "peer"),
					     (uint64_t)json_integer_value(json_object_get(row, "epoch")),
					     (uint64_t)json_integer_value(json_object_get(row, "begun_ms")));
		if (e)
			snprintf(e->phase, sizeof e->phase, "%s", column(row, "phase"));
		add_open(r, e);
	}
	json_decref(rows);
	return rc;
}

/* Whether the journal has that move, over or not. */
static bool is_known(struct recorder *r, bool incoming, const char *uuid, uint64_t first, uint64_t last)
{
	struct journal_statement q = {.sql = "SELECT 1 AS n FROM move WHERE direction = ?1 AND uuid = ?2 AND "
					     "(epoch BETWEEN ?3 AND ?4 OR last_epoch BETWEEN ?3 AND ?4)",
				      .params = json_pack("[s, s, I, I]", incoming ? "in" : "out", uuid,
							  (json_int_t)first, (json_int_t)last)};
	json_t *rows = NULL;
	bool known = journal_query(r->journal, &q, 1, &rows, NULL) || json_array_size(rows);
	json_decref(rows);
	return known || find(r, incoming, uuid, last);
}

/* A last line that the journal does not have: its row was lost, or is older than the journal. */
static void import_line(void *opaque, const char *uuid, bool arrival)
{
	struct recorder *r = opaque;
	json_t *line = NULL;
	int rc = arrival ? registry_arrival_load(r->daemon->cfg, uuid, &line, NULL)
			 : registry_result_load(r->daemon->cfg, uuid, &line, NULL);
	json_int_t last = json_integer_value(json_object_get(line, "epoch"));
	json_int_t first = json_integer_value(json_object_get(line, "first_epoch"));
	if (first <= 0 || first > last)
		first = last;
	if (!rc && move_line_matches(line, arrival, (uint64_t)first) &&
	    !is_known(r, arrival, uuid, (uint64_t)first, (uint64_t)last)) {
		uint64_t ended = registry_result_time_ms(r->daemon->cfg, uuid, arrival);
		json_int_t took = json_integer_value(json_object_get(line, "total_ms"));
		if (took < 0 || (uint64_t)took > ended)
			took = 0;
		/* judged as any other, which writes its row */
		add_open(r, make_entry(arrival, uuid, column(line, "vm"),
				       column(line, arrival ? "source" : "destination"), (uint64_t)first,
				       ended - (uint64_t)took));
	}
	json_decref(line);
}

/* A record in the middle of a move that has no row. */
static int import_record(void *opaque, const char *uuid)
{
	struct recorder *r = opaque;
	struct vm_record rec;
	if (record_hint(r->daemon->cfg, uuid, &rec))
		return 0;
	bool out = rec.state == HANDOVER_HANDING_OVER ||
		   (rec.state == HANDOVER_MOVED && !(rec.flags & RECORD_FILES_DONE));
	bool in = rec.state == HANDOVER_PREPARED ||
		  (rec.state == HANDOVER_OWNER_UNCONFIRMED && !(rec.flags & RECORD_FORCED));
	if ((out || in) && !is_known(r, in, uuid, rec.epoch, rec.epoch))
		add_open(r, make_entry(in, uuid, rec.name, rec.peer, rec.epoch, rec.changed_ns / 1000000));
	return 0;
}

/* A live snvmm whose move has not got as far as a record. */
static void import_live(struct recorder *r, const char *uuid)
{
	struct entry probe = {0};
	struct seen s = {0};
	snprintf(probe.uuid, sizeof probe.uuid, "%s", uuid);
	s.recorded = !record_hint(r->daemon->cfg, uuid, &s.rec);
	s.info = s.recorded ? ask_snvmm(r, &probe, &s) : NULL;
	json_t *work = json_object_get(s.info, "migrating");
	json_int_t epoch = json_integer_value(json_object_get(work, "epoch"));
	json_int_t age = json_integer_value(json_object_get(work, "elapsed_ms"));
	if (epoch > 0 && !is_known(r, false, uuid, (uint64_t)epoch, (uint64_t)epoch))
		add_open(r, make_entry(false, uuid, s.rec.name, column(work, "destination"), (uint64_t)epoch,
				       realtime_ms() - (uint64_t)(age > 0 ? age : 0)));
	json_decref(s.info);
}

/* Live ones are known by their socket already here: whoever holds a record's lock is one. */
static int import_snvmm(void *opaque, const char *uuid)
{
	import_live(opaque, uuid);
	return 0;
}

static void load(struct recorder *r)
{
	if (load_open(r) < 0)
		return;
	r->loaded = true;
	record_list(r->daemon->cfg->state_dir, import_record, r, NULL);
	record_list(r->daemon->cfg->state_dir, import_snvmm, r, NULL);
	registry_results_each(r->daemon->cfg, import_line, r, NULL);
}

/* ---- the thread ---- */

/* lock held. */
static void take_begun(struct recorder *r)
{
	while (r->begun) {
		struct entry *e = r->begun;
		r->begun = e->next;
		/* in the order in which they were told of */
		struct entry *known = find(r, e->incoming, e->uuid, e->epoch);
		if (known) {
			free(e);
			continue;
		}
		e->next = r->open;
		r->open = e;
		put_row(r, e, 0, NULL);
	}
}

static void *record_moves(void *arg)
{
	struct recorder *r = arg;
	uint64_t load_at = 0;
	for (;;) {
		pthread_mutex_lock(&r->lock);
		unsigned ms = !r->loaded ? LOAD_INTERVAL_MS / 10
			      : r->open	 ? LOOK_INTERVAL_MS
					 : IDLE_INTERVAL_MS;
		struct timespec until = clock_timespec(clock_now_ns() + ms * UINT64_C(1000000));
		if (!r->closing && !r->begun && load_at)
			pthread_cond_timedwait(&r->changed, &r->lock, &until);
		bool closing = r->closing;
		take_begun(r);
		pthread_mutex_unlock(&r->lock);
		if (closing)
			break;
		if (!r->loaded && clock_now_ms() >= load_at) {
			journal_flush(r->journal, INFO_TIMEOUT_MS, NULL);
			load(r);
			load_at = clock_now_ms() + LOAD_INTERVAL_MS;
		}
		for (struct entry **at = &r->open; *at;) {
			struct entry *e = *at;
			if (!follow(r, e)) {
				at = &e->next;
				continue;
			}
			*at = e->next;
			free(e);
		}
	}
	SCOPE_LOCK(&r->lock);
	r->ended = true;
	pthread_cond_broadcast(&r->changed);
	return NULL;
}

int recorder_start(struct daemon *d, struct error *err)
{
	struct recorder *r = calloc(1, sizeof *r);
	if (!r)
		return error_errno(err, ENOMEM, "journal");
	r->daemon = d;
	pthread_mutex_init(&r->lock, NULL);
	cond_init_monotonic(&r->changed);
	int rc = journal_open(d->cfg->state_dir, &r->journal, err);
	d->recorder = r;
	if (!rc) {
		rc = pthread_create(&r->thread, NULL, record_moves, r);
		if (rc)
			rc = error_errno(err, rc, "journal: thread");
	}
	return rc;
}

/* The thread may be with a snvmm that does not answer: it is not waited for, and threads of the daemon's end
 * with the process anyway. */
void recorder_stop(struct daemon *d)
{
	struct recorder *r = d->recorder;
	uint64_t until = clock_now_ns() + CLOSE_TIMEOUT_MS * UINT64_C(1000000);
	struct timespec at = clock_timespec(until);
	pthread_mutex_lock(&r->lock);
	r->closing = true;
	pthread_cond_broadcast(&r->changed);
	while (!r->ended && clock_now_ns() < until)
		pthread_cond_timedwait(&r->changed, &r->lock, &at);
	bool ended = r->ended;
	pthread_mutex_unlock(&r->lock);
	if (ended)
		journal_flush(r->journal, CLOSE_TIMEOUT_MS, NULL);
}

void recorder_begin(struct daemon *d, bool incoming, const char *uuid, const char *name, const char *peer,
		    uint64_t epoch)
{
	struct recorder *r = d->recorder;
	struct entry *e = make_entry(incoming, uuid, name, peer, epoch, realtime_ms());
	if (!e)
		return;
	SCOPE_LOCK(&r->lock);
	struct entry **at = &r->begun;
	while (*at)
		at = &(*at)->next;
	*at = e;
	pthread_cond_broadcast(&r->changed);
}

struct journal *recorder_journal(struct daemon *d)
{
	return d->recorder->journal;
}
