/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/move_source.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>

#include "base/cleanup.h"
#include "base/cond.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/log.h"
#include "host/exit.h"
#include "vmm/dirty_rate.h"
#include "vmm/state.h"

#define RESUME_WAIT_MS 10000 /* after resolve --run-here wrote the record */

/* --- interruption --- */

/* Threads other than the move's own count themselves while they use the link. */
static void link_put(struct move *mv)
{
	SCOPE_LOCK(&mv->lock);
	mv->link_users--;
	pthread_cond_broadcast(&mv->changed);
}

void source_interrupt(struct move *mv, const struct error *why)
{
	pthread_mutex_lock(&mv->lock);
	/* After a lost link the move may go on: whatever ends it for good counts more. */
	bool more = !mv->interrupted || (source_link_lost(&mv->why) && !source_link_lost(why));
	if (mv->commit || !more || mv->phase == MOVE_ENDED) {
		pthread_mutex_unlock(&mv->lock);
		return;
	}
	mv->interrupted = true;
	mv->why = *why;
	if (mv->vm->machine)
		machine_unslow(mv->vm->machine);
	/* told to, the destination may close the link before the cancel has got here */
	if (mv->cancelled)
		error_set(&mv->why, ECANCELED, "cancelled");
	if (mv->sender)
		mem_sender_cancel(mv->sender);
	if (mv->mirrors_on)
		for (unsigned i = 0; i < mv->vm->def.ndisks; i++)
			mirror_cancel(mv->vm->disks[i].mirror);
	if (mv->layer_mirror)
		mirror_cancel(mv->layer_mirror);
	for (unsigned i = 0; i < mv->nmemory; i++)
		conn_shutdown(mv->memory[i]);
	struct move_link *link = mv->link;
	if (link)
		mv->link_users++;
	pthread_cond_broadcast(&mv->changed);
	pthread_mutex_unlock(&mv->lock);
	if (link) {
		move_link_fail(link, why);
		link_put(mv);
	}
}

int source_check(struct move *mv, struct error *err)
{
	SCOPE_LOCK(&mv->lock);
	if (mv->interrupted)
		error_copy(err, &mv->why);
	return mv->interrupted ? mv->why.code : 0;
}

void source_link_failed(void *opaque, const struct error *why)
{
	source_interrupt(opaque, why);
}

/* Tells the destination the phase and waits until it is ready for it. */
int source_phase_with_peer(struct move *mv, const char *phase, struct error *err)
{
	json_t *o = json_pack("{s:s}", "phase", phase);
	int rc = move_link_send(mv->link, FRAME_PHASE, o, err);
	json_decref(o);
	struct frame f;
	if (!rc)
		rc = move_link_wait(mv->link, 1u << FRAME_PHASE_OK, 0, &f, err);
	if (rc)
		return rc;
	frame_release(&f);
	return 0;
}

static int run_storage(struct move *mv, struct error *err)
{
	source_set_phase(mv, MOVE_STORAGE, "storage");
	int rc = source_layers_copy(mv, err);
	if (!rc)
		rc = source_phase_with_peer(mv, "storage", err);
	for (unsigned i = 0; !rc && i < mv->vm->def.ndisks; i++)
		rc = source_is_shared(mv, i) ? 0 : source_storage_open(mv, i, 0, err);
	pthread_mutex_lock(&mv->lock);
	mv->mirrors_on = true;
	pthread_mutex_unlock(&mv->lock);
	if (!rc)
		rc = source_storage_sync(mv, err);
	if (!rc) {
		fault_point("in-mirror");
		rc = source_check(mv, err);
	}
	return rc;
}

/* All channels are there before the first disk byte moves: what could be refused later is refused now. */
static int dial_memory(struct move *mv, struct error *err)
{
	for (unsigned i = 0; i < mv->opt.streams; i++) {
		struct conn *c;
		int rc = source_dial(mv, CHANNEL_MEMORY, mv->memory_token[i], &c, err);
		if (rc)
			return rc;
		SCOPE_LOCK(&mv->lock);
		mv->memory[mv->nmemory++] = c;
	}
	return 0;
}

static int open_memory(struct move *mv, struct error *err)
{
	struct vm *vm = mv->vm;
	int rc = source_phase_with_peer(mv, "memory", err);
	if (rc)
		return rc;
	struct mem_sender_options so = {
		.space = machine_memory_space(vm->machine),
		.dirty = machine_dirty_source(vm->machine),
		.streams = mv->memory,
		.nstreams = mv->nmemory,
		.compress = mv->opt.compress,
		.zstd_level = mv->opt.zstd_level,
		.delta_cache_bytes =
			mv->deltas_agreed ? source_delta_bytes(&mv->opt, vm->def.memory_bytes) : 0,
		.timeout_ms = vm->cfg->silence_ms,
		.guest_stands = mv->opt.quick,
		.bandwidth = &mv->bandwidth,
		.epoch = mv->opt.epoch,
	};
	vm_dirty_rate_end(vm);
	source_pace_options(mv, &so);
	struct mem_sender *s;
	rc = mem_sender_create(&so, &s, err);
	if (rc)
		return error_prefix(err, "memory");
	SCOPE_LOCK(&mv->lock);
	mv->sender = s;
	return 0;
}

/* From hello to READY: 0. */
static int run_attempt(struct move *mv, struct error *err)
{
	int rc = source_proof_create(mv, err);
	if (!rc)
		rc = source_hello(mv, err);
	if (!rc)
		rc = dial_memory(mv, err);
	if (!rc)
		rc = source_quick_pause(mv, err);
	if (!rc)
		rc = run_storage(mv, err);
	if (!rc) {
		source_set_phase(mv, MOVE_VERIFY, "verify");
		rc = source_verify(mv, err);
	}
	if (!rc && mv->vm->cold)
		return source_handover_cold(mv, err);
	if (!rc)
		rc = open_memory(mv, err);
	if (!rc) {
		fault_point("in-precopy");
		rc = source_check(mv, err);
	}
	return rc ? rc : source_handover(mv, err);
}

/* A peer's reason or a cancel beats the error that it caused in some stream. */
static void find_reason(struct move *mv, int rc, struct error *err)
{
	struct error why = ERROR_INIT;
	if (source_check(mv, &why) && why.code)
		*err = why;
	if (!err->code)
		error_set(err, rc, "the move failed");
}

/* Undecided, of a VM without memory: nothing here is worth waiting with. The process ends, and with the lock
 * free the daemon asks, and tells who follows the move. */
static bool leaves_it_to_daemon(const struct move *mv, const struct outcome *out)
{
	return mv->vm->cold && out->exit_status == EXIT_IN_DOUBT;
}

static void *source_thread(void *arg)
{
	struct move *mv = arg;
	struct vm *vm = mv->vm;
	struct error err = ERROR_INIT;
	struct outcome out = {"moved", EXIT_MOVED};
	source_set_phase(mv, MOVE_CONNECT, "connect");
	source_ticker_start(mv);
	int rc = source_disks_plan(mv, &err);
	for (bool planned = !rc; planned;) {
		err = ERROR_INIT;
		rc = run_attempt(mv, &err);
		if (!rc)
			break;
		find_reason(mv, rc, &err);
		if (!source_try_again(mv, &err))
			break;
	}
	if (!rc) {
		rc = source_commit(mv, &err);
		if (rc && rc != -EOWNERDEAD)
			find_reason(mv, rc, &err);
	}
	if (!rc) {
		rc = source_end_moved(mv, &err);
		if (rc) {
			/* The destination runs the VM; this side cannot write it down. It must not resume;
			 * the daemon asks again once this process has ended. */
			log_error("record moved: %s", err.message);
			vm_set_state(vm, VM_IN_DOUBT, err.message);
			source_close_channels(mv);
			out = (struct outcome){"in-doubt", EXIT_IN_DOUBT};
		} else if (!mv->peer_started && error_is_set(&mv->postcopy.failure)) {
			err = mv->postcopy.failure;
			out = (struct outcome){"crashed", EXIT_CRASHED};
		} else if (!mv->peer_started) {
			error_set(&err, EOWNERDEAD,
				  "%s owns the VM, but it ended there before it was heard of: it has crashed "
				  "at %s; "
				  "the files here stay until it has been started there",
				  mv->opt.peer, mv->opt.peer);
			out = (struct outcome){"crashed", EXIT_CRASHED};
		}
	} else if (rc == -EOWNERDEAD) {
		source_close_channels(mv);
		out = (struct outcome){"in-doubt", EXIT_IN_DOUBT};
	} else {
		log_warn("move to %s ended: %s", mv->opt.peer, err.message);
		out = source_end_failed(mv, &err);
	}
	source_ticker_stop(mv);
	pthread_mutex_lock(&mv->lock);
	mv->phase = MOVE_ENDED;
	pthread_cond_broadcast(&mv->changed);
	pthread_mutex_unlock(&mv->lock);
	if (!leaves_it_to_daemon(mv, &out))
		source_emit_end(mv, out.result, out.exit_status, out.exit_status ? err.message : "", true);
	struct vm_record rec;
	if (out.exit_status == EXIT_IN_DOUBT || vm->cold ||
	    (!vm_record(vm, &rec, NULL) && rec.state == HANDOVER_MOVED))
		vm_request_quit(vm, 0);
	return NULL;
}

int move_source_start(struct vm *vm, const struct move_options *opt, struct error *err)
{
	enum vm_state state = vm_get_state(vm);
	bool may = vm->cold ? state == VM_STOPPED : state == VM_RUNNING || state == VM_PAUSED;
	if (!may)
		return error_set(err, EBUSY, "VM %s is %s", vm->def.name, vm_state_name(state));
	if (move_is_running(vm))
		return error_set(err, EBUSY, "VM %s is already being moved", vm->def.name);
	if (move_destination_is_paging(vm))
		return error_set(err, EBUSY,
				 "VM %s has just moved here, and its last memory is on the way still",
				 vm->def.name);
	struct vm_record rec;
	int rc = vm_record(vm, &rec, err);
	if (!rc)
		rc = handover_may_move(&rec, err);
	if (rc)
		return rc;
	rc = vm->cold ? source_cold_options(vm, opt, err) : source_quick_options(opt, err);
	if (rc)
		return rc;
	if (opt->epoch <= rec.epoch)
		return error_set(err, ESTALE, "epoch %llu is not above the record's %llu",
				 (unsigned long long)opt->epoch, (unsigned long long)rec.epoch);
	if (opt->no_tls && !vm->cfg->allow_no_tls)
		return error_set(err, EPERM, "--no-tls: [limits] allow-no-tls of %s does not allow it",
				 vm->cfg->path);
	struct move *mv = calloc(1, sizeof *mv);
	if (!mv)
		return error_errno(err, ENOMEM, "move");
	mv->vm = vm;
	mv->opt = *opt;
	if (vm->cold) {
		mv->opt.streams = 0;
		mv->opt.postcopy = MOVE_POSTCOPY_NEVER;
	}
	mv->first_epoch = opt->epoch;
	mv->reached = "connect";
	if (opt->retry_for_s == MOVE_AS_CONFIGURED)
		mv->opt.retry_for_s = vm->cfg->retry_for_s;
	mv->t_start_ms = clock_now_ms();
	mv->events = move_events_create();
	pthread_mutex_init(&mv->lock, NULL);
	cond_init_monotonic(&mv->changed);
	rate_limit_init(&mv->bandwidth, opt->bandwidth_bytes_per_s);
	/* Watchers may still read the former move's events: moves are freed with the process. */
	pthread_mutex_lock(&vm->lock);
	mv->former = vm->move;
	vm->move = mv;
	pthread_cond_broadcast(&vm->changed);
	pthread_mutex_unlock(&vm->lock);
	rc = pthread_create(&mv->thread, NULL, source_thread, mv);
	mv->thread_started = !rc;
	if (rc) {
		mv->phase = MOVE_ENDED;
		return error_errno(err, rc, "move: thread");
	}
	return 0;
}

/* The present move or NULL. It is only replaced while no thread but the control's asks, and freed with the
 * process. */
static struct move *current(struct vm *vm)
{
	SCOPE_LOCK(&vm->lock);
	return vm->move;
}

struct move_events *move_source_events(struct vm *vm)
{
	struct move *mv = current(vm);
	return mv ? mv->events : NULL;
}

bool move_is_running(struct vm *vm)
{
	struct move *mv = current(vm);
	if (!mv)
		return false;
	SCOPE_LOCK(&mv->lock);
	return mv->phase != MOVE_ENDED;
}

bool move_is_deciding(struct vm *vm)
{
	struct move *mv = current(vm);
	if (!mv)
		return false;
	SCOPE_LOCK(&mv->lock);
	return mv->phase != MOVE_ENDED && (mv->deciding || mv->commit);
}

json_t *move_describe(struct vm *vm)
{
	struct move *mv = current(vm);
	if (!mv || !move_is_running(vm))
		return json_null();
	SCOPE_LOCK(&mv->lock);
	return json_pack("{s:s, s:I, s:s, s:f, s:I}", "destination", mv->opt.peer, "epoch",
			 (json_int_t)mv->opt.epoch, "phase", mv->reached, "percent", mv->percent,
			 "elapsed_ms", (json_int_t)(clock_now_ms() - mv->t_start_ms));
}

int move_source_cancel(struct vm *vm, struct error *err)
{
	struct move *mv = current(vm);
	if (!mv || !move_is_running(vm))
		return error_set(err, ENOENT, "VM %s is not being moved", vm->def.name);
	pthread_mutex_lock(&mv->lock);
	if (mv->commit) {
		bool paging = mv->postcopy.began;
		pthread_mutex_unlock(&mv->lock);
		return paging ? error_set(err, EBUSY,
					  "VM %s runs on %s already, and its last memory is on the way "
					  "there: too "
					  "late to cancel",
					  vm->def.name, mv->opt.peer)
			      : error_set(err, EBUSY,
					  "VM %s has been handed over already: too late to cancel",
					  vm->def.name);
	}
	mv->cancelled |= !mv->interrupted || source_link_lost(&mv->why);
	pthread_mutex_unlock(&mv->lock);
	struct error why = ERROR_INIT;
	error_set(&why, ECANCELED, "cancelled");
	/* tell the destination before the link is cut on this side */
	pthread_mutex_lock(&mv->lock);
	struct move_link *link = mv->link;
	if (link)
		mv->link_users++;
	pthread_mutex_unlock(&mv->lock);
	if (link) {
		json_t *o = json_pack("{s:s}", "reason", "cancelled at the source");
		move_link_send(link, FRAME_ABORT, o, NULL);
		json_decref(o);
		link_put(mv);
	}
	source_interrupt(mv, &why);
	return 0;
}

int move_source_tune(struct vm *vm, json_t *request, struct error *err)
{
	struct move *mv = current(vm);
	if (!mv || !move_is_running(vm))
		return error_set(err, ENOENT, "VM %s is not being moved", vm->def.name);
	uint64_t bandwidth = rate_limit_get(&mv->bandwidth);
	int rc = source_parse_bandwidth(request, &bandwidth, err);
	if (rc)
		return rc;
	rate_limit_set(&mv->bandwidth, bandwidth);
	log_info("move to %s: bandwidth %llu bytes a second", mv->opt.peer, (unsigned long long)bandwidth);
	return 0;
}

void move_source_guest_gone(struct vm *vm, const char *what)
{
	struct move *mv = current(vm);
	if (!mv)
		return;
	struct error why = ERROR_INIT;
	error_set(&why, ECANCELED, "%s", what);
	source_interrupt(mv, &why);
	pthread_mutex_lock(&mv->lock);
	while (mv->phase != MOVE_ENDED)
		pthread_cond_wait(&mv->changed, &mv->lock);
	pthread_mutex_unlock(&mv->lock);
	/* The last line is stored and told before the control socket closes. */
	json_t *last;
	int patience = vm_get_state(vm) == VM_IN_DOUBT && vm->cold ? 0 : 400; /* there will be none */
	for (int i = 0; !(last = move_events_final(mv->events)) && i < patience; i++)
		clock_sleep_ms(5);
	json_decref(last);
}

static bool vm_has_moved(struct vm *vm)
{
	struct vm_record rec;
	return !vm_record(vm, &rec, NULL) && rec.state == HANDOVER_MOVED;
}

bool move_source_is_paging(struct vm *vm)
{
	struct move *mv = current(vm);
	return mv && move_is_running(vm) && source_postcopy_open(mv);
}

int move_source_resolve(struct vm *vm, const char *how, struct error *err)
{
	struct move *mv = current(vm);
	if (!mv || !move_is_running(vm))
		return error_set(err, ENOENT, "VM %s is not in doubt here", vm->def.name);
	if (vm_has_moved(vm) && source_postcopy_open(mv))
		return source_postcopy_resolve(mv, how, err);
	SCOPE_LOCK(&mv->lock);
	if (!mv->settle_started)
		return error_set(err, EBUSY, "VM %s is being handed over and not in doubt yet", vm->def.name);
	snprintf(mv->resolve, sizeof mv->resolve, "%s", how);
	mv->resolve_done = false;
	pthread_cond_broadcast(&mv->changed);
	while (!mv->resolve_done && mv->phase != MOVE_ENDED)
		pthread_cond_wait(&mv->changed, &mv->lock);
	if (!mv->resolve_done) /* the other side's word came first */
		return strcmp(how, "ask") ? error_set(err, EBUSY, "VM %s has settled meanwhile", vm->def.name)
					  : 0;
	if (mv->resolve_result.code) {
		error_copy(err, &mv->resolve_result);
		return mv->resolve_result.code;
	}
	/* The record is written; the guest is resumed by the move's thread. Who asked wants to find it
	 * running. */
	uint64_t deadline = clock_now_ms() + RESUME_WAIT_MS;
	while (!strcmp(how, "run-here") && mv->phase != MOVE_ENDED && vm_get_state(vm) == VM_IN_DOUBT &&
	       clock_now_ms() < deadline) {
		pthread_mutex_unlock(&mv->lock);
		clock_sleep_ms(10);
		pthread_mutex_lock(&mv->lock);
	}
	return 0;
}

void move_source_free(struct vm *vm)
{
	pthread_mutex_lock(&vm->lock);
	struct move *mv = steal_ptr(vm->move);
	pthread_mutex_unlock(&vm->lock);
	while (mv) {
		struct move *former = mv->former;
		struct error why = ERROR_INIT;
		error_set(&why, ECANCELED, "the VM ended");
		source_interrupt(mv, &why); /* one that began after the VM was told to end */
		if (mv->thread_started)
			pthread_join(mv->thread, NULL);
		move_events_free(mv->events);
		source_proof_free(mv);
		pthread_cond_destroy(&mv->changed);
		pthread_mutex_destroy(&mv->lock);
		rate_limit_destroy(&mv->bandwidth);
		free(mv);
		mv = former;
	}
}
