/* SPDX-License-Identifier: Apache-2.0 */
/* evacuate, return, plan, maintenance: what the command asks of the daemon. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "host/daemon.h"
#include "host/evacuate.h"
#include "host/exit.h"
#include "host/maintenance.h"
#include "host/trust.h"

#define PARALLEL_DEFAULT 2
#define PARALLEL_MAX	 64
#define DEADLINE_MAX_S	 (30 * 86400)
#define PROGRESS_MS	 1000

/* ---- what is asked for ---- */

struct wish {
	enum run_kind kind;
	const char *peer; /* of a return */
	json_t *to;	  /* new reference */
	unsigned parallel;
	enum plan_order order;
	json_int_t deadline_s;
	bool with_storage, dry_run;
	const char *backing; /* NULL: not given */
};

static bool has(const json_t *list, const json_t *value)
{
	size_t i;
	json_t *v;
	json_array_foreach(list, i, v) if (json_equal(v, value)) return true;
	return false;
}

static void append_host(json_t *list, const char *name)
{
	json_t *host = json_string(name);
	if (!has(list, host))
		json_array_append(list, host);
	json_decref(host);
}

static int add_host(struct daemon *d, json_t *list, const char *name, struct error *err)
{
	struct trust_peer peer;
	if (!name || !strcmp(name, d->cfg->name))
		return error_set(err, EINVAL, "--to %.63s: that is this host", name ? name : "");
	int rc = trust_peer_find(d->cfg, name, &peer, err);
	if (!rc && !peer.may_receive)
		rc = trust_refuse_receive(d->cfg, &peer, err);
	if (!rc)
		append_host(list, peer.name);
	return rc;
}

static int add_if_allowed(void *opaque, const struct trust_peer *peer)
{
	if (!peer->denied && peer->may_receive)
		append_host(opaque, peer->name);
	return 0;
}

static int read_destinations(struct daemon *d, struct wish *w, const json_t *request, struct error *err)
{
	const json_t *to = json_object_get(request, "to");
	json_t *name;
	size_t i;
	int rc = 0;
	w->to = json_array();
	if (w->kind == RUN_RETURN)
		return add_host(d, w->to, w->peer, err);
	if (!json_array_size(to))
		return trust_peers_each(d->cfg, add_if_allowed, w->to, err);
	json_array_foreach(to, i, name) if (!rc) rc = add_host(d, w->to, json_string_value(name), err);
	return rc;
}

static int read_wish(struct daemon *d, struct wish *w, const json_t *request, struct error *err)
{
	const char *host = json_string_value(json_object_get(request, "host"));
	const json_t *parallel = json_object_get(request, "parallel"),
		     *order = json_object_get(request, "order");
	if (!host)
		return error_set(err, EINVAL, "the request names no host");
	if (w->kind == RUN_EVACUATION && strcmp(host, d->cfg->name))
		return error_set(err, EINVAL,
				 "this is host %s: a host is evacuated by its own daemon, so run snmigrate "
				 "evacuate %.63s on %.63s",
				 d->cfg->name, host, host);
	if (w->kind == RUN_RETURN && !strcmp(host, d->cfg->name))
		return error_set(err, EINVAL,
				 "this is host %.63s itself: run snmigrate return %.63s on each host that "
				 "its VMs went to",
				 host, host);
	w->peer = w->kind == RUN_RETURN ? host : "";
	w->parallel = parallel ? (unsigned)json_integer_value(parallel) : PARALLEL_DEFAULT;
	w->deadline_s = json_integer_value(json_object_get(request, "deadline_s"));
	w->with_storage = json_is_true(json_object_get(request, "with_storage"));
	w->dry_run = json_is_true(json_object_get(request, "dry_run"));
	w->backing = json_string_value(json_object_get(request, "backing"));
	if (w->parallel < 1 || w->parallel > PARALLEL_MAX || w->deadline_s < 0 ||
	    w->deadline_s > DEADLINE_MAX_S ||
	    (w->backing && (!name_chars_valid(w->backing) || strlen(w->backing) > 15)) ||
	    (order && plan_order_parse(json_string_value(order), &w->order) < 0))
		return error_set(err, EINVAL, "malformed request");
	return read_destinations(d, w, request, err);
}

/* ---- the plan ---- */

/* By its last way here, which its snvmm wrote down, so that one that came a moment ago counts. One that was
 * brought back here is by the way before that, which only the journal has. */
static bool came_from(struct daemon *d, const char *uuid, const char *host, bool by_journal)
{
	json_t *line = NULL;
	if (registry_arrival_load(d->cfg, uuid, &line, NULL) < 0)
		return by_journal;
	const char *result = json_string_value(json_object_get(line, "result"));
	const char *source = json_string_value(json_object_get(line, "source"));
	enum move_purpose purpose = move_purpose_parse(json_string_value(json_object_get(line, "purpose")));
	bool tells = result && source && !strcmp(result, "moved") && purpose != MOVE_RETURN;
	bool from = tells ? purpose == MOVE_EVACUATION && !strcmp(source, host) : by_journal;
	json_decref(line);
	return from;
}

/* Of a return: those that are here still. */
static int list_vms(struct daemon *d, const struct wish *w, json_t **uuids, struct error *err)
{
	json_t *here = survey_present(d, false), *came = NULL, *uuid;
	size_t i;
	*uuids = here;
	if (w->kind == RUN_EVACUATION)
		return 0;
	int rc = run_came_from(d, w->peer, &came, err);
	*uuids = json_array();
	json_array_foreach(here, i, uuid) if (came_from(d, json_string_value(uuid), w->peer, has(came, uuid)))
		json_array_append(*uuids, uuid);
	json_decref(came);
	json_decref(here);
	return rc;
}

/* Those that stay look what keeps them; one that somebody moves already is followed. */
static void take_staying(struct daemon *d, struct run_vm *vm, const struct plan_vm *p)
{
	uint64_t epoch;
	vm->state = RUN_STAYS;
	snprintf(vm->reason, sizeof vm->reason, "%s", p->why);
	if (survey_judge(d, vm->uuid, &epoch, &vm->state, vm->reason, vm->destination) == VM_TO_WATCH)
		vm->state = RUN_WAITING;
}

static void take_vm(struct daemon *d, struct run_vm *vm, const struct plan *p, const struct plan_vm *from)
{
	snprintf(vm->name, sizeof vm->name, "%s", from->name);
	snprintf(vm->uuid, sizeof vm->uuid, "%s", from->uuid);
	vm->priority = from->priority;
	if (from->host < 0) {
		take_staying(d, vm, from);
		return;
	}
	vm->state = RUN_WAITING;
	snprintf(vm->destination, sizeof vm->destination, "%s", p->hosts[from->host].name);
	snprintf(vm->reason, sizeof vm->reason, "%s%s", from->late ? "after the deadline; " : "", from->why);
	vm->timed = from->timed;
	vm->late = from->late;
	vm->predicted_begin_ms = from->begin_ms;
	vm->predicted_end_ms = from->end_ms;
}

static struct run *make_run(struct daemon *d, const struct wish *w, const struct plan *p)
{
	struct run *run = run_new(p->nvms);
	if (!run)
		return NULL;
	run->kind = w->kind;
	snprintf(run->peer, sizeof run->peer, "%s", w->peer);
	run->to = json_incref(w->to);
	run->parallel = w->parallel;
	run->order = w->order;
	run->with_storage = w->with_storage;
	snprintf(run->backing, sizeof run->backing, "%s", w->backing ? w->backing : "");
	run->deadline_ms = w->deadline_s ? clock_realtime_ns() / 1000000 + (uint64_t)w->deadline_s * 1000 : 0;
	run->predicted_ms = p->total_ms;
	size_t staying = p->going;
	for (size_t v = 0; v < p->nvms; v++) {
		const struct plan_vm *from = &p->vms[v];
		take_vm(d, &run->vms[from->host < 0 ? staying++ : from->turn], p, from);
	}
	return run;
}

static int plan_run(struct daemon *d, const struct wish *w, struct run **out, struct error *err)
{
	json_t *uuids = NULL;
	int rc = list_vms(d, w, &uuids, err);
	struct plan p = {.order = w->order,
			 .parallel = w->parallel,
			 .per_host = d->cfg->moves_per_link,
			 .deadline_ms = (uint64_t)w->deadline_s * 1000};
	struct survey s = {.uuids = uuids,
			   .hosts = w->to,
			   .with_storage = w->with_storage,
			   .backing_chosen = w->backing != NULL};
	if (!rc)
		rc = survey_plan(d, &s, &p, err);
	if (!rc) {
		*out = make_run(d, w, &p);
		rc = *out ? 0 : error_errno(err, ENOMEM, "plan");
		plan_free(&p);
	}
	json_decref(uuids);
	return rc;
}

/* ---- following it ---- */

static json_t *make_progress(const struct run *run)
{
	unsigned moved = 0, waiting = 0;
	json_t *moving = json_array();
	for (size_t i = 0; i < run->nvms; i++) {
		const struct run_vm *vm = &run->vms[i];
		moved += vm->state == RUN_MOVED;
		waiting += vm->state == RUN_WAITING;
		if (vm->state == RUN_MOVING)
			json_array_append_new(moving, json_pack("{s:s, s:s, s:s, s:f}", "vm", vm->name,
								"destination", vm->destination, "phase",
								vm->phase, "percent", vm->percent));
	}
	return json_pack("{s:s, s:I, s:i, s:i, s:o}", "event", "progress", "elapsed_ms",
			 (json_int_t)(clock_realtime_ns() / 1000000 - run->begun_ms), "moved", (int)moved,
			 "waiting", (int)waiting, "moving", moving);
}

/* Locked. What has changed since then, as events; the last one is the end. */
static json_t *make_events(struct daemon *d, const struct run *run, uint64_t *seen)
{
	json_t *events = json_array(), *o;
	for (size_t i = 0; i < run->nvms; i++) {
		if (run->vms[i].version <= *seen)
			continue;
		o = run_vm_to_json(run, &run->vms[i]);
		json_object_set_new(o, "event", json_string("vm"));
		json_array_append_new(events, o);
	}
	*seen = run->version;
	if (run->ended_ms) {
		o = run_to_json(d, run);
		json_object_set_new(o, "event", json_string("end"));
	} else {
		o = make_progress(run);
	}
	json_array_append_new(events, o);
	return events;
}

/* To its end, or until the client has gone. The run is held by the caller. */
static void follow(struct command_context *c, struct run *run, uint64_t seen)
{
	struct daemon *d = c->daemon;
	bool over = false;
	int rc = 0;
	while (!over && rc >= 0) {
		evacuator_lock(d);
		if (!run->ended_ms && run->version <= seen)
			evacuator_wait(d, PROGRESS_MS);
		over = run->ended_ms != 0;
		json_t *events = make_events(d, run, &seen), *event;
		evacuator_unlock(d);
		size_t i;
		json_array_foreach(events, i, event) if (rc >= 0) rc =
			jsonl_write(c->client, event, -1, NULL);
		json_decref(events);
	}
}

/* Locked; leaves. */
static void answer_and_follow(struct command_context *c, struct run *run)
{
	struct daemon *d = c->daemon;
	run_hold(run);
	uint64_t seen = run->version;
	json_t *plan = run_to_json(d, run);
	evacuator_unlock(d);
	reply_ok(c->client, json_pack("{s:o}", "plan", plan));
	follow(c, run, seen);
	evacuator_lock(d);
	run_release(run);
	evacuator_unlock(d);
}

static int begin(struct command_context *c, enum run_kind kind, struct error *err)
{
	struct daemon *d = c->daemon;
	struct wish w = {.kind = kind};
	struct run *run = NULL;
	int rc = read_wish(d, &w, c->request, err);
	if (!rc && !w.dry_run)
		rc = evacuator_is_free(d, err);
	/* before the hosts are asked: otherwise it would fill up while it is emptied */
	if (!rc && kind == RUN_EVACUATION && !w.dry_run)
		rc = maintenance_set(d->cfg, true, err);
	if (!rc)
		rc = plan_run(d, &w, &run, err);
	json_decref(w.to);
	if (rc < 0)
		return EXIT_REFUSED;
	if (w.dry_run) {
		reply_ok(c->client, json_pack("{s:o}", "plan", run_to_json(d, run)));
		run_release(run);
		return 0;
	}
	evacuator_lock(d);
	run_hold(run);
	evacuator_unlock(d);
	rc = evacuator_begin(d, run, err);
	evacuator_lock(d);
	if (!rc)
		answer_and_follow(c, run);
	else
		evacuator_unlock(d);
	evacuator_lock(d);
	run_release(run);
	if (rc < 0)
		run_release(run);
	evacuator_unlock(d);
	return rc < 0 ? EXIT_REFUSED : 0;
}

int command_evacuate(struct command_context *c, struct error *err)
{
	return begin(c, RUN_EVACUATION, err);
}

int command_return(struct command_context *c, struct error *err)
{
	return begin(c, RUN_RETURN, err);
}

int command_plan(struct command_context *c, struct error *err)
{
	struct daemon *d = c->daemon;
	const char *what = json_string_value(json_object_get(c->request, "do"));
	if (what && !strcmp(what, "cancel")) {
		if (evacuator_cancel(d, err) < 0)
			return EXIT_REFUSED;
		reply_ok(c->client, NULL);
		return 0;
	}
	evacuator_lock(d);
	struct run *run = evacuator_run(d);
	json_int_t id = json_integer_value(json_object_get(c->request, "id"));
	if (what && !strcmp(what, "follow") && run && (!id || run->id == id)) {
		answer_and_follow(c, run);
		return 0;
	}
	json_t *plan = run ? run_to_json(d, run) : json_null();
	evacuator_unlock(d);
	if (what && !strcmp(what, "follow")) {
		json_decref(plan);
		return error_set(err, ENOENT, "neither an evacuation nor a return is known here"),
		       EXIT_REFUSED;
	}
	reply_ok(c->client, json_pack("{s:o}", "plan", plan));
	return 0;
}

int command_maintenance(struct command_context *c, struct error *err)
{
	const json_t *on = json_object_get(c->request, "on");
	if (!json_is_boolean(on))
		return error_set(err, EINVAL, "maintenance: on or off"), EXIT_USAGE;
	if (maintenance_set(c->daemon->cfg, json_is_true(on), err) < 0)
		return EXIT_FAILED;
	log_info("maintenance is %s", json_is_true(on) ? "on: no VM may arrive" : "off");
	reply_ok(c->client, json_pack("{s:b}", "maintenance", json_is_true(on)));
	return 0;
}
