/* SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "host/jsonl.h"
#include "tests/suite.h"

static struct jsonl *a, *b;
static struct error err;

static void setup(void)
{
	int fds[2];
	ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
	a = jsonl_from_fd(fds[0]);
	b = jsonl_from_fd(fds[1]);
	err = ERROR_INIT;
}

static void teardown(void)
{
	jsonl_close(a);
	jsonl_close(b);
}

static void send_raw(const char *text)
{
	ck_assert_int_eq(write(jsonl_fd(a), text, strlen(text)), (ssize_t)strlen(text));
}

START_TEST(lines_come_one_by_one)
{
	json_t *o = NULL;
	send_raw("{\"n\":1}\n{\"n\":2}\n{\"n\"");
	ck_assert_int_eq(jsonl_read(b, &o, NULL, 1000, &err), 0);
	ck_assert_int_eq(json_integer_value(json_object_get(o, "n")), 1);
	json_decref(o);
	ck_assert(jsonl_pending(b));
	ck_assert_int_eq(jsonl_read(b, &o, NULL, 1000, &err), 0);
	json_decref(o);
	ck_assert(!jsonl_pending(b));
	ck_assert_int_eq(jsonl_read(b, &o, NULL, 20, &err), -ETIMEDOUT);
	ck_assert_ptr_null(o);
	send_raw(":3}\n");
	ck_assert_int_eq(jsonl_read(b, &o, NULL, 1000, &err), 0);
	ck_assert_int_eq(json_integer_value(json_object_get(o, "n")), 3);
	json_decref(o);
}
END_TEST

static const char *const garbage[] = {"hello\n",	"[1]\n",  "\n", "{\"a\":1,\"a\":2}\n",
				      "{\"a\":\xff}\n", "{} {}\n"};

START_TEST(garbage_is_refused_and_the_next_line_read)
{
	json_t *o = NULL;
	send_raw(garbage[_i]);
	send_raw("{}\n");
	ck_assert_int_eq(jsonl_read(b, &o, NULL, 1000, &err), -EPROTO);
	ck_assert_ptr_null(o);
	ck_assert_int_eq(jsonl_read(b, &o, NULL, 1000, &err), 0);
	json_decref(o);
}
END_TEST

START_TEST(ends)
{
	json_t *o = NULL;
	send_raw("{\"half");
	shutdown(jsonl_fd(a), SHUT_WR);
	ck_assert_int_eq(jsonl_read(b, &o, NULL, 1000, &err), -ECONNRESET);
	shutdown(jsonl_fd(b), SHUT_WR);
	ck_assert_int_eq(jsonl_read(a, &o, NULL, 1000, &err), -ENODATA);
}
END_TEST

static void *feed(void *arg)
{
	char chunk[65536];
	memset(chunk, 'x', sizeof chunk);
	for (size_t n = 0; n < JSONL_LINE_MAX_BYTES + (8u << 20); n += sizeof chunk)
		if (send(jsonl_fd(a), chunk, sizeof chunk, MSG_NOSIGNAL) < 0)
			break;
	return NULL;
}

START_TEST(a_line_has_a_limit)
{
	json_t *o = NULL;
	pthread_t t;
	pthread_create(&t, NULL, feed, NULL);
	ck_assert_int_eq(jsonl_read(b, &o, NULL, 10000, &err), -EPROTO);
	shutdown(jsonl_fd(b), SHUT_RDWR);
	pthread_join(t, NULL);
}
END_TEST

/* The descriptor belongs to its own line, whatever stands before it in the buffer. */
START_TEST(descriptors_go_with_their_lines)
{
	int pipes[2], got = -1;
	json_t *o = NULL, *plain = json_pack("{s:i}", "n", 1), *with = json_pack("{s:i}", "n", 2);
	ck_assert_int_eq(pipe(pipes), 0);
	ck_assert_int_eq(jsonl_write(a, plain, -1, &err), 0);
	ck_assert_int_eq(jsonl_write(a, with, pipes[0], &err), 0);
	ck_assert_int_eq(jsonl_write(a, with, pipes[1], &err), 0);
	ck_assert_int_eq(jsonl_write(a, plain, -1, &err), 0);
	ck_assert_ptr_null(json_object_get(with, "descriptor"));
	int fds[4];
	for (int i = 0; i < 4; i++) {
		ck_assert_int_eq(jsonl_read(b, &o, &got, 1000, &err), 0);
		ck_assert_int_eq(json_integer_value(json_object_get(o, "n")), i == 1 || i == 2 ? 2 : 1);
		fds[i] = got;
		json_decref(o);
	}
	ck_assert(fds[0] == -1 && fds[3] == -1 && fds[1] >= 0 && fds[2] >= 0);
	char c = 0;
	ck_assert_int_eq(write(fds[2], "x", 1), 1);
	ck_assert_int_eq(read(fds[1], &c, 1), 1);
	ck_assert_int_eq(c, 'x');
	send_raw("{\"descriptor\":true}\n");
	ck_assert_int_eq(jsonl_read(b, &o, &got, 1000, &err), -EPROTO);
	close(fds[1]);
	close(fds[2]);
	close(pipes[0]);
	close(pipes[1]);
	json_decref(plain);
	json_decref(with);
}
END_TEST

static void *answer(void *arg)
{
	json_t *o = NULL;
	struct error e = ERROR_INIT;
	jsonl_read(b, &o, NULL, 5000, NULL);
	json_decref(o);
	error_set(&e, EBUSY, "VM x is \xff busy");
	jsonl_write_error(b, 3, &e);
	jsonl_read(b, &o, NULL, 5000, NULL);
	json_object_set_new(o, "ok", json_true());
	jsonl_write(b, o, -1, NULL);
	json_decref(o);
	return NULL;
}

START_TEST(calls)
{
	pthread_t t;
	json_t *q = json_pack("{s:s}", "cmd", "x"), *reply = NULL;
	int status = 0;
	pthread_create(&t, NULL, answer, NULL);
	ck_assert_int_lt(jsonl_call(a, q, &reply, &status, 5000, &err), 0);
	ck_assert_int_eq(status, 3);
	ck_assert_str_eq(err.message, "VM x is ? busy");
	ck_assert_ptr_null(reply);
	ck_assert_int_eq(jsonl_call(a, q, &reply, &status, 5000, &err), 0);
	ck_assert_str_eq(json_string_value(json_object_get(reply, "cmd")), "x");
	json_decref(reply);
	json_decref(q);
	pthread_join(t, NULL);
}
END_TEST

static void *answer_with_descriptors(void *arg)
{
	json_t *o = NULL, *refusal = json_pack("{s:b}", "ok", 0);
	for (int i = 0; i < 3; i++) {
		jsonl_read(b, &o, NULL, 5000, NULL);
		json_object_set_new(o, "ok", json_true());
		jsonl_write(b, i < 2 ? o : refusal, i == 1 ? -1 : *(int *)arg, NULL);
		json_decref(o);
	}
	json_decref(refusal);
	return NULL;
}

static unsigned open_descriptors(void)
{
	unsigned n = 0;
	for (int i = 0; i < 256; i++)
		n += fcntl(i, F_GETFD) >= 0;
	return n;
}

START_TEST(a_descriptor_may_come_with_a_reply)
{
	pthread_t t;
	json_t *q = json_pack("{s:s}", "cmd", "x");
	int pipes[2], got, status;
	char c = 0;
	ck_assert_int_eq(pipe(pipes), 0);
	unsigned before = open_descriptors();
	pthread_create(&t, NULL, answer_with_descriptors, &pipes[1]);
	ck_assert_int_eq(jsonl_call_fd(a, q, NULL, &got, NULL, 5000, &err), 0);
	ck_assert_int_ge(got, 0);
	ck_assert_int_eq(write(got, "x", 1), 1);
	ck_assert_int_eq(read(pipes[0], &c, 1), 1);
	ck_assert_int_eq(c, 'x');
	close(got);
	ck_assert_int_eq(jsonl_call_fd(a, q, NULL, &got, NULL, 5000, &err), 0);
	ck_assert_int_eq(got, -1);
	/* nobody has use for one that comes with a refusal */
	ck_assert_int_eq(jsonl_call_fd(a, q, NULL, &got, &status, 5000, &err), -EREMOTE);
	ck_assert_int_eq(got, -1);
	pthread_join(t, NULL);
	ck_assert_uint_eq(open_descriptors(), before);
	close(pipes[0]);
	close(pipes[1]);
	json_decref(q);
}
END_TEST

START_TEST(writing_to_nobody_is_an_error)
{
	json_t *o = json_object();
	jsonl_close(b);
	int fds[2];
	ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
	b = jsonl_from_fd(fds[0]);
	close(fds[1]);
	ck_assert_int_eq(jsonl_write(a, o, -1, &err), -EPIPE);
	ck_assert_int_eq(jsonl_write(a, o, -1, &err), -EPIPE);
	json_decref(o);
}
END_TEST

/* A path longer than sockaddr_un has room for; mode 0600; stale sockets are replaced, live ones and files are
 * not. */
START_TEST(listening)
{
	char dir[64] = "/tmp/test_jsonl.XXXXXX", deep[400], path[500];
	ck_assert(mkdtemp(dir) != NULL);
	snprintf(deep, sizeof deep, "%s/%0120d", dir, 0);
	ck_assert_int_eq(mkdir(deep, 0700), 0);
	snprintf(path, sizeof path, "%s/s.sock", deep);
	int fd = jsonl_listen(path, &err);
	ck_assert_msg(fd >= 0, "%s", err.message);
	struct stat st;
	ck_assert_int_eq(stat(path, &st), 0);
	ck_assert_int_eq(st.st_mode & 0777, 0600);
	ck_assert_int_eq(jsonl_listen(path, &err), -EADDRINUSE);
	struct jsonl *c = NULL;
	ck_assert_int_eq(jsonl_connect(path, 1000, &c, &err), 0);
	jsonl_close(c);
	close(fd);
	ck_assert_int_eq(jsonl_connect(path, 1000, &c, &err), -ECONNREFUSED);
	ck_assert_msg(strstr(err.message, "s.sock") != NULL, "%s", err.message);
	fd = jsonl_listen(path, &err);
	ck_assert_msg(fd >= 0, "%s", err.message);
	close(fd);
	unlink(path);
	ck_assert_int_eq(jsonl_connect(path, 1000, &c, &err), -ENOENT);
	close(open(path, O_CREAT | O_WRONLY, 0600));
	ck_assert_int_eq(jsonl_listen(path, &err), -EEXIST);
	unlink(path);
	rmdir(deep);
	rmdir(dir);
}
END_TEST

int main(void)
{
	signal(SIGPIPE, SIG_DFL); /* jsonl must not need it ignored */
	Suite *s = suite_create("jsonl");
	TCase *tc = tcase_create("jsonl");
	tcase_add_checked_fixture(tc, setup, teardown);
	tcase_add_test(tc, lines_come_one_by_one);
	tcase_add_loop_test(tc, garbage_is_refused_and_the_next_line_read, 0, ARRAY_SIZE(garbage));
	tcase_add_test(tc, ends);
	tcase_add_test(tc, a_line_has_a_limit);
	tcase_add_test(tc, descriptors_go_with_their_lines);
	tcase_add_test(tc, calls);
	tcase_add_test(tc, a_descriptor_may_come_with_a_reply);
	tcase_add_test(tc, writing_to_nobody_is_an_error);
	tcase_add_test(tc, listening);
	suite_add_tcase(s, tc);
	return suite_run(s);
}
