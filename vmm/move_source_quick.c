/* SPDX-License-Identifier: Apache-2.0 */
/*
 * --quick: the guest stands still from before the disks are copied until it runs at the destination, so that
 * nothing is sent or compared twice and no write has to go to both sides. The states and messages are those
 * of every move.
 */
#include <errno.h>
#include <stdio.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "vmm/move_source.h"

int source_quick_parse(json_t *o, struct move_options *opt, struct error *err)
{
	json_t *predicted = json_object_get(o, "predicted_stop_ms");
	opt->quick = json_is_true(json_object_get(o, "quick"));
	if (!opt->quick)
		return 0;
	const char *what = opt->postcopy != MOVE_POSTCOPY_NEVER ? "--postcopy"
			   : opt->mirror_buffered		? "--mirror buffered"
								: NULL;
	if (what)
		return error_set(err, EINVAL, "%s is for a guest that runs while it moves: not with --quick",
				 what);
	if (predicted && json_is_integer(predicted) && json_integer_value(predicted) > 0)
		opt->predicted_stop_ms = (uint64_t)json_integer_value(predicted);
	/* Only one that was asked for is a budget here. */
	opt->quick_most_ms = json_object_get(o, "max_downtime_ms") ? opt->max_downtime_ms : 0;
	return 0;
}

static void tell(struct move *mv)
{
	char text[200];
	if (mv->opt.predicted_stop_ms)
		snprintf(text, sizeof text, "the guest stands still from here on, for about %.1f s",
			 (double)mv->opt.predicted_stop_ms / 1000);
	else
		snprintf(text, sizeof text, "the guest stands still from here on");
	log_info("move to %s: %s", mv->opt.peer, text);
	json_t *ev = json_pack("{s:s, s:I, s:s}", "event", "message", "ms",
			       (json_int_t)(clock_now_ms() - mv->t_start_ms), "text", text);
	if (ev && mv->opt.predicted_stop_ms)
		json_object_set_new(ev, "predicted_downtime_ms",
				    json_integer((json_int_t)mv->opt.predicted_stop_ms));
	move_events_emit(mv->events, ev, false);
}

int source_quick_pause(struct move *mv, struct error *err)
{
	struct vm *vm = mv->vm;
	if (!mv->opt.quick || vm->cold)
		return 0;
	pthread_mutex_lock(&vm->run_lock);
	mv->was_paused = vm_get_state(vm) == VM_PAUSED;
	pthread_mutex_lock(&mv->lock);
	mv->deciding = true; /* nobody resumes it meanwhile */
	mv->pause_us = clock_now_us();
	pthread_mutex_unlock(&mv->lock);
	int rc = machine_pause(vm->machine, err);
	if (!rc)
		mv->paused_by_us = !mv->was_paused;
	pthread_mutex_unlock(&vm->run_lock);
	if (!rc)
		rc = machine_drain(vm->machine, vm->cfg->drain_timeout_ms, err);
	if (rc) {
		/* its own disks, not the link, were too slow */
		struct error e = *err;
		return error_set(err, rc == -ETIMEDOUT ? EBUSY : rc, "the guest could not be stopped: %.200s",
				 e.message);
	}
	tell(mv);
	return 0;
}

bool source_quick_late(struct move *mv, struct error *why)
{
	SCOPE_LOCK(&mv->lock);
	if (!mv->opt.quick_most_ms || !mv->deciding || mv->commit || mv->interrupted)
		return false;
	uint64_t ms = (clock_now_us() - mv->pause_us) / 1000;
	if (ms <= mv->opt.quick_most_ms)
		return false;
	mv->pace.cancelled = true;
	error_set(why, ECANCELED,
		  "the guest has stood still for %llu ms, and %u ms are allowed (--max-downtime)",
		  (unsigned long long)ms, mv->opt.quick_most_ms);
	return true;
}
