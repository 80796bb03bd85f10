/* SPDX-License-Identifier: Apache-2.0 */
/* What the journal of this host says: history, and status, which begins with what is under way. */
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "host/client.h"
#include "host/exit.h"
#include "host/ini.h"
#include "tools/libsnmigrate/snmigrate.h"
#include "tui/text.h"

#define CALL_TIMEOUT_MS 60000
#define SHOWN_BYTES	1024
#define LIMIT_MAX	10000
#define SINCE_MAX_S	(3650u * 86400)

static const char *text(const json_t *o, const char *key)
{
	const char *s = json_string_value(json_object_get(o, key));
	return s ? s : "";
}

/* Names and reasons come from other hosts, too. */
static const char *shown(const json_t *o, const char *key, char buf[SHOWN_BYTES])
{
	text_clean(buf, SHOWN_BYTES, text(o, key));
	return buf;
}

static bool is_on(const json_t *o, const char *key)
{
	return json_is_true(json_object_get(o, key));
}

static void print_json(const json_t *o, size_t flags)
{
	char *line = json_dumps(o, flags);
	if (line)
		puts(line);
	free(line);
}

/* ---- a move in lines ---- */

#define WHEN_BYTES 24
static const char *when(json_int_t ms, char buf[WHEN_BYTES])
{
	time_t t = (time_t)(ms / 1000);
	struct tm tm;
	if (!localtime_r(&t, &tm) || !strftime(buf, WHEN_BYTES, "%Y-%m-%d %H:%M:%S", &tm))
		snprintf(buf, WHEN_BYTES, "?");
	return buf;
}

/* "12.3 s, stopped 8 ms, 1.2 GB sent" of a move whose figures are known. */
static void figures(const json_t *m, char *out, size_t size)
{
	const json_t *d = json_object_get(m, "details"), *down = json_object_get(d, "downtime_ms"),
		     *wire = json_object_get(d, "wire_bytes");
	json_int_t begun = json_integer_value(json_object_get(m, "begun_ms"));
	const json_t *ended = json_object_get(m, "ended_ms");
	char a[TEXT_BYTES];
	size_t n = 0;
	out[0] = '\0';
	if (json_is_integer(ended) && json_integer_value(ended) >= begun)
		n += (size_t)snprintf(out, size, "%s",
				      text_span((uint64_t)(json_integer_value(ended) - begun), a));
	if (json_number_value(down) > 0 && n < size)
		n += (size_t)snprintf(out + n, size - n, ", stopped %.1f ms", json_number_value(down));
	if (json_number_value(wire) > 0 && n < size)
		snprintf(out + n, size - n, ", %s sent", text_bytes(json_number_value(wire), a));
}

static void print_move(const json_t *m)
{
	char vm[SHOWN_BYTES], peer[SHOWN_BYTES], result[SHOWN_BYTES], reason[SHOWN_BYTES], phase[SHOWN_BYTES];
	char at[WHEN_BYTES], how[128];
	bool in = !strcmp(text(m, "direction"), "in");
	figures(m, how, sizeof how);
	shown(m, "result", result);
	if (!*result)
		snprintf(result, sizeof result, "under way (%.64s)", shown(m, "phase", phase));
	else if (strcmp(result, "moved"))
		snprintf(result + strlen(result), sizeof result - strlen(result), " in %.64s",
			 shown(m, "phase", phase));
	printf("%s  %-16s %-4s %-16s %s%s%s\n", when(json_integer_value(json_object_get(m, "begun_ms")), at),
	       shown(m, "name", vm), in ? "from" : "to", shown(m, "peer", peer), result, *how ? ", " : "",
	       how);
	if (*shown(m, "reason", reason))
		printf("                     %s\n", reason);
}

/* ---- history ---- */

/* "2h", or "2026-11-21", or "2026-11-21 16:30": milliseconds since 1970. */
static int parse_since(const char *arg, json_int_t *out)
{
	static const char *const formats[] = {"%Y-%m-%d", "%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M",
					      "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S"};
	unsigned seconds;
	if (!duration_parse(arg, SINCE_MAX_S, &seconds)) {
		*out = (json_int_t)(clock_realtime_ns() / 1000000) - (json_int_t)seconds * 1000;
		return 0;
	}
	for (size_t i = 0; i < ARRAY_SIZE(formats); i++) {
		struct tm tm = {.tm_isdst = -1};
		const char *end = strptime(arg, formats[i], &tm);
		time_t t = end && !*end ? mktime(&tm) : -1;
		if (t >= 0) {
			*out = (json_int_t)t * 1000;
			return 0;
		}
	}
	return snmigrate_usage_error(
		"--since %s: not a time such as 2h or 3d, nor a date such as 2026-01-31 or "
		"\"2026-01-31 16:30\"",
		arg);
}

static int parse_limit(const char *arg, json_int_t *out)
{
	char *end;
	unsigned long n = strtoul(arg, &end, 10);
	if (*arg < '0' || *arg > '9' || *end || !n || n > LIMIT_MAX)
		return snmigrate_usage_error("--limit %s: not a number from 1 to %d", arg, LIMIT_MAX);
	*out = (json_int_t)n;
	return 0;
}

/* One move a line after the reply; with the end, {"end":true}. */
static int stream_history(struct snmigrate *s, json_t *request, bool json)
{
	struct jsonl *j = NULL;
	struct error err = ERROR_INIT;
	int status = EXIT_FAILED;
	int rc = client_connect(s->control, &j, &err);
	if (rc < 0)
		status = EXIT_REFUSED;
	else
		rc = jsonl_call(j, request, NULL, &status, CALL_TIMEOUT_MS, &err);
	for (bool more = true; !rc && more;) {
		json_t *m = NULL;
		rc = jsonl_read(j, &m, NULL, CALL_TIMEOUT_MS, &err);
		more = !rc && !is_on(m, "end");
		if (more && json)
			print_json(m, JSON_COMPACT);
		else if (more)
			print_move(m);
		json_decref(m);
	}
	jsonl_close(j);
	if (!rc)
		return 0;
	fprintf(stderr, "snmigrate: %s\n", err.message);
	return status ? status : EXIT_FAILED;
}

int snmigrate_history(struct snmigrate *s, int argc, char **argv)
{
	static const struct option known[] = {{"json", no_argument, NULL, 'j'},
					      {"since", required_argument, NULL, 's'},
					      {"limit", required_argument, NULL, 'l'},
					      {"control", required_argument, NULL, 'c'},
					      {0}};
	json_int_t since = 0, limit = 0;
	bool json = false;
	int c, status = 0;
	while (!status && (c = getopt_long(argc, argv, "", known, NULL)) != -1) {
		if (c == 'j')
			json = true;
		else if (c == 's')
			status = parse_since(optarg, &since);
		else if (c == 'l')
			status = parse_limit(optarg, &limit);
		else if (c == 'c')
			s->control = optarg;
		else
			status = client_option_error("snmigrate", argv);
	}
	if (!status && argc - optind > 1)
		status = snmigrate_usage_error("history takes one VM, or none for all moves of this host");
	if (status)
		return status;
	json_t *request = json_pack("{s:s, s:s*, s:I, s:I}", "cmd", "history", "vm", argv[optind], "since_ms",
				    since, "limit", limit);
	if (!request)
		return snmigrate_usage_error("history: that is not the name of a VM");
	status = stream_history(s, request, json);
	json_decref(request);
	return status;
}

/* ---- status ---- */

static void print_moving(const json_t *m)
{
	char vm[SHOWN_BYTES], peer[SHOWN_BYTES], phase[SHOWN_BYTES], span[TEXT_BYTES];
	bool in = !strcmp(text(m, "direction"), "in");
	const json_t *percent = json_object_get(m, "percent");
	printf("  %-16s %-4s %-16s %s", shown(m, "vm", vm), in ? "from" : "to", shown(m, "peer", peer),
	       shown(m, "phase", phase));
	if (json_is_number(percent))
		printf(", %.0f %%", json_number_value(percent));
	printf(", for %s\n", text_span((uint64_t)json_integer_value(json_object_get(m, "elapsed_ms")), span));
}

static void print_waiting(const json_t *w)
{
	char a[SHOWN_BYTES], b[SHOWN_BYTES];
	printf("  %-16s %s (record %s, epoch %lld", shown(w, "vm", a), text(w, "what"), text(w, "record"),
	       (long long)json_integer_value(json_object_get(w, "epoch")));
	printf(*text(w, "peer") ? ", other host %s)\n" : ")%s\n", shown(w, "peer", b));
	if (*shown(w, "why", a))
		printf("                   %s\n", a);
	if (*shown(w, "peer_error", a))
		printf("                   %s\n", a);
	if (*text(w, "do"))
		printf("                   do: %s\n", shown(w, "do", a));
	else
		printf("                   nothing to do: it settles by itself\n");
}

static void print_partial(const json_t *p)
{
	char vm[SHOWN_BYTES], peer[SHOWN_BYTES], size[TEXT_BYTES], span[TEXT_BYTES];
	printf("  %-16s from %-16s %s, for another %s\n", shown(p, "vm", vm), shown(p, "peer", peer),
	       text_bytes(json_number_value(json_object_get(p, "allocated_bytes")), size),
	       text_span((uint64_t)json_integer_value(json_object_get(p, "expires_s")) * 1000, span));
}

static void print_list(const char *title, const char *none, const json_t *list, void (*print)(const json_t *))
{
	size_t i;
	json_t *o;
	if (json_array_size(list))
		printf("%s\n", title);
	else if (none)
		printf("%s\n", none);
	json_array_foreach(list, i, o) print(o);
}

static void print_status(const json_t *o)
{
	char error[SHOWN_BYTES];
	if (is_on(o, "maintenance"))
		printf("In maintenance: no VM may arrive (snmigrate maintenance off).\n");
	const json_t *plan = json_object_get(o, "plan");
	if (json_is_object(plan))
		printf("%s under way: %lld of %lld VMs moved, %lld moving, %lld waiting (snmigrate evacuate "
		       "--status).\n",
		       strcmp(text(plan, "kind"), "return") ? "An evacuation is" : "A return is",
		       (long long)json_integer_value(json_object_get(plan, "moved")),
		       (long long)json_integer_value(json_object_get(plan, "vms")),
		       (long long)json_integer_value(json_object_get(plan, "moving")),
		       (long long)json_integer_value(json_object_get(plan, "waiting")));
	print_list("Moving:", "Nothing is moving.", json_object_get(o, "moving"), print_moving);
	print_list("Waiting:", NULL, json_object_get(o, "waiting"), print_waiting);
	print_list("Kept of arrivals that failed (snmigrate partial):", NULL, json_object_get(o, "partials"),
		   print_partial);
	print_list("Last moves (snmigrate history):", NULL, json_object_get(o, "last"), print_move);
	if (*shown(o, "journal_error", error))
		printf("The journal cannot be read: %s\n", error);
}

int snmigrate_status(struct snmigrate *s, int argc, char **argv)
{
	bool json;
	int bad = snmigrate_common_options(s, argc, argv, "", &json);
	if (bad)
		return bad;
	if (argc > optind)
		return snmigrate_usage_error("status takes no VM: it is of this host");
	json_t *reply = NULL, *w;
	size_t i;
	int status = client_request("snmigrate", s->control, json_pack("{s:s}", "cmd", "status"), &reply,
				    CALL_TIMEOUT_MS);
	if (status)
		return status;
	json_array_foreach(json_object_get(reply, "waiting"), i, w) if (is_on(w, "needs_you")) status =
		EXIT_IN_DOUBT;
	json_object_del(reply, "ok");
	if (json)
		print_json(reply, JSON_INDENT(2));
	else
		print_status(reply);
	json_decref(reply);
	return status;
}
