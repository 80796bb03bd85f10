/* SPDX-License-Identifier: Apache-2.0 */
/* Trust between hosts: pair, peers, unpair. */
#include <getopt.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "host/client.h"
#include "host/exit.h"
#include "host/ini.h"
#include "tools/libsnmigrate/snmigrate.h"

#define CALL_TIMEOUT_MS 60000
#define VALID_MAX_S	3600

static const char *text(const json_t *o, const char *key)
{
	const char *s = json_string_value(json_object_get(o, key));
	return s ? s : "";
}

static void print_json(const json_t *o)
{
	json_dumpf(o, stdout, JSON_INDENT(2));
	putchar('\n');
}

/* ---- pair ---- */

static int open_code(struct snmigrate *s, unsigned valid_s, bool json)
{
	json_t *reply = NULL;
	json_t *request = json_pack("{s:s}", "cmd", "pair-open");
	if (valid_s)
		json_object_set_new(request, "valid_s", json_integer(valid_s));
	int status = client_request("snmigrate", s->control, request, &reply, CALL_TIMEOUT_MS);
	if (status)
		return status;
	json_object_del(reply, "ok");
	json_int_t left = json_integer_value(json_object_get(reply, "valid_s"));
	if (json) {
		print_json(reply);
	} else {
		puts(text(reply, "code"));
		fflush(stdout);
		fprintf(stderr, "Good once, for %lld %s. On the other host: snmigrate pair %s %s\n",
			(long long)(left % 60 ? left : left / 60), left % 60 ? "s" : "min",
			text(reply, "address"), text(reply, "code"));
	}
	json_decref(reply);
	return 0;
}

static int join(struct snmigrate *s, const char *address, const char *code, bool json)
{
	json_t *reply = NULL;
	json_t *request = json_pack("{s:s, s:s, s:s}", "cmd", "pair-join", "address", address, "code", code);
	int status = client_request("snmigrate", s->control, request, &reply, CALL_TIMEOUT_MS);
	if (status)
		return status;
	json_object_del(reply, "ok");
	if (json)
		print_json(reply);
	else
		printf("paired with %s (%s), certificate SHA-256 %s\n", text(reply, "host"),
		       text(reply, "address"), text(reply, "sha256"));
	json_decref(reply);
	return 0;
}

int snmigrate_pair(struct snmigrate *s, int argc, char **argv)
{
	static const struct option known[] = {{"json", no_argument, NULL, 'j'},
					      {"valid", required_argument, NULL, 'v'},
					      {"control", required_argument, NULL, 'c'},
					      {0}};
	bool json = false;
	unsigned valid_s = 0;
	int c;
	while ((c = getopt_long(argc, argv, "", known, NULL)) != -1) {
		if (c == 'j')
			json = true;
		else if (c == 'c')
			s->control = optarg;
		else if (c != 'v')
			return client_option_error("snmigrate", argv);
		else if (duration_parse(optarg, VALID_MAX_S, &valid_s) < 0 || !valid_s)
			return snmigrate_usage_error("--valid %s: not a time from 1s to 1h", optarg);
	}
	int words = argc - optind;
	if (words == 0)
		return open_code(s, valid_s, json);
	if (words == 2 && !valid_s)
		return join(s, argv[optind], argv[optind + 1], json);
	return snmigrate_usage_error(
		"pair takes nothing (to print a code), or ADDRESS and CODE of the other host");
}

/* ---- peers ---- */

static void print_row(const json_t *p)
{
	char rights[64], until[32] = "-";
	bool denied = json_is_true(json_object_get(p, "denied"));
	snprintf(rights, sizeof rights, "%s%s%s", json_is_true(json_object_get(p, "send")) ? " send" : "",
		 json_is_true(json_object_get(p, "receive")) ? " receive" : "",
		 json_is_true(json_object_get(p, "administer")) ? " administer" : "");
	const json_t *certificates = json_object_get(p, "certificates");
	time_t last = 0;
	for (size_t i = 0; i < json_array_size(certificates); i++) {
		time_t t = json_integer_value(json_object_get(json_array_get(certificates, i), "not_after"));
		last = t > last ? t : last;
	}
	struct tm tm;
	if (last && gmtime_r(&last, &tm))
		strftime(until, sizeof until, "%Y-%m-%d", &tm);
	printf("%-20s %-24s %-10s  %-11s %s\n", text(p, "name"), text(p, "address"), text(p, "trust"), until,
	       denied	 ? "refused (deny-peers)"
	       : *rights ? rights + 1
			 : "none");
}

static int list(struct snmigrate *s, bool json)
{
	json_t *reply = NULL, *p;
	size_t i;
	int status = client_request("snmigrate", s->control, json_pack("{s:s}", "cmd", "peer-list"), &reply,
				    CALL_TIMEOUT_MS);
	if (status)
		return status;
	json_t *all = json_object_get(reply, "peers");
	if (json) {
		print_json(all);
	} else {
		printf("%-20s %-24s %-10s  %-11s %s\n", "HOST", "ADDRESS", "TRUST", "UNTIL", "MAY");
		json_array_foreach(all, i, p) print_row(p);
	}
	json_decref(reply);
	return 0;
}

/* "+send", "-receive", "address=HOST:PORT" */
static bool add_change(json_t *request, const char *word)
{
	static const char *const rights[] = {"send", "receive", "administer"};
	if (!strncmp(word, "address=", 8) && word[8])
		return json_object_set_new(request, "address", json_string(word + 8)) == 0;
	for (size_t i = 0; i < ARRAY_SIZE(rights); i++)
		if ((*word == '+' || *word == '-') && !strcmp(word + 1, rights[i]))
			return json_object_set_new(request, rights[i], json_boolean(*word == '+')) == 0;
	return false;
}

static int set(struct snmigrate *s, int argc, char **argv)
{
	if (argc < 2)
		return snmigrate_usage_error(
			"peers set takes a HOST and what changes, such as +send -receive");
	json_t *request = json_pack("{s:s, s:s}", "cmd", "peer-set", "host", argv[0]);
	for (int i = 1; i < argc; i++)
		if (!add_change(request, argv[i])) {
			json_decref(request);
			return snmigrate_usage_error("peers set: '%s' is not +send, +receive, +administer, "
						     "the same with -, or address=ADDRESS",
						     argv[i]);
		}
	return client_request("snmigrate", s->control, request, NULL, CALL_TIMEOUT_MS);
}

int snmigrate_peers(struct snmigrate *s, int argc, char **argv)
{
	bool json;
	/* what comes after "set HOST" begins with - and is no option */
	int bad = snmigrate_common_options(s, argc, argv, "+", &json);
	if (bad)
		return bad;
	int words = argc - optind;
	if (words == 0)
		return list(s, json);
	if (!json && !strcmp(argv[optind], "set"))
		return set(s, words - 1, argv + optind + 1);
	return snmigrate_usage_error("peers takes \"[--json]\" or \"set HOST +send -receive ...\"");
}

/* ---- unpair ---- */

int snmigrate_unpair(struct snmigrate *s, int argc, char **argv)
{
	static const struct option known[] = {
		{"force", no_argument, NULL, 'f'}, {"control", required_argument, NULL, 'c'}, {0}};
	bool force = false;
	int c;
	while ((c = getopt_long(argc, argv, "", known, NULL)) != -1) {
		if (c == 'f')
			force = true;
		else if (c == 'c')
			s->control = optarg;
		else
			return client_option_error("snmigrate", argv);
	}
	if (argc - optind != 1)
		return snmigrate_usage_error("unpair takes one host");
	return client_request(
		"snmigrate", s->control,
		json_pack("{s:s, s:s, s:b}", "cmd", "unpair", "host", argv[optind], "force", (int)force),
		NULL, CALL_TIMEOUT_MS);
}
