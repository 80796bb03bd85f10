/* SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"
#include "net/preamble.h"
#include "tests/suite.h"

#define HEX "0123456789abcdef0123456789abcdef"

static const struct {
	const char *line;
	int ret;
	enum channel channel;
	const char *mention;
} lines[] = {
	{"SNMIGRATE/1 control -", 0, CHANNEL_CONTROL, NULL},
	{"SNMIGRATE/1 control paired", 0, CHANNEL_CONTROL, NULL},
	{"SNMIGRATE/1 pair -", 0, CHANNEL_PAIR, NULL},
	{"SNMIGRATE/1 control paire", -EPROTO, 0, "malformed token"},
	{"SNMIGRATE/1 control pairedx", -EPROTO, 0, "malformed token"},
	{"SNMIGRATE/1 pair paired", -EPROTO, 0, "malformed token"},
	{"SNMIGRATE/1 pair 0123456789abcdef0123456789abcdef", -EPROTO, 0, "malformed token"},
	{"SNMIGRATE/1 memory paired", -EPROTO, 0, "malformed token"},
	{"SNMIGRATE/1 memory " HEX, 0, CHANNEL_MEMORY, NULL},
	{"SNMIGRATE/1 disk " HEX, 0, CHANNEL_DISK, NULL},
	{"", -EPROTO, 0, "does not begin"},
	{"SNMIGRATE/1", -EPROTO, 0, "does not begin"},
	{"SNMIGRATE/1 ", -EPROTO, 0, "no token"},
	{"SNMIGRATE/1 control", -EPROTO, 0, "no token"},
	{"SNMIGRATE/1 control ", -EPROTO, 0, "malformed token"},
	{"SNMIGRATE/1 control --", -EPROTO, 0, "malformed token"},
	{"SNMIGRATE/1 control " HEX, -EPROTO, 0, "malformed token"},
	{"SNMIGRATE/1 memory -", -EPROTO, 0, "malformed token"},
	{"SNMIGRATE/1 memory " HEX "0", -EPROTO, 0, "malformed token"},
	{"SNMIGRATE/1 memory 0123456789ABCDEF0123456789abcdef", -EPROTO, 0, "malformed token"},
	{"SNMIGRATE/1 memory  " HEX, -EPROTO, 0, "malformed token"},
	{"SNMIGRATE/1 memory " HEX "\r", -EPROTO, 0, "malformed token"},
	{"SNMIGRATE/1 Memory " HEX, -EPROTO, 0, "no known channel"},
	{"SNMIGRATE/1 floppy " HEX, -EPROTO, 0, "no known channel"},
	{"SNMIGRATE/2 memory " HEX, -EPROTO, 0, "another version"},
	{" SNMIGRATE/1 control -", -EPROTO, 0, "does not begin"},
	{"GET / HTTP/1.1", -EPROTO, 0, "does not begin"},
};

START_TEST(test_parse_table)
{
	struct preamble pre;
	struct error err = ERROR_INIT;
	int ret = preamble_parse(lines[_i].line, strlen(lines[_i].line), &pre, &err);

	ck_assert_int_eq(ret, lines[_i].ret);
	if (ret == 0) {
		ck_assert_int_eq(pre.channel, lines[_i].channel);
		ck_assert_str_eq(pre.token, strrchr(lines[_i].line, ' ') + 1);
	} else {
		ck_assert_msg(strstr(err.message, lines[_i].mention) != NULL, "%s", err.message);
	}
}
END_TEST

START_TEST(test_parse_embedded_nul)
{
	static const char line[] = "SNMIGRATE/1 memory 0123456789abcdef\0 123456789abcdef";
	struct preamble pre;

	ck_assert_int_eq(preamble_parse(line, sizeof line - 1, &pre, NULL), -EPROTO);
}
END_TEST

START_TEST(test_round_trip_and_nothing_past_the_newline)
{
	struct preamble pre = {.channel = CHANNEL_DISK}, got;
	char rest[16] = "";
	int fds[2];

	ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
	ck_assert_int_eq(token_generate(pre.token, NULL), 0);
	ck_assert_int_eq(preamble_write(fds[0], &pre, 1000, NULL), 0);
	ck_assert_int_eq(send(fds[0], "more\ndata", 9, 0), 9);
	ck_assert_int_eq(preamble_read(fds[1], 1000, &got, NULL), 0);
	ck_assert_int_eq(got.channel, CHANNEL_DISK);
	ck_assert_str_eq(got.token, pre.token);
	ck_assert_int_eq(recv(fds[1], rest, sizeof rest, 0), 9);
	ck_assert_str_eq(rest, "more\ndata");
	close(fds[0]);
	close(fds[1]);
}
END_TEST

static void *dribble(void *arg)
{
	static const char line[] = "SNMIGRATE/1 memory " HEX "\nX";

	for (size_t i = 0; i < sizeof line - 1; i++) {
		send(*(int *)arg, line + i, 1, 0);
		clock_sleep_ms(2);
	}
	return NULL;
}

START_TEST(test_line_in_pieces)
{
	struct preamble got;
	pthread_t thread;
	char byte;
	int fds[2];

	ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
	pthread_create(&thread, NULL, dribble, &fds[0]);
	ck_assert_int_eq(preamble_read(fds[1], 5000, &got, NULL), 0);
	ck_assert_str_eq(got.token, HEX);
	pthread_join(thread, NULL);
	ck_assert_int_eq(recv(fds[1], &byte, 1, 0), 1);
	ck_assert_int_eq(byte, 'X');
	close(fds[0]);
	close(fds[1]);
}
END_TEST

START_TEST(test_total_time_is_limited)
{
	struct preamble got;
	pthread_t thread;
	uint64_t before = clock_now_ms();
	int fds[2];

	/* A byte every 2 ms is progress, but the line as a whole is late. */
	ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
	pthread_create(&thread, NULL, dribble, &fds[0]);
	ck_assert_int_eq(preamble_read(fds[1], 30, &got, NULL), -ETIMEDOUT);
	ck_assert_uint_lt(clock_now_ms() - before, 2000);
	pthread_join(thread, NULL);
	close(fds[0]);
	close(fds[1]);
}
END_TEST

START_TEST(test_length_is_limited)
{
	struct preamble got;
	struct error err = ERROR_INIT;
	char junk[4096] = "SNMIGRATE/1 memory ";
	int fds[2];

	memset(junk + 19, 'a', sizeof junk - 19);
	ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
	ck_assert_int_eq(send(fds[0], junk, sizeof junk, 0), sizeof junk);
	ck_assert_int_eq(preamble_read(fds[1], 5000, &got, &err), -EPROTO);
	ck_assert(strstr(err.message, "longer than 256") != NULL);
	close(fds[0]);
	close(fds[1]);
}
END_TEST

START_TEST(test_stranger_is_told_early)
{
	struct preamble got;
	uint64_t before = clock_now_ms();
	int fds[2];

	ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
	ck_assert_int_eq(send(fds[0], "\x16\x03\x01\x02", 4, 0), 4);
	ck_assert_int_eq(preamble_read(fds[1], 5000, &got, NULL), -EPROTO);
	ck_assert_uint_lt(clock_now_ms() - before, 2000);
	close(fds[0]);
	close(fds[1]);
}
END_TEST

START_TEST(test_closed_peer)
{
	struct preamble got;
	int fds[2];

	ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
	close(fds[0]);
	ck_assert_int_eq(preamble_read(fds[1], 5000, &got, NULL), -ENODATA);
	close(fds[1]);
	ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
	ck_assert_int_eq(send(fds[0], "SNMIG", 5, 0), 5);
	close(fds[0]);
	ck_assert_int_eq(preamble_read(fds[1], 5000, &got, NULL), -EPROTO);
	close(fds[1]);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("preamble");
	TCase *tc = tcase_create("preamble");

	tcase_add_loop_test(tc, test_parse_table, 0, (int)(sizeof lines / sizeof lines[0]));
	tcase_add_test(tc, test_parse_embedded_nul);
	tcase_add_test(tc, test_round_trip_and_nothing_past_the_newline);
	tcase_add_test(tc, test_line_in_pieces);
	tcase_add_test(tc, test_total_time_is_limited);
	tcase_add_test(tc, test_length_is_limited);
	tcase_add_test(tc, test_stranger_is_told_early);
	tcase_add_test(tc, test_closed_peer);
	suite_add_tcase(suite, tc);
	return suite_run(suite);
}
