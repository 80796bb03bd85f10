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

/* The limit where nobody gave one: a guest that stands still for far longer than was said is to run again. */
#define MOST_TIMES_PREDICTED 4
#define MOST_SPARE_MS	     10000
#define PREDICTED_MOST_MS    (UINT64_C(1000) * 3600 * 24 * 365)

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
	if (opt->predicted_stop_ms > PREDICTED_MOST_MS)
		opt->predicted_stop_ms = PREDICTED_MOST_MS;
	/* What is the default of a guest that runs is no budget here. */
	opt->quick_limited = json_object_get(o, "max_downtime_ms") != NULL;
	if (opt->quick_limited)
		opt->quick_most_ms = opt->max_downtime_ms;
	else if (opt->predicted_stop_ms)
		opt->quick_most_ms = MOST_TIMES_PREDICTED * opt->predicted_stop_ms + MOST_SPARE_MS;
	return 0;
}

int source_quick_options(const struct move_options *opt, struct error *err)
{
	if (!opt->quick || opt->quick_most_ms)
		return 0;
	return error_set(err, EINVAL,
			 "--quick: for how long the guest will stand still is not known: say for how long it "
			 "may (--max-downtime)");
}

static void tell(struct move *mv)
{
	char text[200], about[64] = "";
	if (mv->opt.predicted_stop_ms)
		snprintf(about, sizeof about, "for about %.1f s, and ",
			 (double)mv->opt.predicted_stop_ms / 1000);
	snprintf(text, sizeof text, "the guest stands still from here on, %sfor %.1f s at most", about,
		 (double)mv->opt.quick_most_ms / 1000);
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
	pthread_cond_broadcast(&mv->changed); /* the ticker looks when the time will be over */
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

uint64_t source_quick_deadline_ns(const struct move *mv)
{
	if (!mv->opt.quick || !mv->deciding || mv->commit || mv->interrupted || mv->phase == MOVE_ENDED)
		return UINT64_MAX;
	return (mv->pause_us + mv->opt.quick_most_ms * 1000) * 1000;
}

void source_quick_expire(struct move *mv)
{
	struct error why = ERROR_INIT;
	pthread_mutex_lock(&mv->lock);
	uint64_t now = clock_now_ns();
	bool late = source_quick_deadline_ns(mv) <= now;
	if (late) {
		mv->pace.cancelled = true;
		error_set(&why, ECANCELED,
			  "the guest has stood still for %llu ms, and %llu ms are allowed (%s)",
			  (unsigned long long)(now / 1000 - mv->pause_us) / 1000,
			  (unsigned long long)mv->opt.quick_most_ms,
			  mv->opt.quick_limited
				  ? "--max-downtime"
				  : "by what was predicted; --max-downtime allows more or less");
	}
	pthread_mutex_unlock(&mv->lock);
	if (late)
		source_interrupt(mv, &why);
}
