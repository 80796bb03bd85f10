/* SPDX-License-Identifier: Apache-2.0 */
#include "memxfer/pace.h"

#include <math.h>
#include <stddef.h>

#define PAGE_BYTES 4096.0
/* What the last round costs besides its data: waking threads, the barrier, the end. */
#define FINAL_FIXED_US 500
/* The end is acknowledged, then COMMIT answered. */
#define ROUND_TRIPS 2
/* So many rounds in a row that do not shrink enough, and the guest is slowed: fewer may be a burst. */
#define LATE_ROUNDS 3
/* So many rounds, and so long, without getting any smaller, with all done that may be done: that is how it
 * is. */
#define STALL_ROUNDS 8
#define STALL_MS     10000
#define STALL_SHRINK 0.9
/* Of what is left of the limits, so much is planned with: a working set hides part of what is written to it,
 * and the speed lags behind. */
#define PLANNED_PART  0.75
#define SHRINK_LEAST  0.1 /* more than this no single round is asked for */
#define SLOWER_MOST   4.0 /* a round may mislead: the speed changes by these factors at most */
#define FASTER_MOST   1.25
#define FASTER_MARGIN 0.8 /* only what shrinks clearly faster than it must is given speed back */

uint64_t mem_predict_us(const struct mem_prediction *p, uint64_t *fixed_us)
{
	const struct mem_pause_costs *c = &p->pause;
	double bytes = (double)p->dirty_bytes + p->dirty_bytes_per_s * (double)c->lead_us / 1e6;
	double data_us = bytes > 0 ? 1e18 : 0;
	uint64_t fixed = c->stop_us + c->drain_us + c->state_us + c->load_us + p->collect_us +
			 ROUND_TRIPS * p->round_trip_us + FINAL_FIXED_US;

	if (bytes > 0 && p->rate_bytes_per_s > 0)
		data_us = bytes / p->rate_bytes_per_s * 1e6;
	if (fixed_us)
		*fixed_us = fixed;
	if (data_us >= (double)MEM_PREDICTION_MAX_US)
		return MEM_PREDICTION_MAX_US + fixed;
	return (uint64_t)data_us + fixed;
}

void mem_pace_init(struct mem_pace *p, const struct mem_pace_options *opt)
{
	*p = (struct mem_pace){.opt = *opt, .speed = 1};
	mem_pace_again(p);
}

void mem_pace_again(struct mem_pace *p)
{
	p->least_bytes = UINT64_MAX;
	p->late = p->stalled = 0;
}

static double least_speed(const struct mem_pace *p)
{
	return 1 - p->opt.slow_max_percent / 100.0;
}

/* What part of this round the next one may have for all limits to hold: those of rounds and time are reached
 * at the end of a geometric series. */
static double limit_shrink(const struct mem_pace *p, const struct mem_pace_round *r)
{
	const struct mem_pace_options *o = &p->opt;
	double shrink = 1, left = (double)r->left_bytes;
	double target = (double)(o->budget_us - r->fixed_us) / 1e6 * r->rate_bytes_per_s;

	if (target < PAGE_BYTES)
		target = PAGE_BYTES;
	if (o->max_rounds && target < left)
		shrink = pow(target / left, 1 / (PLANNED_PART * (o->max_rounds - r->rounds)));
	if (o->max_time_ms) {
		double next_ms = left / (double)r->began_bytes * (double)r->ns / 1e6;

		shrink =
			fmin(shrink, 1 - next_ms / (PLANNED_PART * (o->max_time_ms - (double)r->elapsed_ms)));
	}
	return fmax(shrink, SHRINK_LEAST);
}

/* Twice the speed dirties twice as much: true of a guest that is busy with it. One that has its pace from
 * elsewhere makes up for lost time, and is slowed further round by round until that ends. */
static void set_speed(struct mem_pace *p, double ratio, double limit)
{
	double allowed = fmin(limit, p->opt.shrink);
	/* Who gets there by himself, if slowly, is left alone. */
	double late = p->speed < 1 ? allowed : fmin(limit, (1 + p->opt.shrink) / 2);
	double factor = allowed / ratio;

	p->late = ratio > late ? p->late + 1 : 0;
	if (p->late && (p->speed < 1 || p->late >= LATE_ROUNDS))
		p->speed *= fmax(factor, 1 / SLOWER_MOST);
	else if (ratio < allowed * FASTER_MARGIN)
		p->speed *= fmin(factor, FASTER_MOST);
	p->speed = fmin(fmax(p->speed, least_speed(p)), 1);
}

enum mem_pace_verdict mem_pace_next(struct mem_pace *p, const struct mem_pace_round *r)
{
	const struct mem_pace_options *o = &p->opt;
	bool helpless = r->fixed_us >= o->budget_us || p->speed <= least_speed(p);

	if (r->predicted_us <= o->budget_us)
		return MEM_PACE_FITS;
	if ((o->max_rounds && r->rounds >= o->max_rounds) ||
	    (o->max_time_ms && r->elapsed_ms >= o->max_time_ms))
		return MEM_PACE_OVER;
	if ((double)r->left_bytes < STALL_SHRINK * (double)p->least_bytes) {
		p->least_bytes = r->left_bytes;
		p->least_ms = r->elapsed_ms;
		p->stalled = 0;
	} else if (helpless && ++p->stalled >= STALL_ROUNDS && r->elapsed_ms - p->least_ms >= STALL_MS) {
		return MEM_PACE_OVER;
	}
	/* Where the fixed part alone breaks the budget, a slow guest would be slowed for nothing. */
	if (r->fixed_us >= o->budget_us)
		p->speed = 1;
	else if (r->began_bytes && r->left_bytes)
		set_speed(p, (double)r->left_bytes / (double)r->began_bytes, limit_shrink(p, r));
	return MEM_PACE_ON;
}

static double dirtied_at(const double *dirties, unsigned n, double cap, double least)
{
	double sum = 0;

	for (unsigned i = 0; i < n; i++)
		sum += fmin(dirties[i], fmax(cap, dirties[i] * least));
	return sum;
}

void mem_pace_spread(const double *dirties, unsigned n, double speed, double least, double *speeds)
{
	double all = 0, low = 0, high = 0;

	for (unsigned i = 0; i < n; i++) {
		all += dirties[i];
		high = fmax(high, dirties[i]);
	}
	/* The rate that no vCPU may exceed: what they dirty together grows with it. */
	for (unsigned i = 0; i < 60; i++) {
		double cap = (low + high) / 2;

		if (dirtied_at(dirties, n, cap, least) > speed * all)
			high = cap;
		else
			low = cap;
	}
	for (unsigned i = 0; i < n; i++) {
		double s = all > 0 ? (dirties[i] > high ? high / dirties[i] : 1) : speed;

		speeds[i] = speed >= 1 ? 1 : fmin(fmax(s, least), 1);
	}
}
