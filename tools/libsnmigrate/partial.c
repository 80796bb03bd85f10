/* SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <string.h>

#include "host/client.h"
#include "tools/libsnmigrate/snmigrate.h"

#define CALL_TIMEOUT_MS 60000

static const char *text(const json_t *o, const char *key)
{
	const char *s = json_string_value(json_object_get(o, key));
	return s ? s : "";
}

static void print_row(const json_t *p)
{
	unsigned long long left = (unsigned long long)json_integer_value(json_object_get(p, "expires_s"));
	printf("%-20s %-20s %8lld MiB  %3lluh %02llum  %s\n", text(p, "name"), text(p, "peer"),
	       (long long)json_integer_value(json_object_get(p, "allocated_bytes")) >> 20, left / 3600,
	       left / 60 % 60, text(p, "uuid"));
}

static int list(struct snmigrate *s, bool json)
{
	json_t *reply = NULL, *p;
	size_t i;
	int status = client_request("snmigrate", s->control, json_pack("{s:s}", "cmd", "partial-list"),
				    &reply, CALL_TIMEOUT_MS);
	if (status)
		return status;
	json_t *all = json_object_get(reply, "partials");
	if (json) {
		json_dumpf(all, stdout, JSON_INDENT(2));
		putchar('\n');
	} else {
		printf("%-20s %-20s %12s  %8s  %s\n", "VM", "FROM", "KEPT", "EXPIRES", "UUID");
		json_array_foreach(all, i, p) print_row(p);
	}
	json_decref(reply);
	return 0;
}

int snmigrate_partial(struct snmigrate *s, int argc, char **argv)
{
	bool json;
	int bad = snmigrate_common_options(s, argc, argv, "", &json);
	if (bad)
		return bad;
	int words = argc - optind;
	if (words == 1 && !strcmp(argv[optind], "list"))
		return list(s, json);
	if (words == 2 && !strcmp(argv[optind], "delete") && !json)
		return client_request(
			"snmigrate", s->control,
			json_pack("{s:s, s:s}", "cmd", "partial-delete", "vm", argv[optind + 1]), NULL,
			CALL_TIMEOUT_MS);
	return snmigrate_usage_error("partial takes \"list [--json]\" or \"delete VM\"");
}
