/* SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <locale.h>
#include <stdlib.h>

#include "tests/suite.h"
#include "tests/unit/tui/recorded.h"

static struct view v;

static void setup(void)
{
	view_init(&v, "vm1", "hosta", "hostb");
}

static const char *last_message(void)
{
	return v.nmessages ? view_message(&v, v.nmessages - 1)->text : "";
}

/* A progress event of a storage phase. */
static void progress(uint64_t ms, double remaining_mb, double total_mb, uint64_t eta_ms, double rate_mb)
{
	json_t *o =
		json_pack("{s:s, s:s, s:I, s:f, s:f, s:I, s:f}", "event", "progress", "phase", "storage",
			  "ms", (json_int_t)ms, "remaining_bytes", remaining_mb * 1e6, "total_bytes",
			  total_mb * 1e6, "eta_ms", (json_int_t)eta_ms, "rate_bytes_per_s", rate_mb * 1e6);
	view_event(&v, o);
	json_decref(o);
}

START_TEST(a_recorded_move)
{
	play(&v, UINT32_MAX);
	ck_assert(v.ended);
	ck_assert_str_eq(v.result, "moved");
	ck_assert_int_eq(v.exit_status, 0);
	ck_assert(v.percent == 100);
	static const char *const phases[] = {"connect", "storage", "memory", "handover", "cleanup"};
	ck_assert_uint_eq(v.nphases, 5);
	for (unsigned i = 0; i < 5; i++) {
		ck_assert_str_eq(v.phase[i].name, phases[i]);
		ck_assert_uint_ge(v.phase[i].ended_ms, v.phase[i].began_ms);
		if (i)
			ck_assert_uint_eq(v.phase[i].began_ms, v.phase[i - 1].ended_ms);
	}
	ck_assert_uint_eq(v.ndisks, 2);
	ck_assert_str_eq(v.disk[0].id, "root");
	ck_assert_uint_eq(v.disk[1].synced_bytes, v.disk[1].total_bytes);
	ck_assert(v.memory.known && v.memory.round > 5);
	/* the first round begins with all, each is kept once */
	ck_assert_uint_eq(v.round[0].number, 1);
	ck_assert_uint_eq(v.round[0].bytes, v.memory.total_bytes);
	for (unsigned i = 1; i < v.nrounds; i++)
		ck_assert_uint_gt(v.round[i].number, v.round[i - 1].number);
	ck_assert_uint_gt(v.nsamples, 20);
	ck_assert_uint_eq(v.bandwidth, 16 << 20);
	ck_assert(v.downtime_ms > 0);
}
END_TEST

/* Over the whole record, whatever comes: worse figures only right after a message. */
START_TEST(figures_worsen_only_with_a_reason)
{
	double percent = 0;
	uint64_t left = 0;
	json_t *o;
	for (unsigned i = 0; (o = recorded(i)); i++) {
		unsigned told = v.nmessages;
		bool known = v.left_known;
		if (json_object_get(o, "result"))
			view_end(&v, o);
		else
			view_event(&v, o);
		ck_assert_msg(v.percent >= percent || v.nmessages > told, "line %u: %f after %f", i,
			      v.percent, percent);
		ck_assert_msg(!known || v.left_ms <= left || v.nmessages > told,
			      "line %u: %llu ms after %llu", i, (unsigned long long)v.left_ms,
			      (unsigned long long)left);
		percent = v.percent;
		left = v.left_ms;
		json_decref(o);
	}
	/* its rounds did not get shorter for a while, which was said */
	ck_assert_uint_ge(v.nmessages, 1);
	ck_assert_msg(strstr(view_message(&v, 0)->text, "the guest dirties") != NULL, "%s",
		      view_message(&v, 0)->text);
}
END_TEST

START_TEST(per_cent_stands_still_until_a_reason_is_given)
{
	progress(1000, 600, 1000, 6000, 100);
	double before = v.percent;
	ck_assert(before > 39 && before < 41);
	progress(2000, 700, 1000, 6000, 100);
	ck_assert(v.percent == before);
	ck_assert_uint_eq(v.nmessages, 0);
	event(&v, "{\"event\":\"message\",\"ms\":2100,\"text\":\"disk root: session broke, 200 MiB to copy "
		  "again\"}");
	ck_assert_str_eq(last_message(), "disk root: session broke, 200 MiB to copy again");
	progress(3000, 700, 1000, 9000, 100);
	ck_assert(v.percent < before);
	ck_assert_uint_eq(v.left_ms, 9000);
	/* the excuse is used up */
	before = v.percent;
	progress(4000, 800, 1000, 9500, 100);
	ck_assert(v.percent == before);
	ck_assert_uint_eq(v.left_ms, 9000);
	ck_assert_uint_eq(v.nmessages, 1);
}
END_TEST

START_TEST(a_later_end_is_explained)
{
	progress(1000, 600, 1000, 6000, 100);
	progress(2000, 500, 1000, 30000, 20);
	ck_assert_uint_eq(v.left_ms, 6000);
	ck_assert_uint_eq(v.nmessages, 0);
	progress(4000, 480, 1000, 28000, 20);
	ck_assert_uint_eq(v.left_ms, 28000);
	ck_assert_uint_eq(v.nmessages, 1);
	ck_assert_str_eq(last_message(),
			 "time left 0:28, not 0:06: sending slowed down to 20.0 MB/s, 480 MB to move");
	/* a single outlier says nothing */
	progress(5000, 460, 1000, 90000, 20);
	progress(6000, 440, 1000, 22000, 20);
	progress(7000, 420, 1000, 90000, 20);
	ck_assert_uint_eq(v.left_ms, 22000);
	ck_assert_uint_eq(v.nmessages, 1);
	/* unknown: what was known stays */
	progress(8000, 420, 1000, 0, 0);
	ck_assert(v.left_known);
	ck_assert_uint_eq(v.left_ms, 22000);
}
END_TEST

START_TEST(unknown_events_and_phases_are_kept_by_name)
{
	event(&v, "{\"event\":\"phase\",\"phase\":\"verify\",\"ms\":5,\"peer\":\"x\"}");
	ck_assert_str_eq(view_phase_name(&v), "verify");
	ck_assert_str_eq(v.host, "hostb");
	event(&v, "{\"event\":\"retrying\",\"ms\":6000,\"reason\":\"link lost, for another 4:50\"}");
	ck_assert_str_eq(last_message(), "retrying: link lost, for another 4:50");
	event(&v, "{\"event\":\"retrying\",\"ms\":7000,\"reason\":\"link lost, for another 4:49\"}");
	ck_assert_str_eq(last_message(), "retrying: link lost, for another 4:49");
	ck_assert_uint_eq(v.nmessages, 1); /* the last of its kind */
	event(&v, "{\"event\":\"novelty\",\"figures\":[1,2]}");
	ck_assert_str_eq(last_message(), "novelty");
	ck_assert_uint_eq(v.nmessages, 2);
	event(&v, "{\"hello\":1}");
	ck_assert_uint_eq(v.nmessages, 2);
	/* a progress that knows phases more coarsely does not lead back */
	event(&v, "{\"event\":\"phase\",\"phase\":\"storage\",\"ms\":8000}");
	event(&v, "{\"event\":\"phase\",\"phase\":\"verify\",\"ms\":9000}");
	event(&v,
	      "{\"event\":\"progress\",\"phase\":\"storage\",\"ms\":9500,\"mirror_buffered_bytes\":4096}");
	ck_assert_str_eq(view_phase_name(&v), "verify");
	ck_assert_uint_eq(v.nphases, 3);
	ck_assert_uint_eq(v.buffered_bytes, 4096);
}
END_TEST

START_TEST(another_attempt)
{
	event(&v, "{\"event\":\"phase\",\"phase\":\"storage\",\"ms\":100}");
	progress(1000, 600, 1000, 6000, 100);
	event(&v, "{\"event\":\"retry\",\"reason\":\"link lost\",\"left_ms\":290000,\"wait_ms\":500}");
	ck_assert_str_eq(last_message(), "retry: link lost, for another 4:50");
	event(&v, "{\"event\":\"phase\",\"phase\":\"connect\",\"ms\":2000}");
	progress(3000, 600, 1000, 6000, 100);
	event(&v, "{\"event\":\"phase\",\"phase\":\"storage\",\"ms\":3100}");
	progress(4000, 900, 1000, 9000, 100);
	ck_assert(v.percent < 11);
	ck_assert_uint_eq(v.left_ms, 9000);
	ck_assert_uint_eq(v.nphases, 3);
}
END_TEST

/* The events of a program before these keys. */
START_TEST(an_old_progress_event)
{
	event(&v, "{\"event\":\"progress\",\"phase\":\"memory\",\"percent\":41.5,\"done_bytes\":10,\"total_"
		  "bytes\":20,"
		  "\"rate_bytes_per_s\":5,\"dirty_bytes_per_s\":2,\"eta_ms\":2000,\"round\":3}");
	ck_assert(v.percent == 41.5);
	ck_assert_uint_eq(v.left_ms, 2000);
	ck_assert(!v.memory.known && !v.ndisks && !v.downtime_predicted);
}
END_TEST

static const char *const nonsense[] = {
	"{\"event\":\"progress\"}",
	"{\"event\":17,\"phase\":{}}",
	"{\"event\":\"phase\"}",
	"{\"event\":\"phase\",\"phase\":[],\"ms\":\"x\"}",
	"{\"event\":\"progress\",\"phase\":7,\"percent\":\"x\",\"disks\":{},\"memory\":[],\"eta_ms\":{}}",
	"{\"event\":\"progress\",\"disks\":[1,null,{},{\"id\":5,\"total_bytes\":-1,\"synced_bytes\":1e300}],"
	"\"memory\":{}}",
	"{\"event\":\"progress\",\"percent\":1e308,\"remaining_bytes\":1e308,\"total_bytes\":1e308,\"eta_"
	"ms\":1e308,"
	"\"rate_bytes_per_s\":1e308,\"dirty_bytes_per_s\":-1e308,\"predicted_downtime_ms\":1e308,\"ms\":"
	"1e308}",
	"{\"event\":\"progress\",\"percent\":-5,\"remaining_bytes\":-5,\"total_bytes\":-5,\"eta_ms\":-5,"
	"\"predicted_downtime_ms\":-5,\"ms\":-5}",
	"{\"event\":\"progress\",\"memory\":{\"round\":-1,\"total_bytes\":1,\"remaining_bytes\":9e18,\"sent_"
	"bytes\":9e18,\"wire_bytes\":1}}",
	"{\"result\":5,\"exit\":-3,\"reason\":[],\"downtime_ms\":1e308,\"total_ms\":-1}",
	"{\"result\":\"moved\",\"exit\":1e9}",
};

START_TEST(nonsense_is_survived)
{
	event(&v, nonsense[_i]);
	ck_assert(v.percent >= 0 && v.percent <= 100);
	for (unsigned i = 0; i < v.ndisks; i++)
		ck_assert_uint_le(v.disk[i].synced_bytes, v.disk[i].total_bytes);
	ck_assert_uint_le(v.left_ms, UINT64_C(1) << 42);
	ck_assert_uint_le(v.send_rate, UINT64_C(1) << 60);
}
END_TEST

START_TEST(names_and_reasons_are_cleaned)
{
	view_init(&v, "v\x1b[2Jm", "a\rb", "");
	ck_assert_str_eq(v.vm, "v?[2Jm");
	ck_assert_str_eq(v.from, "a?b");
	event(&v, "{\"event\":\"phase\",\"phase\":\"st\\u001bor\",\"peer\":\"h\\u009bx\"}");
	ck_assert_str_eq(v.host, "h?x");
	ck_assert_str_eq(view_phase_name(&v), "st?or");
	event(&v, "{\"event\":\"progress\",\"disks\":[{\"id\":\"\\u001b]0;x\\u0007\"}]}");
	ck_assert_str_eq(v.disk[0].id, "?]0;x?");
	event(&v, "{\"event\":\"a\\nb\",\"text\":\"c\\u001bd\"}");
	ck_assert_str_eq(last_message(), "a?b: c?d");
	event(&v, "{\"result\":\"fai\\tled\",\"reason\":\"x\\u001b[31m\"}");
	ck_assert_str_eq(v.result, "fai?led");
	ck_assert_str_eq(v.reason, "x?[31m");
}
END_TEST

START_TEST(floods_keep_the_newest)
{
	char text[160];
	for (unsigned i = 0; i < 1000; i++) {
		snprintf(text, sizeof text, "{\"event\":\"message\",\"text\":\"m%u\"}", i);
		event(&v, text);
		snprintf(text, sizeof text, "{\"event\":\"phase\",\"phase\":\"p%u\",\"ms\":%u}", i, i);
		event(&v, text);
		snprintf(text, sizeof text,
			 "{\"event\":\"progress\",\"rate_bytes_per_s\":%u,\"memory\":{\"round\":%u}}", i,
			 i + 1);
		event(&v, text);
	}
	ck_assert_str_eq(last_message(), "m999");
	ck_assert_str_eq(view_message(&v, v.nmessages - VIEW_MESSAGES)->text, "m936");
	ck_assert_str_eq(view_phase_name(&v), "p999");
	ck_assert_uint_eq(v.nphases, VIEW_PHASES);
	ck_assert_uint_eq(v.nrounds, VIEW_ROUNDS);
	ck_assert_uint_eq(v.round[VIEW_ROUNDS - 1].number, 1000);
	ck_assert_uint_eq(view_sample(&v, v.nsamples - 1)->send, 999);
	ck_assert_uint_eq(view_sample(&v, v.nsamples - VIEW_HISTORY)->send, 1000 - VIEW_HISTORY);
	char disks[VIEW_DISKS * 40] = "{\"event\":\"progress\",\"disks\":[{}";
	for (unsigned i = 0; i < 2 * VIEW_DISKS; i++)
		strcat(disks, ",{\"id\":\"x\"}");
	strcat(disks, "]}");
	event(&v, disks);
	ck_assert_uint_eq(v.ndisks, VIEW_DISKS);
}
END_TEST

int main(void)
{
	if (!setlocale(LC_CTYPE, "C.UTF-8"))
		abort();
	Suite *s = suite_create("model");
	TCase *tc = tcase_create("model");
	tcase_add_checked_fixture(tc, setup, NULL);
	tcase_add_test(tc, a_recorded_move);
	tcase_add_test(tc, figures_worsen_only_with_a_reason);
	tcase_add_test(tc, per_cent_stands_still_until_a_reason_is_given);
	tcase_add_test(tc, a_later_end_is_explained);
	tcase_add_test(tc, unknown_events_and_phases_are_kept_by_name);
	tcase_add_test(tc, another_attempt);
	tcase_add_test(tc, an_old_progress_event);
	tcase_add_loop_test(tc, nonsense_is_survived, 0, sizeof nonsense / sizeof *nonsense);
	tcase_add_test(tc, names_and_reasons_are_cleaned);
	tcase_add_test(tc, floods_keep_the_newest);
	suite_add_tcase(s, tc);
	return suite_run(s);
}
