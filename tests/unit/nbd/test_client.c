/* SPDX-License-Identifier: Apache-2.0 */
/* The client against our server, against nbdkit with its fault filters, and against peers that fall silent.
 */
#include <check.h>
#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "base/clock.h"
#include "nbd/nbd.h"
#include "tests/suite.h"
#include "tests/unit/block/rig.h"

#define MiB (UINT64_C(1) << 20)

static struct block *disk, *blk;
static struct nbd_server *server;
static pid_t child;

static void setup(void)
{
	rig_setup();
}

static void teardown(void)
{
	block_close(blk);
	nbd_server_free(server);
	block_close(disk);
	if (child > 0) {
		kill(child, SIGKILL);
		waitpid(child, NULL, 0);
	}
	rig_teardown();
}

static void start_server(void)
{
	struct error err = ERROR_INIT;
	struct block_open_options opt = {.format = BLOCK_FORMAT_RAW};
	rig_file("d", 32 * MiB);
	ck_ok(block_open(rig_path("d"), &opt, &disk, &err), err);
	struct nbd_server_options sopt = {.block = disk, .export_name = "x"};
	ck_ok(nbd_server_create(&sopt, &server, &err), err);
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

static void connect_client(unsigned n, unsigned timeout_ms)
{
	struct error err = ERROR_INIT;
	int fds[16];
	for (unsigned i = 0; i < n; i++)
		fds[i] = dial();
	struct nbd_client_options opt = {.export_name = "x", .timeout_ms = timeout_ms};
	ck_ok(nbd_client_open(fds, n, &opt, &blk, &err), err);
}

struct many {
	struct block_request req;
	struct iovec iov[2];
	unsigned char buf[8192];
	atomic_uint *left;
	int result;
	bool again;
};

static void many_done(struct block_request *req, int result)
{
	struct many *m = req->opaque;
	m->result = result;
	if (m->again && result == 0) {
		/* done() may submit, to the same disk. */
		m->again = false;
		memset(m->buf, 0, sizeof m->buf);
		req->op = BLOCK_READ;
		m->iov[0] = (struct iovec){m->buf, 100};
		m->iov[1] = (struct iovec){m->buf + 100, sizeof m->buf - 100};
		if (block_submit(blk, req) == 0)
			return;
		m->result = -ECANCELED;
	}
	atomic_fetch_sub(m->left, 1);
}

static struct many *submit_many(unsigned n, atomic_uint *left)
{
	struct many *m = calloc(n, sizeof *m);
	atomic_store(left, n);
	for (unsigned i = 0; i < n; i++) {
		memset(m[i].buf, (int)(i & 0xff), sizeof m[i].buf);
		m[i].left = left;
		m[i].again = true;
		m[i].iov[0] = (struct iovec){m[i].buf, 4096};
		m[i].iov[1] = (struct iovec){m[i].buf + 4096, 4096};
		m[i].req = (struct block_request){.op = BLOCK_WRITE,
						  .offset_bytes = (uint64_t)i * sizeof m[i].buf,
						  .len_bytes = sizeof m[i].buf,
						  .iov = m[i].iov,
						  .niov = 2,
						  .done = many_done,
						  .opaque = &m[i]};
		int rc = block_submit(blk, &m[i].req);
		if (rc) {
			m[i].result = rc;
			atomic_fetch_sub(left, 1);
		}
	}
	return m;
}

static void wait_all(atomic_uint *left, unsigned ms)
{
	uint64_t until = clock_now_ms() + ms;
	while (atomic_load(left) && clock_now_ms() < until)
		clock_sleep_ms(1);
	ck_assert_uint_eq(atomic_load(left), 0);
}

START_TEST(test_io)
{
	static const unsigned lanes[] = {1, 4};
	start_server();
	connect_client(lanes[_i], 0);
	ck_assert_uint_eq(blk->size_bytes, 32 * MiB);
	ck_assert_uint_eq(blk->limits.max_transfer_bytes, 32 * MiB);
	ck_assert(!blk->limits.read_only && blk->limits.can_multi_conn);
	rig_fill(blk, 7, 20 * MiB, MiB);
	rig_expect(blk, 7, 20 * MiB, MiB);
	rig_expect(blk, 0, MiB, 0);
	ck_assert_int_eq(block_zero(blk, 2 * MiB, MiB, 0), 0);
	ck_assert_int_eq(block_zero(blk, 4 * MiB, MiB, BLOCK_REQ_MAY_UNMAP | BLOCK_REQ_FUA), 0);
	ck_assert_int_eq(block_zero(blk, 6 * MiB, MiB, BLOCK_REQ_MAY_UNMAP | BLOCK_REQ_NO_FALLBACK), 0);
	ck_assert_int_eq(block_discard(blk, 8 * MiB, MiB), 0);
	ck_assert_int_eq(block_flush(blk), 0);
	for (unsigned i = 1; i < 9; i++)
		rig_expect(disk, i % 2 ? 7 : 0, MiB, i * MiB);
	struct block_extent ext[16];
	struct error err = ERROR_INIT;
	unsigned n = 16;
	ck_ok(block_extents(blk, 3 * MiB, 3 * MiB, ext, &n, &err), err);
	ck_assert_uint_eq(n, 3);
	ck_assert(!ext[0].hole && ext[1].hole && ext[1].zero && ext[1].len_bytes == MiB && !ext[2].hole);
	n = 1;
	ck_ok(block_extents(blk, 4 * MiB, MiB / 2, ext, &n, &err), err);
	ck_assert(n == 1 && ext[0].hole && ext[0].len_bytes == MiB / 2);
	char b[512] = {0};
	ck_assert_int_eq(block_pread(blk, b, 512, 32 * MiB), -EINVAL);
	ck_assert_int_eq(block_pwrite(blk, b, 512, 32 * MiB), -ENOSPC);

	atomic_uint left;
	struct many *m = submit_many(1000, &left);
	wait_all(&left, 20000);
	for (unsigned i = 0; i < 1000; i++) {
		ck_assert_int_eq(m[i].result, 0);
		ck_assert(m[i].buf[0] == (i & 0xff) && m[i].buf[8191] == (i & 0xff));
	}
	free(m);
}
END_TEST

START_TEST(test_wrong_export)
{
	start_server();
	int fd = dial();
	struct error err = ERROR_INIT;
	struct nbd_client_options opt = {.export_name = "other", .label = "disk root"};
	ck_assert_int_lt(nbd_client_open(&fd, 1, &opt, &blk, &err), 0);
	ck_assert_ptr_nonnull(strstr(err.message, "disk root"));
	ck_assert_ptr_null(blk);
}
END_TEST

/* A peer that accepts and never says a word. */
START_TEST(test_silent_handshake)
{
	int fds[2];
	struct error err = ERROR_INIT;
	ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
	struct nbd_client_options opt = {.timeout_ms = 200};
	uint64_t begin = clock_now_ms();
	ck_assert_int_eq(nbd_client_open(&fds[0], 1, &opt, &blk, &err), -ETIMEDOUT);
	ck_assert_uint_lt(clock_now_ms() - begin, 3000);
	char c;
	ck_assert_int_eq(recv(fds[1], &c, 1, MSG_DONTWAIT), 0); /* our end is closed */
	close(fds[1]);
}
END_TEST

/* The server goes away under load: everything in flight fails, later requests fail at once, close returns. */
START_TEST(test_server_gone)
{
	start_server();
	connect_client(_i ? 3 : 1, 0);
	atomic_uint left;
	struct many *m = submit_many(3000, &left);
	nbd_server_stop(server);
	wait_all(&left, 10000);
	unsigned failed = 0;
	for (unsigned i = 0; i < 3000; i++)
		failed += m[i].result != 0;
	ck_assert_uint_gt(failed, 0);
	free(m);
	char b[512] = {0};
	for (int i = 0; i < 200 && block_pread(blk, b, 512, 0) == 0; i++)
		clock_sleep_ms(5);
	uint64_t begin = clock_now_ms();
	ck_assert_int_lt(block_pread(blk, b, 512, 0), 0);
	ck_assert_int_lt(block_flush(blk), 0);
	struct block_extent ext;
	unsigned n = 1;
	ck_assert_int_lt(block_extents(blk, 0, 512, &ext, &n, NULL), 0);
	block_close(blk);
	blk = NULL;
	ck_assert_uint_lt(clock_now_ms() - begin, 3000);
}
END_TEST

/* nbdkit ARGS... on a Unix socket. False (and a line) if it is not installed. */
static bool nbdkit(const char *const *args)
{
	const char *argv[32] = {"nbdkit", "-f", "--exit-with-parent", "-U"};
	int n = 4;
	argv[n++] = rig_path("s");
	while (*args)
		argv[n++] = *args++;
	argv[n] = NULL;
	if (system("command -v nbdkit >/dev/null 2>&1") != 0) {
		printf("skipped: nbdkit is not installed\n");
		return false;
	}
	child = fork();
	if (child == 0) {
		execvp("nbdkit", (char *const *)(uintptr_t)argv);
		_exit(127);
	}
	return true;
}

static int open_nbdkit(unsigned conns, unsigned timeout_ms, struct error *err)
{
	struct nbd_client_options opt = {.timeout_ms = timeout_ms};
	int rc = -ENOENT;
	for (int i = 0; i < 500 && (rc == -ENOENT || rc == -ECONNREFUSED); i++) {
		rc = nbd_client_open_unix(rig_path("s"), conns, &opt, &blk, err);
		if (rc)
			clock_sleep_ms(10);
	}
	return rc;
}

START_TEST(test_nbdkit_plain)
{
	static const char *const args[] = {"memory", "64M", NULL};
	struct error err = ERROR_INIT;
	if (!nbdkit(args))
		return;
	ck_ok(open_nbdkit(2, 0, &err), err);
	rig_fill(blk, 9, 8 * MiB, MiB);
	ck_assert_int_eq(block_discard(blk, 2 * MiB, MiB), 0);
	rig_expect(blk, 0, MiB, 2 * MiB);
	rig_expect(blk, 9, MiB, 3 * MiB);
}
END_TEST

/* Without zeroes, FUA, extents or multi-conn: the client does what is missing itself, or says so. */
START_TEST(test_nbdkit_poor)
{
	static const char *const args[] = {"--filter=nozero",
					   "--filter=fua",
					   "--filter=noextents",
					   "--filter=multi-conn",
					   "memory",
					   "64M",

					   "multi-conn-mode=disable",
					   NULL};
	struct error err = ERROR_INIT;
	if (!nbdkit(args))
		return;
	ck_ok(open_nbdkit(1, 0, &err), err);
	rig_fill(blk, 9, 8 * MiB, 0);
	ck_assert_int_eq(block_zero(blk, MiB, MiB, BLOCK_REQ_FUA), 0);
	ck_assert_int_eq(block_discard(blk, 3 * MiB, MiB), 0);
	rig_expect(blk, 0, MiB, MiB);
	rig_expect(blk, 0, MiB, 3 * MiB);
	rig_expect(blk, 9, MiB, 2 * MiB);
	ck_assert_int_eq(block_zero(blk, 0, MiB, BLOCK_REQ_NO_FALLBACK), -EOPNOTSUPP);
	struct block_extent ext;
	unsigned n = 1;
	ck_ok(block_extents(blk, 0, MiB, &ext, &n, &err), err);
	ck_assert(n == 1 && !ext.hole && !ext.zero);
	block_close(blk);
	blk = NULL;
	ck_assert_int_eq(open_nbdkit(2, 0, &err), -ENOTSUP);
}
END_TEST

START_TEST(test_nbdkit_errors)
{
	static const char *const args[] = {"--filter=error",
					   "memory",
					   "64M",
					   "error-pwrite=ENOSPC",
					   "error-pwrite-rate=100%",
					   "error-pread=EIO",
					   "error-pread-rate=50%",
					   NULL};
	struct error err = ERROR_INIT;
	char b[512] = {0};
	if (!nbdkit(args))
		return;
	ck_ok(open_nbdkit(1, 0, &err), err);
	ck_assert_int_eq(block_pwrite(blk, b, 512, 0), -ENOSPC);
	int good = 0, bad = 0;
	for (int i = 0; i < 100; i++) {
		int rc = block_pread(blk, b, 512, 0);
		good += rc == 0;
		bad += rc == -EIO;
	}
	/* An error of a request is no end of the connection. */
	ck_assert(good > 0 && bad > 0 && good + bad == 100);
}
END_TEST

/* Reads take longer than our patience: everything in flight fails with -ETIMEDOUT, and the disk is dead. */
START_TEST(test_nbdkit_timeout)
{
	static const char *const args[] = {"--filter=delay", "memory", "64M", "rdelay=30", NULL};
	struct error err = ERROR_INIT;
	char b[512] = {0};
	if (!nbdkit(args))
		return;
	ck_ok(open_nbdkit(1, 400, &err), err);
	ck_assert_int_eq(block_pwrite(blk, b, 512, 0), 0);
	uint64_t begin = clock_now_ms();
	ck_assert_int_eq(block_pread(blk, b, 512, 0), -ETIMEDOUT);
	uint64_t took = clock_now_ms() - begin;
	ck_assert(took >= 350 && took < 5000);
	ck_assert_int_eq(block_pread(blk, b, 512, 0), -ENOTCONN);
	begin = clock_now_ms();
	block_close(blk);
	blk = NULL;
	ck_assert_uint_lt(clock_now_ms() - begin, 2000);
}
END_TEST

/* A slow answer within the limit is none of our business. */
START_TEST(test_nbdkit_slow)
{
	static const char *const args[] = {"--filter=delay", "memory", "64M", "delay-read=200ms", NULL};
	struct error err = ERROR_INIT;
	if (!nbdkit(args))
		return;
	ck_ok(open_nbdkit(1, 2000, &err), err);
	atomic_uint left;
	struct many *m = submit_many(64, &left);
	wait_all(&left, 30000);
	for (unsigned i = 0; i < 64; i++)
		ck_assert_int_eq(m[i].result, 0);
	free(m);
}
END_TEST

int main(void)
{
	signal(SIGPIPE, SIG_IGN);
	Suite *s = suite_create("client");
	TCase *t = tcase_create("client");
	tcase_add_checked_fixture(t, setup, teardown);
	tcase_set_timeout(t, 60);
	tcase_add_loop_test(t, test_io, 0, 2);
	tcase_add_test(t, test_wrong_export);
	tcase_add_test(t, test_silent_handshake);
	tcase_add_loop_test(t, test_server_gone, 0, 2);
	tcase_add_test(t, test_nbdkit_plain);
	tcase_add_test(t, test_nbdkit_poor);
	tcase_add_test(t, test_nbdkit_errors);
	tcase_add_test(t, test_nbdkit_timeout);
	tcase_add_test(t, test_nbdkit_slow);
	suite_add_tcase(s, t);
	return suite_run(s);
}
