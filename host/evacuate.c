/* SPDX-License-Identifier: Apache-2.0 */
#include "host/evacuate.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/cond.h"
#include "base/log.h"
#include "host/daemon.h"
#include "host/exit.h"

#define ATTEMPTS_MAX	  3
#define RETRY_MS	  2000 /* times the attempts so far */
#define TICK_MS		  500
#define OWN_TIMEOUT_MS	  5000
#define ANSWER_TIMEOUT_MS 30000
#define SILENCE_MS	  600000 /* its snvmm says something every second; a crashed move settles within 30 s */
#define OWN_TRIES	  20	 /* its own control socket may not be served yet */
#define LOAD_RETRY_MS	  1000
#define LOAD_TRIES	  3

struct evacuator {
	struct daemon *daemon;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	struct run *run;
	bool loaded; /* what an earlier daemon left is known */
};

/* One move under way; its thread's. */
struct mover {
	struct evacuator *e;
	struct run *run;
	struct run_vm *vm;
};

static uint64_t realtime_ms(void)
{
	return clock_realtime_ns() / 1000000;
}

void evacuator_lock(struct daemon *d)
{
	struct evacuator *e = d->evacuator;
	pthread_mutex_lock(&e->lock);
	while (!e->loaded)
		pthread_cond_wait(&e->changed, &e->lock);
}

void evacuator_unlock(struct daemon *d)
{
	pthread_mutex_unlock(&d->evacuator->lock);
}

void evacuator_wait(struct daemon *d, unsigned ms)
{
	struct timespec until = clock_timespec(clock_now_ns() + ms * UINT64_C(1000000));
	pthread_cond_timedwait(&d->evacuator->changed, &d->evacuator->lock, &until);
}

struct run *evacuator_run(struct daemon *d)
{
	return d->evacuator->run;
}

void run_hold(struct run *run)
{
	run->users++;
}

void run_release(struct run *run)
{
	if (--run->users)
		return;
	json_decref(run->to);
	free(run->vms);
	free(run);
}

/* Locked. Seen by those who follow, and written down if it is a step. */
static void changed(struct evacuator *e, struct run *run, struct run_vm *vm, bool written)
{
	struct error err = ERROR_INIT;
	vm->version = ++run->version;
	if (written && run_store(e->daemon, run, vm, false, &err) < 0)
		log_warn("plan: %s", err.message);
	pthread_cond_broadcast(&e->changed);
}

static void set_state(struct evacuator *e, struct run *run, struct run_vm *vm, enum run_state state,
		      const char *reason)
{
	vm->state = state;
	snprintf(vm->reason, sizeof vm->reason, "%s", reason);
	if (run_state_is_final(state))
		vm->ended_ms = realtime_ms();
	log_info("%s: VM %s %s%s%s%s%s", run_kind_name(run->kind), vm->name, run_state_name(state),
		 *vm->destination ? ", " : "", vm->destination, *reason ? ": " : "", reason);
	changed(e, run, vm, true);
}

/* ---- one move, in a thread of its own ---- */

static json_t *move_request(const struct run *run, const struct run_vm *vm)
{
	json_t *options =
		json_pack("{s:b, s:s}", "with_storage", run->with_storage, "purpose",
			  move_purpose_name(run->kind == RUN_RETURN ? MOVE_RETURN : MOVE_EVACUATION));
	if (*run->backing)
		json_object_set_new(options, "backing", json_string(run->backing));
	return json_pack("{s:s, s:s, s:s, s:o}", "cmd", "move", "vm", vm->uuid, "host", vm->destination,
			 "options", options);
}

/* As a client of this daemon. request is taken over. */
static int connect_own(struct daemon *d, json_t *request, struct jsonl **out, struct error *err)
{
	int rc = -EAGAIN;
	for (int i = 0; rc < 0 && i < OWN_TRIES; i++) {
		if (i)
			clock_sleep_ms(100);
		*err = ERROR_INIT;
		rc = jsonl_connect(d->cfg->control, OWN_TIMEOUT_MS, out, err);
	}
	if (!rc)
		rc = jsonl_write(*out, request, -1, err);
	json_decref(request);
	return rc;
}

static void note_event(struct mover *m, const json_t *event)
{
	const char *phase = json_string_value(json_object_get(event, "phase"));
	const json_t *percent = json_object_get(event, "percent");
	SCOPE_LOCK(&m->e->lock);
	if (phase)
		snprintf(m->vm->phase, sizeof m->vm->phase, "%s", phase);
	if (json_is_number(percent))
		m->vm->percent = json_number_value(percent);
}

/* To its last line; its exit status, which `why` goes with. */
static int follow(struct mover *m, struct jsonl *j, char why[PLAN_TEXT_BYTES])
{
	struct error err = ERROR_INIT;
	json_t *line = NULL;
	int status = EXIT_FAILED;
	int rc = jsonl_read(j, &line, NULL, ANSWER_TIMEOUT_MS, &err);
	bool ok = !rc && json_is_true(json_object_get(line, "ok"));
	while (ok) {
		json_decref(steal_ptr(line));
		rc = jsonl_read(j, &line, NULL, SILENCE_MS, &err);
		if (rc < 0 || json_object_get(line, "result"))
			break;
		note_event(m, line);
	}
	const char *text = json_string_value(json_object_get(line, ok ? "reason" : "error"));
	const json_t *exit_status = json_object_get(line, "exit");
	if (!rc && json_is_integer(exit_status))
		status = (int)json_integer_value(exit_status);
	snprintf(why, PLAN_TEXT_BYTES, "%s", rc < 0 ? err.message : text ? text : "");
	json_decref(line);
	return status;
}

/* Another host that takes it, none of those that refused it already; "" when there is none. No lock is held:
 * it asks the hosts. */
static void choose_another(struct mover *m, char destination[HOST_NAME_MAX_CHARS + 1])
{
	struct daemon *d = m->e->daemon;
	json_t *uuids = json_pack("[s]", m->vm->uuid), *hosts = json_array(), *name;
	char tried[RUN_TRIED_BYTES + 2], word[HOST_NAME_MAX_CHARS + 3];
	size_t i;
	destination[0] = '\0';
	snprintf(tried, sizeof tried, ",%s,", m->vm->tried);
	json_array_foreach(m->run->to, i, name)
	{
		snprintf(word, sizeof word, ",%s,", json_string_value(name));
		if (!strstr(tried, word))
			json_array_append(hosts, name);
	}
	struct plan p = {.order = m->run->order, .parallel = 1, .per_host = 1};
	struct survey s = {.uuids = uuids,
			   .hosts = hosts,
			   .with_storage = m->run->with_storage,
			   .backing_chosen = *m->run->backing};
	if (json_array_size(hosts) && survey_plan(d, &s, &p, NULL) == 0) {
		if (p.vms[0].host >= 0)
			snprintf(destination, HOST_NAME_MAX_CHARS + 1, "%s", p.hosts[p.vms[0].host].name);
		plan_free(&p);
	}
	json_decref(uuids);
	json_decref(hosts);
}

static void add_tried(struct run_vm *vm)
{
	size_t at = strlen(vm->tried);
	if (at + strlen(vm->destination) + 2 < sizeof vm->tried)
		snprintf(vm->tried + at, sizeof vm->tried - at, "%s%s", at ? "," : "", vm->destination);
}

/* It was refused or failed: once more, elsewhere if another host takes it. */
static void retry(struct mover *m, int status, const char *why)
{
	struct evacuator *e = m->e;
	struct run_vm *vm = m->vm;
	char other[HOST_NAME_MAX_CHARS + 1] = "", text[PLAN_TEXT_BYTES];
	pthread_mutex_lock(&e->lock);
	bool again = vm->attempts < ATTEMPTS_MAX && !m->run->cancelled;
	if (again && status == EXIT_REFUSED)
		add_tried(vm);
	pthread_mutex_unlock(&e->lock);
	if (again && status == EXIT_REFUSED)
		choose_another(m, other);
	SCOPE_LOCK(&e->lock);
	if (!again) {
		set_state(e, m->run, vm, m->run->cancelled ? RUN_CANCELLED : RUN_FAILED, why);
		return;
	}
	vm->not_before_ms = *other ? 0 : clock_now_ms() + RETRY_MS * vm->attempts;
	if (*other)
		snprintf(vm->destination, sizeof vm->destination, "%s", other);
	snprintf(text, sizeof text, "attempt %u of %d: %s", vm->attempts, ATTEMPTS_MAX, why);
	set_state(e, m->run, vm, RUN_WAITING, text);
}

static void settle(struct mover *m, int status, const char *why)
{
	pthread_mutex_lock(&m->e->lock);
	m->vm->exit = status;
	pthread_mutex_unlock(&m->e->lock);
	if (status == EXIT_REFUSED || status == EXIT_FAILED || status == EXIT_USAGE) {
		retry(m, status, why);
		return;
	}
	enum run_state state = status == EXIT_MOVED || status == EXIT_NOT_CLEANED ? RUN_MOVED
			       : status == EXIT_CANCELLED			  ? RUN_CANCELLED
			       : status == EXIT_CRASHED				  ? RUN_CRASHED
										  : RUN_IN_DOUBT;
	SCOPE_LOCK(&m->e->lock);
	set_state(m->e, m->run, m->vm, state, why);
}

/* Where a move that was taken up goes is its snvmm's or its record's to say. */
static void note_destination(struct mover *m, const char *destination)
{
	if (!*destination)
		return;
	SCOPE_LOCK(&m->e->lock);
	snprintf(m->vm->destination, sizeof m->vm->destination, "%s", destination);
}

static void move_one(struct mover *m)
{
	struct daemon *d = m->e->daemon;
	struct error err = ERROR_INIT;
	struct jsonl *j = NULL;
	char why[PLAN_TEXT_BYTES] = "", destination[HOST_NAME_MAX_CHARS + 1] = "";
	uint64_t epoch = 0;
	enum run_state state = RUN_STAYS;
	enum vm_verdict verdict = survey_judge(d, m->vm->uuid, &epoch, &state, why, destination);
	note_destination(m, destination);
	if (verdict == VM_IS_OVER) {
		SCOPE_LOCK(&m->e->lock);
		set_state(m->e, m->run, m->vm, state, why);
		return;
	}
	json_t *request;
	if (verdict == VM_TO_WATCH) {
		request =
			json_pack("{s:s, s:s, s:s}", "cmd", "watch", "vm", m->vm->uuid, "uuid", m->vm->uuid);
		if (epoch)
			json_object_set_new(request, "epoch", json_integer((json_int_t)epoch));
	} else {
		SCOPE_LOCK(&m->e->lock);
		if (m->run->cancelled) {
			set_state(m->e, m->run, m->vm, RUN_CANCELLED, "the plan was cancelled");
			return;
		}
		m->vm->attempts++;
		request = move_request(m->run, m->vm);
		changed(m->e, m->run, m->vm, true);
	}
	int status = EXIT_FAILED;
	if (connect_own(d, request, &j, &err) < 0)
		snprintf(why, sizeof why, "%s", err.message);
	else
		status = follow(m, j, why);
	jsonl_close(j);
	settle(m, status, why);
}

static void *run_mover(void *arg)
{
	struct mover *m = arg;
	move_one(m);
	pthread_mutex_lock(&m->e->lock);
	run_release(m->run);
	pthread_cond_broadcast(&m->e->changed);
	pthread_mutex_unlock(&m->e->lock);
	free(m);
	return NULL;
}

/* Locked. */
static void begin_move(struct evacuator *e, struct run *run, struct run_vm *vm)
{
	struct mover *m = calloc(1, sizeof *m);
	pthread_t thread;
	uint64_t now = realtime_ms();
	if (m)
		*m = (struct mover){.e = e, .run = run, .vm = vm};
	vm->state = RUN_MOVING;
	vm->percent = 0;
	vm->phase[0] = '\0';
	if (!vm->begun_ms)
		vm->begun_ms = now;
	run_hold(run);
	if (m && pthread_create(&thread, NULL, run_mover, m) == 0) {
		pthread_detach(thread);
		changed(e, run, vm, true);
		return;
	}
	run_release(run);
	free(m);
	vm->state = RUN_WAITING;
	vm->not_before_ms = clock_now_ms() + RETRY_MS;
}

/* ---- the plan's own thread ---- */

/* A number for each destination: that of the first VM which goes there. */
static int number_of(const struct run *run, const struct run_vm *vm)
{
	int i = 0;
	while (strcmp(run->vms[i].destination, vm->destination))
		i++;
	return i;
}

/* Locked. Which of the waiting ones may begin now. */
static struct run_vm *next_to_begin(struct evacuator *e, struct run *run)
{
	int hosts[PLAN_VMS_MAX];
	size_t which[PLAN_VMS_MAX], n = 0;
	unsigned at_host[PLAN_VMS_MAX] = {0}, under_way = 0;
	for (size_t i = 0; i < run->nvms && i < PLAN_VMS_MAX; i++) {
		const struct run_vm *vm = &run->vms[i];
		if (vm->state == RUN_MOVING) {
			under_way++;
			at_host[number_of(run, vm)]++;
		} else if (vm->state == RUN_WAITING && vm->not_before_ms <= clock_now_ms()) {
			hosts[n] = number_of(run, vm);
			which[n++] = i;
		}
	}
	int i = plan_next(hosts, n, at_host, under_way, run->parallel, e->daemon->cfg->moves_per_link);
	return i < 0 ? NULL : &run->vms[which[i]];
}

/* Locked. All that waits ends so. */
static void end_waiting(struct evacuator *e, struct run *run, enum run_state state, const char *reason)
{
	for (size_t i = 0; i < run->nvms; i++)
		if (run->vms[i].state == RUN_WAITING)
			set_state(e, run, &run->vms[i], state, reason);
}

/* Locked, and left meanwhile. Those under way are cancelled. */
static void cancel_moving(struct evacuator *e, struct run *run)
{
	for (size_t i = 0; i < run->nvms; i++) {
		struct run_vm *vm = &run->vms[i];
		if (vm->state != RUN_MOVING || vm->cancel_sent)
			continue;
		pthread_mutex_unlock(&e->lock);
		struct jsonl *j = NULL;
		struct error err = ERROR_INIT;
		json_t *answer = NULL;
		/* what has not quite begun, or is past its handover, does not take it: asked again, until it
		 * ends */
		if (connect_own(e->daemon, json_pack("{s:s, s:s}", "cmd", "cancel", "vm", vm->uuid), &j,
				&err) == 0)
			jsonl_read(j, &answer, NULL, OWN_TIMEOUT_MS, &err);
		bool heard = json_is_true(json_object_get(answer, "ok"));
		json_decref(answer);
		jsonl_close(j);
		pthread_mutex_lock(&e->lock);
		vm->cancel_sent = heard;
	}
}

static bool is_over(const struct run *run)
{
	for (size_t i = 0; i < run->nvms; i++)
		if (!run_state_is_final(run->vms[i].state))
			return false;
	return true;
}

/* VMs that run here and that the plan says nothing of. */
static unsigned count_others(struct daemon *d, const struct run *run)
{
	json_t *here = survey_present(d, true), *uuid;
	size_t i;
	unsigned n = 0;
	json_array_foreach(here, i, uuid)
	{
		bool planned = false;
		for (size_t k = 0; k < run->nvms; k++)
			planned |= !strcmp(run->vms[k].uuid, json_string_value(uuid));
		n += !planned;
	}
	json_decref(here);
	return n;
}

static void finish(struct evacuator *e, struct run *run)
{
	struct error err = ERROR_INIT;
	unsigned others = count_others(e->daemon, run);
	SCOPE_LOCK(&e->lock);
	run->ended_ms = realtime_ms();
	run_conclude(run, others);
	run->version++;
	if (run_store(e->daemon, run, NULL, false, &err) < 0)
		log_warn("plan: %s", err.message);
	log_info("%s ends: %s: %s", run_kind_name(run->kind), run->result, run->reason);
	pthread_cond_broadcast(&e->changed);
	run_release(run);
}

static void *carry_out(void *arg)
{
	struct evacuator *e = arg;
	log_set_vm(NULL);
	pthread_mutex_lock(&e->lock);
	struct run *run = e->run;
	run_hold(run);
	/* those that an earlier daemon had begun: their movers look what became of them */
	for (size_t i = 0; i < run->nvms; i++)
		if (run->vms[i].state == RUN_MOVING)
			begin_move(e, run, &run->vms[i]);
	while (!is_over(run)) {
		if (run->cancelled) {
			end_waiting(e, run, RUN_CANCELLED, "the plan was cancelled");
			cancel_moving(e, run);
		} else if (run->deadline_ms && realtime_ms() >= run->deadline_ms) {
			end_waiting(e, run, RUN_STAYS, "not begun: the deadline had passed");
		}
		struct run_vm *vm;
		while (!run->cancelled && (vm = next_to_begin(e, run)) != NULL)
			begin_move(e, run, vm);
		if (!is_over(run))
			evacuator_wait(e->daemon, TICK_MS);
	}
	pthread_mutex_unlock(&e->lock);
	finish(e, run);
	return NULL;
}

/* Locked. */
static int launch(struct evacuator *e, struct run *run, struct error *err)
{
	pthread_t thread;
	struct run *before = e->run;
	e->run = run;
	int rc = pthread_create(&thread, NULL, carry_out, e);
	if (rc) {
		e->run = before;
		return error_errno(err, rc, "plan: thread");
	}
	pthread_detach(thread);
	if (before)
		run_release(before);
	return 0;
}

/* Locked. */
static int check_free(const struct evacuator *e, struct error *err)
{
	if (!e->run || e->run->ended_ms)
		return 0;
	return error_set(
		err, EBUSY,
		"%s is under way here already: snmigrate evacuate --status shows it, --cancel ends it",
		e->run->kind == RUN_RETURN ? "a return" : "an evacuation");
}

int evacuator_is_free(struct daemon *d, struct error *err)
{
	evacuator_lock(d);
	int rc = check_free(d->evacuator, err);
	evacuator_unlock(d);
	return rc;
}

json_t *evacuator_summary(struct daemon *d)
{
	struct evacuator *e = d->evacuator;
	SCOPE_LOCK(&e->lock);
	return e->run && !e->run->ended_ms ? run_summary(e->run) : json_null();
}

int evacuator_begin(struct daemon *d, struct run *run, struct error *err)
{
	struct evacuator *e = d->evacuator;
	struct error why = ERROR_INIT;
	SCOPE_LOCK(&e->lock);
	if (check_free(e, err) < 0)
		return -EBUSY;
	run->begun_ms = realtime_ms();
	run->id = (int64_t)run->begun_ms;
	if (run_store(d, run, NULL, true, &why) < 0) {
		snprintf(run->unwritten, sizeof run->unwritten, "%s", why.message);
		log_warn("plan: %s; a new daemon would not take it up", why.message);
	}
	return launch(e, run, err);
}

int evacuator_cancel(struct daemon *d, struct error *err)
{
	struct evacuator *e = d->evacuator;
	struct error why = ERROR_INIT;
	int rc = 0;
	evacuator_lock(d);
	if (!e->run || e->run->ended_ms) {
		rc = error_set(err, ENOENT, "neither an evacuation nor a return is under way here");
	} else {
		e->run->cancelled = true;
		if (run_store(d, e->run, NULL, false, &why) < 0)
			log_warn("plan: %s", why.message);
		pthread_cond_broadcast(&e->changed);
	}
	evacuator_unlock(d);
	return rc;
}

/* The journal's thread may need a while for its file; the daemon does not wait for it, only commands that are
 * about plans do. */
static void *take_up(void *arg)
{
	struct evacuator *e = arg;
	struct run *run = NULL;
	struct error err = ERROR_INIT;
	int rc = run_load_open(e->daemon, &run, &err);
	for (int i = 1; rc < 0 && i < LOAD_TRIES; i++) {
		clock_sleep_ms(LOAD_RETRY_MS);
		err = ERROR_INIT;
		rc = run_load_open(e->daemon, &run, &err);
	}
	if (rc < 0)
		log_error("plan: %s; what was under way is not taken up", err.message);
	bool open = run != NULL;
	if (!rc && !open)
		run_load_last(e->daemon, &run, NULL);
	SCOPE_LOCK(&e->lock);
	e->loaded = true;
	pthread_cond_broadcast(&e->changed);
	if (!open) {
		e->run = run;
		return NULL;
	}
	log_info("%s of %zu VMs is taken up again", run_kind_name(run->kind), run->nvms);
	if (launch(e, run, &err) < 0)
		log_error("%s", err.message);
	return NULL;
}

int evacuator_start(struct daemon *d, struct error *err)
{
	struct evacuator *e = calloc(1, sizeof *e);
	pthread_t thread;
	if (!e)
		return error_errno(err, ENOMEM, "plan");
	e->daemon = d;
	pthread_mutex_init(&e->lock, NULL);
	cond_init_monotonic(&e->changed);
	d->evacuator = e;
	int rc = pthread_create(&thread, NULL, take_up, e);
	if (rc)
		return error_errno(err, rc, "plan: thread");
	pthread_detach(thread);
	return 0;
}
