/* SPDX-License-Identifier: Apache-2.0 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "host/client.h"
#include "tools/libsnmigrate/snmigrate.h"
#include "tui/text.h"

#define SECONDS_DEFAULT 5
#define SECONDS_MAX	60
#define CALL_TIMEOUT_MS 60000 /* besides the time that it takes */

static double figure(const json_t *o, const char *key)
{
	return json_number_value(json_object_get(o, key));
}

static int parse_seconds(const char *arg, unsigned *seconds)
{
	char *end;
	unsigned long n = strtoul(arg, &end, 10);
	if (*arg < '0' || *arg > '9' || *end || !n || n > SECONDS_MAX)
		return snmigrate_usage_error("--seconds %s: not a number from 1 to %d", arg, SECONDS_MAX);
	*seconds = (unsigned)n;
	return 0;
}

static void show(const json_t *r, const char *vm, unsigned seconds)
{
	char rate[TEXT_BYTES], most[TEXT_BYTES], set[TEXT_BYTES], clean[64];
	text_clean(clean, sizeof clean, vm);
	printf("%s dirties %s/s (at most %s/s), %s of its memory in %u s\n", clean,
	       text_bytes(figure(r, "dirty_bytes_per_s"), rate),
	       text_bytes(figure(r, "most_dirty_bytes_per_s"), most),
	       text_bytes(figure(r, "working_set_bytes"), set), seconds);
}

int snmigrate_dirty_rate(struct snmigrate *s, int argc, char **argv)
{
	static const struct option known[] = {{"seconds", required_argument, NULL, 's'},
					      {"json", no_argument, NULL, 'j'},
					      {"control", required_argument, NULL, 'c'},
					      {0}};
	unsigned seconds = SECONDS_DEFAULT;
	bool json = false;
	int c, status = 0;
	while (!status && (c = getopt_long(argc, argv, "", known, NULL)) != -1) {
		if (c == 's')
			status = parse_seconds(optarg, &seconds);
		else if (c == 'j')
			json = true;
		else if (c == 'c')
			s->control = optarg;
		else
			status = client_option_error("snmigrate", argv);
	}
	if (!status && argc - optind != 1)
		status = snmigrate_usage_error("dirty-rate takes one VM");
	if (status)
		return status;
	json_t *reply = NULL;
	status = client_request("snmigrate", s->control,
				json_pack("{s:s, s:s, s:i}", "cmd", "dirty-rate", "vm", argv[optind],
					  "seconds", (int)seconds),
				&reply, seconds * 1000 + CALL_TIMEOUT_MS);
	if (status)
		return status;
	json_object_del(reply, "ok");
	if (json) {
		json_dumpf(reply, stdout, JSON_INDENT(2));
		putchar('\n');
	} else {
		show(reply, argv[optind], seconds);
	}
	json_decref(reply);
	return 0;
}
