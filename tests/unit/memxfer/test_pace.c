/* SPDX-License-Identifier: Apache-2.0 */
/* The prediction of the downtime and the slowing of the guest, against simulated guests and links. */
#include <check.h>
#include <math.h>
#include <stdlib.h>

#include "memxfer/pace.h"
#include "tests/suite.h"

#define MB	    1e6
#define FIXED_US    2000
#define OVERHEAD_S  0.002 /* of every round */
#define ROUNDS_SEEN 10000

/* A guest writes pages of its working set at random. */
struct guest {
	double memory, working_set; /* bytes */
	double busy;		    /* bytes a second that it writes when it runs all the time... */
	double wanted;		    /* ...and, if not 0, those that it wants to: it makes up for time lost */
	double calm_after_s;	    /* then it stops writing; 0: never */
};

struct outcome {
	enum mem_pace_verdict verdict;
	unsigned rounds;
	double left, seconds, lowest, speed; /* of the guest: at its lowest, at the end */
};

static double written(const struct guest *g, double seconds, double at, double speed)
{
	double rate = g->busy * speed;

	if (g->wanted > 0 && g->wanted < rate)
		rate = g->wanted;
	if (g->calm_after_s > 0 && at > g->calm_after_s)
		return 0;
	return g->working_set * (1 - exp(-rate * seconds / g->working_set));
}

static struct outcome move(const struct guest *g, double link, const struct mem_pace_options *opt)
{
	struct outcome o = {.verdict = MEM_PACE_ON, .lowest = 1};
	struct mem_pace p;
	double began = g->memory;

	mem_pace_init(&p, opt);
	while (o.verdict == MEM_PACE_ON && o.rounds < ROUNDS_SEEN) {
		double took = began / link + OVERHEAD_S;
		struct mem_prediction f = {.rate_bytes_per_s = link, .pause = {.state_us = FIXED_US - 500}};
		struct mem_pace_round r;

		o.left = written(g, took, o.seconds, p.speed);
		o.seconds += took;
		f.dirty_bytes = (uint64_t)o.left;
		r = (struct mem_pace_round){
			.rounds = ++o.rounds,
			.elapsed_ms = (uint64_t)(o.seconds * 1000),
			.ns = (uint64_t)(took * 1e9),
			.began_bytes = (uint64_t)began,
			.left_bytes = (uint64_t)o.left,
			.rate_bytes_per_s = link,
		};
		r.predicted_us = mem_predict_us(&f, &r.fixed_us);
		ck_assert_uint_eq(r.fixed_us, FIXED_US);
		o.verdict = mem_pace_next(&p, &r);
		ck_assert(p.speed <= 1 && p.speed >= 1 - opt->slow_max_percent / 100.0 - 1e-9);
		o.lowest = fmin(o.lowest, p.speed);
		began = o.left;
	}
	o.speed = p.speed;
	return o;
}

static const struct mem_pace_options balanced = {
	.budget_us = 50000, .max_rounds = 30, .slow_max_percent = 75, .shrink = 0.75};
static const struct mem_pace_options finish = {
	.budget_us = 50000, .max_rounds = 30, .slow_max_percent = 99, .shrink = 0.5};
static const struct mem_pace_options never = {.budget_us = 50000, .max_rounds = 30, .shrink = 0.75};

START_TEST(test_prediction)
{
	struct mem_prediction p = {
		.dirty_bytes = 10000000,
		.rate_bytes_per_s = 100 * MB,
		.collect_us = 300,
		.round_trip_us = 1000,
		.pause = {.stop_us = 10, .drain_us = 20, .state_us = 30, .load_us = 40},
	};
	uint64_t fixed;

	ck_assert_uint_eq(mem_predict_us(&p, &fixed), 100000 + fixed);
	ck_assert_uint_eq(fixed, 300 + 2 * 1000 + 100 + 500);
	/* what the guest dirties between the last look and the pause */
	p.dirty_bytes_per_s = 50 * MB;
	p.pause.lead_us = 10000;
	ck_assert_uint_eq(mem_predict_us(&p, NULL), 105000 + fixed);
	/* nothing dirty needs no rate; anything else without one takes for ever */
	p.rate_bytes_per_s = 0;
	ck_assert_uint_ge(mem_predict_us(&p, NULL), MEM_PREDICTION_MAX_US);
	p.dirty_bytes = 0;
	p.dirty_bytes_per_s = 0;
	ck_assert_uint_eq(mem_predict_us(&p, NULL), fixed);
	p.rate_bytes_per_s = 1e-9;
	p.dirty_bytes = UINT64_MAX;
	ck_assert_uint_ge(mem_predict_us(&p, NULL), MEM_PREDICTION_MAX_US);
}
END_TEST

/* Dirtying at 0.1 to 0.8 of the link's rate, or in a small working set: fits by itself. */
START_TEST(test_who_converges_is_not_slowed)
{
	for (int i = 1; i <= 8; i++) {
		struct guest g = {.memory = 4000 * MB, .working_set = 1000 * MB, .busy = i * 10 * MB};
		struct outcome o = move(&g, 100 * MB, &balanced);

		ck_assert_int_eq(o.verdict, MEM_PACE_FITS);
		ck_assert(o.lowest >= 1);
	}
	struct guest small = {.memory = 4000 * MB, .working_set = 4 * MB, .busy = 1000 * MB};
	struct outcome o = move(&small, 100 * MB, &finish);

	ck_assert_int_eq(o.verdict, MEM_PACE_FITS);
	ck_assert(o.lowest >= 1);
}
END_TEST

/* At 1.5, 2 and 2.5 times the link's rate. */
START_TEST(test_busy_guest_is_slowed_as_far_as_needed)
{
	for (int i = 3; i <= 5; i++) {
		struct guest g = {.memory = 4000 * MB, .working_set = 500 * MB, .busy = i * 50 * MB};
		struct outcome o = move(&g, 100 * MB, &balanced);

		ck_assert_int_eq(o.verdict, MEM_PACE_FITS);
		ck_assert_uint_lt(o.rounds, 30);
		ck_assert(o.left <= 0.048 * 100 * MB);
		/* what it dirties at that speed is less than the link carries, but not far less */
		ck_assert_msg(o.lowest * i / 2 < 1 && o.lowest * i / 2 > 0.5, "%d: slowed down to %.2f", i,
			      o.lowest);
	}
}
END_TEST

START_TEST(test_priority_limits_it)
{
	struct guest g = {.memory = 2000 * MB, .working_set = 500 * MB, .busy = 1000 * MB};
	struct outcome o = move(&g, 100 * MB, &never);

	ck_assert_int_eq(o.verdict, MEM_PACE_OVER);
	ck_assert(o.lowest >= 1);
	/* ten times the link's rate is more than a quarter of the speed allows for */
	o = move(&g, 100 * MB, &balanced);
	ck_assert_int_eq(o.verdict, MEM_PACE_OVER);
	ck_assert(o.lowest <= 0.25 + 1e-9);
	o = move(&g, 100 * MB, &finish);
	ck_assert_int_eq(o.verdict, MEM_PACE_FITS);
	ck_assert(o.lowest < 0.1 && o.lowest > 0.02);
}
END_TEST

/* It makes up for the time that it stood still, as what serves requests does. */
START_TEST(test_guest_with_a_pace_of_its_own)
{
	struct guest g = {.memory = 1000 * MB, .working_set = 64 * MB, .busy = 1000 * MB, .wanted = 80 * MB};
	struct outcome o = move(&g, 40 * MB, &finish);

	ck_assert_int_eq(o.verdict, MEM_PACE_FITS);
	ck_assert(o.lowest < 0.04 && o.lowest >= 0.01 - 1e-9);
	ck_assert_uint_lt(o.rounds, 20);
	/* slowed for nothing, and so not for 30 rounds */
	o = move(&g, 40 * MB, &balanced);
	ck_assert_int_eq(o.verdict, MEM_PACE_OVER);
	ck_assert_uint_lt(o.rounds, 20);
}
END_TEST

START_TEST(test_limits_hold)
{
	struct guest g = {.memory = 4000 * MB, .working_set = 500 * MB, .busy = 200 * MB};
	struct mem_pace_options o = finish;

	for (o.max_rounds = 1; o.max_rounds <= 12; o.max_rounds++)
		ck_assert_uint_le(move(&g, 100 * MB, &o).rounds, o.max_rounds);
	/* fewer rounds need a slower guest */
	o.max_rounds = 16;
	o.shrink = 0.9;
	struct outcome few = move(&g, 100 * MB, &o);
	o.max_rounds = 100;
	struct outcome many = move(&g, 100 * MB, &o);
	ck_assert_int_eq(few.verdict, MEM_PACE_FITS);
	ck_assert_int_eq(many.verdict, MEM_PACE_FITS);
	ck_assert(few.lowest < many.lowest);
	/* the first round takes 40 s, the second nearly 5 */
	o.max_rounds = 0;
	o.max_time_ms = 60000;
	struct outcome timed = move(&g, 100 * MB, &o);
	ck_assert_int_eq(timed.verdict, MEM_PACE_FITS);
	ck_assert(timed.seconds < 60 && timed.lowest < many.lowest);
	o.max_time_ms = 45000;
	timed = move(&g, 100 * MB, &o);
	ck_assert_int_eq(timed.verdict, MEM_PACE_OVER);
	ck_assert(timed.seconds < 51);
}
END_TEST

/* A pause that costs more than the budget by itself: slowing would not help. */
START_TEST(test_hopeless_budget_slows_nobody)
{
	struct guest g = {.memory = 1000 * MB, .working_set = 500 * MB, .busy = 500 * MB};
	struct mem_pace_options o = finish;

	o.budget_us = FIXED_US;
	struct outcome r = move(&g, 100 * MB, &o);
	ck_assert_int_eq(r.verdict, MEM_PACE_OVER);
	ck_assert(r.lowest >= 1);
}
END_TEST

START_TEST(test_guest_that_calms_down_gets_its_speed_back)
{
	struct mem_pace_options o = finish;
	struct mem_pace p;
	struct mem_pace_round r = {.ns = 1000000000, .rate_bytes_per_s = 100 * MB, .fixed_us = FIXED_US};

	o.max_rounds = 0;
	mem_pace_init(&p, &o);
	for (r.rounds = 1; r.rounds <= 4; r.rounds++) {
		r.began_bytes = r.left_bytes = 100000000;
		r.predicted_us = 1000000;
		ck_assert_int_eq(mem_pace_next(&p, &r), MEM_PACE_ON);
	}
	ck_assert(p.speed < 0.3);
	double before = p.speed;
	for (; p.speed < 1; r.rounds++) {
		r.left_bytes = 10000000;
		r.predicted_us = 100000;
		ck_assert_int_eq(mem_pace_next(&p, &r), MEM_PACE_ON);
		ck_assert(p.speed > before);
		before = p.speed;
		ck_assert_uint_lt(r.rounds, 40);
	}
	/* rounds that begin once more keep the speed, not the patience */
	mem_pace_again(&p);
	ck_assert_uint_eq(p.late, 0);
	ck_assert(p.speed >= 1);
	struct guest g = {.memory = 1000 * MB, .working_set = 500 * MB, .busy = 400 * MB, .calm_after_s = 30};
	ck_assert_int_eq(move(&g, 100 * MB, &finish).verdict, MEM_PACE_FITS);
}
END_TEST

static double sum_of(const double *dirties, const double *speeds, unsigned n)
{
	double sum = 0;

	for (unsigned i = 0; i < n; i++)
		sum += dirties[i] * speeds[i];
	return sum;
}

START_TEST(test_those_that_dirty_most_are_slowed)
{
	double one[4] = {0, 100, 0, 0}, mixed[4] = {10, 100, 50, 0}, none[4] = {0}, out[4];

	mem_pace_spread(one, 4, 0.25, 0.01, out);
	ck_assert_double_eq(out[0], 1);
	ck_assert_double_eq_tol(out[1], 0.25, 1e-6);
	ck_assert_double_eq(out[3], 1);
	/* to one rate, and together to the part that is asked for */
	mem_pace_spread(mixed, 4, 0.5, 0.01, out);
	ck_assert_double_eq(out[0], 1);
	ck_assert_double_eq(out[3], 1);
	ck_assert_double_eq_tol(out[1] * 100, out[2] * 50, 1e-3);
	ck_assert_double_eq_tol(sum_of(mixed, out, 4), 80, 1e-3);
	/* none below the least: then the others make up for it */
	mem_pace_spread(mixed, 4, 0.35, 0.3, out);
	ck_assert_double_eq_tol(out[1], 0.3, 1e-6);
	ck_assert(out[2] >= 0.3 - 1e-9 && out[2] < 1 && out[0] >= 0.3 - 1e-9);
	ck_assert_double_eq_tol(sum_of(mixed, out, 4), 56, 1e-3);
	mem_pace_spread(mixed, 4, 0.01, 0.3, out);
	for (int i = 0; i < 3; i++)
		ck_assert_double_eq_tol(out[i], 0.3, 1e-6);
	mem_pace_spread(none, 4, 0.4, 0.01, out);
	for (int i = 0; i < 4; i++)
		ck_assert_double_eq_tol(out[i], 0.4, 1e-9);
	mem_pace_spread(mixed, 4, 1, 0.01, out);
	for (int i = 0; i < 4; i++)
		ck_assert_double_eq(out[i], 1);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("pace");
	TCase *tc = tcase_create("pace");

	tcase_add_test(tc, test_prediction);
	tcase_add_test(tc, test_who_converges_is_not_slowed);
	tcase_add_test(tc, test_busy_guest_is_slowed_as_far_as_needed);
	tcase_add_test(tc, test_priority_limits_it);
	tcase_add_test(tc, test_guest_with_a_pace_of_its_own);
	tcase_add_test(tc, test_limits_hold);
	tcase_add_test(tc, test_hopeless_budget_slows_nobody);
	tcase_add_test(tc, test_guest_that_calms_down_gets_its_speed_back);
	tcase_add_test(tc, test_those_that_dirty_most_are_slowed);
	suite_add_tcase(suite, tc);
	return suite_run(suite);
}
