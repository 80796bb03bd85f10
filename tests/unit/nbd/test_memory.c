/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a connection may cost: a client sends the worst that it is allowed to, takes no reply, and goes on
 * until the server reads no more. Whatever it was, the server holds less than 64 MiB for it, and answers
 * everything once the client reads.
 */
#include <check.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "nbd/nbd.h"
#include "nbd/protocol.h"
#include "tests/suite.h"
#include "tests/unit/block/rig.h"

#define LIMIT_BYTES (UINT64_C(64) << 20)
#define SIZE	    (UINT64_C(64) << 20)
#define HANG_MS	    30000
#define MANY	    100000 /* requests that no budget lets in */

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
/* The shadow and the quarantine are not the server's: what is allocated counts. */
size_t __sanitizer_get_current_allocated_bytes(void);
static uint64_t memory_bytes(void)
{
	return __sanitizer_get_current_allocated_bytes();
}
#else
static uint64_t memory_bytes(void)
{
	FILE *f = fopen("/proc/self/status", "re");
	char line[128];
	unsigned long long kib = 0;
	ck_assert_ptr_nonnull(f);
	while (fgets(line, sizeof line, f))
		if (sscanf(line, "VmHWM: %llu", &kib) == 1)
			break;
	fclose(f);
	return kib << 10;
}
#endif

/* --- a real disk whose requests may be held up --- */

struct gate {
	struct block block; /* first */
	struct block *below;
	pthread_mutex_t lock;
	struct block_request *held; /* linked by driver[0] */
	bool shut;
};

static struct gate gate;
static struct nbd_server *server;

static int gate_submit(struct block *blk, struct block_request *req)
{
	pthread_mutex_lock(&gate.lock);
	bool shut = gate.shut;
	if (shut) {
		req->driver[0] = (uintptr_t)gate.held;
		gate.held = req;
	}
	pthread_mutex_unlock(&gate.lock);
	return shut ? 0 : block_submit(gate.below, req);
}

static void gate_open(void)
{
	pthread_mutex_lock(&gate.lock);
	struct block_request *req = gate.held;
	gate.held = NULL;
	gate.shut = false;
	pthread_mutex_unlock(&gate.lock);
	while (req) {
		struct block_request *next = (struct block_request *)(uintptr_t)req->driver[0];
		ck_assert_int_eq(block_submit(gate.below, req), 0);
		req = next;
	}
}

static int gate_extents(struct block *blk, uint64_t offset, uint64_t len, struct block_extent *ext,
			unsigned *n, struct error *err)
{
	return block_extents(gate.below, offset, len, ext, n, err);
}

static const struct block_ops gate_ops = {.name = "gate", .submit = gate_submit, .extents = gate_extents};

static void setup(void)
{
	struct error err = ERROR_INIT;
	struct block_open_options opt = {.format = BLOCK_FORMAT_RAW};
	rig_setup();
	rig_file("d", SIZE);
	ck_ok(block_open(rig_path("d"), &opt, &gate.below, &err), err);
	gate.block = *gate.below;
	gate.block.ops = &gate_ops;
	pthread_mutex_init(&gate.lock, NULL);
	struct nbd_server_options sopt = {.block = &gate.block};
	ck_ok(nbd_server_create(&sopt, &server, &err), err);
}

static void teardown(void)
{
	nbd_server_free(server);
	block_close(gate.below);
	rig_teardown();
}

/* --- a client that does not read --- */

struct client {
	int fd;
	uint64_t before_bytes;
	uint8_t buf[1 << 20];
};

static struct client client;
/* So long nothing is taken: the server reads no more. */
static int stuck_ms = 300;

/* False: the server has read nothing for a while. */
static bool push(const void *data, size_t len)
{
	const char *p = data;
	while (len) {
		ssize_t n = send(client.fd, p, len, MSG_DONTWAIT | MSG_NOSIGNAL);
		if (n > 0) {
			p += n;
			len -= (size_t)n;
			continue;
		}
		ck_assert_int_eq(errno, EAGAIN);
		struct pollfd pfd = {.fd = client.fd, .events = POLLOUT};
		if (poll(&pfd, 1, stuck_ms) == 0)
			return false;
	}
	return true;
}

static void take(void *data, size_t len)
{
	for (size_t got = 0; got < len;) {
		struct pollfd pfd = {.fd = client.fd, .events = POLLIN};
		ck_assert_msg(poll(&pfd, 1, HANG_MS) == 1, "the server does not answer");
		ssize_t n = recv(client.fd, (char *)data + got, len - got, 0);
		ck_assert_int_gt(n, 0);
		got += (size_t)n;
	}
}

static void option(uint32_t what, const void *data, uint32_t len)
{
	uint8_t raw[16];
	put_be64(raw, NBD_IHAVEOPT);
	put_be32(raw + 8, what);
	put_be32(raw + 12, len);
	ck_assert(push(raw, sizeof raw) && push(data, len));
}

static uint32_t option_reply(void)
{
	uint8_t raw[20], sink[16384];
	take(raw, sizeof raw);
	ck_assert_uint_le(get_be32(raw + 16), sizeof sink);
	take(sink, get_be32(raw + 16));
	return get_be32(raw + 12);
}

static void dial(void)
{
	int fds[2];
	struct conn *conn;
	struct error err = ERROR_INIT;
	uint8_t hello[18], flags[4];
	ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
	client.fd = fds[0];
	memset(client.buf, 'w', sizeof client.buf);
	FILE *f = fopen("/proc/self/clear_refs", "we"); /* the peak from here on */
	if (f) {
		fputs("5", f);
		fclose(f);
	}
	client.before_bytes = memory_bytes();
	ck_ok(conn_from_fd(fds[1], &conn, &err), err);
	ck_ok(nbd_server_add(server, conn, &err), err);
	take(hello, sizeof hello);
	put_be32(flags, 3);
	ck_assert(push(flags, 4));
}

static void go(bool structured)
{
	static const uint8_t none[6] = {0};
	dial();
	if (structured) {
		uint8_t meta[32] = {0};
		option(NBD_OPT_STRUCTURED_REPLY, NULL, 0);
		ck_assert_uint_eq(option_reply(), NBD_REP_ACK);
		put_be32(meta + 4, 1);
		put_be32(meta + 8, 15);
		memcpy(meta + 12, NBD_BASE_ALLOCATION, 15);
		option(NBD_OPT_SET_META_CONTEXT, meta, 27);
		ck_assert_uint_eq(option_reply(), NBD_REP_META_CONTEXT);
		ck_assert_uint_eq(option_reply(), NBD_REP_ACK);
	}
	option(NBD_OPT_GO, none, sizeof none);
	while (option_reply() != NBD_REP_ACK)
		;
}

static bool push_request(uint16_t command, uint64_t offset, uint32_t len)
{
	uint8_t raw[NBD_REQUEST_BYTES];
	put_be32(raw, NBD_REQUEST_MAGIC);
	put_be16(raw + 4, 0);
	put_be16(raw + 6, command);
	put_be64(raw + 8, command == NBD_CMD_READ ? len : 0);
	put_be64(raw + 16, offset);
	put_be32(raw + 24, len);
	if (!push(raw, sizeof raw))
		return false;
	for (uint32_t n; command == NBD_CMD_WRITE && len; len -= n) {
		n = len < sizeof client.buf ? len : sizeof client.buf;
		if (!push(client.buf, n))
			return false;
	}
	return true;
}

static void expect_below_the_limit(const char *what)
{
	uint64_t grown = memory_bytes() - client.before_bytes;
	if (getenv("SNM_WRAP")) {
		printf("skipped: memory of a connection, %s: something is between the program and its "
		       "memory\n",
		       what);
		return;
	}
	printf("memory of a connection, %s: %.2f MiB\n", what, (double)grown / (1 << 20));
	ck_assert_msg(grown < LIMIT_BYTES, "%s: %.2f MiB for one connection", what,
		      (double)grown / (1 << 20));
}

/* Until the server reads no more; returns how many requests it got whole. */
static unsigned fill(uint16_t command, uint32_t len)
{
	unsigned n = 0;
	while (n < MANY && push_request(command, (uint64_t)n * len % (SIZE - len + 1), len))
		n++;
	ck_assert_msg(n < MANY, "%u requests were taken", n);
	return n;
}

/* The answers to n simple requests, in any order; the cookie says how much data follows. */
static void drain(unsigned n)
{
	static uint8_t sink[1 << 20];
	while (n--) {
		take(sink, NBD_SIMPLE_REPLY_BYTES);
		ck_assert_uint_eq(get_be32(sink), NBD_SIMPLE_MAGIC);
		ck_assert_uint_eq(get_be32(sink + 4), 0);
		uint64_t len = get_be64(sink + 8);
		for (uint64_t at = 0; at < len; at += sizeof sink)
			take(sink, len - at < sizeof sink ? len - at : sizeof sink);
	}
}

static void fill_disk(void)
{
	for (uint64_t at = 0; at < SIZE; at += 1 << 20)
		rig_fill(gate.below, 'd', 1 << 20, at);
}

static const uint32_t lengths[] = {1, 4096, 65536, 131073, (256u << 10) - 4096, 1u << 20, (32u << 20) - 4096};

START_TEST(test_reads)
{
	uint32_t len = lengths[_i];
	char what[64];
	fill_disk();
	go(false);
	unsigned n = fill(NBD_CMD_READ, len);
	snprintf(what, sizeof what, "%u reads of %u bytes", n, len);
	expect_below_the_limit(what);
	drain(n);
	close(client.fd);
}
END_TEST

START_TEST(test_writes)
{
	uint32_t len = lengths[_i];
	char what[64];
	go(false);
	gate.shut = true;
	unsigned n = fill(NBD_CMD_WRITE, len);
	snprintf(what, sizeof what, "%u writes of %u bytes", n, len);
	expect_below_the_limit(what);
	gate_open();
	drain(n);
	close(client.fd);
}
END_TEST

/* What is freed after one kind of request does not stay beside what the next kind takes. */
START_TEST(test_lengths_in_turn)
{
	fill_disk();
	go(false);
	for (unsigned turn = 0; turn < 2; turn++)
		for (size_t i = 1; i < sizeof lengths / sizeof lengths[0]; i++)
			drain(fill(NBD_CMD_READ, lengths[i]));
	expect_below_the_limit("reads of all lengths in turn");
	close(client.fd);
}
END_TEST

/* Short and long ones by turns, read now and then, for as long as it takes. */
START_TEST(test_lengths_mixed)
{
	enum { ROUNDS = 12, BATCH = 8192, BATCH_BYTES = 48 << 20 };
	unsigned seed = 1;
	fill_disk();
	go(false);
	for (unsigned round = 0; round < ROUNDS; round++) {
		unsigned n = 0;
		uint64_t total = 0;
		uint32_t most = 1u << (9 + (unsigned)rand_r(&seed) % 13);
		while (n < BATCH && total < BATCH_BYTES) {
			uint32_t len = 1 + (uint32_t)rand_r(&seed) % most;
			if (!push_request(NBD_CMD_READ, (uint64_t)rand_r(&seed) % (SIZE - most), len))
				break;
			total += len;
			n++;
		}
		drain(n);
	}
	expect_below_the_limit("reads of mixed lengths");
	close(client.fd);
}
END_TEST

START_TEST(test_requests_without_data)
{
	go(false);
	gate.shut = true;
	unsigned n = fill(_i ? NBD_CMD_TRIM : NBD_CMD_WRITE_ZEROES, 4096);
	expect_below_the_limit(_i ? "discards" : "write-zeroes");
	gate_open();
	drain(n);
	close(client.fd);
}
END_TEST

/* Replies with as many extents as there may be. */
START_TEST(test_block_status)
{
	for (uint64_t at = 0; at < SIZE; at += 16384)
		rig_fill(gate.below, 'd', 4096, at);
	go(true);
	stuck_ms = 3000; /* looking for extents takes its time */
	unsigned n = fill(NBD_CMD_BLOCK_STATUS, (uint32_t)SIZE);
	expect_below_the_limit("block status");
	while (n--) {
		static uint8_t sink[4 + 8 * NBD_EXTENTS_MAX];
		take(sink, NBD_CHUNK_HEADER_BYTES);
		uint32_t len = get_be32(sink + 16);
		ck_assert_uint_eq(get_be32(sink), NBD_STRUCTURED_MAGIC);
		ck_assert_uint_eq(get_be16(sink + 6), NBD_CHUNK_BLOCK_STATUS);
		ck_assert_uint_ge(len, 1000 * 8);
		ck_assert_uint_le(len, sizeof sink);
		take(sink, len);
	}
	close(client.fd);
}
END_TEST

START_TEST(test_options)
{
	dial();
	for (unsigned i = 0; i < NBD_OPTIONS_MAX - 1; i++) {
		option(i % 2 ? NBD_OPT_GO : 4711, client.buf,
		       i % 3 ? NBD_OPTION_MAX_BYTES : NBD_OPTION_DRAIN_BYTES);
		ck_assert_uint_gt(option_reply(), NBD_REP_ERROR(0));
	}
	expect_below_the_limit("options");
	close(client.fd);
}
END_TEST

int main(void)
{
	setenv("SNM_LOG", "error", 0);
	log_init("test");
	Suite *s = suite_create("nbd-memory");
	TCase *tc = tcase_create("memory");
	tcase_set_timeout(tc, 120);
	tcase_add_checked_fixture(tc, setup, teardown);
	int n = (int)(sizeof lengths / sizeof lengths[0]);
	tcase_add_loop_test(tc, test_reads, 0, n);
	tcase_add_loop_test(tc, test_writes, 0, n);
	tcase_add_test(tc, test_lengths_in_turn);
	tcase_add_test(tc, test_lengths_mixed);
	tcase_add_loop_test(tc, test_requests_without_data, 0, 2);
	tcase_add_test(tc, test_block_status);
	tcase_add_test(tc, test_options);
	suite_add_tcase(s, tc);
	return suite_run(s);
}
