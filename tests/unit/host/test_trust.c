/* SPDX-License-Identifier: Apache-2.0 */
/* Two hosts with state directories of their own: peers, certificates, and whole pairings over a socket. */
#include <arpa/inet.h>
#include <check.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "host/fsutil.h"
#include "host/jsonl.h"
#include "host/pair_codes.h"
#include "host/pair_serve.h"
#include "host/trust.h"
#include "host/trust_renew.h"
#include "net/preamble.h"
#include "tests/suite.h"

static char dir[64];
static struct host_config *a, *b;
static struct error err;
static struct pair_codes codes;

static struct host_config *host(const char *name, const char *more)
{
	char text[1024], path[128];
	struct host_config *cfg = NULL;
	snprintf(text, sizeof text, "[host]\nname = %s\nstate-dir = %s/%s\nlisten = 127.0.0.1:0\n%s", name,
		 dir, name, more);
	snprintf(path, sizeof path, "%s/%s.ini", dir, name);
	ck_assert_msg(host_config_parse(text, strlen(text), path, &cfg, &err) == 0, "%s", err.message);
	return cfg;
}

static void setup(void)
{
	strcpy(dir, "/tmp/test_trust.XXXXXX");
	ck_assert(mkdtemp(dir) != NULL);
	err = ERROR_INIT;
	a = host("hosta", "");
	b = host("hostb", "");
	pair_codes_init(&codes);
}

static void teardown(void)
{
	host_config_free(a);
	host_config_free(b);
	fs_remove_tree(dir, NULL);
}

/* ---- peers ---- */

static struct trust_peer peer(const char *name, char digit)
{
	struct trust_peer p = {.paired = true, .may_send = true, .may_receive = true, .ncertificates = 1};
	snprintf(p.name, sizeof p.name, "%s", name);
	strcpy(p.address, "192.0.2.9:16516");
	memset(p.certificates[0].sha256, digit, TRUST_FINGERPRINT_CHARS);
	p.certificates[0].not_after = 4102444800;
	return p;
}

static int clear_rights(struct trust_peer *p, void *opaque, struct error *e)
{
	p->may_send = p->may_receive = false;
	p->may_administer = true;
	return opaque ? error_set(e, EINVAL, "no") : 0;
}

START_TEST(a_peer_is_kept_changed_and_removed)
{
	struct trust_peer p = peer("hostb", '1'), q;
	ck_assert_int_eq(trust_prepare(a, &err), 0);
	ck_assert_int_eq(trust_peer_find(a, "hostb", &q, &err), -ENOENT);
	ck_assert_msg(strstr(err.message, "not paired") && strstr(err.message, dir), "%s", err.message);
	ck_assert_msg(trust_peer_add(a, &p, &err) == 0, "%s", err.message);
	ck_assert_int_eq(trust_peer_find(a, "hostb", &q, &err), 0);
	ck_assert_mem_eq(&p, &q, sizeof p);
	int x = 0;
	ck_assert_int_eq(trust_peer_change(a, "hostb", clear_rights, &x, &err), -EINVAL);
	ck_assert_int_eq(trust_peer_find(a, "hostb", &q, &err), 0);
	ck_assert(q.may_send);
	ck_assert_int_eq(trust_peer_change(a, "hostb", clear_rights, NULL, &err), 0);
	ck_assert_int_eq(trust_peer_find(a, "hostb", &q, &err), 0);
	ck_assert(!q.may_send && !q.may_receive && q.may_administer);
	/* the same host again: a new address, no new rights */
	strcpy(p.address, "192.0.2.10:16516");
	ck_assert_int_eq(trust_peer_add(a, &p, &err), 0);
	ck_assert_int_eq(trust_peer_find(a, "hostb", &q, &err), 0);
	ck_assert(!q.may_send && !q.may_receive);
	ck_assert_str_eq(q.address, "192.0.2.10:16516");
	ck_assert_int_eq(trust_peer_remove(a, "hostb", &err), 0);
	ck_assert_int_eq(trust_peer_remove(a, "hostb", &err), -ENOENT);
	ck_assert_int_eq(trust_peer_change(a, "hostb", clear_rights, NULL, &err), -ENOENT);
}
END_TEST

START_TEST(a_name_is_taken_once)
{
	struct trust_peer p = peer("hostb", '1');
	ck_assert_int_eq(trust_prepare(a, &err), 0);
	ck_assert_int_eq(trust_peer_add(a, &p, &err), 0);
	struct trust_peer other = peer("hostb", '2'), twin = peer("hostc", '1'), self = peer("hosta", '3');
	ck_assert_int_eq(trust_peer_add(a, &other, &err), -EEXIST);
	ck_assert_msg(strstr(err.message, "another certificate") &&
			      strstr(err.message, "snmigrate unpair hostb"),
		      "%s", err.message);
	ck_assert_int_eq(trust_peer_add(a, &twin, &err), -EEXIST);
	ck_assert_msg(strstr(err.message, "is host hostb's") != NULL, "%s", err.message);
	ck_assert_int_eq(trust_peer_add(a, &self, &err), -EEXIST);
	struct trust_peer strange = peer("../../x", '4');
	ck_assert_int_eq(trust_peer_add(a, &strange, &err), -EINVAL);
	ck_assert_int_eq(trust_peer_find(a, "../peers/hostb", &p, &err), -ENOENT);
}
END_TEST

START_TEST(the_configuration_counts_before_a_pairing)
{
	struct trust_peer p = peer("hostb", '1'), q;
	ck_assert_int_eq(trust_prepare(a, &err), 0);
	ck_assert_int_eq(trust_peer_add(a, &p, &err), 0);
	struct host_config *c =
		host("hosta", "deny-peers = hostd\n[tls]\nca = x\ncert = y\nkey = z\n[peer hostb]\n"
			      "address = b\nsend = no\n[peer hostd]\naddress = d\n");
	ck_assert_int_eq(trust_peer_find(c, "hostb", &q, &err), 0);
	ck_assert(!q.paired && !q.may_send && q.may_receive);
	ck_assert_str_eq(q.address, "b:16516");
	ck_assert_int_eq(trust_peer_add(c, &p, &err), -EEXIST);
	ck_assert_int_eq(trust_peer_change(c, "hostb", clear_rights, NULL, &err), -EPERM);
	ck_assert_msg(strstr(err.message, "[peer hostb] of ") != NULL, "%s", err.message);
	ck_assert_int_eq(trust_peer_remove(c, "hostb", &err), -EPERM);
	ck_assert_int_eq(trust_peer_find(c, "hostd", &q, &err), -EPERM);
	ck_assert_msg(strstr(err.message, "deny-peers") != NULL, "%s", err.message);
	host_config_free(c);
}
END_TEST

START_TEST(a_damaged_file_trusts_nobody)
{
	static const char *const texts[] = {"", "{}", "[", "{\"name\":\"hostc\"}",
					    "{\"name\":\"hostb\",\"certificates\":[]}"};
	struct trust_peer q;
	char path[160];
	ck_assert_int_eq(trust_prepare(a, &err), 0);
	snprintf(path, sizeof path, "%s/hosta/trust/peers/hostb.json", dir);
	for (size_t i = 0; i < ARRAY_SIZE(texts); i++) {
		FILE *f = fopen(path, "w");
		fputs(texts[i], f);
		fclose(f);
		ck_assert_int_eq(trust_peer_find(a, "hostb", &q, &err), -EUCLEAN);
		ck_assert_msg(strstr(err.message, path) != NULL, "%s", err.message);
	}
}
END_TEST

START_TEST(a_host_makes_its_certificate_once)
{
	struct trust_own own, again;
	struct stat st;
	ck_assert_int_eq(trust_own_load(a, &own, &err), -ENOENT);
	ck_assert_msg(trust_own_ensure(a, &own, &err) == 0, "%s", err.message);
	ck_assert_int_eq(trust_own_ensure(a, &again, &err), 0);
	ck_assert_str_eq(own.present.sha256, again.present.sha256);
	ck_assert_str_eq(own.names, "hosta");
	ck_assert_int_eq(stat(own.file, &st), 0);
	ck_assert_uint_eq(st.st_mode & 0777, 0600);
	/* a host that was given another name */
	struct host_config *c = host("hostc", "");
	snprintf(c->state_dir, sizeof c->state_dir, "%s", a->state_dir);
	ck_assert_int_eq(trust_own_ensure(c, &own, &err), -EKEYREJECTED);
	ck_assert_msg(strstr(err.message, "host.pem") &&
			      strstr(err.message, "found is for hosta, expected is hostc"),
		      "%s", err.message);
	host_config_free(c);
}
END_TEST

/* ---- pairing over a socket: host a listens, in threads that stand for its daemon and its snvmm --pair ----
 */

struct listener {
	int listen_fd, connections;
	char address[64];
	pthread_t thread;
};

static void *answer(void *arg)
{
	struct jsonl *j = arg;
	json_t *request = NULL;
	struct error e = ERROR_INIT;
	if (jsonl_read(j, &request, NULL, 5000, NULL) == 0) {
		json_t *o = pair_answer(a, &codes, request, "127.0.0.1", &e);
		if (o) {
			json_object_set_new(o, "ok", json_true());
			jsonl_write(j, o, -1, NULL);
		} else {
			jsonl_write_error(j, 3, &e);
		}
		json_decref(o);
	}
	json_decref(request);
	jsonl_close(j);
	return NULL;
}

static void *listen_for_pairs(void *arg)
{
	struct listener *l = arg;
	for (int i = 0; i < l->connections; i++) {
		int fd = accept(l->listen_fd, NULL, NULL), pair[2];
		struct preamble pre;
		pthread_t daemon;
		ck_assert_int_eq(preamble_read(fd, 5000, &pre, NULL), 0);
		ck_assert_int_eq(pre.channel, CHANNEL_PAIR);
		ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
		pthread_create(&daemon, NULL, answer, jsonl_from_fd(pair[0]));
		struct jsonl *j = jsonl_from_fd(pair[1]);
		pair_serve(a, fd, j, NULL);
		jsonl_close(j);
		pthread_join(daemon, NULL);
	}
	return NULL;
}

static void listener_start(struct listener *l, int connections)
{
	struct sockaddr_storage addr;
	socklen_t len = sizeof addr;
	char port[16];
	l->connections = connections;
	l->listen_fd = net_listen("127.0.0.1:0", 4, &err);
	ck_assert_int_ge(l->listen_fd, 0);
	getsockname(l->listen_fd, (struct sockaddr *)&addr, &len);
	snprintf(port, sizeof port, "%u", ntohs(((struct sockaddr_in *)&addr)->sin_port));
	snprintf(l->address, sizeof l->address, "127.0.0.1:%s", port);
	pthread_create(&l->thread, NULL, listen_for_pairs, l);
}

static void listener_end(struct listener *l)
{
	pthread_join(l->thread, NULL);
	close(l->listen_fd);
}

static void new_code(unsigned valid_s, char text[PAIR_CODE_CHARS + 1])
{
	struct trust_own own;
	struct pair_code code;
	ck_assert_msg(trust_own_ensure(a, &own, &err) == 0, "%s", err.message);
	ck_assert_int_eq(
		pair_codes_make(&codes, own.present.sha256, valid_s, pair_codes_now_ms(), &code, &err), 0);
	pair_code_format(&code, text);
}

struct tls_end {
	int fd;
	bool paired;
	int rc;
	struct error err;
	struct trust_peer who;
};

/* Host a accepts a control channel. */
static void *accept_control(void *arg)
{
	struct tls_end *e = arg;
	struct tls_context *tls = NULL;
	struct conn *conn = NULL;
	e->rc = trust_server_context(a, e->paired, &tls, &e->err);
	if (e->rc)
		close(e->fd);
	else
		e->rc = conn_tls_accept(e->fd, tls, 5000, &conn, &e->err);
	if (!e->rc)
		e->rc = trust_peer_of(a, e->paired, conn, &e->who, &e->err);
	if (!e->rc)
		e->rc = conn_write_full(conn, "x", 1, 1000, &e->err);
	conn_close(conn);
	tls_context_free(tls);
	return NULL;
}

/* Host b dials host a as it trusts it; the client's result, the server's in *server. */
static int control(struct tls_end *server)
{
	struct trust_peer p;
	struct tls_context *tls = NULL;
	struct conn *conn = NULL;
	pthread_t thread;
	int fds[2];
	char byte;
	*server = (struct tls_end){.paired = true};
	ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
	server->fd = fds[1];
	pthread_create(&thread, NULL, accept_control, server);
	int rc = trust_peer_find(b, "hosta", &p, &err);
	if (!rc)
		rc = trust_client_context(b, &p, &tls, &err);
	if (rc)
		close(fds[0]);
	else
		rc = conn_tls_connect(fds[0], tls, p.name, 5000, &conn, &err);
	if (!rc)
		rc = conn_read_full(conn, &byte, 1, 5000, &err);
	conn_close(conn);
	tls_context_free(tls);
	pthread_join(thread, NULL);
	return rc;
}

START_TEST(two_fresh_hosts_pair_and_know_each_other)
{
	struct listener l;
	struct trust_peer p, q;
	char code[PAIR_CODE_CHARS + 1];
	struct tls_end server;
	new_code(600, code);
	listener_start(&l, 1);
	ck_assert_msg(pair_join(b, l.address, code, &p, &err) == 0, "%s", err.message);
	listener_end(&l);
	ck_assert_str_eq(p.name, "hosta");
	ck_assert_int_eq(trust_peer_find(b, "hosta", &q, &err), 0);
	ck_assert_str_eq(q.address, l.address);
	ck_assert_int_eq(trust_peer_find(a, "hostb", &q, &err), 0);
	ck_assert_str_eq(q.address, "127.0.0.1:0");
	ck_assert_msg(control(&server) == 0, "%s", err.message);
	ck_assert_msg(server.rc == 0, "%s", server.err.message);
	ck_assert_str_eq(server.who.name, "hostb");
	/* revoked at the server: refused at once, both say why */
	ck_assert_int_eq(trust_peer_remove(a, "hostb", &err), 0);
	ck_assert_int_lt(control(&server), 0);
	ck_assert_msg(strstr(err.message,
			     "hostb/trust/host.pem (name hostb): this host is not paired there") != NULL,
		      "%s", err.message);
	ck_assert_int_eq(server.rc, -EKEYREJECTED);
	ck_assert_msg(strstr(server.err.message, "for: hostb") &&
			      strstr(server.err.message, "hosta/trust/peers"),
		      "%s", server.err.message);
}
END_TEST

START_TEST(another_certificate_of_the_same_name_is_refused)
{
	struct listener l;
	struct trust_peer p;
	char code[PAIR_CODE_CHARS + 1], path[160];
	struct tls_end server;
	new_code(600, code);
	listener_start(&l, 1);
	ck_assert_msg(pair_join(b, l.address, code, &p, &err) == 0, "%s", err.message);
	listener_end(&l);
	/* host a is installed anew, or is somebody else who says that he is host a */
	snprintf(path, sizeof path, "%s/hosta/trust/host.pem", dir);
	ck_assert_int_eq(unlink(path), 0);
	ck_assert_int_eq(control(&server), -EKEYREJECTED);
	ck_assert_msg(strstr(err.message, "hosta.json: expected hosta") &&
			      strstr(err.message, "found one for: hosta"),
		      "%s", err.message);
	ck_assert_int_eq(server.rc, -EACCES);
}
END_TEST

START_TEST(wrong_used_and_expired_codes_are_refused)
{
	struct listener l;
	struct trust_peer p;
	char good[PAIR_CODE_CHARS + 1], late[PAIR_CODE_CHARS + 1], wrong[PAIR_CODE_CHARS + 1];
	struct trust_own own;
	struct pair_code guess;
	new_code(600, good);
	new_code(1, late);
	ck_assert_int_eq(trust_own_ensure(a, &own, &err), 0);
	ck_assert_int_eq(pair_code_make(own.present.sha256, &guess, &err), 0);
	pair_code_format(&guess, wrong);
	listener_start(&l, 4);
	ck_assert_int_eq(pair_join(b, l.address, wrong, &p, &err), -EACCES);
	ck_assert_msg(strstr(err.message, "refused: the code is wrong") != NULL, "%s", err.message);
	ck_assert_int_eq(trust_peer_find(b, "hosta", &p, NULL), -ENOENT);
	ck_assert_msg(pair_join(b, l.address, good, &p, &err) == 0, "%s", err.message);
	ck_assert_int_eq(pair_join(b, l.address, good, &p, &err), -EACCES);
	ck_assert_msg(strstr(err.message, "the code was used already, by host hostb") != NULL, "%s",
		      err.message);
	sleep(1);
	ck_assert_int_eq(pair_join(b, l.address, late, &p, &err), -EACCES);
	ck_assert_msg(strstr(err.message, "the code has expired") != NULL, "%s", err.message);
	listener_end(&l);
}
END_TEST

/* Whoever sits in between has a certificate of his own, and so another SHA-256. */
START_TEST(the_code_of_another_host_sends_nothing)
{
	struct listener l;
	struct trust_peer p;
	struct pair_code code;
	char text[PAIR_CODE_CHARS + 1];
	ck_assert_int_eq(pair_code_make("00000000000000000000000000000000000000000000000000000000000000ff",
					&code, &err),
			 0);
	pair_code_format(&code, text);
	listener_start(&l, 1);
	ck_assert_int_eq(pair_join(b, l.address, text, &p, &err), -EKEYREJECTED);
	ck_assert_msg(strstr(err.message, "the code is not of the host that answers at") &&
			      strstr(err.message, "somebody is in between"),
		      "%s", err.message);
	listener_end(&l);
}
END_TEST

START_TEST(hosts_of_one_name_do_not_pair)
{
	struct listener l;
	struct trust_peer p;
	char code[PAIR_CODE_CHARS + 1];
	struct host_config *twin = host("hosta", "");
	snprintf(twin->state_dir, sizeof twin->state_dir, "%s/twin", dir);
	new_code(600, code);
	listener_start(&l, 2);
	ck_assert_int_eq(pair_join(twin, l.address, code, &p, &err), -EEXIST);
	ck_assert_msg(strstr(err.message, "both hosts are named hosta") != NULL, "%s", err.message);
	/* the code is still good */
	ck_assert_msg(pair_join(b, l.address, code, &p, &err) == 0, "%s", err.message);
	listener_end(&l);
	host_config_free(twin);
}
END_TEST

START_TEST(without_a_tls_section_nobody_comes_by_a_ca)
{
	struct tls_context *tls = NULL;
	ck_assert_int_eq(trust_server_context(a, false, &tls, &err), -EPERM);
	ck_assert_msg(strstr(err.message, "has no [tls] section") != NULL, "%s", err.message);
}
END_TEST

/* ---- renewal ---- */

/* Host b takes one control channel and answers its first frame. */
static void *answer_renewal(void *arg)
{
	int listener = *(int *)arg, fd = accept(listener, NULL, NULL);
	struct preamble pre;
	struct tls_context *tls = NULL;
	struct conn *conn = NULL;
	struct trust_peer who;
	struct frame f = {0};
	ck_assert_int_eq(preamble_read(fd, 5000, &pre, NULL), 0);
	ck_assert_str_eq(pre.token, PREAMBLE_BY_PAIRING);
	ck_assert_int_eq(trust_server_context(b, true, &tls, NULL), 0);
	if (!conn_tls_accept(fd, tls, 5000, &conn, NULL) && !trust_peer_of(b, true, conn, &who, NULL) &&
	    !frame_read(conn, 5000, &f, NULL))
		trust_renew_answer(b, &who, conn, &f, NULL);
	frame_release(&f);
	conn_close(conn);
	tls_context_free(tls);
	return NULL;
}

static int set_address(struct trust_peer *p, void *opaque, struct error *e)
{
	snprintf(p->address, sizeof p->address, "%s", (const char *)opaque);
	return 0;
}

/* The life of the present certificate, in seconds, and how long it has been used for: a third of it is left
 * then. */
#define SHORT_LIFE_S 6

static void pair_for_renewal(struct listener *l, unsigned life_s, int *listen_fd)
{
	struct trust_peer p;
	struct sockaddr_storage addr;
	socklen_t len = sizeof addr;
	char code[PAIR_CODE_CHARS + 1], address[64];
	a->certificate_s = life_s;
	new_code(600, code);
	listener_start(l, 1);
	ck_assert_msg(pair_join(b, l->address, code, &p, &err) == 0, "%s", err.message);
	listener_end(l);
	*listen_fd = net_listen("127.0.0.1:0", 4, &err);
	getsockname(*listen_fd, (struct sockaddr *)&addr, &len);
	snprintf(address, sizeof address, "127.0.0.1:%u", ntohs(((struct sockaddr_in *)&addr)->sin_port));
	ck_assert_int_eq(trust_peer_change(a, "hostb", set_address, address, &err), 0);
	a->certificate_s = 3600;
}

START_TEST(a_certificate_is_renewed_before_its_end_and_the_peer_knows_it)
{
	struct listener l;
	struct trust_own before, after;
	struct trust_peer p;
	struct tls_end server;
	pthread_t thread;
	int listen_fd;
	pair_for_renewal(&l, SHORT_LIFE_S, &listen_fd);
	ck_assert_int_eq(trust_own_load(a, &before, &err), 0);
	trust_renew(a); /* too early */
	ck_assert_int_eq(trust_own_load(a, &after, &err), 0);
	ck_assert_str_eq(before.present.sha256, after.present.sha256);
	sleep(SHORT_LIFE_S * 2 / 3);
	pthread_create(&thread, NULL, answer_renewal, &listen_fd);
	trust_renew(a);
	pthread_join(thread, NULL);
	close(listen_fd);
	ck_assert_int_eq(trust_own_load(a, &after, &err), 0);
	ck_assert_str_ne(before.present.sha256, after.present.sha256);
	ck_assert_int_gt(after.present.not_after, before.present.not_after + 3000);
	ck_assert_int_eq(trust_peer_find(b, "hosta", &p, &err), 0);
	ck_assert_uint_eq(p.ncertificates, 2);
	ck_assert_str_eq(p.certificates[0].sha256, before.present.sha256);
	ck_assert_str_eq(p.certificates[1].sha256, after.present.sha256);
	ck_assert_int_eq(trust_peer_find(a, "hostb", &p, &err), 0);
	ck_assert_str_eq(p.knows, after.present.sha256);
	ck_assert_msg(control(&server) == 0, "%s", err.message);
}
END_TEST

START_TEST(who_cannot_be_told_is_waited_for_and_then_left_behind)
{
	struct listener l;
	struct trust_own before, after;
	struct tls_end server;
	int listen_fd;
	pair_for_renewal(&l, SHORT_LIFE_S, &listen_fd);
	close(listen_fd);
	ck_assert_int_eq(trust_own_load(a, &before, &err), 0);
	sleep(SHORT_LIFE_S * 2 / 3);
	trust_renew(a);
	ck_assert_int_eq(trust_own_load(a, &after, &err), 0);
	ck_assert_str_eq(before.present.sha256, after.present.sha256);
	sleep(SHORT_LIFE_S / 3 + 1);
	trust_renew(a);
	ck_assert_int_eq(trust_own_load(a, &after, &err), 0);
	ck_assert_str_ne(before.present.sha256, after.present.sha256);
	ck_assert_int_eq(control(&server), -EKEYREJECTED);
	ck_assert_msg(strstr(err.message, "expected hosta with the certificate of SHA-256") != NULL, "%s",
		      err.message);
}
END_TEST

START_TEST(an_expired_certificate_is_refused_though_it_is_known)
{
	struct listener l;
	struct tls_end server;
	int listen_fd;
	pair_for_renewal(&l, 3, &listen_fd);
	close(listen_fd);
	sleep(4);
	ck_assert_int_eq(control(&server), -EKEYEXPIRED);
	ck_assert_msg(strstr(err.message, "(name hosta) expired on") != NULL, "%s", err.message);
	ck_assert_int_eq(server.rc, -EACCES);
	ck_assert_msg(strstr(server.err.message,
			     "hosta/trust/host.pem (name hosta): it has expired by the peer's clock") != NULL,
		      "%s", server.err.message);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("trust");
	TCase *tc = tcase_create("trust");
	tcase_set_timeout(tc, 60);
	tcase_add_checked_fixture(tc, setup, teardown);
	tcase_add_test(tc, a_peer_is_kept_changed_and_removed);
	tcase_add_test(tc, a_name_is_taken_once);
	tcase_add_test(tc, the_configuration_counts_before_a_pairing);
	tcase_add_test(tc, a_damaged_file_trusts_nobody);
	tcase_add_test(tc, a_host_makes_its_certificate_once);
	tcase_add_test(tc, two_fresh_hosts_pair_and_know_each_other);
	tcase_add_test(tc, another_certificate_of_the_same_name_is_refused);
	tcase_add_test(tc, wrong_used_and_expired_codes_are_refused);
	tcase_add_test(tc, the_code_of_another_host_sends_nothing);
	tcase_add_test(tc, hosts_of_one_name_do_not_pair);
	tcase_add_test(tc, a_certificate_is_renewed_before_its_end_and_the_peer_knows_it);
	tcase_add_test(tc, who_cannot_be_told_is_waited_for_and_then_left_behind);
	tcase_add_test(tc, an_expired_certificate_is_refused_though_it_is_known);
	tcase_add_test(tc, without_a_tls_section_nobody_comes_by_a_ca);
	suite_add_tcase(s, tc);
	return suite_run(s);
}
