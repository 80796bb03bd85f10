/* SPDX-License-Identifier: Apache-2.0 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "host/client.h"
#include "host/exit.h"
#include "tools/libsnmigrate/snmigrate.h"
#include "tui/text.h"

#define CALL_TIMEOUT_MS 120000
#define SHOWN_BYTES	1400
#define DOWNTIME_MAX_MS 600000

static const char *text(const json_t *o, const char *key)
{
	const char *s = json_string_value(json_object_get(o, key));
	return s ? s : "";
}

static void print_line(const json_t *l)
{
	char shown[SHOWN_BYTES];
	const char *result = text(l, "result");
	text_clean(shown, sizeof shown, text(l, "text"));
	printf("%-8s %-11s %s\n",
	       strcmp(result, "pass") ? strcmp(result, "failure") ? "WARNING" : "FAILURE" : "pass",
	       text(l, "check"), shown);
	text_clean(shown, sizeof shown, text(l, "do"));
	if (*shown)
		printf("                     do: %s\n", shown);
}

static void print_report(const json_t *o)
{
	size_t i;
	json_t *l;
	unsigned failures = 0, warnings = 0;
	json_array_foreach(json_object_get(o, "lines"), i, l)
	{
		print_line(l);
		failures += !strcmp(text(l, "result"), "failure");
		warnings += !strcmp(text(l, "result"), "warning");
	}
	if (failures)
		printf("A move would fail: %u failure%s, %u warning%s.\n", failures, failures == 1 ? "" : "s",
		       warnings, warnings == 1 ? "" : "s");
	else if (warnings)
		printf("A move would work, with %u warning%s.\n", warnings, warnings == 1 ? "" : "s");
	else
		printf("Nothing is in the way of a move.\n");
}

static int parse_downtime(const char *arg, json_t *request)
{
	char *end;
	unsigned long ms = strtoul(arg, &end, 10);
	if (*arg < '0' || *arg > '9' || *end || !ms || ms > DOWNTIME_MAX_MS)
		return snmigrate_usage_error("--max-downtime %s: not a number of milliseconds", arg);
	json_object_set_new(request, "max_downtime_ms", json_integer((json_int_t)ms));
	return 0;
}

int snmigrate_check(struct snmigrate *s, int argc, char **argv)
{
	static const struct option known[] = {
		{"json", no_argument, NULL, 'j'},	   {"with-storage", no_argument, NULL, 's'},
		{"backing", required_argument, NULL, 'K'}, {"max-downtime", required_argument, NULL, 'd'},
		{"control", required_argument, NULL, 'c'}, {0}};
	json_t *request = json_pack("{s:s}", "cmd", "check");
	bool json = false;
	int c, status = 0;
	while (!status && (c = getopt_long(argc, argv, "", known, NULL)) != -1) {
		if (c == 'j')
			json = true;
		else if (c == 'K')
			json_object_set_new(request, "backing", json_true());
		else if (c == 'd')
			status = parse_downtime(optarg, request);
		else if (c == 'c')
			s->control = optarg;
		else if (c != 's')
			status = client_option_error("snmigrate", argv);
	}
	if (!status && argc - optind != 2)
		status = snmigrate_usage_error("check takes a VM and a host");
	json_t *vm = status ? NULL : json_string(argv[optind]),
	       *host = status ? NULL : json_string(argv[optind + 1]);
	if (!status && (!vm || !host))
		status = snmigrate_usage_error("check takes a VM and a host");
	if (status) {
		json_decref(vm);
		json_decref(host);
		json_decref(request);
		return status;
	}
	json_object_set_new(request, "vm", vm);
	json_object_set_new(request, "host", host);
	json_t *reply = NULL;
	status = client_request("snmigrate", s->control, request, &reply, CALL_TIMEOUT_MS);
	if (status)
		return status;
	json_object_del(reply, "ok");
	if (json) {
		json_dumpf(reply, stdout, JSON_INDENT(2));
		putchar('\n');
	} else {
		print_report(reply);
	}
	status = strcmp(text(reply, "result"), "failure") ? 0 : EXIT_REFUSED;
	json_decref(reply);
	return status;
}
