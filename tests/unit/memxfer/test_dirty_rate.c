/* SPDX-License-Identifier: Apache-2.0 */
/* Measuring a guest's dirty rate by its dirty log. */
#include "memxfer/dirty_rate.h"
#include "tests/suite.h"
#include "tests/unit/memxfer/harness.h"

#define NPAGES (3 * MEM_REGION_BYTES / MEM_PAGE_BYTES + 70)

static unsigned asked, asks_allowed;

static int ask(void *opaque, struct error *err)
{
	return ++asked > asks_allowed ? error_set(err, EBUSY, "%s wants it", (char *)opaque) : 0;
}

static void setup(void)
{
	asked = 0;
	asks_allowed = UINT32_MAX;
}

START_TEST(test_a_steady_guest)
{
	struct fake_log log;
	struct dirty_source source = fake_source(&log, NPAGES);
	struct mem_dirty_rate r;
	struct error err = ERROR_INIT;

	log.always_dirty = 1000; /* at every look */
	ck_assert_int_eq(mem_dirty_rate_measure(&source, NPAGES, 5, ask, NULL, &r, &err), 0);
	ck_assert_uint_eq(r.samples, 5);
	ck_assert_uint_eq(r.working_set_bytes, 1000 * MEM_PAGE_BYTES);
	/* 1000 pages in 100 ms; fewer a second where a busy machine looked late */
	ck_assert_uint_le(r.bytes_per_s, 10 * 1000 * MEM_PAGE_BYTES * 11 / 10);
	ck_assert_uint_gt(r.bytes_per_s, 1000 * MEM_PAGE_BYTES);
	ck_assert_uint_ge(r.most_bytes_per_s, r.bytes_per_s);
	ck_assert_uint_eq(log.starts, 1);
	ck_assert_uint_eq(log.stops, 1);
	/* what was dirty at the start counts for nothing: all was cleared first */
	ck_assert_uint_eq(atomic_load(&log.cleared_ranges), 4 + 5 * 2);
	free(log.bits);
}
END_TEST

START_TEST(test_an_idle_guest)
{
	struct fake_log log;
	struct dirty_source source = fake_source(&log, NPAGES);
	struct mem_dirty_rate r;
	struct error err = ERROR_INIT;

	ck_assert_int_eq(mem_dirty_rate_measure(&source, NPAGES, 2, ask, NULL, &r, &err), 0);
	ck_assert_uint_eq(r.bytes_per_s + r.most_bytes_per_s + r.working_set_bytes, 0);
	free(log.bits);
}
END_TEST

/* The working set is what all samples saw together. */
START_TEST(test_a_guest_that_wanders)
{
	struct mem_space space = space_create(NPAGES);
	struct fake_log log;
	struct dirty_source source = fake_source(&log, NPAGES);
	struct guest g = {
		.space = &space, .log = &log, .seed = 1, .pause_us = 500, .first = 512, .npages = 512};
	struct mem_dirty_rate r;
	struct error err = ERROR_INIT;

	guest_run(&g);
	ck_assert_int_eq(mem_dirty_rate_measure(&source, NPAGES, 10, ask, NULL, &r, &err), 0);
	guest_pause(&g);
	ck_assert_uint_gt(g.writes, 1000);
	ck_assert_uint_gt(r.working_set_bytes, 100 * MEM_PAGE_BYTES);
	ck_assert_uint_le(r.working_set_bytes, 512 * MEM_PAGE_BYTES);
	ck_assert_uint_gt(r.bytes_per_s, 0);
	free(log.bits);
	space_free(&space);
}
END_TEST

/* It ends at once, tells why, and leaves the log as it was. */
START_TEST(test_an_end_before_its_time)
{
	struct fake_log log;
	struct dirty_source source = fake_source(&log, NPAGES);
	struct mem_dirty_rate r;
	struct error err = ERROR_INIT;
	uint64_t before = clock_now_ms();

	asks_allowed = 5;
	ck_assert_int_eq(mem_dirty_rate_measure(&source, NPAGES, 600, ask, "a move", &r, &err), -EBUSY);
	ck_assert_str_eq(err.message, "a move wants it");
	ck_assert_uint_lt(clock_now_ms() - before, 30000);
	ck_assert_uint_eq(log.stops, 1);
	setup();
	log.fail_collect = true;
	ck_assert_int_eq(mem_dirty_rate_measure(&source, NPAGES, 600, ask, NULL, &r, &err), -EIO);
	ck_assert_uint_eq(log.stops, 2);
	free(log.bits);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("dirty_rate");
	TCase *tc = tcase_create("dirty_rate");

	tcase_set_timeout(tc, 60);
	tcase_add_checked_fixture(tc, setup, NULL);
	tcase_add_test(tc, test_a_steady_guest);
	tcase_add_test(tc, test_an_idle_guest);
	tcase_add_test(tc, test_a_guest_that_wanders);
	tcase_add_test(tc, test_an_end_before_its_time);
	suite_add_tcase(suite, tc);
	return suite_run(suite);
}
