/* SPDX-License-Identifier: Apache-2.0 */
#include <arpa/inet.h>
#include <check.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "host/config.h"
#include "host/ini.h"
#include "tests/suite.h"

static char dir[128], path[160];
static struct host_config *cfg;
static struct error err;

#define TLS "[tls]\nca = ca.pem\ncert = h1.pem\nkey = /etc/h1.key\n"

static void setup(void)
{
	strcpy(dir, "/tmp/test_config.XXXXXX");
	ck_assert(mkdtemp(dir) != NULL);
	snprintf(path, sizeof path, "%s/h.ini", dir);
	err = ERROR_INIT;
	cfg = NULL;
}

static void teardown(void)
{
	host_config_free(cfg);
	unlink(path);
	rmdir(dir);
}

static int load(const char *text)
{
	FILE *f = fopen(path, "w");
	fputs(text, f);
	fclose(f);
	return host_config_load(path, &cfg, &err);
}

static void refused(const char *text, unsigned line, const char *says)
{
	char place[300];
	snprintf(place, sizeof place, "%s:%u: ", path, line);
	ck_assert_int_eq(load(text), -EINVAL);
	if (line)
		ck_assert_msg(!strncmp(err.message, place, strlen(place)), "%s", err.message);
	ck_assert_msg(strstr(err.message, says) != NULL, "%s", err.message);
}

START_TEST(everything_is_read)
{
	ck_assert_msg(load("# a host\n[host]\nname = h1 ; ours\nlisten = 10.0.0.1\nstate-dir = state\n" TLS
			   "[peer h2]\naddress = h2.example:99\n[peer h3]\naddress = [fd00::3]\n"
			   "[network]\nbridges = br0, br1\n"
			   "[backing debian]\npath = images/d.qcow2\nformat = qcow2\n"
			   "[devices]\nallow = /dev/vg0/vm-*, /dev/loop7\n"
			   "[shared]\npath = /srv/vms/, /mnt/nfs\n"
			   "[limits]\nretry-for = 90s\nkeep-partial = 2d\nsilence-ms = 1000\nmax-incoming = "
			   "3\nmoves-per-link = 5\nallow-no-tls = "
			   "yes\n[programs]\nsnvmm = /x/snvmm\n") == 0,
		      "%s", err.message);
	char want[300];
	ck_assert_str_eq(cfg->path, path);
	ck_assert_str_eq(cfg->name, "h1");
	ck_assert_str_eq(cfg->listen, "10.0.0.1:16516");
	snprintf(want, sizeof want, "%s/state", dir);
	ck_assert_str_eq(cfg->state_dir, want);
	snprintf(want, sizeof want, "%s/state/control.sock", dir);
	ck_assert_str_eq(cfg->control, want);
	snprintf(want, sizeof want, "%s/ca.pem", dir);
	ck_assert_str_eq(cfg->ca, want);
	ck_assert_str_eq(cfg->key, "/etc/h1.key");
	ck_assert_uint_eq(cfg->npeers, 2);
	ck_assert_str_eq(host_config_peer(cfg, "h2")->address, "h2.example:99");
	ck_assert_str_eq(host_config_peer(cfg, "h3")->address, "[fd00::3]:16516");
	ck_assert_ptr_null(host_config_peer(cfg, "h1"));
	ck_assert_str_eq(cfg->bridges, "br0, br1");
	ck_assert_uint_eq(cfg->nbackings, 1);
	snprintf(want, sizeof want, "%s/images/d.qcow2", dir);
	ck_assert_str_eq(cfg->backings[0].path, want);
	ck_assert_str_eq(cfg->backings[0].format, "qcow2");
	ck_assert_str_eq(cfg->shared, "/srv/vms/, /mnt/nfs");
	ck_assert(host_config_device_allowed(cfg, "/dev/loop7"));
	ck_assert(host_config_device_allowed(cfg, "/dev/vg0/vm-a"));
	static const char *const not_allowed[] = {"/dev/loop6",
						  "/dev/vg0/vm-a/b",
						  "/dev/vg0/vm-/../../sda",
						  "/dev/vg0/../vg0/vm-a",
						  "/dev/vg0/./vm-a",
						  "/dev//vg0/vm-a",
						  "dev/loop7",
						  "/dev/loop7/",
						  "/dev/loop77",
						  ""};
	for (unsigned i = 0; i < ARRAY_SIZE(not_allowed); i++)
		ck_assert_msg(!host_config_device_allowed(cfg, not_allowed[i]), "%s", not_allowed[i]);
	ck_assert_uint_eq(cfg->silence_ms, 1000);
	ck_assert_uint_eq(cfg->max_incoming, 3);
	ck_assert_uint_eq(cfg->moves_per_link, 5);
	ck_assert_uint_eq(cfg->retry_for_s, 90);
	ck_assert_uint_eq(cfg->keep_partial_s, 2 * 86400);
	ck_assert(cfg->allow_no_tls);
	ck_assert_str_eq(cfg->snvmm, "/x/snvmm");
}
END_TEST

START_TEST(defaults)
{
	ck_assert_int_eq(load("[host]\nname=h1\nstate-dir=/var/lib/s\n" TLS), 0);
	ck_assert_str_eq(cfg->listen, "0.0.0.0:16516");
	ck_assert_str_eq(cfg->control, "/var/lib/s/control.sock");
	ck_assert_uint_eq(cfg->silence_ms, 10000);
	ck_assert_uint_eq(cfg->max_incoming, 8);
	ck_assert_uint_eq(cfg->moves_per_link, 2);
	ck_assert_uint_eq(cfg->retry_for_s, 300);
	ck_assert_uint_eq(cfg->keep_partial_s, 86400);
	ck_assert_uint_eq(cfg->drain_timeout_ms, 5000);
	ck_assert(!cfg->allow_no_tls);
	ck_assert(!host_config_device_allowed(cfg, "/dev/loop7"));
	ck_assert_msg(strstr(cfg->snvmm, "/snvmm") != NULL, "%s", cfg->snvmm);
}
END_TEST

static const struct {
	const char *text;
	unsigned line;
	const char *says;
} bad[] = {
	{"[host]\nname = h1\nnonsense\n", 3, "expected 'key = value'"},
	{"[host\n", 1, "without ']'"},
	{"[host] x\n", 1, "text after"},
	{"name = h1\n", 1, "before the first [section]"},
	{"[hosts]\n", 1, "unknown section [hosts]"},
	{"[host]\nnam = h1\n", 2, "unknown key 'nam'"},
	{"[host]\nname = h1\nname = h2\n", 3, "given twice"},
	{"[host]\nname = -h1\n", 2, "not a host name"},
	{"[host]\nname =\n", 2, "not a host name"},
	{"[host]\nlisten = :16516\n", 2, "not ADDRESS:PORT"},
	{"[host]\nlisten = h1:99999\n", 2, "no valid port"},
	{"[host]\nlisten = fd00::1\n", 2, "in brackets"},
	{"[peer]\n", 1, "not a host name"},
	{"[peer h2]\naddress = a\n[peer h2]\n", 3, "given twice"},
	{"[peer h2]\nport = 1\n", 2, "unknown key 'port'"},
	{"[limits]\nsilence-ms = fast\n", 2, "not a number"},
	{"[limits]\nsilence-ms = 0\n", 2, "not a number from"},
	{"[limits]\nretry-for = soon\n", 2, "not a time from 0"},
	{"[limits]\nkeep-partial = 366d\n", 2, "not a time from 0"},
	{"[limits]\nallow-no-tls = perhaps\n", 2, "neither yes nor no"},
	{"[host]\nname = \x01\n", 2, "control character"},
	{"[host]\nname = h1\n[tls]\ncert = a.pem\nkey = a.key\n", 0, "[tls] ca is missing"},
	{"[host]\nname = h1\n[tls]\nca = a.pem\n", 0, "[tls] cert is missing"},
	{"[host]\nname = h1\n[peer h2]\naddress = h2\n", 0, "[peer h2] needs the certificates"},
	{"[peer h2]\nsend = yes\nsend = no\n", 3, "send: given twice"},
	{"[peer h2]\nreceive = often\n", 2, "neither yes nor no"},
	{"[host]\nmigration-address = 10.0.0.1:x\n", 2, "has no valid port"},
	{"[host]\nallow-from = 10.0.0.0/33\n", 2, "allow-from: '10.0.0.0/33': not a prefix"},
	{"[host]\ndeny-from = 10.0.0.1/8\n", 2, "bits behind the prefix"},
	{"[host]\ndeny-from = host2\n", 2, "'host2' is no IP address"},
	{"[host]\ndeny-peers = h2, a/b\n", 2, "'a/b' is not a host name"},
	{"[limits]\ncertificate-validity = 9s\n", 2, "less than 10 s"},
	{"[devices]\nallow = /dev/a, vg/*\n", 2, "no absolute path"},
	{"[shared]\npath = /srv/vms, nfs\n", 2, "no absolute path"},
	{"[shared]\npath = /srv/../etc\n", 2, "no absolute path"},
	{"[shared a]\npath = /srv\n", 1, "takes no name"},
	{"[shared]\nfolder = /srv\n", 2, "unknown key"},
	{"[backing a]\nformat = vmdk\n", 2, "neither raw nor qcow2"},
	{"[backing a]\npath = /x\npath = /y\n", 3, "given twice"},
	{"[backing a/b]\n", 1, "not a name"},
	{"[host]\nname = h1\nstate-dir = /x\n" TLS "[backing a]\npath = /x\n", 0,
	 "[backing a] format is missing"},
	{"[host]\nname = h1\nstate-dir = /x\n" TLS "[peer h2]\n", 0, "[peer h2] address is missing"},
};

START_TEST(bad_input_names_file_and_line)
{
	refused(bad[_i].text, bad[_i].line, bad[_i].says);
}
END_TEST

START_TEST(nothing_but_defaults_is_a_host_that_can_be_paired)
{
	char own[256] = "";
	ck_assert_int_eq(gethostname(own, sizeof own - 1), 0);
	own[strcspn(own, ".")] = '\0';
	ck_assert_msg(load("[host]\n") == 0, "%s", err.message);
	ck_assert_str_eq(cfg->name, own);
	ck_assert_str_eq(cfg->state_dir, "/var/lib/snmigrate");
	ck_assert_str_eq(cfg->ca, "");
	ck_assert_uint_eq(cfg->certificate_s, 365 * 86400);
}
END_TEST

static struct sockaddr_storage ip(const char *text)
{
	struct sockaddr_storage a = {0};
	struct sockaddr_in *v4 = (struct sockaddr_in *)&a;
	struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)&a;
	if (inet_pton(AF_INET, text, &v4->sin_addr) == 1)
		a.ss_family = AF_INET;
	else if (inet_pton(AF_INET6, text, &v6->sin6_addr) == 1)
		a.ss_family = AF_INET6;
	return a;
}

START_TEST(networks_and_peers_are_refused)
{
	static const struct {
		const char *from;
		bool allowed;
	} t[] = {{"10.1.0.9", true},	    {"10.2.0.9", false},	{"10.1.2.9", false},
		 {"10.1.2.255", false},	    {"10.1.3.0", true},		{"192.0.2.7", true},
		 {"192.0.2.8", false},	    {"fd00::1", true},		{"fd00:0:0:1::1", false},
		 {"::ffff:10.1.0.9", true}, {"::ffff:10.1.2.9", false}, {"::1", false}};
	ck_assert_msg(
		load("[host]\nname = h1\nallow-from = 10.1.0.0/16, 192.0.2.7 fd00::/64\n"
		     "deny-from = 10.1.2.0/24\ndeny-peers = evil, other\nmigration-address = 10.9.0.1\n") ==
			0,
		"%s", err.message);
	for (size_t i = 0; i < ARRAY_SIZE(t); i++) {
		struct sockaddr_storage a = ip(t[i].from);
		ck_assert_msg(host_config_network_allowed(cfg, &a) == t[i].allowed, "%s", t[i].from);
	}
	ck_assert(host_config_peer_denied(cfg, "evil"));
	ck_assert(host_config_peer_denied(cfg, "other"));
	ck_assert(!host_config_peer_denied(cfg, "evi"));
	ck_assert(!host_config_peer_denied(cfg, "evil2"));
	ck_assert(!host_config_peer_denied(cfg, ""));
	ck_assert_str_eq(cfg->migration_address, "10.9.0.1:16516");
}
END_TEST

START_TEST(rights_of_peers)
{
	ck_assert_msg(load("[host]\nname = h1\n" TLS
			   "[peer a]\naddress = a\n[peer b]\naddress = b\nsend = no\n"
			   "[peer c]\naddress = c\nreceive = no\nadminister = yes\n") == 0,
		      "%s", err.message);
	const struct host_peer *a = host_config_peer(cfg, "a"), *b = host_config_peer(cfg, "b"),
			       *c = host_config_peer(cfg, "c");
	ck_assert(a->may_send && a->may_receive && !a->may_administer);
	ck_assert(!b->may_send && b->may_receive && !b->may_administer);
	ck_assert(c->may_send && !c->may_receive && c->may_administer);
}
END_TEST

START_TEST(missing_file)
{
	ck_assert_int_eq(host_config_load("/nonexistent/h.ini", &cfg, &err), -ENOENT);
	ck_assert_msg(strstr(err.message, "/nonexistent/h.ini") != NULL, "%s", err.message);
}
END_TEST

START_TEST(state_dir_too_long_for_its_socket)
{
	char text[600], longest[201];
	memset(longest, 'a', 200);
	longest[200] = '\0';
	snprintf(text, sizeof text, "[host]\nname = h1\nstate-dir = /%s\n" TLS, longest);
	refused(text, 0, "set [host] control");
	snprintf(text, sizeof text, "[host]\nname = h1\nstate-dir = /%s\ncontrol = /run/c.sock\n" TLS,
		 longest);
	ck_assert_int_eq(load(text), 0);
}
END_TEST

static int count(void *opaque, const struct ini_entry *e, struct error *why)
{
	unsigned *n = opaque;
	(*n)++;
	if (e->key && !strcmp(e->key, "long"))
		ck_assert_uint_eq(strlen(e->value), 2000);
	if (e->key && !strcmp(e->key, "c"))
		ck_assert_str_eq(e->value, "a;b#c");
	if (e->key && !strcmp(e->key, "eq"))
		ck_assert_str_eq(e->value, "x=y = z");
	return 0;
}

START_TEST(ini_long_lines_comments_and_equals)
{
	char text[4096];
	unsigned n = 0;
	int at = snprintf(
		text, sizeof text,
		"\xef\xbb\xbf[s label one]\r\nc = a;b#c ; comment\r\neq = x=y = z\n\n  # comment\nlong = ");
	memset(text + at, 'v', 2000);
	strcpy(text + at + 2000, "\nlast=1");
	ck_assert_msg(ini_parse_text(text, strlen(text), "t", count, &n, &err) == 0, "%s", err.message);
	ck_assert_uint_eq(n, 5);
}
END_TEST

START_TEST(ini_refuses_what_is_too_long)
{
	CLEANUP_FREE char *text = malloc(INI_LINE_MAX_BYTES + 64);
	unsigned n = 0;
	int at = sprintf(text, "[s]\nk = ");
	memset(text + at, 'v', INI_LINE_MAX_BYTES);
	text[at + INI_LINE_MAX_BYTES] = '\0';
	ck_assert_int_eq(ini_parse_text(text, strlen(text), "t", count, &n, &err), -EINVAL);
	ck_assert_msg(!strncmp(err.message, "t:2: line longer", 16), "%s", err.message);
}
END_TEST

START_TEST(sizes)
{
	static const struct {
		const char *text;
		int rc;
		uint64_t bytes;
	} cases[] = {{"512", 0, 512},
		     {"2G", 0, UINT64_C(2) << 30},
		     {"1MiB", 0, 1 << 20},
		     {"3k", 0, 3072},
		     {"16T", 0, UINT64_C(16) << 40},
		     {"", -EINVAL, 0},
		     {"-1", -EINVAL, 0},
		     {"1X", -EINVAL, 0},
		     {"1GB", -EINVAL, 0},
		     {"99999999999T", -EINVAL, 0},
		     {"18446744073709551616", -EINVAL, 0}};
	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		uint64_t v = 0;
		ck_assert_msg(size_parse(cases[i].text, &v) == cases[i].rc, "%s", cases[i].text);
		if (!cases[i].rc)
			ck_assert_uint_eq(v, cases[i].bytes);
	}
}
END_TEST

int main(void)
{
	Suite *s = suite_create("config");
	TCase *tc = tcase_create("config");
	tcase_add_checked_fixture(tc, setup, teardown);
	tcase_add_test(tc, everything_is_read);
	tcase_add_test(tc, defaults);
	tcase_add_loop_test(tc, bad_input_names_file_and_line, 0, ARRAY_SIZE(bad));
	tcase_add_test(tc, nothing_but_defaults_is_a_host_that_can_be_paired);
	tcase_add_test(tc, networks_and_peers_are_refused);
	tcase_add_test(tc, rights_of_peers);
	tcase_add_test(tc, missing_file);
	tcase_add_test(tc, state_dir_too_long_for_its_socket);
	tcase_add_test(tc, ini_long_lines_comments_and_equals);
	tcase_add_test(tc, ini_refuses_what_is_too_long);
	tcase_add_test(tc, sizes);
	suite_add_tcase(s, tc);
	return suite_run(s);
}
