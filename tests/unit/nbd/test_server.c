/* SPDX-License-Identifier: Apache-2.0 */
/* The server against a hand-written client: exactly the bytes that no decent client would send. */
#include <check.h>
#include <errno.h>
#include <poll.h>
#include <sys/socket.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "nbd/nbd.h"
#include "nbd/protocol.h"
#include "tests/suite.h"
#include "tests/unit/block/rig.h"

#define SIZE (UINT64_C(4) << 20)

static struct block *disk;
static struct nbd_server *server;

static void start(const struct nbd_server_options *with)
{
	struct error err = ERROR_INIT;
	struct block_open_options opt = {.format = BLOCK_FORMAT_RAW};
	rig_file("d", SIZE);
	ck_ok(block_open(rig_path("d"), &opt, &disk, &err), err);
	struct nbd_server_options sopt = with ? *with : (struct nbd_server_options){0};
	sopt.block = disk;
	ck_ok(nbd_server_create(&sopt, &server, &err), err);
}

static void setup(void)
{
	rig_setup();
}

static void teardown(void)
{
	nbd_server_free(server);
	block_close(disk);
	rig_teardown();
}

static int dial(void)
{
	int fds[2];
	struct conn *conn;
	struct error err = ERROR_INIT;
	ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
	ck_ok(conn_from_fd(fds[1], &conn, &err), err);
	ck_ok(nbd_server_add(server, conn, &err), err);
	return fds[0];
}

static void send_all(int fd, const void *p, size_t n)
{
	ck_assert_int_eq(send(fd, p, n, MSG_NOSIGNAL), (ssize_t)n);
}

/* n bytes within 5 s, or the test fails. */
static void take(int fd, void *p, size_t n)
{
	size_t got = 0;
	while (got < n) {
		struct pollfd pfd = {.fd = fd, .events = POLLIN};
		ck_assert_int_eq(poll(&pfd, 1, 5000), 1);
		ssize_t r = recv(fd, (char *)p + got, n - got, 0);
		ck_assert_int_gt(r, 0);
		got += (size_t)r;
	}
}

static void expect_closed(int fd, int within_ms)
{
	char buf[4096];
	uint64_t until = clock_now_ms() + (uint64_t)within_ms;
	for (;;) {
		struct pollfd pfd = {.fd = fd, .events = POLLIN};
		uint64_t now = clock_now_ms();
		ck_assert_uint_lt(now, until);
		ck_assert_int_eq(poll(&pfd, 1, (int)(until - now)), 1);
		if (recv(fd, buf, sizeof buf, 0) <= 0)
			break;
	}
	close(fd);
}

static void greet(int fd)
{
	uint8_t hello[18], flags[4];
	take(fd, hello, sizeof hello);
	ck_assert_uint_eq(get_be64(hello), NBD_MAGIC);
	ck_assert_uint_eq(get_be64(hello + 8), NBD_IHAVEOPT);
	ck_assert_uint_eq(get_be16(hello + 16), 3);
	put_be32(flags, 3);
	send_all(fd, flags, 4);
}

static void send_option(int fd, uint32_t option, const void *data, uint32_t len)
{
	uint8_t raw[16];
	put_be64(raw, NBD_IHAVEOPT);
	put_be32(raw + 8, option);
	put_be32(raw + 12, len);
	send_all(fd, raw, 16);
	if (len)
		send_all(fd, data, len);
}

static uint32_t take_rep(int fd, uint32_t option, void *data, size_t size)
{
	uint8_t raw[20], sink[8192];
	take(fd, raw, sizeof raw);
	ck_assert_uint_eq(get_be64(raw), NBD_OPTION_REPLY);
	ck_assert_uint_eq(get_be32(raw + 8), option);
	uint32_t len = get_be32(raw + 16);
	ck_assert_uint_le(len, sizeof sink);
	take(fd, sink, len);
	if (data)
		memcpy(data, sink, len < size ? len : size);
	return get_be32(raw + 12);
}

static void go(int fd)
{
	static const uint8_t none[6] = {0};
	greet(fd);
	send_option(fd, NBD_OPT_GO, none, sizeof none);
	while (take_rep(fd, NBD_OPT_GO, NULL, 0) != NBD_REP_ACK)
		;
}

static void send_request(int fd, uint16_t command, uint16_t flags, uint64_t offset, uint32_t len)
{
	uint8_t raw[NBD_REQUEST_BYTES];
	put_be32(raw, NBD_REQUEST_MAGIC);
	put_be16(raw + 4, flags);
	put_be16(raw + 6, command);
	put_be64(raw + 8, 0xabcd0000ull + command);
	put_be64(raw + 16, offset);
	put_be32(raw + 24, len);
	send_all(fd, raw, sizeof raw);
}

static uint32_t take_simple(int fd, uint16_t command)
{
	uint8_t raw[NBD_SIMPLE_REPLY_BYTES];
	take(fd, raw, sizeof raw);
	ck_assert_uint_eq(get_be32(raw), NBD_SIMPLE_MAGIC);
	ck_assert_uint_eq(get_be64(raw + 8), 0xabcd0000ull + command);
	return get_be32(raw + 4);
}

START_TEST(test_answers_out_of_range)
{
	start(NULL);
	int fd = dial();
	go(fd);
	char data[1024];
	memset(data, 'w', sizeof data);
	send_request(fd, NBD_CMD_READ, 0, SIZE, 512);
	ck_assert_uint_eq(take_simple(fd, NBD_CMD_READ), NBD_EINVAL);
	/* The payload of a refused write is drained: the stream goes on. */
	send_request(fd, NBD_CMD_WRITE, 0, SIZE - 512, 1024);
	send_all(fd, data, 1024);
	ck_assert_uint_eq(take_simple(fd, NBD_CMD_WRITE), NBD_ENOSPC);
	send_request(fd, NBD_CMD_TRIM, 0, SIZE, 512);
	ck_assert_uint_eq(take_simple(fd, NBD_CMD_TRIM), NBD_EINVAL);
	send_request(fd, NBD_CMD_WRITE_ZEROES, 0, 0, UINT32_MAX);
	ck_assert_uint_eq(take_simple(fd, NBD_CMD_WRITE_ZEROES), NBD_ENOSPC);
	send_request(fd, 77, 0, 0, 512);
	ck_assert_uint_eq(take_simple(fd, 77), NBD_EINVAL);
	send_request(fd, NBD_CMD_WRITE, NBD_CMD_FLAG_FUA, SIZE - 512, 512);
	send_all(fd, data, 512);
	ck_assert_uint_eq(take_simple(fd, NBD_CMD_WRITE), 0);
	send_request(fd, NBD_CMD_READ, 0, SIZE - 1024, 1024);
	ck_assert_uint_eq(take_simple(fd, NBD_CMD_READ), 0);
	take(fd, data, sizeof data);
	ck_assert(data[511] == 0 && data[512] == 'w' && data[1023] == 'w');
	send_request(fd, NBD_CMD_READ, 0, 0, 0);
	ck_assert_uint_eq(take_simple(fd, NBD_CMD_READ), 0);
	send_request(fd, NBD_CMD_DISC, 0, 0, 0);
	expect_closed(fd, 5000);
}
END_TEST

START_TEST(test_read_only)
{
	struct nbd_server_options opt = {.read_only = true};
	start(&opt);
	int fd = dial();
	go(fd);
	send_request(fd, NBD_CMD_WRITE, 0, 0, 512);
	char data[512] = {0};
	send_all(fd, data, sizeof data);
	ck_assert_uint_eq(take_simple(fd, NBD_CMD_WRITE), NBD_EPERM);
	send_request(fd, NBD_CMD_TRIM, 0, 0, 512);
	ck_assert_uint_eq(take_simple(fd, NBD_CMD_TRIM), NBD_EPERM);
	send_request(fd, NBD_CMD_FLUSH, 0, 0, 0);
	ck_assert_uint_eq(take_simple(fd, NBD_CMD_FLUSH), 0);
	close(fd);
}
END_TEST

START_TEST(test_options)
{
	struct nbd_server_options opt = {.export_name = "vm-disk"};
	start(&opt);
	int fd = dial();
	greet(fd);
	static uint8_t big[100000];
	send_option(fd, 4711, big, 5000);
	ck_assert_uint_eq(take_rep(fd, 4711, NULL, 0), NBD_REP_ERR_UNSUP);
	send_option(fd, NBD_OPT_INFO, big, sizeof big);
	ck_assert_uint_eq(take_rep(fd, NBD_OPT_INFO, NULL, 0), NBD_REP_ERR_TOO_BIG);
	send_option(fd, NBD_OPT_LIST, big, 1);
	ck_assert_uint_eq(take_rep(fd, NBD_OPT_LIST, NULL, 0), NBD_REP_ERR_INVALID);
	uint8_t name[64];
	send_option(fd, NBD_OPT_LIST, NULL, 0);
	ck_assert_uint_eq(take_rep(fd, NBD_OPT_LIST, name, sizeof name), NBD_REP_SERVER);
	ck_assert(get_be32(name) == 7 && memcmp(name + 4, "vm-disk", 7) == 0);
	ck_assert_uint_eq(take_rep(fd, NBD_OPT_LIST, NULL, 0), NBD_REP_ACK);
	/* A context needs structured replies first. */
	uint8_t meta[32] = {0};
	put_be32(meta + 4, 1);
	put_be32(meta + 8, 15);
	memcpy(meta + 12, NBD_BASE_ALLOCATION, 15);
	send_option(fd, NBD_OPT_SET_META_CONTEXT, meta, 27);
	ck_assert_uint_eq(take_rep(fd, NBD_OPT_SET_META_CONTEXT, NULL, 0), NBD_REP_ERR_INVALID);
	uint8_t other[16] = {0};
	put_be32(other, 5);
	memcpy(other + 4, "other", 5);
	send_option(fd, NBD_OPT_GO, other, 11);
	ck_assert_uint_eq(take_rep(fd, NBD_OPT_GO, NULL, 0), NBD_REP_ERR_UNKNOWN);
	send_option(fd, NBD_OPT_GO, other, 8);
	ck_assert_uint_eq(take_rep(fd, NBD_OPT_GO, NULL, 0), NBD_REP_ERR_INVALID);
	send_option(fd, NBD_OPT_ABORT, NULL, 0);
	ck_assert_uint_eq(take_rep(fd, NBD_OPT_ABORT, NULL, 0), NBD_REP_ACK);
	expect_closed(fd, 5000);

	/* The old way in, with its 124 zero bytes. */
	fd = dial();
	uint8_t hello[18], flags[4], answer[134];
	take(fd, hello, sizeof hello);
	put_be32(flags, NBD_FLAG_FIXED_NEWSTYLE);
	send_all(fd, flags, 4);
	send_option(fd, NBD_OPT_EXPORT_NAME, "vm-disk", 7);
	take(fd, answer, sizeof answer);
	ck_assert_uint_eq(get_be64(answer), SIZE);
	send_request(fd, NBD_CMD_FLUSH, 0, 0, 0);
	ck_assert_uint_eq(take_simple(fd, NBD_CMD_FLUSH), 0);
	close(fd);
}
END_TEST

START_TEST(test_garbage_ends_the_connection)
{
	start(NULL);
	char junk[256];
	memset(junk, 'G', sizeof junk);
	int fd = dial();
	send_all(fd, junk, sizeof junk);
	expect_closed(fd, 5000);
	fd = dial();
	greet(fd);
	send_all(fd, junk, sizeof junk);
	expect_closed(fd, 5000);
	fd = dial();
	go(fd);
	send_all(fd, junk, sizeof junk);
	expect_closed(fd, 5000);
	fd = dial();
	greet(fd);
	uint8_t raw[16];
	put_be64(raw, NBD_IHAVEOPT);
	put_be32(raw + 8, NBD_OPT_GO);
	put_be32(raw + 12, UINT32_MAX);
	send_all(fd, raw, 16);
	expect_closed(fd, 5000);
	fd = dial();
	greet(fd);
	for (int i = 0; i < NBD_OPTIONS_MAX; i++) {
		send_option(fd, 4711, NULL, 0);
		ck_assert_uint_eq(take_rep(fd, 4711, NULL, 0), NBD_REP_ERR_UNSUP);
	}
	expect_closed(fd, 5000);
	for (int i = 0; nbd_server_connections(server) && i < 500; i++)
		clock_sleep_ms(10);
	ck_assert_uint_eq(nbd_server_connections(server), 0);
}
END_TEST

/* A client that drips a byte now and then does not keep its place. */
START_TEST(test_handshake_deadline)
{
	struct nbd_server_options opt = {.handshake_timeout_ms = 300};
	start(&opt);
	int fd = dial(), silent = dial();
	uint64_t begin = clock_now_ms();
	bool closed = false;
	while (!closed && clock_now_ms() - begin < 3000) {
		closed = send(fd, "\0", 1, MSG_NOSIGNAL) < 0;
		clock_sleep_ms(100);
	}
	ck_assert(closed);
	expect_closed(silent, 2000);
	close(fd);
}
END_TEST

START_TEST(test_connection_limit)
{
	struct nbd_server_options opt = {.max_connections = 2};
	start(&opt);
	int a = dial(), b = dial(), fds[2];
	struct conn *conn;
	struct error err = ERROR_INIT;
	ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
	ck_ok(conn_from_fd(fds[1], &conn, &err), err);
	ck_assert_int_eq(nbd_server_add(server, conn, &err), -EBUSY);
	expect_closed(fds[0], 1000);
	go(a);
	go(b);
	close(a);
	close(b);
}
END_TEST

/* More replies than the budget, none of them read: the server waits, then delivers all. */
START_TEST(test_flight_budget)
{
	struct nbd_server_options opt = {.max_inflight_bytes = 1 << 20};
	start(&opt);
	int fd = dial();
	go(fd);
	enum { N = 64, LEN = 256 << 10 };
	for (int i = 0; i < N; i++)
		send_request(fd, NBD_CMD_READ, 0, 0, LEN);
	clock_sleep_ms(200);
	static char buf[LEN];
	for (int i = 0; i < N; i++) {
		ck_assert_uint_eq(take_simple(fd, NBD_CMD_READ), 0);
		take(fd, buf, LEN);
	}
	close(fd);
}
END_TEST

/* Lengths around those of the buffers that a connection keeps, over and over: every request has its own data.
 * Once with room for what is kept, once with a budget that leaves none. */
START_TEST(test_kept_buffers)
{
	static const uint32_t lens[] = {512,	   128 << 10,	      (128 << 10) + 512, (256 << 10) - 512,
					256 << 10, (256 << 10) + 512, 512 << 10};
	enum { N = ARRAY_SIZE(lens), STRIDE = 512 << 10 };
	struct nbd_server_options opt = {.max_inflight_bytes = _i ? 300 << 10 : 0};
	static char out[STRIDE], in[STRIDE];
	start(&opt);
	int fd = dial();
	go(fd);
	for (int round = 0; round < 20; round++) {
		for (int i = 0; i < N; i++) {
			int k = (i + round) % N;
			memset(out, 1 + (round * N + k) % 255, lens[k]);
			send_request(fd, NBD_CMD_WRITE, 0, (uint64_t)k * STRIDE, lens[k]);
			send_all(fd, out, lens[k]);
		}
		for (int i = 0; i < N; i++)
			ck_assert_uint_eq(take_simple(fd, NBD_CMD_WRITE), 0);
		for (int k = N; k--;) {
			/* A refused one in between takes no buffer along. */
			send_request(fd, NBD_CMD_READ, 0, SIZE, 256 << 10);
			ck_assert_uint_eq(take_simple(fd, NBD_CMD_READ), NBD_EINVAL);
			send_request(fd, NBD_CMD_READ, 0, (uint64_t)k * STRIDE, lens[k]);
			ck_assert_uint_eq(take_simple(fd, NBD_CMD_READ), 0);
			take(fd, in, lens[k]);
			memset(out, 1 + (round * N + k) % 255, lens[k]);
			ck_assert_mem_eq(in, out, lens[k]);
		}
	}
	close(fd);
}
END_TEST

/* The fence: stop returns although a client neither reads nor leaves, and nothing is written afterwards. */
START_TEST(test_stop)
{
	start(NULL);
	int fd = dial(), other = dial();
	go(fd);
	for (int i = 0; i < 100; i++)
		send_request(fd, NBD_CMD_READ, 0, 0, 1 << 20);
	send_request(fd, NBD_CMD_WRITE, 0, 0, 4096); /* its payload never comes */
	uint64_t begin = clock_now_ms();
	nbd_server_stop(server);
	ck_assert_uint_lt(clock_now_ms() - begin, 3000);
	ck_assert_uint_eq(nbd_server_connections(server), 0);
	expect_closed(fd, 1000);
	expect_closed(other, 1000);
	int fds[2];
	struct conn *conn;
	struct error err = ERROR_INIT;
	ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
	ck_ok(conn_from_fd(fds[1], &conn, &err), err);
	ck_assert_int_eq(nbd_server_add(server, conn, &err), -ESHUTDOWN);
	close(fds[0]);
	nbd_server_stop(server);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("server");
	TCase *t = tcase_create("server");
	tcase_add_checked_fixture(t, setup, teardown);
	tcase_set_timeout(t, 60);
	tcase_add_test(t, test_answers_out_of_range);
	tcase_add_test(t, test_read_only);
	tcase_add_test(t, test_options);
	tcase_add_test(t, test_garbage_ends_the_connection);
	tcase_add_test(t, test_handshake_deadline);
	tcase_add_test(t, test_connection_limit);
	tcase_add_test(t, test_flight_budget);
	tcase_add_loop_test(t, test_kept_buffers, 0, 2);
	tcase_add_test(t, test_stop);
	suite_add_tcase(s, t);
	return suite_run(s);
}
