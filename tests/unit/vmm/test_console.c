/* SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "tests/suite.h"
#include "vmm/console.h"

static char dir[] = "/tmp/snm-test-console-XXXXXX";
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char typed[256];
static size_t ntyped, room;

static size_t room_of(void *opaque)
{
	SCOPE_LOCK(&lock);
	return room;
}

static void deliver(void *opaque, const uint8_t *bytes, size_t n)
{
	SCOPE_LOCK(&lock);
	ck_assert_uint_le(n, room);
	ck_assert_uint_le(ntyped + n, sizeof typed);
	memcpy(typed + ntyped, bytes, n);
	ntyped += n;
	room -= n;
}

static const struct console_input input = {.room = room_of, .deliver = deliver};

static size_t typed_bytes(void)
{
	SCOPE_LOCK(&lock);
	return ntyped;
}

static void setup(void)
{
	strcpy(dir + sizeof dir - 7, "XXXXXX");
	ck_assert_ptr_nonnull(mkdtemp(dir));
	ntyped = 0;
	room = 100;
}

static void teardown(void)
{
	char cmd[128];
	snprintf(cmd, sizeof cmd, "rm -rf %s", dir);
	ck_assert_int_eq(system(cmd), 0);
}

static struct console *create(const char *spec)
{
	struct console *c = NULL;
	struct error err = ERROR_INIT;
	int ret = console_create(spec, dir, &input, &c, &err);
	ck_assert_msg(ret == 0, "%s", err.message);
	return c;
}

static void put(struct console *c, const char *s)
{
	while (*s)
		console_put(c, (uint8_t)*s++);
}

static int dial(void)
{
	struct sockaddr_un sa = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);
	snprintf(sa.sun_path, sizeof sa.sun_path, "%s/console.sock", dir);
	ck_assert_int_eq(connect(fd, (struct sockaddr *)&sa, sizeof sa), 0);
	return fd;
}

/* Reads until n bytes are there or nothing comes for `ms`. */
static size_t take(int fd, char *buf, size_t n, int ms)
{
	size_t got = 0;
	struct pollfd p = {.fd = fd, .events = POLLIN};
	while (got < n && poll(&p, 1, ms) == 1) {
		ssize_t r = read(fd, buf + got, n - got);
		if (r <= 0)
			break;
		got += (size_t)r;
	}
	return got;
}

START_TEST(a_client_gets_what_was_printed_before_and_after)
{
	struct console *c = create("socket");
	char buf[64] = {0};
	struct stat st;
	char path[64];
	snprintf(path, sizeof path, "%s/console.sock", dir);
	ck_assert_int_eq(stat(path, &st), 0);
	ck_assert_uint_eq(st.st_mode & 0777, 0600);
	console_resume(c);
	put(c, "before ");
	int fd = dial();
	ck_assert_uint_eq(take(fd, buf, 7, 5000), 7);
	put(c, "after");
	ck_assert_uint_eq(take(fd, buf + 7, 5, 5000), 5);
	ck_assert_str_eq(buf, "before after");
	ck_assert_int_eq(write(fd, "typed", 5), 5);
	for (int i = 0; i < 2500 && typed_bytes() < 5; i++)
		clock_sleep_ms(2);
	ck_assert_mem_eq(typed, "typed", 5);

	int second = dial();
	memset(buf, 0, sizeof buf);
	ck_assert_uint_gt(take(second, buf, sizeof buf - 1, 5000), 10);
	ck_assert_ptr_nonnull(strstr(buf, "another client"));
	close(second);
	close(fd);
	clock_sleep_ms(50);
	fd = dial(); /* the place is free again */
	ck_assert_uint_eq(take(fd, buf, 12, 5000), 12);
	close(fd);
	console_destroy(c);
	ck_assert_int_eq(access(path, F_OK), -1);
}
END_TEST

START_TEST(nothing_leaves_while_paused)
{
	struct console *c = create("socket");
	char buf[64];
	int fd = dial();
	put(c, "held"); /* created paused */
	ck_assert_uint_eq(take(fd, buf, 4, 100), 0);
	console_resume(c);
	ck_assert_uint_eq(take(fd, buf, 4, 5000), 4);
	put(c, "early");
	console_pause(c);
	put(c, "late");
	ck_assert_int_eq(console_drain(c, 5000), 0);
	ck_assert_uint_eq(take(fd, buf, sizeof buf, 100), 5); /* what came before the pause did leave */
	ck_assert_mem_eq(buf, "early", 5);
	ck_assert_int_eq(write(fd, "x", 1), 1); /* and nothing comes in */
	clock_sleep_ms(50);
	ck_assert_uint_eq(typed_bytes(), 0);
	console_resume(c);
	ck_assert_uint_eq(take(fd, buf, 4, 5000), 4);
	ck_assert_mem_eq(buf, "late", 4);
	for (int i = 0; i < 2500 && typed_bytes() < 1; i++)
		clock_sleep_ms(2);
	ck_assert_uint_eq(typed_bytes(), 1);
	close(fd);
	console_destroy(c);
}
END_TEST

START_TEST(a_client_that_does_not_read_blocks_nobody)
{
	struct console *c = create("socket");
	console_resume(c);
	int fd = dial();
	for (int i = 0; i < 2000000; i++)
		console_put(c, (uint8_t)('a' + i % 26));
	console_pause(c);
	uint64_t start = clock_now_ms();
	console_drain(c, 3000);
	ck_assert_uint_lt(clock_now_ms() - start, 2500);
	close(fd);
	console_destroy(c);
}
END_TEST

START_TEST(input_waits_for_room)
{
	struct console *c = create("socket");
	console_resume(c);
	room = 3;
	int fd = dial();
	ck_assert_int_eq(write(fd, "12345678", 8), 8);
	for (int i = 0; i < 2500 && typed_bytes() < 3; i++)
		clock_sleep_ms(2);
	clock_sleep_ms(20);
	ck_assert_uint_eq(typed_bytes(), 3);
	{
		SCOPE_LOCK(&lock);
		room = 5;
	}
	console_wake(c);
	for (int i = 0; i < 2500 && typed_bytes() < 8; i++)
		clock_sleep_ms(2);
	ck_assert_mem_eq(typed, "12345678", 8);
	close(fd);
	console_destroy(c);
}
END_TEST

START_TEST(kept_bytes_travel_and_are_not_printed_twice)
{
	char spec[80], path[64], buf[64] = {0};
	snprintf(path, sizeof path, "%s/log", dir);
	snprintf(spec, sizeof spec, "file:%s", path);
	struct console *c = create(spec);
	console_resume(c);
	put(c, "one ");
	console_pause(c);
	ck_assert_int_eq(console_drain(c, 5000), 0);
	put(c, "two ");
	struct state_writer *w = state_writer_create();
	const uint8_t *state;
	size_t len;
	state_section_begin(w, "c", 1);
	console_save(c, w);
	state_section_end(w);
	ck_assert_int_eq(state_writer_finish(w, &state, &len, NULL), 0);
	console_destroy(c);

	struct console *n = create(spec);
	struct state_reader *r;
	ck_assert_int_eq(state_reader_open(state, len, &r, NULL), 0);
	ck_assert_int_eq(state_reader_section(r, "c", 1, NULL, NULL), 0);
	ck_assert_int_eq(console_load(n, r, NULL), 0);
	ck_assert_int_eq(state_reader_section_end(r, NULL), 0);
	state_reader_free(r);
	console_resume(n);
	put(n, "three");
	console_pause(n);
	ck_assert_int_eq(console_drain(n, 5000), 0);
	int fd = open(path, O_RDONLY);
	ck_assert_int_eq(read(fd, buf, sizeof buf - 1), 13);
	ck_assert_str_eq(buf, "one two three");
	close(fd);
	console_destroy(n);
	state_writer_free(w);
}
END_TEST

START_TEST(the_socket_goes_with_a_renamed_folder)
{
	char moved[64], path[96];
	struct console *c = create("socket");
	snprintf(moved, sizeof moved, "%s.moved", dir);
	ck_assert_int_eq(rename(dir, moved), 0);
	snprintf(path, sizeof path, "%s/console.sock", moved);
	ck_assert_int_eq(access(path, F_OK), 0);
	console_destroy(c);
	ck_assert_int_eq(access(path, F_OK), -1);
	ck_assert_int_eq(rename(moved, dir), 0);
}
END_TEST

START_TEST(bad_places_are_named)
{
	struct console *c;
	struct error err = ERROR_INIT;
	ck_assert_int_eq(console_create("file:/nowhere/log", dir, &input, &c, &err), -ENOENT);
	ck_assert_ptr_nonnull(strstr(err.message, "/nowhere/log"));
	ck_assert_int_eq(console_create("socket", "/nowhere", &input, &c, &err), -ENOENT);
	ck_assert_int_eq(console_create("socket", NULL, &input, &c, &err), -EINVAL);
	ck_assert_int_eq(console_create("vc", dir, &input, &c, &err), -EINVAL);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("console");
	TCase *t = tcase_create("console");
	tcase_add_checked_fixture(t, setup, teardown);
	tcase_add_test(t, a_client_gets_what_was_printed_before_and_after);
	tcase_add_test(t, nothing_leaves_while_paused);
	tcase_add_test(t, a_client_that_does_not_read_blocks_nobody);
	tcase_add_test(t, input_waits_for_room);
	tcase_add_test(t, kept_bytes_travel_and_are_not_printed_twice);
	tcase_add_test(t, the_socket_goes_with_a_renamed_folder);
	tcase_add_test(t, bad_places_are_named);
	suite_add_tcase(s, t);
	return suite_run(s);
}
