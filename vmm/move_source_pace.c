/* SPDX-License-Identifier: Apache-2.0 */
/*
 * --max-downtime, --priority and --on-exceed at the source: what the prediction of the downtime is fed with,
 * the brake that memxfer/pace.h pulls, and what is done when the prediction still breaks the budget.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "vmm/move_source.h"

/* How far --priority lets the guest be slowed, and how fast the rounds are to get smaller by that. */
static const struct {
	const char *name;
	unsigned slow_max_percent;
	double shrink;
} priorities[] = {
	[MOVE_PRIORITY_GUEST] = {"guest", 0, 0.75},
	[MOVE_PRIORITY_BALANCED] = {"balanced", 75, 0.75},
	[MOVE_PRIORITY_FINISH] = {"finish", 99, 0.5},
};

static const char *const exceeds[] = {[MOVE_EXCEED_THROTTLE] = "throttle",
				      [MOVE_EXCEED_CANCEL] = "cancel",
				      [MOVE_EXCEED_POSTCOPY] = "postcopy"};

int source_parse_pace(json_t *o, struct move_options *opt, struct error *err)
{
	json_t *v = json_object_get(o, "priority");
	const char *word = json_string_value(v);
	unsigned i;
	for (i = 0; word && i < ARRAY_SIZE(priorities) && strcmp(word, priorities[i].name);)
		i++;
	if (!v || json_is_null(v))
		i = MOVE_PRIORITY_BALANCED;
	else if (!word || i == ARRAY_SIZE(priorities))
		return error_set(err, EINVAL, "option priority: guest, balanced or finish is needed");
	opt->priority = (enum move_priority)i;
	v = json_object_get(o, "on_exceed");
	word = json_string_value(v);
	for (i = 0; word && i < ARRAY_SIZE(exceeds) && strcmp(word, exceeds[i]);)
		i++;
	if (v && !json_is_null(v) && (!word || i == ARRAY_SIZE(exceeds)))
		return error_set(err, EINVAL, "option on_exceed: cancel, throttle or postcopy is needed");
	opt->on_exceed = (enum move_exceed)i;
	return 0;
}

/* --- the brake --- */

static void tell(struct move *mv, const char *text)
{
	log_info("move to %s: %s", mv->opt.peer, text);
	move_events_emit(mv->events,
			 json_pack("{s:s, s:I, s:s}", "event", "message", "ms",
				   (json_int_t)(clock_now_ms() - mv->t_start_ms), "text", text),
			 false);
}

/* mv->lock held. */
static void count_slowed(struct source_pace *p, unsigned percent)
{
	uint64_t now = clock_now_ms();
	if (p->slowed_percent)
		p->slowed_ms += now - p->since_ms;
	p->since_ms = now;
	p->slowed_percent = percent;
	if (percent > p->most_percent)
		p->most_percent = percent;
}

static void set_speed(void *opaque, double speed)
{
	struct move *mv = opaque;
	struct error err = ERROR_INIT;
	double least = 1 - priorities[mv->opt.priority].slow_max_percent / 100.0;
	struct mem_stats st;
	mem_sender_stats(mv->sender, &st);
	if (machine_slow(mv->vm->machine, speed, least, &err))
		log_warn("move to %s: %s", mv->opt.peer, err.message);
	pthread_mutex_lock(&mv->lock);
	/* what interrupted the move meanwhile gave the speed back too early */
	if (mv->interrupted)
		machine_unslow(mv->vm->machine);
	bool was = mv->pace.slowed_percent > 0;
	unsigned vcpus, percent = machine_slowed(mv->vm->machine, &vcpus);
	count_slowed(&mv->pace, percent);
	pthread_mutex_unlock(&mv->lock);
	char text[200];
	if (percent && !was) {
		snprintf(text, sizeof text,
			 "the guest dirties %.1f MB/s and %.1f MB/s are sent: it is slowed down until it has "
			 "moved",
			 (double)st.dirty_bytes_per_s / 1e6, (double)st.rate_bytes_per_s / 1e6);
		tell(mv, text);
	} else if (was && !percent) {
		tell(mv, "the guest is not slowed down any more");
	}
	log_debug("move to %s: %u vCPUs slowed by up to %u %%", mv->opt.peer, vcpus, percent);
}

void source_pace_release(struct move *mv)
{
	machine_unslow(mv->vm->machine);
	pthread_mutex_lock(&mv->lock);
	count_slowed(&mv->pace, 0);
	pthread_mutex_unlock(&mv->lock);
}

/* --- the budget --- */

static struct mem_pause_costs pause_costs(struct move *mv)
{
	struct mem_pause_costs c = {.lead_us = mv->pace.lead_us};
	/* the first time: the record is written before the pause, and so it was when the move began */
	if (!c.lead_us)
		c.lead_us = __atomic_load_n(&mv->vm->record_us, __ATOMIC_RELAXED);
	machine_pause_costs(mv->vm->machine, &c);
	return c;
}

void source_pace_options(struct move *mv, struct mem_sender_options *so)
{
	so->downtime_target_ms = mv->opt.max_downtime_ms;
	so->max_rounds = source_postcopy_rounds(mv);
	so->max_time_ms = mv->opt.max_time_ms;
	/* One that may go before its memory has need not be slowed. */
	so->slow_max_percent = mv->postcopy.agreed ? 0 : priorities[mv->opt.priority].slow_max_percent;
	so->shrink = priorities[mv->opt.priority].shrink;
	so->brake = (struct guest_brake){mv, set_speed};
	so->pause = pause_costs(mv);
	machine_slow_prepare(mv->vm->machine);
}

void source_pace_paused(struct move *mv)
{
	/* with --quick the guest had stood still before */
	mv->pace.lead_us = mv->pause_us > mv->pace.judged_us ? mv->pause_us - mv->pace.judged_us : 0;
	source_pace_release(mv);
}

void source_pace_again(struct move *mv)
{
	struct mem_pause_costs c = pause_costs(mv);
	mem_sender_pause_costs(mv->sender, &c);
}

int source_pace_judge(struct move *mv, bool limit_hit, struct error *err)
{
	struct mem_stats st;
	mem_sender_stats(mv->sender, &st);
	pthread_mutex_lock(&mv->lock);
	mv->pace.predicted_us = st.predicted_downtime_us;
	mv->pace.judged_us = clock_now_us();
	/* post-copy is the answer to that; and who stands still anyway has another budget */
	limit_hit &= !mv->postcopy.agreed && !mv->opt.quick;
	bool cancel = limit_hit && mv->opt.on_exceed == MOVE_EXCEED_CANCEL;
	mv->pace.cancelled |= cancel;
	pthread_mutex_unlock(&mv->lock);
	if (cancel)
		return error_set(
			err, ECANCELED,
			"a downtime of about %.0f ms is expected after %u rounds, and %u ms are allowed "
			"(--max-downtime)",
			(double)st.predicted_downtime_us / 1000, st.round, mv->opt.max_downtime_ms);
	if (limit_hit)
		log_warn("move to %s: a downtime of about %llu us is expected after %u rounds, over the "
			 "budget of "
			 "%u ms",
			 mv->opt.peer, (unsigned long long)st.predicted_downtime_us, st.round,
			 mv->opt.max_downtime_ms);
	return 0;
}

/* --- what is told of it; mv->lock held --- */

static void add_prediction(json_t *ev, uint64_t us)
{
	if (us && us < MEM_PREDICTION_MAX_US)
		json_object_set_new(ev, "predicted_downtime_ms", json_real((double)us / 1000));
}

void source_pace_progress(struct move *mv, json_t *ev)
{
	unsigned vcpus = 0, percent = 0;
	if (!mv->mem.total_bytes)
		return;
	percent = machine_slowed(mv->vm->machine, &vcpus);
	add_prediction(ev, mv->opt.quick ? mv->opt.predicted_stop_ms * 1000 : mv->mem.predicted_downtime_us);
	json_object_set_new(ev, "guest_slowed_percent", json_integer(percent));
	json_object_set_new(ev, "guest_slowed_vcpus", json_integer(vcpus));
}

void source_pace_result(struct move *mv, json_t *ev)
{
	add_prediction(ev, mv->opt.quick ? mv->opt.predicted_stop_ms * 1000 : mv->pace.predicted_us);
	json_object_set_new(ev, "max_downtime_ms", json_integer(mv->opt.max_downtime_ms));
	json_object_set_new(ev, "guest_slowed_percent", json_integer(mv->pace.most_percent));
	json_object_set_new(ev, "guest_slowed_ms", json_integer((json_int_t)mv->pace.slowed_ms));
}
