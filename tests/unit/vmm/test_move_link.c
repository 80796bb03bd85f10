/* SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"
#include "tests/suite.h"
#include "vmm/move.h"
#include "vmm/move_events.h"
#include "vmm/move_link.h"

#define EPOCH 7

static struct conn *raw; /* the other side, without a link */
static struct move_link *link_a;
static unsigned failures;

static void on_failed(void *opaque, const struct error *why)
{
	(void)opaque;
	(void)why;
	__atomic_add_fetch(&failures, 1, __ATOMIC_SEQ_CST);
}

static struct move_link *start(int fd, unsigned silence_ms)
{
	struct conn *c;
	struct move_link *l;
	ck_assert_int_eq(conn_from_fd(fd, &c, NULL), 0);
	struct move_link_options opt = {
		.conn = c, .epoch = EPOCH, .silence_ms = silence_ms, .failed = on_failed};
	ck_assert_int_eq(move_link_start(&opt, &l, NULL), 0);
	return l;
}

static void setup(void)
{
	int fd[2];
	failures = 0;
	ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd), 0);
	link_a = start(fd[0], 400);
	ck_assert_int_eq(conn_from_fd(fd[1], &raw, NULL), 0);
}

static void teardown(void)
{
	move_link_free(link_a);
	conn_close(raw);
}

START_TEST(a_frame_arrives_and_beats_do_not_count)
{
	struct frame f;
	ck_assert_int_eq(frame_send_json(raw, FRAME_BEAT, EPOCH, NULL, 1000, NULL), 0);
	ck_assert_int_eq(frame_send_json(raw, FRAME_READY, EPOCH, NULL, 1000, NULL), 0);
	ck_assert_int_eq(move_link_wait(link_a, 1u << FRAME_READY, 1000, &f, NULL), 0);
	ck_assert_int_eq(f.type, FRAME_READY);
	frame_release(&f);
	ck_assert(!move_link_failed(link_a, NULL));
}
END_TEST

START_TEST(silence_is_a_failure)
{
	struct error err = ERROR_INIT;
	struct frame f;
	uint64_t t = clock_now_ms();
	ck_assert_int_eq(move_link_wait(link_a, 1u << FRAME_READY, 0, &f, &err), -ETIMEDOUT);
	ck_assert_uint_ge(clock_now_ms() - t, 350);
	ck_assert_ptr_nonnull(strstr(err.message, "silent for 400 ms"));
	clock_sleep_ms(20);
	ck_assert_uint_eq(__atomic_load_n(&failures, __ATOMIC_SEQ_CST), 1);
}
END_TEST

START_TEST(beats_keep_it_alive)
{
	struct frame f;
	for (int i = 0; i < 8; i++) {
		ck_assert_int_eq(frame_send_json(raw, FRAME_BEAT, EPOCH, NULL, 1000, NULL), 0);
		ck_assert_int_eq(move_link_wait(link_a, 1u << FRAME_READY, 100, &f, NULL), -ETIMEDOUT);
	}
	ck_assert(!move_link_failed(link_a, NULL));
	/* and it beats itself */
	ck_assert_int_eq(frame_read(raw, 1000, &f, NULL), 0);
	ck_assert_int_eq(f.type, FRAME_BEAT);
	ck_assert_uint_eq(f.epoch, EPOCH);
	frame_release(&f);
}
END_TEST

START_TEST(another_epoch_ends_it)
{
	struct frame f;
	struct error err = ERROR_INIT;
	ck_assert_int_eq(frame_send_json(raw, FRAME_READY, EPOCH + 1, NULL, 1000, NULL), 0);
	ck_assert_int_eq(move_link_wait(link_a, 1u << FRAME_READY, 1000, &f, &err), -EPROTO);
	ck_assert_ptr_nonnull(strstr(err.message, "epoch 8"));
}
END_TEST

START_TEST(an_unexpected_frame_ends_it)
{
	struct frame f;
	ck_assert_int_eq(frame_send_json(raw, FRAME_COMMIT, EPOCH, NULL, 1000, NULL), 0);
	ck_assert_int_eq(move_link_wait(link_a, 1u << FRAME_READY, 1000, &f, NULL), -EPROTO);
	ck_assert(move_link_failed(link_a, NULL));
}
END_TEST

START_TEST(abort_brings_its_sentence)
{
	struct frame f;
	struct error err = ERROR_INIT;
	json_t *o = json_pack("{s:s}", "reason", "the disk is full");
	ck_assert_int_eq(frame_send_json(raw, FRAME_ABORT, EPOCH, o, 1000, NULL), 0);
	json_decref(o);
	ck_assert_int_eq(move_link_wait(link_a, 1u << FRAME_READY, 1000, &f, &err), -ECONNABORTED);
	ck_assert_ptr_nonnull(strstr(err.message, "the disk is full"));
	ck_assert_int_eq(move_link_send(link_a, FRAME_READY, NULL, &err), -ECONNABORTED);
}
END_TEST

/* After COMMIT this decides between a moved VM and one in doubt. */
START_TEST(what_came_before_the_end_still_counts)
{
	struct frame f;
	ck_assert_int_eq(frame_send_json(raw, FRAME_RUNNING, EPOCH, NULL, 1000, NULL), 0);
	conn_shutdown(raw);
	clock_sleep_ms(100);
	ck_assert(move_link_failed(link_a, NULL));
	ck_assert_int_eq(move_link_wait(link_a, 1u << FRAME_RUNNING, 1000, &f, NULL), 0);
	frame_release(&f);
	ck_assert_int_eq(move_link_wait(link_a, 1u << FRAME_RUNNING, 1000, &f, NULL), -ECONNRESET);
}
END_TEST

START_TEST(a_flood_of_frames_ends_it)
{
	for (int i = 0; i < 100; i++)
		if (frame_send_json(raw, FRAME_READY, EPOCH, NULL, 1000, NULL))
			break;
	clock_sleep_ms(100);
	struct error err = ERROR_INIT;
	ck_assert(move_link_failed(link_a, &err));
	ck_assert_int_eq(err.code, -EPROTO);
}
END_TEST

START_TEST(files_without_a_taker_end_it)
{
	struct frame f;
	char bytes[16] = {0};
	ck_assert_int_eq(frame_send_bytes(raw, FRAME_FILE, EPOCH, bytes, sizeof bytes, 1000, NULL), 0);
	ck_assert_int_eq(move_link_wait(link_a, 1u << FRAME_READY, 1000, &f, NULL), -EPROTO);
}
END_TEST

START_TEST(events_are_kept_for_late_watchers_and_end)
{
	struct move_events *ev = move_events_create();
	for (int i = 0; i < 600; i++)
		move_events_emit(ev, json_pack("{s:i}", "n", i), false);
	move_events_emit(ev, json_pack("{s:i}", "n", 600), true);
	move_events_emit(ev, json_pack("{s:i}", "n", 601), true); /* after the end: nothing */
	unsigned next = 0, seen = 0;
	int last = -1;
	bool ended = false;
	for (;;) {
		json_t *e = move_events_wait(ev, &next, 10, &ended);
		if (!e)
			break;
		int n = (int)json_integer_value(json_object_get(e, "n"));
		ck_assert_int_gt(n, last);
		last = n;
		seen++;
		json_decref(e);
	}
	ck_assert(ended);
	ck_assert_int_eq(last, 600);
	ck_assert_uint_eq(seen, 512);
	json_t *f = move_events_final(ev);
	ck_assert_int_eq((int)json_integer_value(json_object_get(f, "n")), 600);
	json_decref(f);
	move_events_free(ev);
}
END_TEST

START_TEST(compression_is_as_asked)
{
	static const struct {
		const char *options;
		enum mem_compress compress;
		int level;
	} t[] = {{"{}", MEM_COMPRESS_AUTO, 1},
		 {"{\"compress\":\"auto\"}", MEM_COMPRESS_AUTO, 1},
		 {"{\"compress\":\"off\"}", MEM_COMPRESS_OFF, 1},
		 {"{\"compress\":\"zstd\",\"zstd_level\":7}", MEM_COMPRESS_ALWAYS, 7}};
	for (size_t i = 0; i < sizeof t / sizeof t[0]; i++) {
		struct move_options opt;
		json_t *o = json_pack("{s:s, s:s, s:i, s:o}", "address", "h:1", "peer", "h", "epoch", 2,
				      "options", json_loads(t[i].options, 0, NULL));
		ck_assert_int_eq(move_options_parse(o, &opt, NULL), 0);
		ck_assert_int_eq((int)opt.compress, (int)t[i].compress);
		ck_assert_int_eq(opt.zstd_level, t[i].level);
		json_decref(o);
	}
}
END_TEST

START_TEST(options_are_checked)
{
	static const struct {
		const char *json;
		int rc;
	} t[] = {
		{"{\"address\":\"h:1\",\"peer\":\"h\",\"epoch\":2}", 0},
		{"{\"address\":\"h:1\",\"peer\":\"h\",\"epoch\":2,\"options\":{\"max_downtime_ms\":10,"
		 "\"streams\":3}}",
		 0},
		{"{\"address\":\"h:1\",\"peer\":\"h\",\"epoch\":2,\"options\":{\"compress\":\"zstd\",\"zstd_"
		 "level\":3}}",
		 0},
		{"{\"address\":\"h:1\",\"peer\":\"h\",\"epoch\":2,\"options\":{\"compress\":\"off\"}}", 0},
		{"{\"address\":\"h:1\",\"peer\":\"h\",\"epoch\":2,\"options\":{\"compress\":\"lz4\"}}",
		 -EINVAL},
		{"{\"address\":\"h:1\",\"peer\":\"h\",\"epoch\":2,\"options\":{\"compress\":1}}", -EINVAL},
		{"{\"address\":\"h:1\",\"peer\":\"h\",\"epoch\":2,\"options\":{\"zstd_level\":0}}", -EINVAL},
		{"{\"address\":\"h:1\",\"peer\":\"h\",\"epoch\":2,\"options\":{\"zstd_level\":20}}", -EINVAL},
		{"{\"address\":\"h:1\",\"peer\":\"h\"}", -EINVAL},
		{"{\"address\":\"h:1\",\"peer\":\"h\",\"epoch\":0}", -EINVAL},
		{"{\"address\":\"h:1\",\"epoch\":2}", -EINVAL},
		{"{\"address\":\"h:1\",\"peer\":\"h\",\"epoch\":2,\"options\":{\"streams\":17}}", -EINVAL},
		{"{\"address\":\"h:1\",\"peer\":\"h\",\"epoch\":2,\"options\":{\"max_downtime_ms\":-1}}",
		 -EINVAL},
		{"{\"address\":\"h:1\",\"peer\":\"h\",\"epoch\":2,\"options\":{\"max_downtime_ms\":\"1\"}}",
		 -EINVAL},
	};
	for (size_t i = 0; i < sizeof t / sizeof t[0]; i++) {
		struct move_options opt;
		json_t *o = json_loads(t[i].json, 0, NULL);
		ck_assert_ptr_nonnull(o);
		ck_assert_msg(move_options_parse(o, &opt, NULL) == t[i].rc, "%s", t[i].json);
		json_decref(o);
	}
}
END_TEST

int main(void)
{
	Suite *s = suite_create("move_link");
	TCase *tc = tcase_create("link");
	tcase_add_checked_fixture(tc, setup, teardown);
	tcase_add_test(tc, a_frame_arrives_and_beats_do_not_count);
	tcase_add_test(tc, silence_is_a_failure);
	tcase_add_test(tc, beats_keep_it_alive);
	tcase_add_test(tc, another_epoch_ends_it);
	tcase_add_test(tc, an_unexpected_frame_ends_it);
	tcase_add_test(tc, abort_brings_its_sentence);
	tcase_add_test(tc, what_came_before_the_end_still_counts);
	tcase_add_test(tc, a_flood_of_frames_ends_it);
	tcase_add_test(tc, files_without_a_taker_end_it);
	suite_add_tcase(s, tc);
	TCase *te = tcase_create("events and options");
	tcase_add_test(te, events_are_kept_for_late_watchers_and_end);
	tcase_add_test(te, options_are_checked);
	tcase_add_test(tc, compression_is_as_asked);
	suite_add_tcase(s, te);
	return suite_run(s);
}
