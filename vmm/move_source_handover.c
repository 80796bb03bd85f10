/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/move_source.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/log.h"
#include "host/exit.h"
#include "vmm/state.h"

#define HANDOVER_ATTEMPTS 3
#define RECORD_RETRY_MS	  500

int source_record_handing_over(struct move *mv, struct error *err)
{
	struct vm_record rec;
	int rc = vm_record(mv->vm, &rec, err);
	if (rc || (rec.state == HANDOVER_HANDING_OVER && rec.epoch == mv->opt.epoch))
		return rc;
	struct vm_transition t = {
		.from = HANDOVER_OWNER,
		.from_epoch = rec.epoch,
		.to = HANDOVER_HANDING_OVER,
		.to_epoch = mv->opt.epoch,
	};
	return vm_record_transition(mv->vm, &t, err);
}

/* Microseconds since *at, which becomes now. */
static uint64_t lap(uint64_t *at)
{
	uint64_t before = *at;
	*at = clock_now_us();
	return *at - before;
}

/* Divides the time from the saved state to READY: the destination says how long it loaded. */
static void count_transfer(struct move *mv, const struct frame *ready, uint64_t us)
{
	struct blackout *b = &mv->blackout;
	struct mem_stats st;
	mem_sender_stats(mv->sender, &st);
	b->dirty_us = st.final_collect_us < us ? st.final_collect_us : us;
	us -= b->dirty_us;
	json_int_t load = json_integer_value(json_object_get(ready->json, "load_us"));
	b->load_us = load < 0 ? 0 : (uint64_t)load < us ? (uint64_t)load : us;
	b->send_us = us - b->load_us;
}

/* Guest paused and drained, disks agree: the device state and the last memory. Saving can write guest pages,
 * so it comes before the last look at the dirty log; the state is under way while the memory is, and loaded
 * as soon as that is there. Until COMMIT everything may fail. */
static int send_last(struct move *mv, struct state_writer *w, struct error *err)
{
	const uint8_t *buf;
	size_t len;
	uint64_t at = clock_now_us();
	int rc = machine_save(mv->vm->machine, w, err);
	if (!rc)
		rc = state_writer_finish(w, &buf, &len, err);
	if (!rc && len > FRAME_STATE_MAX_BYTES)
		rc = error_set(err, E2BIG, "device state of %zu bytes", len);
	mv->blackout.state_us = lap(&at);
	if (!rc)
		rc = source_send_sums(mv, err);
	if (!rc)
		rc = move_link_send_bytes(mv->link, FRAME_DEVICE_STATE, buf, (uint32_t)len, err);
	if (!rc)
		rc = mv->postcopy.chosen ? source_postcopy_send(mv, err) : mem_sender_finish(mv->sender, err);
	struct frame f;
	if (!rc)
		rc = move_link_wait(mv->link, 1u << FRAME_READY, mv->vm->cfg->silence_ms / 2, &f, err);
	if (rc)
		return rc;
	mv->ready_us = clock_now_us();
	count_transfer(mv, &f, mv->ready_us - at);
	frame_release(&f);
	source_proof_ready(mv);
	return mv->compare.wanted ? source_compare(mv, buf, len, err) : 0;
}

void source_unpause(struct move *mv)
{
	struct error e = ERROR_INIT;
	if (mv->paused_by_us && machine_start(mv->vm->machine, &e)) {
		log_error("resume: %s", e.message);
		vm_set_state(mv->vm, VM_CRASHED, e.message);
	}
	mv->paused_by_us = false;
	pthread_mutex_lock(&mv->lock);
	mv->deciding = false;
	pthread_mutex_unlock(&mv->lock);
}

/* 0: READY; -EAGAIN: could not quiesce, the guest runs again; else failed. */
static int pause_and_send(struct move *mv, struct state_writer *w, struct error *err)
{
	struct vm *vm = mv->vm;
	mv->blackout = (struct blackout){0};
	/* A resume by a person that has looked at the state already must not start the guest after this. */
	pthread_mutex_lock(&vm->run_lock);
	pthread_mutex_lock(&mv->lock);
	mv->deciding = true;
	pthread_mutex_unlock(&mv->lock);
	uint64_t at = clock_now_us();
	if (mv->opt.quick) {
		mv->blackout.quick_us = at - mv->pause_us;
	} else {
		mv->was_paused = vm_get_state(vm) == VM_PAUSED;
		mv->pause_us = at;
	}
	int rc = machine_pause(vm->machine, err);
	mv->blackout.stop_us = lap(&at);
	if (!rc)
		mv->paused_by_us = !mv->was_paused;
	source_pace_paused(mv);
	pthread_mutex_unlock(&vm->run_lock);
	if (rc)
		return rc;
	rc = machine_drain(vm->machine, vm->cfg->drain_timeout_ms, err);
	if (!rc && (!source_storage_consistent(mv) || !source_take_sums(mv)))
		rc = error_set(err, ETIMEDOUT, "a disk fell behind at the last moment");
	mv->blackout.drain_us = lap(&at);
	/* with --quick it has stood still for long, and did nothing */
	if (rc == -ETIMEDOUT && !mv->opt.quick) {
		source_unpause(mv);
		return -EAGAIN;
	}
	if (!rc)
		rc = source_shared_release(mv, err);
	if (!rc)
		rc = send_last(mv, w, err);
	return rc == -EAGAIN ? -EIO : rc; /* that would say that the guest runs */
}

/* The state's room is made and the record written before the guest stops: what can be paid by a guest that
 * runs is. */
static int one_handover(struct move *mv, struct error *err)
{
	struct state_writer *w = state_writer_create();
	int rc = w ? machine_prepare_save(mv->vm->machine, w, err) : error_errno(err, ENOMEM, "device state");
	if (!rc)
		rc = source_record_handing_over(mv, err);
	if (!rc) {
		source_set_phase(mv, MOVE_HANDOVER, "handover");
		rc = pause_and_send(mv, w, err);
	}
	state_writer_free(w);
	return rc;
}

/* Until the rest of the memory is expected to fit, and every disk is flushed and compared at the destination.
 */
static int converge(struct move *mv, struct error *err)
{
	bool limit_hit;
	int rc = mem_sender_precopy(mv->sender, &limit_hit, err);
	if (!rc)
		rc = source_pace_judge(mv, limit_hit, err);
	/* Disks may take long, and nothing is won by a guest that is slow meanwhile. */
	if (!source_verified(mv) || mv->opt.mirror_buffered)
		source_pace_release(mv);
	/* What a session that broke meanwhile left is copied and compared again. */
	if (!rc)
		rc = source_verify(mv, err);
	/* The first flush drained what was buffered; meanwhile the guest went on in its memory. */
	if (!rc && mv->opt.mirror_buffered && mv->attempts == 1) {
		rc = mem_sender_precopy(mv->sender, &limit_hit, err);
		if (!rc)
			rc = source_pace_judge(mv, limit_hit, err);
		if (!rc)
			rc = source_verify(mv, err);
	}
	return rc;
}

static int try_handover(struct move *mv, struct error *err)
{
	for (mv->attempts = 1;; mv->attempts++) {
		source_set_phase(mv, MOVE_MEMORY, "memory");
		int rc = converge(mv, err);
		if (!rc && mv->attempts == 1)
			rc = source_phase_with_peer(mv, "prepare", err);
		/* Both hosts' disks were busy since the last round; what the guest has written meanwhile goes
		 * while it runs. */
		bool limit_hit = false;
		if (!rc && source_postcopy_catches_up(mv))
			rc = mem_sender_catch_up(mv->sender, &limit_hit, err);
		if (!rc)
			rc = source_pace_judge(mv, limit_hit, err);
		if (!rc)
			rc = source_postcopy_prepare(mv, err);
		mv->handover_begun |= !rc;
		if (rc)
			return rc;
		if (mv->opt.rehearse) {
			mv->rehearsed = true;
			return error_set(err, ECANCELED, "the rehearsal is over");
		}
		rc = one_handover(mv, err);
		if (rc != -EAGAIN)
			return rc;
		log_warn("handover attempt %u: %s; the guest runs on", mv->attempts, err ? err->message : "");
		if (mv->attempts == HANDOVER_ATTEMPTS)
			return error_set(err, ETIMEDOUT,
					 "the guest's disks could not be quiesced in %u attempts",
					 mv->attempts);
		source_pace_again(mv);
	}
}

int source_handover(struct move *mv, struct error *err)
{
	int rc = try_handover(mv, err);
	source_pace_release(mv);
	return rc;
}

/* How much of the time up to RUNNING, at most `most`, the guest ran at the destination already: its vCPUs go
 * before the owner's record is durable, only what they do to the outside waits for that. */
static uint64_t held_effects_us(const struct frame *running, uint64_t most)
{
	json_int_t all = json_integer_value(json_object_get(running->json, "since_commit_us"));
	json_int_t vcpus = json_integer_value(json_object_get(running->json, "vcpus_us"));
	if (vcpus < 0 || all <= vcpus)
		return 0;
	return (uint64_t)(all - vcpus) < most ? (uint64_t)(all - vcpus) : most;
}

/* Sends COMMIT and learns the outcome: 0 = the destination runs the VM; -ECANCELED = it promised not to. */
int source_commit(struct move *mv, struct error *err)
{
	fault_point("after-ready");
	if (!source_storage_consistent(mv) || !source_verified(mv))
		return error_set(err, EIO, "a disk became unsynced after READY");
	pthread_mutex_lock(&mv->lock);
	if (mv->interrupted) {
		error_copy(err, &mv->why);
		pthread_mutex_unlock(&mv->lock);
		return err ? err->code : -EIO;
	}
	mv->commit = true; /* from here nobody may cancel, and only the destination's word settles */
	mv->phase = MOVE_COMMITTED;
	pthread_mutex_unlock(&mv->lock);
	uint64_t stopped_us = mv->pause_us ? clock_now_us() - mv->pause_us : 0;
	json_t *o =
		json_pack("{s:I, s:b}", "stopped_us", (json_int_t)stopped_us, "paused", (int)mv->was_paused);
	struct error lost = ERROR_INIT;
	int rc = move_link_send(mv->link, FRAME_COMMIT, o, &lost);
	json_decref(o);
	fault_point("after-commit");
	struct frame f;
	if (!rc)
		rc = move_link_wait(mv->link, 1u << FRAME_RUNNING | 1u << FRAME_ABANDONED, 0, &f, &lost);
	if (!rc) {
		if (mv->pause_us) {
			mv->running_us = clock_now_us() - held_effects_us(&f, clock_now_us() - mv->ready_us);
			mv->blackout.resume_us = mv->running_us - mv->ready_us;
		}
		mv->peer_started = !source_postcopy_open(mv);
		bool abandoned = f.type == FRAME_ABANDONED;
		const char *s = json_string_value(json_object_get(f.json, "reason"));
		if (abandoned)
			error_set(err, ECANCELED, "%s gave the VM back: %s", mv->opt.peer,
				  s ? s : "no reason given");
		frame_release(&f);
		return abandoned ? -ECANCELED : 0;
	}
	log_warn("after COMMIT: %s", lost.message);
	if (mv->vm->cold) {
		vm_set_state(mv->vm, VM_IN_DOUBT, "COMMIT was sent and the channel is gone");
		return error_set(err, EOWNERDEAD, "%s has not said whether it has the VM: %s", mv->opt.peer,
				 lost.message);
	}
	switch (source_settle(mv, err)) {
	case HANDOVER_ACT_RECORD_MOVED:
		return 0;
	case HANDOVER_ACT_TAKE_BACK:
		return -ECANCELED;
	default:
		return -EOWNERDEAD; /* a person decided, or the process has to end undecided */
	}
}

void source_count_disks(struct move *mv)
{
	for (unsigned i = 0; i < mv->vm->def.ndisks; i++) {
		struct mirror_stats st;
		mirror_stats(mv->vm->disks[i].mirror, &st);
		uint64_t copied = st.data_bytes_copied - mv->counted[i].copied;
		uint64_t mirrored = st.mirrored_bytes - mv->counted[i].mirrored;
		mv->counted[i].copied += copied;
		mv->counted[i].mirrored += mirrored;
		mv->mirrored_bytes += mirrored;
		mv->disk_bytes += copied + mirrored;
		mv->wire_bytes += copied + mirrored;
	}
	uint64_t layers = mv->layer_copied_bytes - mv->layer_counted_bytes;
	mv->layer_counted_bytes += layers;
	mv->disk_bytes += layers;
	mv->wire_bytes += layers;
}

void source_close_channels(struct move *mv)
{
	pthread_mutex_lock(&mv->lock);
	struct mem_sender *s = steal_ptr(mv->sender);
	if (s)
		mem_sender_stats(s, &mv->mem);
	pthread_mutex_unlock(&mv->lock);
	mem_sender_free(s);
	pthread_mutex_lock(&mv->lock);
	unsigned n = mv->nmemory;
	mv->nmemory = 0;
	pthread_mutex_unlock(&mv->lock);
	source_postcopy_close(mv);
	for (unsigned i = 0; i < n; i++) {
		mv->wire_bytes += conn_bytes_sent(mv->memory[i]);
		conn_close(mv->memory[i]);
		mv->memory[i] = NULL;
	}
	pthread_mutex_lock(&mv->lock);
	source_count_disks(mv);
	pthread_mutex_unlock(&mv->lock);
	source_storage_stop(mv);
	pthread_mutex_lock(&mv->lock);
	struct move_link *link = steal_ptr(mv->link);
	while (mv->link_users)
		pthread_cond_wait(&mv->changed, &mv->lock);
	pthread_mutex_unlock(&mv->lock);
	if (link)
		mv->wire_bytes += conn_bytes_sent(move_link_conn(link));
	move_link_free(link);
	tls_context_free(mv->tls);
	mv->tls = NULL;
}

static int record_owner(struct move *mv, const struct error *why, struct error *err)
{
	struct vm_record rec;
	int rc = vm_record(mv->vm, &rec, err);
	if (rc || rec.state != HANDOVER_HANDING_OVER)
		return rc;
	struct vm_transition t = {
		.from = HANDOVER_HANDING_OVER,
		.from_epoch = rec.epoch,
		.to = HANDOVER_OWNER,
		.to_epoch = rec.epoch,
		.flags_clear = RECORD_KEEP_SOURCE,
		.reason = why->message,
	};
	return vm_record_transition(mv->vm, &t, err);
}

/* The move is off; the guest goes on here. The record first: a resumed guest with a handing-over record would
 * be in doubt. A medium that fails for a while must not cost the guest its memory: tried for as long as a
 * silent peer is. */
static bool take_back(struct move *mv, const struct error *why)
{
	struct vm *vm = mv->vm;
	struct error e = ERROR_INIT;
	uint64_t until = clock_now_ms() + SETTLE_SILENCES * (uint64_t)vm->cfg->silence_ms;
	while (record_owner(mv, why, &e)) {
		log_error("record: %s", e.message);
		vm_set_state(vm, VM_IN_DOUBT, e.message);
		if (clock_now_ms() >= until)
			return false;
		clock_sleep_ms(RECORD_RETRY_MS);
		e = ERROR_INIT;
	}
	source_shared_take_back(mv);
	source_unpause(mv);
	struct vm_record rec;
	if (!vm_record(vm, &rec, NULL) && rec.state == HANDOVER_OWNER_UNCONFIRMED &&
	    move_forced_start(vm, &e))
		log_error("%s", e.message);
	if (vm_get_state(vm) == VM_IN_DOUBT)
		vm_set_state(vm, vm->cold ? VM_STOPPED : mv->was_paused ? VM_PAUSED : VM_RUNNING, NULL);
	return true;
}

struct outcome source_end_failed(struct move *mv, const struct error *why)
{
	if (mv->link && !mv->commit) {
		json_t *o = json_pack("{s:o}", "reason", jsonl_text(why->message));
		if (mv->rehearsed)
			json_object_set_new(o, "rehearsed", json_true());
		move_link_send(mv->link, FRAME_ABORT, o, NULL);
		json_decref(o);
	}
	bool back = take_back(mv, why);
	if (back && mv->pause_us && !mv->running_us)
		mv->running_us = clock_now_us();
	source_close_channels(mv);
	pthread_mutex_lock(&mv->vm->lock);
	bool crashed = mv->vm->guest_crashed || mv->vm->state == VM_CRASHED;
	pthread_mutex_unlock(&mv->vm->lock);
	if (!back)
		return (struct outcome){"in-doubt", EXIT_IN_DOUBT};
	if (crashed)
		return (struct outcome){"crashed", EXIT_CRASHED};
	if (mv->rehearsed)
		return (struct outcome){"rehearsed", 0};
	if (mv->cancelled || mv->pace.cancelled)
		return (struct outcome){"cancelled", EXIT_CANCELLED};
	if (!mv->negotiated)
		return (struct outcome){"refused", EXIT_REFUSED};
	return (struct outcome){"failed", EXIT_FAILED};
}

int source_end_moved(struct move *mv, struct error *err)
{
	struct vm *vm = mv->vm;
	struct vm_record rec;
	int rc = vm_record(vm, &rec, err);
	if (!rc && rec.state == HANDOVER_HANDING_OVER) {
		struct vm_transition t = {
			.from = HANDOVER_HANDING_OVER,
			.from_epoch = rec.epoch,
			.to = HANDOVER_MOVED,
			.to_epoch = rec.epoch,
			.flags_set = mv->peer_started ? RECORD_PEER_STARTED : 0,
			.flags_clear = RECORD_POWERED_ON,
		};
		rc = vm_record_transition(vm, &t, err);
	}
	if (rc)
		return rc;
	fault_point("moved-recorded");
	bool paging = source_postcopy_open(mv);
	source_set_phase(mv, paging ? MOVE_POSTCOPY : MOVE_CLEANUP, paging ? "postcopy" : "cleanup");
	struct frame f;
	json_t *told = json_pack("{s:o}", "figures", source_figures(mv));
	if (mv->link && !move_link_failed(mv->link, NULL) &&
	    !move_link_send(mv->link, FRAME_MOVED, told, NULL) &&
	    !move_link_wait(mv->link, 1u << FRAME_MOVED_ACK, vm->cfg->silence_ms, &f, NULL)) {
		frame_release(&f);
		if (!vm_record(vm, &rec, NULL)) {
			rec.flags |= RECORD_PEER_ACKED;
			record_store(vm->record, &rec, NULL);
		}
	}
	json_decref(told);
	if (paging) {
		source_postcopy_finish(mv);
		source_set_phase(mv, MOVE_CLEANUP, "cleanup");
	}
	source_close_channels(mv);
	return 0;
}
