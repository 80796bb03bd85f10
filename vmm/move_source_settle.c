/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "host/ask.h"
#include "host/exit.h"
#include "vmm/move_source.h"

#define ASK_EVERY_MS 1000

/* The words for the command's exit 6. */
static void say_in_doubt(struct move *mv, const struct error *why)
{
	char sentence[800];
	snprintf(sentence, sizeof sentence,
		 "%s was handed over to %s, which has not said whether it runs (%s). The VM is paused here "
		 "and goes on asking; "
		 "when %s is reachable again it settles by itself. If %s is powered off for good: snmigrate "
		 "resolve %s --run-here",
		 mv->vm->def.name, mv->opt.peer, why->message, mv->opt.peer, mv->opt.peer, mv->vm->def.name);
	vm_set_state(mv->vm, VM_IN_DOUBT, sentence);
	source_emit_end(mv, "in-doubt", EXIT_IN_DOUBT, sentence, true);
}

/* A person said what to do. Returns true if that ended the matter; *act tells. Called with mv->lock held. */
static bool resolve_by_hand(struct move *mv, bool answered, enum handover_action *act)
{
	struct vm *vm = mv->vm;
	struct error e = ERROR_INIT;
	struct vm_record rec, to;
	struct handover_self self = {.live = true, .channel_up = false, .attempt_open = true, .commit = true};
	bool ended = false;
	int rc = vm_record(vm, &rec, &e);
	if (!rc && !strcmp(mv->resolve, "run-here") && answered) {
		rc = error_set(&e, EPERM,
			       "VM %s: host %s answers, so it has power; see snmigrate resolve %s on both",
			       vm->def.name, mv->opt.peer, vm->def.name);
	} else if (!rc && !strcmp(mv->resolve, "run-here")) {
		rc = handover_run_here(&rec, &self, &to, &e);
		if (!rc)
			rc = record_compare_and_set(vm->record, rec.state, rec.epoch, &to, NULL, &e);
		if (!rc) {
			*act = HANDOVER_ACT_TAKE_BACK;
			ended = true;
		}
	} else if (!rc && !strcmp(mv->resolve, "give-up")) {
		enum handover_action a = handover_give_up(&rec, &self, &e);
		if (a == HANDOVER_ACT_NONE) {
			rc = e.code ? e.code : -EPERM;
		} else {
			/* The record stays handing-over; only the paused guest's memory goes, with this
			 * process. */
			*act = HANDOVER_ACT_ASK;
			ended = true;
		}
	} else if (!rc && strcmp(mv->resolve, "ask")) {
		rc = error_set(&e, EINVAL, "resolve: unknown way '%s'", mv->resolve);
	}
	mv->resolve_result = e;
	if (rc && !e.code)
		mv->resolve_result.code = rc;
	mv->resolve[0] = '\0';
	mv->resolve_done = true;
	pthread_cond_broadcast(&mv->changed);
	return ended;
}

enum handover_action source_settle(struct move *mv, struct error *err)
{
	struct vm *vm = mv->vm;
	uint64_t first_ms = clock_now_ms();
	bool said = false;
	pthread_mutex_lock(&mv->lock);
	mv->settle_started = true;
	pthread_mutex_unlock(&mv->lock);
	/* the destination may be running by now: nobody shall read "running" at both hosts */
	vm_set_state(vm, VM_IN_DOUBT, "COMMIT was sent and the channel is gone: asking the other side");
	for (;;) {
		struct error e = ERROR_INIT;
		struct vm_record rec;
		struct handover_report report = {0};
		/* The channel is dead for the rules as well: the destination may still be told ABANDONED
		 * nowhere else. */
		struct handover_self self = {
			.live = true, .channel_up = false, .attempt_open = true, .commit = true};
		int rc = vm_record(vm, &rec, &e);
		if (!rc) {
			struct handover_report own;
			handover_describe(&rec, &self, false, &own);
			rc = ask_peer(vm->cfg, mv->opt.peer, mv->opt.address, vm->def.uuid, &own,
				      vm->cfg->silence_ms, &report, &e);
		}
		/* one that has forgotten the VM cannot run it */
		bool answered = !rc && report.state != HANDOVER_NONE;
		enum handover_action act =
			rc ? HANDOVER_ACT_ASK : handover_decide_source(&rec, &self, &report);
		if (!rc)
			log_info("%s says %s epoch %llu%s: %s", mv->opt.peer,
				 handover_state_name(report.state), (unsigned long long)report.epoch,
				 report.started ? ", started" : "", handover_action_name(act));
		switch (act) {
		case HANDOVER_ACT_RECORD_MOVED:
			mv->running_us = clock_now_us();
			mv->peer_started = report.started;
			return act;
		case HANDOVER_ACT_TAKE_BACK:
			error_set(err, ECANCELED, "%s promised not to start it", mv->opt.peer);
			return act;
		default:
			break;
		}
		if (!said && clock_now_ms() - first_ms >= SETTLE_SILENCES * (uint64_t)vm->cfg->silence_ms) {
			if (!e.code)
				error_set(&e, EAGAIN, "it has not decided yet");
			say_in_doubt(mv, &e);
			said = true;
		}
		SCOPE_LOCK(&mv->lock);
		uint64_t at = clock_now_ns() + ASK_EVERY_MS * UINT64_C(1000000);
		struct timespec until = clock_timespec(at);
		while (!mv->resolve[0] && clock_now_ns() < at)
			pthread_cond_timedwait(&mv->changed, &mv->lock, &until);
		if (mv->resolve[0] && resolve_by_hand(mv, answered, &act)) {
			error_set(err, ECANCELED, "settled by hand");
			return act;
		}
	}
}
