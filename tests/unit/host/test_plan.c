/* SPDX-License-Identifier: Apache-2.0 */
/* Who goes where, in which order, and for how long. */
#include <check.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "host/plan.h"
#include "tests/suite.h"

#define GIB (UINT64_C(1) << 30)

static struct plan p;

static void begin(size_t nvms, size_t nhosts)
{
	p = (struct plan){.parallel = 2, .per_host = 2};
	ck_assert_int_eq(plan_init(&p, nvms, nhosts, NULL), 0);
	for (size_t h = 0; h < nhosts; h++) {
		snprintf(p.hosts[h].name, sizeof p.hosts[h].name, "host%zu", h);
		p.hosts[h].memory_bytes = 16 * GIB;
		p.hosts[h].disk_bytes = 100 * GIB;
		p.hosts[h].link_bytes_per_s = 1000000000;
	}
	for (size_t v = 0; v < nvms; v++) {
		snprintf(p.vms[v].name, sizeof p.vms[v].name, "vm%zu", v);
		p.vms[v].memory_bytes = p.vms[v].disk_bytes = GIB;
		p.vms[v].travels_bytes = 2 * GIB;
		for (size_t h = 0; h < nhosts; h++)
			plan_pair(&p, v, h)->alone_ms = 1000;
	}
}

static void finish(void)
{
	plan_free(&p);
}

START_TEST(equal_ones_are_spread)
{
	begin(4, 2);
	plan_make(&p);
	unsigned at[2] = {0};
	for (size_t v = 0; v < 4; v++) {
		ck_assert_int_ge(p.vms[v].host, 0);
		at[p.vms[v].host]++;
	}
	ck_assert_uint_eq(at[0], 2);
	ck_assert_uint_eq(p.going, 4);
	ck_assert_str_eq(
		p.vms[0].why,
		"fits: after all of the plan host0 has 14.0 GiB of memory and 98.0 GiB of disk left");
}
END_TEST

/* 10 and 6 GiB for 6, 5 and 5: only the larger one on the smaller host leaves room for all. */
START_TEST(they_are_packed_when_spreading_leaves_one)
{
	begin(3, 2);
	p.hosts[0].memory_bytes = 10 * GIB;
	p.hosts[1].memory_bytes = 6 * GIB;
	p.vms[0].memory_bytes = p.vms[1].memory_bytes = 5 * GIB;
	p.vms[2].memory_bytes = 6 * GIB;
	plan_make(&p);
	ck_assert_int_eq(p.vms[0].host, 0);
	ck_assert_int_eq(p.vms[1].host, 0);
	ck_assert_int_eq(p.vms[2].host, 1);
}
END_TEST

START_TEST(what_does_not_fit_says_why_of_each_host)
{
	begin(3, 3);
	p.vms[0].memory_bytes = 20 * GIB;
	strcpy(p.hosts[1].why_not, "does not answer");
	p.hosts[0].disk_bytes = 2 * GIB;
	p.vms[1].disk_bytes = 3 * GIB;
	strcpy(plan_pair(&p, 1, 2)->why_not, "its CPU lacks avx2");
	strcpy(p.vms[2].why_not, "is stopped");
	plan_make(&p);
	ck_assert_int_eq(p.vms[0].host, -1);
	ck_assert_str_eq(p.vms[0].why, "host0: needs 20.0 GiB of memory, 16.0 GiB are left; host1: does not "
				       "answer; host2: needs 20.0 GiB of memory, 16.0 GiB are left");
	ck_assert_int_eq(p.vms[1].host, -1);
	ck_assert_str_eq(p.vms[1].why,
			 "host0: needs 3.0 GiB of disk, 2.0 GiB are left; host1: does not answer; "
			 "host2: its CPU lacks avx2");
	ck_assert_int_eq(p.vms[2].host, -1);
	ck_assert_str_eq(p.vms[2].why, "is stopped");
	ck_assert_uint_eq(p.going, 0);
	finish();
	begin(1, 0);
	plan_make(&p);
	ck_assert_str_eq(p.vms[0].why, "there is no other host");
}
END_TEST

START_TEST(the_important_one_gets_the_room)
{
	begin(2, 1);
	p.vms[0].memory_bytes = 12 * GIB;
	p.vms[1].memory_bytes = 6 * GIB;
	p.vms[1].priority = 1;
	plan_make(&p);
	ck_assert_int_eq(p.vms[0].host, -1);
	ck_assert_int_eq(p.vms[1].host, 0);
}
END_TEST

START_TEST(orders)
{
	static const struct {
		enum plan_order order;
		unsigned turns[3];
	} cases[] = {{PLAN_BY_PRIORITY, {2, 0, 1}}, {PLAN_BY_SIZE, {1, 2, 0}}, {PLAN_FASTEST, {0, 2, 1}}};
	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		enum plan_order order;
		begin(3, 1);
		p.vms[1].priority = 9;
		p.vms[1].travels_bytes = GIB;
		p.vms[2].travels_bytes = 3 * GIB;
		plan_pair(&p, 0, 0)->alone_ms = 500;
		plan_pair(&p, 1, 0)->alone_ms = 3000;
		plan_pair(&p, 2, 0)->alone_ms = 2000;
		ck_assert_int_eq(plan_order_parse(plan_order_name(cases[i].order), &order), 0);
		ck_assert_int_eq(order, cases[i].order);
		p.order = order;
		plan_make(&p);
		for (size_t v = 0; v < 3; v++)
			ck_assert_msg(p.vms[v].turn == cases[i].turns[v], "%s: vm%zu at %u",
				      plan_order_name(order), v, p.vms[v].turn);
		plan_free(&p);
	}
	enum plan_order order;
	ck_assert_int_eq(plan_order_parse("slowest", &order), -EINVAL);
	ck_assert_int_eq(plan_order_parse(NULL, &order), -EINVAL);
	begin(0, 0);
}
END_TEST

START_TEST(limits)
{
	const int hosts[] = {0, 0, 1, -1};
	unsigned at[] = {0, 0};
	ck_assert_int_eq(plan_next(hosts, 4, at, 0, 2, 1), 0);
	at[0] = 1;
	ck_assert_int_eq(plan_next(hosts, 4, at, 1, 2, 1), 2);
	ck_assert_int_eq(plan_next(hosts, 4, at, 1, 2, 2), 0);
	ck_assert_int_eq(plan_next(hosts, 4, at, 2, 2, 9), -1);
	ck_assert_int_eq(plan_next(hosts, 2, at, 1, 2, 1), -1);
	ck_assert_int_eq(plan_next(hosts, 0, at, 0, 2, 1), -1);
}
END_TEST

static void ends_at(size_t vm, uint64_t begin_ms, uint64_t end_ms)
{
	ck_assert(p.vms[vm].timed);
	ck_assert_msg(p.vms[vm].begin_ms == begin_ms && p.vms[vm].end_ms == end_ms, "vm%zu: %llu to %llu", vm,
		      (unsigned long long)p.vms[vm].begin_ms, (unsigned long long)p.vms[vm].end_ms);
}

START_TEST(moves_share_a_link)
{
	begin(2, 1);
	plan_make(&p);
	ends_at(0, 0, 2000);
	ends_at(1, 0, 2000);
	p.parallel = 1;
	plan_make(&p);
	ends_at(0, 0, 1000);
	ends_at(1, 1000, 2000);
	ck_assert_uint_eq(p.total_ms, 2000);
	/* what is not the link's is not shared */
	p.parallel = 2;
	plan_pair(&p, 0, 0)->fixed_ms = plan_pair(&p, 1, 0)->fixed_ms = 600;
	plan_make(&p);
	ends_at(1, 0, 1400);
	/* ...but for the processors */
	p.cpus = 2;
	plan_make(&p);
	ends_at(1, 0, 1400);
	p.cpus = 1;
	plan_make(&p);
	ends_at(1, 0, 2000);
}
END_TEST

START_TEST(two_links_share_the_source)
{
	begin(2, 2);
	plan_make(&p);
	ck_assert_int_ne(p.vms[0].host, p.vms[1].host);
	ends_at(0, 0, 2000);
	ends_at(1, 0, 2000);
	/* a slow link is not what the source is short of */
	p.hosts[1].link_bytes_per_s = 100000000;
	plan_make(&p);
	for (size_t v = 0; v < 2; v++)
		ends_at(v, 0, p.vms[v].host == 1 ? 1000 : 1500);
}
END_TEST

START_TEST(nothing_begins_after_the_deadline)
{
	begin(3, 1);
	p.parallel = 1;
	p.deadline_ms = 1500;
	plan_make(&p);
	ck_assert(!p.vms[0].late && !p.vms[1].late && p.vms[2].late);
	ends_at(1, 1000, 2000);
	ck_assert(!p.vms[2].timed);
	ck_assert_uint_eq(p.total_ms, 2000);
}
END_TEST

START_TEST(what_is_not_known_is_not_told)
{
	begin(2, 1);
	plan_pair(&p, 1, 0)->alone_ms = 0;
	plan_make(&p);
	ck_assert_uint_eq(p.going, 2);
	ck_assert_uint_eq(p.total_ms, 0);
	ck_assert(!p.vms[0].timed && !p.vms[1].timed);
}
END_TEST

static uint64_t seed;

static uint64_t any(uint64_t n)
{
	seed = seed * 6364136223846793005u + 1442695040888963407u;
	return (seed >> 33) % n;
}

/* Whatever the facts are: nothing is promised twice, no limit is broken, and the one who stays fits nowhere.
 */
static void check_plan(void)
{
	size_t going = 0;
	for (size_t h = 0; h < p.nhosts; h++) {
		uint64_t memory = 0, disk = 0;
		for (size_t v = 0; v < p.nvms; v++) {
			if (p.vms[v].host != (int)h)
				continue;
			ck_assert(!*p.hosts[h].why_not && !*plan_pair(&p, v, h)->why_not &&
				  !*p.vms[v].why_not);
			memory += p.vms[v].memory_bytes;
			disk += p.vms[v].disk_bytes;
			going++;
		}
		ck_assert(memory <= p.hosts[h].memory_bytes && disk <= p.hosts[h].disk_bytes);
		for (size_t v = 0; v < p.nvms; v++)
			ck_assert(p.vms[v].host >= 0 || *p.vms[v].why_not || *p.hosts[h].why_not ||
				  *plan_pair(&p, v, h)->why_not ||
				  p.vms[v].memory_bytes > p.hosts[h].memory_bytes - memory ||
				  p.vms[v].disk_bytes > p.hosts[h].disk_bytes - disk);
	}
	ck_assert_uint_eq(going, p.going);
	for (size_t v = 0; v < p.nvms; v++) {
		unsigned all = 0, there = 0;
		ck_assert_uint_gt(strlen(p.vms[v].why), 0);
		if (!p.vms[v].timed)
			continue;
		ck_assert(p.vms[v].end_ms <= p.total_ms && p.vms[v].begin_ms < p.vms[v].end_ms);
		for (size_t o = 0; o < p.nvms; o++) {
			if (!p.vms[o].timed || p.vms[o].begin_ms > p.vms[v].begin_ms ||
			    p.vms[o].end_ms <= p.vms[v].begin_ms)
				continue;
			all++;
			there += p.vms[o].host == p.vms[v].host;
		}
		ck_assert(all <= p.parallel && there <= p.per_host);
	}
}

START_TEST(any_facts)
{
	seed = (uint64_t)_i + 1;
	begin(any(40), any(6));
	p.order = (enum plan_order)any(3);
	p.parallel = 1 + (unsigned)any(4);
	p.per_host = 1 + (unsigned)any(3);
	p.cpus = (unsigned)any(4);
	p.deadline_ms = any(2) ? any(20000) + 1 : 0;
	for (size_t h = 0; h < p.nhosts; h++) {
		p.hosts[h].memory_bytes = any(64) * GIB;
		p.hosts[h].disk_bytes = any(400) * GIB;
		p.hosts[h].link_bytes_per_s = any(5) * 100000000;
		if (!any(5))
			strcpy(p.hosts[h].why_not, "x");
	}
	for (size_t v = 0; v < p.nvms; v++) {
		p.vms[v].memory_bytes = any(16) * GIB;
		p.vms[v].disk_bytes = any(100) * GIB;
		p.vms[v].priority = (unsigned)any(3);
		if (!any(10))
			strcpy(p.vms[v].why_not, "x");
		for (size_t h = 0; h < p.nhosts; h++) {
			plan_pair(&p, v, h)->alone_ms = 1 + any(10000);
			plan_pair(&p, v, h)->fixed_ms = any(500);
			if (!any(6))
				strcpy(plan_pair(&p, v, h)->why_not, "x");
		}
	}
	plan_make(&p);
	check_plan();
}
END_TEST

START_TEST(too_many)
{
	struct error err = ERROR_INIT;
	p = (struct plan){0};
	ck_assert_int_eq(plan_init(&p, PLAN_VMS_MAX + 1, 1, &err), -E2BIG);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("plan");
	TCase *t = tcase_create("plan");
	tcase_add_checked_fixture(t, NULL, finish);
	tcase_add_test(t, equal_ones_are_spread);
	tcase_add_test(t, they_are_packed_when_spreading_leaves_one);
	tcase_add_test(t, what_does_not_fit_says_why_of_each_host);
	tcase_add_test(t, the_important_one_gets_the_room);
	tcase_add_test(t, orders);
	tcase_add_test(t, limits);
	tcase_add_test(t, moves_share_a_link);
	tcase_add_test(t, two_links_share_the_source);
	tcase_add_test(t, nothing_begins_after_the_deadline);
	tcase_add_test(t, what_is_not_known_is_not_told);
	tcase_add_loop_test(t, any_facts, 0, 300);
	tcase_add_test(t, too_many);
	suite_add_tcase(s, t);
	return suite_run(s);
}
