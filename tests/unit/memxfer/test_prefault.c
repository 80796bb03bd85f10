/* SPDX-License-Identifier: Apache-2.0 */
/* Memory made ready ahead of the data, and beside them. */
#include "memxfer/prefault.h"
#include "tests/suite.h"
#include "tests/unit/memxfer/harness.h"

#define PAGES_PER_REGION (MEM_REGION_BYTES / MEM_PAGE_BYTES)

static void prefault_start(struct mem_prefault **p, const struct mem_space *space, const uint64_t *regions,
			   uint64_t nregions, unsigned nthreads, bool huge)
{
	struct mem_prefault_options opt = {.space = *space,
					   .regions = regions,
					   .nregions = nregions,
					   .nthreads = nthreads,
					   .huge = huge};
	struct error err = ERROR_INIT;

	ck_assert_msg(mem_prefault_start(&opt, p, &err) == 0, "%s", err.message);
}

START_TEST(test_reported_regions_alone)
{
	uint64_t npages = 8 * PAGES_PER_REGION + 5, nregions = 9;
	struct mem_space src = space_create(npages), dst = space_create(npages);
	uint64_t map[1] = {~UINT64_C(0)}, pages[BITMAP_WORDS(8 * PAGES_PER_REGION + 5)] = {0};
	struct mem_prefault *p;
	struct error err = ERROR_INIT;

	page_fill(&src, 3, 1);
	page_fill(&src, 2 * PAGES_PER_REGION - 1, 1);
	page_fill(&src, 2 * PAGES_PER_REGION, 1);
	page_fill(&src, npages - 1, 1);
	ck_assert_int_eq(mem_populated_regions(&src, map, &err), 0);
	ck_assert_uint_eq(map[0] & 0x1ff, 0x107);
	dst.base[5] = 77;
	prefault_start(&p, &dst, map, nregions, (unsigned)_i / 2, _i % 2);
	map[0] = 0; /* it has a copy */
	ck_assert_msg(mem_prefault_wait(p, &err) == 0, "%s", err.message);
	ck_assert_uint_eq(space_populated(&dst, pages), 3 * PAGES_PER_REGION + 5);
	ck_assert_uint_eq(bitmap_next_clear(pages, npages, 0), 3 * PAGES_PER_REGION);
	ck_assert_uint_eq(dst.base[5], 77);
	dst.base[5] = 0;
	for (uint64_t at = 0; at < 3 * MEM_REGION_BYTES; at++)
		if (dst.base[at])
			ck_abort_msg("byte %llu is not zero", (unsigned long long)at);
	ck_assert_int_eq(mem_prefault_stop(p, &err), 0);
	mem_prefault_free(p);
	space_check_guard(&dst);
	space_free(&src);
	space_free(&dst);
}
END_TEST

START_TEST(test_more_regions_than_there_are)
{
	struct mem_space space = space_create(PAGES_PER_REGION);
	uint64_t map[1] = {3};
	struct mem_prefault_options opt = {.space = space, .regions = map, .nregions = 2};
	struct mem_prefault *p;
	struct error err = ERROR_INIT;

	ck_assert_int_eq(mem_prefault_start(&opt, &p, &err), -EINVAL);
	ck_assert_ptr_null(p);
	ck_assert_msg(strstr(err.message, "2 regions, the guest has 1") != NULL, "%s", err.message);
	space_free(&space);
}
END_TEST

/* After a cancelled move nothing more is taken, and the wait is for a region, not for all. */
START_TEST(test_stops_at_once)
{
	uint64_t nregions = 2048, npages = nregions * PAGES_PER_REGION, populated;
	struct mem_space space = space_create(npages);
	uint64_t *map = bitmap_alloc(nregions);
	struct mem_prefault *p;

	bitmap_set_range(map, 0, nregions);
	prefault_start(&p, &space, map, nregions, 2, _i);
	usleep(2000);
	ck_assert_int_eq(mem_prefault_stop(p, NULL), 0);
	populated = space_populated(&space, NULL);
	ck_assert_uint_lt(populated, npages / 2);
	mem_prefault_region(p, nregions - 1);
	usleep(20000);
	ck_assert_uint_eq(space_populated(&space, NULL), populated);
	mem_prefault_free(p);
	space_free(&space);
	free(map);
}
END_TEST

/* Who brings data makes its region ready itself, once; what was not asked for is left alone. */
START_TEST(test_region_by_who_comes_first)
{
	struct mem_space space = space_create(4 * PAGES_PER_REGION);
	uint64_t map[1] = {6};
	struct mem_prefault *p;

	prefault_start(&p, &space, map, 4, 1, _i);
	for (uint64_t r = 4; r-- > 0;)
		mem_prefault_region(p, r);
	mem_prefault_region(p, 100);
	ck_assert_uint_eq(space_populated(&space, NULL), 2 * PAGES_PER_REGION);
	ck_assert_int_eq(mem_prefault_wait(p, NULL), 0);
	ck_assert_uint_eq(space_populated(&space, NULL), 2 * PAGES_PER_REGION);
	mem_prefault_free(p);
	space_free(&space);
}
END_TEST

/* Nothing before its time but what data come for. */
START_TEST(test_not_before_its_time)
{
	struct mem_space space = space_create(4 * PAGES_PER_REGION);
	uint64_t map[1] = {7}, pages[BITMAP_WORDS(4 * PAGES_PER_REGION)] = {0};
	struct mem_prefault_options opt = {
		.space = space, .regions = map, .nregions = 4, .delay_ms = 3600000, .huge = _i};
	struct mem_prefault *p;

	ck_assert_int_eq(mem_prefault_start(&opt, &p, NULL), 0);
	usleep(2000);
	ck_assert_uint_eq(space_populated(&space, NULL), 0);
	for (uint64_t r = 1; r < 6; r += 2) /* asked for, not asked for, not there */
		mem_prefault_region(p, r);
	ck_assert_uint_eq(space_populated(&space, pages), PAGES_PER_REGION);
	ck_assert_uint_eq(bitmap_next_set(pages, space.npages, 0), PAGES_PER_REGION);
	ck_assert_int_eq(mem_prefault_stop(p, NULL), 0);
	ck_assert_uint_eq(space_populated(&space, NULL), PAGES_PER_REGION);
	ck_assert(mem_prefault_forgo(p, 1)); /* there is something to be freed */
	ck_assert(!mem_prefault_forgo(p, 2));
	mem_prefault_free(p);
	opt.delay_ms = 20;
	ck_assert_int_eq(mem_prefault_start(&opt, &p, NULL), 0);
	ck_assert_int_eq(mem_prefault_wait(p, NULL), 0);
	ck_assert_uint_eq(space_populated(&space, NULL), 3 * PAGES_PER_REGION);
	mem_prefault_free(p);
	space_free(&space);
}
END_TEST

/* A transfer into memory that is being made ready, and of a guest that frees and writes meanwhile. */
START_TEST(test_transfer_beside_it)
{
	enum { NREGIONS = 48, NSTREAMS = 2 };
	uint64_t npages = NREGIONS * PAGES_PER_REGION, map[1];
	struct mem_space src = space_create(npages), dst = space_create(npages);
	struct conn *a[NSTREAMS], *b[NSTREAMS];
	struct mem_sender *sender;
	struct mem_receiver *receiver;
	struct mem_prefault *p;
	struct fake_log log;
	struct error err = ERROR_INIT;
	bool limit;

	for (uint64_t page = 0; page < npages; page++)
		if (page / PAGES_PER_REGION % 5 < 3)
			page_fill(&src, page, page + 1);
	ck_assert_int_eq(mem_populated_regions(&src, map, &err), 0);
	connect_streams(false, NSTREAMS, a, b);
	prefault_start(&p, &dst, map, NREGIONS, 2, _i);

	struct mem_receiver_options ro = {.space = dst,
					  .streams = b,
					  .nstreams = NSTREAMS,
					  .timeout_ms = TIMEOUT_MS,
					  .epoch = 42,
					  .prefault = p};
	struct mem_sender_options so = {.space = src,
					.dirty = fake_source(&log, npages),
					.streams = a,
					.nstreams = NSTREAMS,
					.compress = _i ? MEM_COMPRESS_ALWAYS : MEM_COMPRESS_OFF,
					.zstd_level = 1,
					.downtime_target_ms = 50,
					.max_rounds = 5,
					.timeout_ms = TIMEOUT_MS,
					.epoch = 42};
	struct guest g = {
		.space = &src, .log = &log, .seed = 3, .pause_us = 200, .punches = true, .npages = npages};

	ck_assert_msg(mem_receiver_start(&ro, &receiver, &err) == 0, "%s", err.message);
	ck_assert_msg(mem_sender_create(&so, &sender, &err) == 0, "%s", err.message);
	guest_run(&g);
	ck_assert_msg(mem_sender_precopy(sender, &limit, &err) == 0, "%s", err.message);
	guest_pause(&g);
	ck_assert_msg(mem_sender_finish(sender, &err) == 0, "%s", err.message);
	ck_assert_msg(mem_receiver_wait(receiver, &err) == 0, "%s", err.message);
	ck_assert_int_eq(mem_prefault_stop(p, NULL), 0);
	for (uint64_t page = 0; page < npages; page++)
		if (memcmp(src.base + page * MEM_PAGE_BYTES, dst.base + page * MEM_PAGE_BYTES,
			   MEM_PAGE_BYTES))
			ck_abort_msg("page %llu differs", (unsigned long long)page);
	mem_sender_free(sender);
	mem_receiver_free(receiver);
	mem_prefault_free(p);
	close_streams(NSTREAMS, a);
	close_streams(NSTREAMS, b);
	space_check_guard(&dst);
	space_free(&src);
	space_free(&dst);
	free(log.bits);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("prefault");
	TCase *tc = tcase_create("prefault");

	tcase_set_timeout(tc, 60);
	tcase_add_loop_test(tc, test_reported_regions_alone, 0, 8);
	tcase_add_test(tc, test_more_regions_than_there_are);
	tcase_add_loop_test(tc, test_stops_at_once, 0, 2);
	tcase_add_loop_test(tc, test_region_by_who_comes_first, 0, 2);
	tcase_add_loop_test(tc, test_not_before_its_time, 0, 2);
	tcase_add_loop_test(tc, test_transfer_beside_it, 0, 2);
	suite_add_tcase(suite, tc);
	return suite_run(suite);
}
