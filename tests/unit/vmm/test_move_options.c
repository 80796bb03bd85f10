/* SPDX-License-Identifier: Apache-2.0 */
/* {"cmd":"migrate"} as it comes in: what is a move's priority and budget, and what is refused by name. */
#include <check.h>
#include <errno.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "tests/suite.h"
#include "vmm/move_source.h"

static int parse(const char *options, struct move_options *opt, struct error *err)
{
	json_t *o = json_loads(options, 0, NULL);
	ck_assert_msg(o != NULL, "%s", options);
	json_t *request = json_pack("{s:s, s:s, s:i, s:o}", "address", "192.0.2.1:16516", "peer", "hostb",
				    "epoch", 7, "options", o);
	int ret = move_options_parse(request, opt, err);
	json_decref(request);
	return ret;
}

START_TEST(what_nobody_says)
{
	struct move_options opt;
	ck_assert_int_eq(parse("{\"priority\":null,\"on_exceed\":null}", &opt, NULL), 0);
	ck_assert_uint_eq(opt.max_downtime_ms, 50);
	ck_assert_uint_eq(opt.max_rounds, 30);
	ck_assert_uint_eq(opt.max_time_ms, 0);
	ck_assert_int_eq(opt.priority, MOVE_PRIORITY_BALANCED);
	ck_assert_int_eq(opt.on_exceed, MOVE_EXCEED_THROTTLE);
}
END_TEST

START_TEST(what_somebody_says)
{
	struct move_options opt;
	ck_assert_int_eq(parse("{\"priority\":\"guest\",\"on_exceed\":\"cancel\",\"max_downtime_ms\":20,"
			       "\"max_rounds\":4,\"max_time_ms\":90000}",
			       &opt, NULL),
			 0);
	ck_assert_int_eq(opt.priority, MOVE_PRIORITY_GUEST);
	ck_assert_int_eq(opt.on_exceed, MOVE_EXCEED_CANCEL);
	ck_assert_uint_eq(opt.max_downtime_ms, 20);
	ck_assert_uint_eq(opt.max_rounds, 4);
	ck_assert_uint_eq(opt.max_time_ms, 90000);
	ck_assert_int_eq(parse("{\"priority\":\"finish\",\"on_exceed\":\"throttle\"}", &opt, NULL), 0);
	ck_assert_int_eq(opt.priority, MOVE_PRIORITY_FINISH);
	ck_assert_int_eq(opt.on_exceed, MOVE_EXCEED_THROTTLE);
}
END_TEST

START_TEST(former_pages_are_bounded)
{
	static const struct {
		const char *options;
		uint64_t memory_mib, mib;
	} t[] = {
		{"{}", 32, 32},
		{"{}", 512, 64},
		{"{}", 4096, 256},
		{"{\"delta_cache_bytes\":null}", 1 << 20, 1024},
		{"{\"delta_cache_bytes\":0}", 4096, 0},
		{"{\"delta_cache_bytes\":8388608}", 4096, 8},
		{"{\"delta_cache_bytes\":68719476736}", 4096, 4096},
	};
	for (size_t i = 0; i < sizeof t / sizeof t[0]; i++) {
		struct move_options opt;
		ck_assert_int_eq(parse(t[i].options, &opt, NULL), 0);
		ck_assert_uint_eq(source_delta_bytes(&opt, t[i].memory_mib << 20), t[i].mib << 20);
	}
}
END_TEST

/* Deltas go to whom they were offered, if he said that he takes them: an older host says nothing. */
START_TEST(deltas_are_agreed_upon)
{
	static const struct {
		uint64_t cache_bytes;
		const char *hello_ok;
		bool offered, agreed;
	} t[] = {
		{MOVE_DELTA_AUTO, "{}", true, false},
		{MOVE_DELTA_AUTO, "{\"memory_deltas\":true}", true, true},
		{MOVE_DELTA_AUTO, "{\"memory_deltas\":1}", true, false},
		{8 << 20, "{\"memory_deltas\":true}", true, true},
		{0, "{\"memory_deltas\":true}", false, false},
	};
	for (size_t i = 0; i < sizeof t / sizeof t[0]; i++) {
		static struct move mv;
		json_t *hello = json_object(), *ok = json_loads(t[i].hello_ok, 0, NULL);
		mv.opt.delta_cache_bytes = t[i].cache_bytes;
		mv.deltas_agreed = true; /* of an attempt before */
		source_delta_hello(&mv, hello);
		ck_assert_int_eq(json_is_true(json_object_get(hello, "memory_deltas")), t[i].offered);
		source_delta_accepted(&mv, ok);
		ck_assert_int_eq(mv.deltas_agreed, t[i].agreed);
		json_decref(hello);
		json_decref(ok);
	}
}
END_TEST

START_TEST(quick)
{
	struct move_options opt;
	ck_assert_int_eq(parse("{}", &opt, NULL), 0);
	ck_assert(!opt.quick);
	ck_assert_int_eq(source_quick_options(&opt, NULL), 0);
	/* what is the default of a guest that runs is no limit for one that stands still, and without one it
	 * is not stopped */
	ck_assert_int_eq(parse("{\"quick\":true}", &opt, NULL), 0);
	ck_assert(opt.quick);
	ck_assert_uint_eq(opt.predicted_stop_ms, 0);
	ck_assert_int_eq(source_quick_options(&opt, NULL), -EINVAL);
	/* what was predicted makes one */
	ck_assert_int_eq(parse("{\"quick\":true,\"predicted_stop_ms\":1234}", &opt, NULL), 0);
	ck_assert_uint_eq(opt.quick_most_ms, 4 * 1234 + 10000);
	ck_assert(!opt.quick_limited);
	ck_assert_int_eq(source_quick_options(&opt, NULL), 0);
	ck_assert_int_eq(parse("{\"quick\":true,\"predicted_stop_ms\":9223372036854775807}", &opt, NULL), 0);
	ck_assert_uint_lt(opt.quick_most_ms, UINT64_MAX / 1000000);
	/* and what a person says goes before that */
	ck_assert_int_eq(
		parse("{\"quick\":true,\"max_downtime_ms\":9000,\"predicted_stop_ms\":1234}", &opt, NULL), 0);
	ck_assert_uint_eq(opt.quick_most_ms, 9000);
	ck_assert(opt.quick_limited);
	ck_assert_uint_eq(opt.predicted_stop_ms, 1234);
}
END_TEST

START_TEST(quick_deadline)
{
	struct move mv = {.opt = {.quick = true, .quick_most_ms = 3000}, .pause_us = 5000000};
	ck_assert_uint_eq(source_quick_deadline_ns(&mv), UINT64_MAX); /* it runs */
	mv.deciding = true;
	ck_assert_uint_eq(source_quick_deadline_ns(&mv), 8000000000u);
	mv.commit = true;
	ck_assert_uint_eq(source_quick_deadline_ns(&mv), UINT64_MAX);
	mv.commit = false;
	mv.interrupted = true;
	ck_assert_uint_eq(source_quick_deadline_ns(&mv), UINT64_MAX);
	mv.interrupted = false;
	mv.opt.quick = false; /* the pause of any other move */
	ck_assert_uint_eq(source_quick_deadline_ns(&mv), UINT64_MAX);
	/* the longest that may be predicted does not wrap */
	ck_assert_int_eq(parse("{\"quick\":true,\"predicted_stop_ms\":9223372036854775807}", &mv.opt, NULL),
			 0);
	ck_assert_uint_gt(source_quick_deadline_ns(&mv), UINT64_C(3600) * 24 * 365 * 1000000000);
	ck_assert_uint_lt(source_quick_deadline_ns(&mv), UINT64_MAX);
}
END_TEST

static const struct {
	const char *options, *named;
} wrong[] = {
	{"{\"quick\":true,\"postcopy\":\"auto\"}", "postcopy"},
	{"{\"quick\":true,\"mirror\":\"buffered\"}", "mirror buffered"},
	{"{\"priority\":\"fast\"}", "priority"},
	{"{\"priority\":\"\"}", "priority"},
	{"{\"priority\":1}", "priority"},
	{"{\"priority\":[]}", "priority"},
	{"{\"on_exceed\":\"go\"}", "on_exceed"},
	{"{\"on_exceed\":true}", "on_exceed"},
	{"{\"max_downtime_ms\":-1}", "max_downtime"},
	{"{\"max_rounds\":\"4\"}", "max_rounds"},
	{"{\"max_time_ms\":1e3}", "max_time"},
	{"{\"delta_cache_bytes\":-1}", "delta_cache"},
	{"{\"delta_cache_bytes\":1048575}", "delta_cache"},
	{"{\"delta_cache_bytes\":68719476737}", "delta_cache"},
	{"{\"delta_cache_bytes\":\"auto\"}", "delta_cache"},
};

START_TEST(what_is_wrong_is_named)
{
	struct move_options opt;
	struct error err = ERROR_INIT;
	ck_assert_int_eq(parse(wrong[_i].options, &opt, &err), -EINVAL);
	ck_assert_msg(strstr(err.message, wrong[_i].named) != NULL, "%s", err.message);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("move_options");
	TCase *t = tcase_create("move_options");
	tcase_add_test(t, what_nobody_says);
	tcase_add_test(t, what_somebody_says);
	tcase_add_test(t, former_pages_are_bounded);
	tcase_add_test(t, deltas_are_agreed_upon);
	tcase_add_test(t, quick);
	tcase_add_test(t, quick_deadline);
	tcase_add_loop_test(t, what_is_wrong_is_named, 0, sizeof wrong / sizeof *wrong);
	suite_add_tcase(suite, t);
	return suite_run(suite);
}
