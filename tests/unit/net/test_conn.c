/* SPDX-License-Identifier: Apache-2.0 */
#include <arpa/inet.h>
#include <check.h>
#include <errno.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "net/conn_impl.h"
#include "tests/suite.h"
#include "tests/unit/net/pki.h"

#define TIMEOUT_MS 20000

static char *dir;

static char *path(const char *name)
{
	static __thread char buf[8][512];
	static __thread unsigned next;
	char *p = buf[next++ % 8];

	snprintf(p, sizeof buf[0], "%s/%s", dir, name);
	return p;
}

static void make_pki(void)
{
	dir = pki_create();
}

static void remove_pki(void)
{
	pki_remove(dir);
}

static struct tls_context *context(const char *ca, const char *name)
{
	struct tls_context *ctx = NULL;
	struct error err = ERROR_INIT;
	char cert[128], key[128];

	snprintf(cert, sizeof cert, "%s.pem", name);
	snprintf(key, sizeof key, "%s.key", name);
	tls_context_create(path(ca), path(cert), path(key), &ctx, &err);
	ck_assert_msg(ctx != NULL, "%s", err.message);
	return ctx;
}

/* One side of a handshake in a thread of its own. */
struct side {
	int fd;
	struct tls_context *ctx;
	const char *expected; /* NULL: accept */
	unsigned timeout_ms;
	struct conn *conn;
	struct error err;
	int ret;
	pthread_t thread;
};

static void *side_main(void *arg)
{
	struct side *s = arg;

	if (s->expected)
		s->ret = conn_tls_connect(s->fd, s->ctx, s->expected, s->timeout_ms, &s->conn, &s->err);
	else
		s->ret = conn_tls_accept(s->fd, s->ctx, s->timeout_ms, &s->conn, &s->err);
	return NULL;
}

static void tcp_pair(int fds[2])
{
	struct error err = ERROR_INIT;
	int listener = net_listen("127.0.0.1:0", 1, &err);
	struct sockaddr_in addr;
	socklen_t len = sizeof addr;
	char text[64];

	ck_assert_msg(listener >= 0, "%s", err.message);
	ck_assert_int_eq(getsockname(listener, (struct sockaddr *)&addr, &len), 0);
	snprintf(text, sizeof text, "127.0.0.1:%u", ntohs(addr.sin_port));
	fds[0] = net_connect(text, 5000, &err);
	ck_assert_msg(fds[0] >= 0, "%s", err.message);
	fds[1] = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	ck_assert_int_ge(fds[1], 0);
	close(listener);
}

static void handshake(struct side *client, struct side *server)
{
	int fds[2];

	tcp_pair(fds);
	client->fd = fds[0];
	server->fd = fds[1];
	client->timeout_ms = server->timeout_ms = TIMEOUT_MS;
	pthread_create(&server->thread, NULL, side_main, server);
	side_main(client);
	pthread_join(server->thread, NULL);
}

static void handshake_ok(struct conn **client, struct conn **server)
{
	struct side c = {.ctx = context("ca.pem", "host1"), .expected = "host2"};
	struct side s = {.ctx = context("ca.pem", "host2")};

	handshake(&c, &s);
	ck_assert_msg(c.ret == 0, "client: %s", c.err.message);
	ck_assert_msg(s.ret == 0, "server: %s", s.err.message);
	tls_context_free(c.ctx);
	tls_context_free(s.ctx);
	*client = c.conn;
	*server = s.conn;
}

static void plain_pair(struct conn **a, struct conn **b)
{
	struct error err = ERROR_INIT;
	int fds[2];

	ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
	ck_assert_int_eq(conn_from_fd(fds[0], a, &err), 0);
	ck_assert_int_eq(conn_from_fd(fds[1], b, &err), 0);
}

static void pair(bool tls, struct conn **a, struct conn **b)
{
	if (tls)
		handshake_ok(a, b);
	else
		plain_pair(a, b);
}

#define assert_mentions(message, word)                                                                       \
	ck_assert_msg(strstr(message, word) != NULL, "\"%s\" does not mention %s", message, word)

START_TEST(test_good_handshake_names_and_fingerprints)
{
	struct conn *c, *s;
	char buf[6] = "";

	handshake_ok(&c, &s);
	ck_assert_str_eq(conn_peer_name(c), "host2");
	ck_assert_str_eq(conn_peer_name(s), "host1");
	ck_assert(conn_peer_has_name(c, "host2"));
	ck_assert(conn_peer_has_name(c, "host2.example"));
	ck_assert(!conn_peer_has_name(c, "host1"));
	ck_assert(!conn_peer_has_name(c, ""));
	ck_assert_uint_eq(strlen(conn_peer_fingerprint(c)), 64);
	ck_assert(conn_is_tls(c));
	ck_assert_str_eq(SSL_get_cipher_name(c->ssl), "TLS_AES_128_GCM_SHA256");
	ck_assert_str_eq(SSL_get_cipher_name(s->ssl), "TLS_AES_128_GCM_SHA256");
	ck_assert_int_eq(conn_write_full(c, "hello", 5, TIMEOUT_MS, NULL), 0);
	ck_assert_int_eq(conn_read_full(s, buf, 5, TIMEOUT_MS, NULL), 0);
	ck_assert_str_eq(buf, "hello");
	ck_assert_uint_gt(conn_bytes_sent(c), 5);
	conn_close(c);
	ck_assert_int_eq(conn_read_full(s, buf, 1, TIMEOUT_MS, NULL), -ENODATA);
	conn_close(s);
}
END_TEST

/* The client's handshake is complete before the server judges its certificate: the first read brings the
 * verdict. */
static void client_read_verdict(struct side *c)
{
	char byte;

	ck_assert_msg(c->ret == 0, "%s", c->err.message);
	c->ret = conn_read_full(c->conn, &byte, 1, TIMEOUT_MS, &c->err);
}

START_TEST(test_server_refuses_other_ca)
{
	struct side c = {.ctx = context("ca.pem", "stranger"), .expected = "host2"};
	struct side s = {.ctx = context("ca.pem", "host2")};

	handshake(&c, &s);
	ck_assert_int_eq(s.ret, -EKEYREJECTED);
	assert_mentions(s.err.message, "not issued by the CA in");
	assert_mentions(s.err.message, path("ca.pem"));
	assert_mentions(s.err.message, "stranger");
	assert_mentions(s.err.message, "Other CA");
	client_read_verdict(&c);
	ck_assert_int_eq(c.ret, -EACCES);
	assert_mentions(c.err.message, "unknown_ca");
	assert_mentions(c.err.message, path("stranger.pem"));
	conn_close(c.conn);
	tls_context_free(c.ctx);
	tls_context_free(s.ctx);
}
END_TEST

/* A writer that never reads learns the reason too. */
START_TEST(test_refusal_reaches_a_writer)
{
	struct side c = {.ctx = context("ca.pem", "stranger"), .expected = "host2"};
	struct side s = {.ctx = context("ca.pem", "host2")};
	static char data[65536];
	int ret = 0;

	handshake(&c, &s);
	ck_assert_int_eq(s.ret, -EKEYREJECTED);
	for (int i = 0; i < 1000 && ret == 0; i++)
		ret = conn_write_full(c.conn, data, sizeof data, TIMEOUT_MS, &c.err);
	ck_assert_msg(ret == -EACCES, "%d %s", ret, c.err.message);
	assert_mentions(c.err.message, "unknown_ca");
	conn_close(c.conn);
	tls_context_free(c.ctx);
	tls_context_free(s.ctx);
}
END_TEST

START_TEST(test_client_refuses_other_ca)
{
	struct side c = {.ctx = context("ca.pem", "host1"), .expected = "stranger"};
	struct side s = {.ctx = context("ca.pem", "stranger")};

	handshake(&c, &s);
	ck_assert_int_eq(c.ret, -EKEYREJECTED);
	assert_mentions(c.err.message, "not issued by the CA in");
	ck_assert_int_eq(s.ret, -EACCES);
	assert_mentions(s.err.message, "unknown_ca");
	tls_context_free(c.ctx);
	tls_context_free(s.ctx);
}
END_TEST

START_TEST(test_client_refuses_other_name)
{
	struct side c = {.ctx = context("ca.pem", "host1"), .expected = "host9"};
	struct side s = {.ctx = context("ca.pem", "host2")};

	handshake(&c, &s);
	ck_assert_int_eq(c.ret, -EKEYREJECTED);
	ck_assert_str_eq(
		c.err.message,
		"expected a peer named host9, but the certificate found is for: host2, host2.example");
	ck_assert_int_eq(s.ret, -EACCES);
	assert_mentions(s.err.message, "expected another name");
	tls_context_free(c.ctx);
	tls_context_free(s.ctx);
}
END_TEST

START_TEST(test_expired_peer)
{
	struct tls_context *good = context("ca.pem", "host1");
	/* tls_context_create refuses an expired certificate of one's own, so this one expires meanwhile. */
	struct side s = {0};
	struct side c = {.ctx = good, .expected = "shortlived"};

	pki_issue(dir, "shortlived", 2);
	s.ctx = context("ca.pem", "shortlived");
	clock_sleep_ms(3200);
	handshake(&c, &s);
	ck_assert_int_eq(c.ret, -EKEYEXPIRED);
	assert_mentions(c.err.message, "name shortlived");
	assert_mentions(c.err.message, "expired on 20");
	ck_assert_int_eq(s.ret, -EACCES);
	assert_mentions(s.err.message, "certificate_expired");
	tls_context_free(s.ctx);
	tls_context_free(good);
}
END_TEST

START_TEST(test_peer_without_certificate)
{
	struct side s = {.ctx = context("ca.pem", "host2"), .timeout_ms = TIMEOUT_MS};
	int fds[2];

	tcp_pair(fds);
	s.fd = fds[1];
	pthread_create(&s.thread, NULL, side_main, &s);
	pki_connect_without_certificate(fds[0]);
	pthread_join(s.thread, NULL);
	ck_assert_int_eq(s.ret, -EKEYREJECTED);
	assert_mentions(s.err.message, "sent no certificate");
	tls_context_free(s.ctx);
}
END_TEST

START_TEST(test_older_tls_is_refused)
{
	struct side s = {.ctx = context("ca.pem", "host2"), .timeout_ms = TIMEOUT_MS};
	int fds[2];

	tcp_pair(fds);
	s.fd = fds[1];
	pthread_create(&s.thread, NULL, side_main, &s);
	pki_connect_with_tls12(fds[0]);
	pthread_join(s.thread, NULL);
	ck_assert_int_eq(s.ret, -EPROTO);
	assert_mentions(s.err.message, "does not speak TLS 1.3");
	tls_context_free(s.ctx);
}
END_TEST

START_TEST(test_garbage_instead_of_tls)
{
	static const char *const garbage[] = {
		"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "SNMIGRATE/1 control -\nnonsense nonsense nonsense",
		"\x16\x03\x01\xff\xff aaaaaaaaaaaaaaaaaaaa", "NBDMAGICIHAVEOPT aaaaaaaaaaaaaaaaaa"};
	const char *g = garbage[_i % 4];
	bool as_server = _i < 4;
	struct side s = {.ctx = context("ca.pem", "host2"),
			 .expected = as_server ? NULL : "host1",
			 .timeout_ms = TIMEOUT_MS};
	int fds[2];

	tcp_pair(fds);
	s.fd = fds[1];
	pthread_create(&s.thread, NULL, side_main, &s);
	ck_assert_int_gt(send(fds[0], g, strlen(g), MSG_NOSIGNAL), 0);
	shutdown(fds[0], SHUT_WR);
	pthread_join(s.thread, NULL);
	ck_assert_int_lt(s.ret, 0);
	ck_assert(s.conn == NULL);
	ck_assert_msg(strstr(s.err.message, "does not speak TLS") || strstr(s.err.message, "closed the"),
		      "%s", s.err.message);
	close(fds[0]);
	tls_context_free(s.ctx);
}
END_TEST

START_TEST(test_silent_peer_times_out_the_handshake)
{
	struct side s = {.ctx = context("ca.pem", "host2"), .timeout_ms = 100};
	int fds[2];

	tcp_pair(fds);
	s.fd = fds[1];
	side_main(&s);
	ck_assert_int_eq(s.ret, -ETIMEDOUT);
	assert_mentions(s.err.message, "100 ms");
	close(fds[0]);
	tls_context_free(s.ctx);
}
END_TEST

START_TEST(test_context_errors_name_the_file)
{
	static const struct {
		const char *ca, *cert, *key, *culprit, *reason;
	} t[] = {
		{"missing.pem", "host1.pem", "host1.key", "missing.pem", "No such file"},
		{"ca.pem", "missing.pem", "host1.key", "missing.pem", "No such file"},
		{"ca.pem", "host1.pem", "missing.key", "missing.key", "No such file"},
		{"text", "host1.pem", "host1.key", "text", "no PEM certificate"},
		{"ca.pem", "text", "host1.key", "text", "no PEM certificate"},
		{"ca.pem", "host1.pem", "text", "text", "no PEM private key"},
		{"ca.pem", "host1.pem", "host2.key", "host2.key", "does not belong to certificate file"},
		{"ca.pem", "expired.pem", "expired.key", "expired.pem", "expired on 20"},
		{"ca.pem", "future.pem", "future.key", "future.pem", "is not valid before 20"},
		{"expired.pem", "host1.pem", "host1.key", "expired.pem", "expired on 20"},
		{"ca.pem", "damaged.pem", "host1.key", "damaged.pem", "damaged"},
		{"ca.pem", "host1.pem", "encrypted.key", "encrypted.key", "passphrase"},
	};
	struct tls_context *ctx;
	struct error err = ERROR_INIT;

	ck_assert_int_lt(tls_context_create(path(t[_i].ca), path(t[_i].cert), path(t[_i].key), &ctx, &err),
			 0);
	ck_assert(ctx == NULL);
	assert_mentions(err.message, path(t[_i].culprit));
	assert_mentions(err.message, t[_i].reason);
}
END_TEST

struct flow {
	struct conn *conn;
	unsigned seed;
	size_t len;
	int ret;
	uint64_t sum;
};

static void fill(uint8_t *p, size_t n, unsigned *state)
{
	for (size_t i = 0; i < n; i++) {
		*state = *state * 1664525 + 1013904223;
		p[i] = (uint8_t)(*state >> 24);
	}
}

static void *flow_write(void *arg)
{
	struct flow *f = arg;
	unsigned state = f->seed, step = 1;
	uint8_t *buf = malloc(300000);

	for (size_t done = 0; done < f->len && f->ret == 0;) {
		size_t n = (step = step * 7 % 100003) * 3;

		if (n > f->len - done)
			n = f->len - done;
		fill(buf, n, &state);
		if (step % 2) {
			struct iovec iov[3] = {{buf, n / 3}, {buf + n / 3, 0}, {buf + n / 3, n - n / 3}};

			f->ret = conn_writev_full(f->conn, iov, 3, TIMEOUT_MS, NULL);
		} else {
			f->ret = conn_write_full(f->conn, buf, n, TIMEOUT_MS, NULL);
		}
		done += n;
	}
	free(buf);
	return NULL;
}

static void *flow_read(void *arg)
{
	struct flow *f = arg;
	unsigned state = f->seed, step = 5;
	uint8_t *buf = malloc(300000), *want = malloc(300000);

	for (size_t done = 0; done < f->len && f->ret == 0;) {
		size_t n = (step = step * 11 % 100003);

		if (n > f->len - done)
			n = f->len - done;
		if (step % 3) {
			/* more pieces than one system call takes, and empty ones */
			struct iovec iov[100] = {{buf, 0}};
			size_t part = n / 98, at = 0;

			for (int i = 1; i < 99; i++, at += part)
				iov[i] = (struct iovec){buf + at, i < 98 ? part : n - at};
			f->ret = conn_readv_full(f->conn, iov, 100, TIMEOUT_MS, NULL);
		} else {
			f->ret = conn_read_full(f->conn, buf, n, TIMEOUT_MS, NULL);
		}
		fill(want, n, &state);
		if (f->ret == 0 && memcmp(buf, want, n) != 0)
			f->ret = -EBADMSG;
		done += n;
	}
	free(buf);
	free(want);
	return NULL;
}

START_TEST(test_both_ways_at_once)
{
	struct conn *a, *b;
	struct flow flows[4];
	pthread_t threads[4];

	pair(_i, &a, &b);
	for (int i = 0; i < 4; i++) {
		flows[i] = (struct flow){
			.conn = i == 0 || i == 3 ? a : b, .seed = i < 2 ? 1 : 2, .len = 24u << 20};
		pthread_create(&threads[i], NULL, i % 2 ? flow_read : flow_write, &flows[i]);
	}
	for (int i = 0; i < 4; i++) {
		pthread_join(threads[i], NULL);
		ck_assert_int_eq(flows[i].ret, 0);
	}
	conn_close(a);
	conn_close(b);
}
END_TEST

START_TEST(test_read_times_out)
{
	struct conn *a, *b;
	struct error err = ERROR_INIT;
	uint64_t before;
	char buf[4];

	pair(_i, &a, &b);
	before = clock_now_ms();
	ck_assert_int_eq(conn_read_full(a, buf, 4, 100, &err), -ETIMEDOUT);
	ck_assert_uint_ge(clock_now_ms() - before, 95);
	/* Progress is no excuse for the rest of the bytes. */
	ck_assert_int_eq(conn_write_full(b, "xx", 2, TIMEOUT_MS, NULL), 0);
	ck_assert_int_eq(conn_read_full(a, buf, 4, 100, &err), -ETIMEDOUT);
	conn_close(a);
	conn_close(b);
}
END_TEST

START_TEST(test_write_times_out)
{
	struct conn *a, *b;
	struct error err = ERROR_INIT;
	static char data[1 << 20];
	int ret = 0;

	pair(_i, &a, &b);
	for (int i = 0; i < 100 && ret == 0; i++)
		ret = conn_write_full(a, data, sizeof data, 100, &err);
	ck_assert_int_eq(ret, -ETIMEDOUT);
	conn_close(a);
	conn_close(b);
}
END_TEST

static void *blocked_reader(void *arg)
{
	struct flow *f = arg;
	char byte;

	f->ret = conn_read_full(f->conn, &byte, 1, 0, NULL);
	return NULL;
}

static void *blocked_writer(void *arg)
{
	struct flow *f = arg;
	static char data[1 << 20];

	while (f->ret == 0)
		f->ret = conn_write_full(f->conn, data, sizeof data, 0, NULL);
	return NULL;
}

START_TEST(test_shutdown_wakes_reader_and_writer)
{
	struct conn *a, *b;
	struct flow reader, writer;
	pthread_t threads[2];

	pair(_i, &a, &b);
	reader = writer = (struct flow){.conn = a};
	pthread_create(&threads[0], NULL, blocked_reader, &reader);
	pthread_create(&threads[1], NULL, blocked_writer, &writer);
	clock_sleep_ms(50);
	conn_shutdown(a);
	pthread_join(threads[0], NULL);
	pthread_join(threads[1], NULL);
	ck_assert_int_eq(reader.ret, -ESHUTDOWN);
	ck_assert_int_eq(writer.ret, -ESHUTDOWN);
	conn_close(a);
	conn_close(b);
}
END_TEST

START_TEST(test_close_in_the_middle)
{
	struct conn *a, *b;
	char buf[4];

	pair(_i, &a, &b);
	ck_assert_int_eq(conn_write_full(b, "xx", 2, TIMEOUT_MS, NULL), 0);
	conn_close(b);
	ck_assert_int_eq(conn_read_full(a, buf, 4, TIMEOUT_MS, NULL), -ECONNRESET);
	conn_close(a);
}
END_TEST

/* Every write leaves whole, however the socket was full in between: a peer that answers it would wait. */
struct whole_write {
	struct conn *conn;
	uint8_t *buf;
	size_t len;
	int ret;
};

static void *write_whole(void *arg)
{
	struct whole_write *w = arg;
	struct error err = ERROR_INIT;

	w->ret = conn_write_full(w->conn, w->buf, w->len, TIMEOUT_MS, &err);
	return NULL;
}

START_TEST(test_tls_a_write_leaves_nothing_behind)
{
	size_t most = 640 << 10, step = 8 << 10;
	CLEANUP_FREE uint8_t *buf = malloc(most), *in = malloc(most);
	struct conn *a, *b;
	int small = 65536;

	handshake_ok(&a, &b);
	setsockopt(conn_fd(a), SOL_SOCKET, SO_SNDBUF, &small, sizeof small);
	setsockopt(conn_fd(b), SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
	for (size_t len = 4 * step; len <= most; len += step) {
		struct whole_write w = {.conn = a, .buf = buf, .len = len};
		struct error err = ERROR_INIT;
		pthread_t thread;

		memset(buf, (int)(len / step), len);
		ck_assert_int_eq(pthread_create(&thread, NULL, write_whole, &w), 0);
		clock_sleep_ms(10);
		ck_assert_msg(conn_read_full(b, in, len, TIMEOUT_MS, &err) == 0, "%zu bytes: %s", len,
			      err.message);
		pthread_join(thread, NULL);
		ck_assert_int_eq(w.ret, 0);
		ck_assert_int_eq(memcmp(buf, in, len), 0);
	}
	conn_close(a);
	conn_close(b);
}
END_TEST

/* Without close_notify anybody on the way could have cut the stream. */
START_TEST(test_tls_truncation_is_no_orderly_end)
{
	struct conn *a, *b;
	char byte;

	pair(true, &a, &b);
	shutdown(conn_fd(b), SHUT_WR);
	ck_assert_int_eq(conn_read_full(a, &byte, 1, TIMEOUT_MS, NULL), -ECONNRESET);
	conn_close(a);
	conn_close(b);
}
END_TEST

/* The default action of SIGPIPE would end this process. */
START_TEST(test_writing_to_a_closed_peer_raises_no_signal)
{
	struct conn *a, *b;
	static char data[1 << 20];
	int ret = 0;

	pair(_i, &a, &b);
	conn_close(b);
	for (int i = 0; i < 10 && ret == 0; i++)
		ret = conn_write_full(a, data, sizeof data, TIMEOUT_MS, NULL);
	ck_assert_int_eq(ret, -ECONNRESET);
	conn_close(a);
}
END_TEST

START_TEST(test_pump_carries_data_and_both_ends)
{
	struct conn *a, *b;
	struct error err = ERROR_INIT;
	struct flow flows[4];
	pthread_t threads[4];
	struct conn *local;
	int fd;
	char byte;

	pair(_i & 1, &a, &b);
	ck_assert_int_eq(conn_pump_start(b, &fd, &err), 0);
	ck_assert_int_eq(conn_from_fd(fd, &local, &err), 0);
	for (int i = 0; i < 4; i++) {
		flows[i] = (struct flow){
			.conn = i == 0 || i == 3 ? a : local, .seed = i < 2 ? 1 : 2, .len = 8u << 20};
		pthread_create(&threads[i], NULL, i % 2 ? flow_read : flow_write, &flows[i]);
	}
	for (int i = 0; i < 4; i++) {
		pthread_join(threads[i], NULL);
		ck_assert_int_eq(flows[i].ret, 0);
	}
	if (_i & 2) { /* the local side ends first: only its direction, the other goes on */
		shutdown(conn_fd(local), SHUT_WR);
		ck_assert_int_eq(conn_read_full(a, &byte, 1, TIMEOUT_MS, NULL), -ENODATA);
		ck_assert_int_eq(conn_write_full(a, "x", 1, TIMEOUT_MS, NULL), 0);
		ck_assert_int_eq(conn_read_full(local, &byte, 1, TIMEOUT_MS, NULL), 0);
		conn_shutdown(a);
		ck_assert_int_eq(conn_read_full(local, &byte, 1, TIMEOUT_MS, NULL), -ENODATA);
	} else {
		conn_shutdown(a);
		ck_assert_int_eq(conn_read_full(local, &byte, 1, TIMEOUT_MS, NULL), -ENODATA);
	}
	conn_close(local);
	conn_close(a);
}
END_TEST

START_TEST(test_pump_ends_when_the_peer_breaks)
{
	struct conn *a, *b;
	struct error err = ERROR_INIT;
	int fd;
	char byte;

	pair(true, &a, &b);
	ck_assert_int_eq(conn_pump_start(b, &fd, &err), 0);
	shutdown(conn_fd(a), SHUT_RDWR);
	ck_assert_int_eq(recv(fd, &byte, 1, 0), 0);
	ck_assert_int_eq(send(fd, "x", 1, MSG_NOSIGNAL), -1);
	close(fd);
	conn_close(a);
}
END_TEST

START_TEST(test_addresses)
{
	static const char *const bad[] = {"host",  "host:",   "host:x",	       "host:70000",
					  "[::1]", "[::1:80", "::1:80",	       "a:b:80",
					  ":80",   "host:-1", "127.0.0.1:80x", "no.such.host.invalid:80"};
	struct error err = ERROR_INIT;

	ck_assert_int_lt(net_connect(bad[_i], 1000, &err), 0);
	assert_mentions(err.message, "address '");
}
END_TEST

START_TEST(test_connect_refused_names_the_address)
{
	struct error err = ERROR_INIT;
	int fds[2];
	struct sockaddr_in addr;
	socklen_t len = sizeof addr;
	char text[64];

	tcp_pair(fds); /* its listener is closed: that port refuses now */
	ck_assert_int_eq(getsockname(fds[1], (struct sockaddr *)&addr, &len), 0);
	snprintf(text, sizeof text, "127.0.0.1:%u", ntohs(addr.sin_port));
	close(fds[0]);
	close(fds[1]);
	ck_assert_int_eq(net_connect(text, 1000, &err), -ECONNREFUSED);
	assert_mentions(err.message, text);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("conn");
	TCase *tc = tcase_create("conn");

	tcase_set_timeout(tc, 120);
	tcase_add_unchecked_fixture(tc, make_pki, remove_pki);
	tcase_add_test(tc, test_good_handshake_names_and_fingerprints);
	tcase_add_test(tc, test_server_refuses_other_ca);
	tcase_add_test(tc, test_refusal_reaches_a_writer);
	tcase_add_test(tc, test_client_refuses_other_ca);
	tcase_add_test(tc, test_client_refuses_other_name);
	tcase_add_test(tc, test_expired_peer);
	tcase_add_test(tc, test_peer_without_certificate);
	tcase_add_test(tc, test_older_tls_is_refused);
	tcase_add_loop_test(tc, test_garbage_instead_of_tls, 0, 8);
	tcase_add_test(tc, test_silent_peer_times_out_the_handshake);
	tcase_add_loop_test(tc, test_context_errors_name_the_file, 0, 12);
	tcase_add_loop_test(tc, test_both_ways_at_once, 0, 2);
	tcase_add_loop_test(tc, test_read_times_out, 0, 2);
	tcase_add_loop_test(tc, test_write_times_out, 0, 2);
	tcase_add_loop_test(tc, test_shutdown_wakes_reader_and_writer, 0, 2);
	tcase_add_loop_test(tc, test_close_in_the_middle, 0, 2);
	tcase_add_test(tc, test_tls_a_write_leaves_nothing_behind);
	tcase_add_test(tc, test_tls_truncation_is_no_orderly_end);
	tcase_add_loop_test(tc, test_writing_to_a_closed_peer_raises_no_signal, 0, 2);
	tcase_add_loop_test(tc, test_pump_carries_data_and_both_ends, 0, 4);
	tcase_add_test(tc, test_pump_ends_when_the_peer_breaks);
	tcase_add_loop_test(tc, test_addresses, 0, 12);
	tcase_add_test(tc, test_connect_refused_names_the_address);
	suite_add_tcase(suite, tc);
	return suite_run(suite);
}
