/* SPDX-License-Identifier: Apache-2.0 */
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
#include "host/pki.h"
#include "net/conn.h"
#include "tests/suite.h"

static char dir[128];
static struct error err;

static void setup(void)
{
	strcpy(dir, "/tmp/test_pki.XXXXXX");
	ck_assert(mkdtemp(dir) != NULL);
	err = ERROR_INIT;
	ck_assert_msg(pki_init(dir, PKI_CA_DAYS, &err) == 0, "%s", err.message);
}

static void teardown(void)
{
	fs_remove_tree(dir, NULL);
}

static const char *at(const char *name)
{
	static _Thread_local char path[4][200];
	static _Thread_local unsigned n;
	n = (n + 1) % 4;
	snprintf(path[n], sizeof path[n], "%s/%s", dir, name);
	return path[n];
}

static int issue(const char *name, int days)
{
	char *addresses[] = {(char *)"127.0.0.1", (char *)"fd00::1", (char *)"host.example"};
	return pki_issue(dir, name, addresses, 3, days, &err);
}

struct side {
	int fd;
	const char *cert, *key;
	int rc;
	struct error err;
};

static void *serve(void *arg)
{
	struct side *s = arg;
	struct tls_context *tls = NULL;
	struct conn *conn = NULL;
	s->rc = tls_context_create(at("ca.pem"), s->cert, s->key, &tls, &s->err);
	if (s->rc)
		close(s->fd);
	else
		s->rc = conn_tls_accept(s->fd, tls, 5000, &conn, &s->err);
	char c = 'x';
	if (!s->rc)
		s->rc = conn_write_full(conn, &c, 1, 5000, &s->err);
	conn_close(conn);
	tls_context_free(tls);
	return NULL;
}

/* Connects as `client` to `server`, expecting `name`. The client's result; its sentence in err. */
static int shake(const char *client, const char *server, const char *name)
{
	int fds[2];
	char cc[64], ck[64], sc[64], sk[64], c = 0;
	pthread_t t;
	struct tls_context *tls = NULL;
	struct conn *conn = NULL;
	snprintf(cc, sizeof cc, "%s.pem", client);
	snprintf(ck, sizeof ck, "%s.key", client);
	snprintf(sc, sizeof sc, "%s.pem", server);
	snprintf(sk, sizeof sk, "%s.key", server);
	ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
	struct side s = {.fd = fds[1], .cert = strdup(at(sc)), .key = strdup(at(sk))};
	pthread_create(&t, NULL, serve, &s);
	int rc = tls_context_create(at("ca.pem"), at(cc), at(ck), &tls, &err);
	ck_assert_msg(rc == 0, "%s", err.message);
	rc = conn_tls_connect(fds[0], tls, name, 5000, &conn, &err);
	if (!rc)
		rc = conn_read_full(conn, &c, 1, 5000, &err);
	conn_close(conn);
	pthread_join(t, NULL);
	if (!rc)
		ck_assert_msg(s.rc == 0, "%s", s.err.message);
	tls_context_free(tls);
	free((char *)s.cert);
	free((char *)s.key);
	return rc;
}

START_TEST(hosts_trust_one_another_by_name)
{
	ck_assert_msg(issue("h1", PKI_HOST_DAYS) == 0, "%s", err.message);
	ck_assert_msg(issue("h2", PKI_HOST_DAYS) == 0, "%s", err.message);
	ck_assert_msg(shake("h1", "h2", "h2") == 0, "%s", err.message);
	ck_assert_int_lt(shake("h1", "h2", "h1"), 0);
	ck_assert_msg(strstr(err.message, "h2") != NULL, "%s", err.message);
	/* the addresses are names, too */
	ck_assert_msg(shake("h2", "h1", "host.example") == 0, "%s", err.message);
}
END_TEST

START_TEST(expired_and_foreign_certificates_are_refused)
{
	ck_assert_msg(issue("h1", PKI_HOST_DAYS) == 0, "%s", err.message);
	ck_assert_msg(issue("old", -1) == 0, "%s", err.message);
	/* its own host does not even begin to use it */
	struct tls_context *tls = NULL;
	ck_assert_int_lt(tls_context_create(at("ca.pem"), at("old.pem"), at("old.key"), &tls, &err), 0);
	ck_assert_msg(strstr(err.message, "expired") != NULL, "%s", err.message);
	ck_assert_int_lt(shake("h1", "old", "old"), 0);
	/* of another CA */
	char here[128];
	strcpy(here, dir);
	snprintf(dir, sizeof dir, "%s/other", here);
	ck_assert_int_eq(pki_init(dir, PKI_CA_DAYS, &err), 0);
	ck_assert_int_eq(issue("h3", PKI_HOST_DAYS), 0);
	char from[200], to[200];
	for (int i = 0; i < 2; i++) {
		snprintf(from, sizeof from, "%s/h3.%s", dir, i ? "key" : "pem");
		snprintf(to, sizeof to, "%s/h3.%s", here, i ? "key" : "pem");
		ck_assert_int_eq(rename(from, to), 0);
	}
	strcpy(dir, here);
	ck_assert_int_lt(shake("h1", "h3", "h3"), 0);
	ck_assert_int_lt(shake("h3", "h1", "h1"), 0);
}
END_TEST

START_TEST(keys_are_private_and_nothing_is_overwritten)
{
	struct stat st;
	CLEANUP_FREE char *before = NULL, *after = NULL;
	size_t n, m;
	ck_assert_int_eq(issue("h1", PKI_HOST_DAYS), 0);
	ck_assert_int_eq(stat(at("h1.key"), &st), 0);
	ck_assert_int_eq(st.st_mode & 0777, 0600);
	ck_assert_int_eq(stat(at("ca.key"), &st), 0);
	ck_assert_int_eq(st.st_mode & 0777, 0600);
	ck_assert_int_eq(fs_read_file(at("h1.key"), 10000, &before, &n, &err), 0);
	ck_assert_int_eq(issue("h1", PKI_HOST_DAYS), -EEXIST);
	ck_assert_int_eq(pki_init(dir, PKI_CA_DAYS, &err), -EEXIST);
	unlink(at("h1.pem"));
	ck_assert_int_eq(issue("h1", PKI_HOST_DAYS), -EEXIST);
	ck_assert_int_ne(access(at("h1.pem"), F_OK), 0);
	ck_assert_int_eq(fs_read_file(at("h1.key"), 10000, &after, &m, &err), 0);
	ck_assert_str_eq(before, after);
}
END_TEST

START_TEST(names_that_are_none)
{
	static const char *const bad[] = {"", "ca", "../x", "a b", "-x"};
	for (size_t i = 0; i < ARRAY_SIZE(bad); i++)
		ck_assert_msg(issue(bad[i], 1) == -EINVAL, "%s", bad[i]);
	char *inject[] = {(char *)"a,IP:1.2.3.4"};
	ck_assert_int_eq(pki_issue(dir, "h1", inject, 1, 1, &err), -EINVAL);
	ck_assert_int_ne(access(at("h1.key"), F_OK), 0);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("pki");
	TCase *tc = tcase_create("pki");
	tcase_add_checked_fixture(tc, setup, teardown);
	tcase_add_test(tc, hosts_trust_one_another_by_name);
	tcase_add_test(tc, expired_and_foreign_certificates_are_refused);
	tcase_add_test(tc, keys_are_private_and_nothing_is_overwritten);
	tcase_add_test(tc, names_that_are_none);
	suite_add_tcase(s, tc);
	return suite_run(s);
}
